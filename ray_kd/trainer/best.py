"""The best checkpoint of a run: the one whose student was nearest to its teacher on the held-out rows.

It is found from what the checkpoints say of themselves, so it is the same after any restart. Only a checkpoint whose
own step was evaluated can be the best. Cost: `state.json` of each checkpoint that is there, which are few.
"""

from pathlib import Path
from typing import Any

from ray_kd import checkpoint

HELD_OUT_KL = ("eval/kl", "eval/topk_bucket_kl")
"""The metric of a run is the first of these that its evaluation has; lower is better."""


def best_step(root: Path, last: int | None = None) -> int | None:
    """Step of the checkpoint under root with the lowest held-out KL, the later of equals; None without any.

    last: later steps do not count. Nothing but state.json is verified.
    """
    found = []
    for folder in checkpoint.folders(root):
        try:
            document = checkpoint.read_state(folder)
        except checkpoint.CorruptCheckpoint:  # a start would pass over it too
            continue
        kl = _kl(document["state"].get("metrics", {}))
        if kl is not None and (last is None or document["step"] <= last):
            found.append((kl, -document["step"]))
    return -min(found)[1] if found else None


def _kl(metrics: dict[str, Any]) -> float | None:
    # null where the student had diverged.
    return next((metrics[name] for name in HELD_OUT_KL if metrics.get(name) is not None), None)
