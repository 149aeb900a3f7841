"""The run folder of a small run, written in milliseconds without Ray: for tests of what reads one."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file

from ray_kd import checkpoint, config, run_folder, summary
from ray_kd.config import RunConfig
from ray_kd.data.order import SlotOrder
from ray_kd.data.prepared import PreparedData
from ray_kd.trainer.fragments import FORMAT, KINDS
from ray_kd.trainer.ledger import Ledger
from tests.fake_prepared import write_prepared
from tests.tiny import tiny_llama

ORDER = SlotOrder(num_rows=10, global_batch_size=4, epochs=2, max_steps=None, seed=3)
"""Of five steps; the last epoch ends with the last slot."""

KL = {2: 1.5, 4: 0.75, 5: 1.0}
"""Held-out KL at the steps that are evaluated and saved: the best is not the last."""


def write_run(home: Path, *, last: int = ORDER.num_steps, kl: Mapping[int, float | None] = KL) -> Path:
    """home/run after `last` steps, finished when these are all; its student and prepared data lie in home."""
    folder, student = home / "run", tiny_llama(home / "student", hidden=32)
    prepared = PreparedData(write_prepared(home / "prepared" / f"fake-{ORDER.num_rows}-16", ORDER.num_rows))
    run = _config(home, student)
    run_folder.create(folder)
    content = {"teacher weights": "sha256:1", "student weights": "sha256:2"}
    run_folder.record(folder, run, content | {"prepared data": prepared.manifest.fingerprint})
    (folder / "eval_before.json").write_text(json.dumps({"kl": 3.0}))
    (folder / "attempts.jsonl").write_text(json.dumps({"start_slot": 0, "time": 0.0}) + "\n")
    (folder / "quarantine.jsonl").write_text("")
    ledger = Ledger(ORDER.num_rows, ORDER.num_planned_rows)
    for step in range(1, last + 1):
        metrics = _train(folder, ledger, step) | ({"eval/kl": kl[step]} if step in kl else {})
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(metrics) + "\n")
        if step in kl:
            save(folder, step, {"ledger": ledger.state(), "student_path": str(student), "metrics": metrics})
    is_done = last == ORDER.num_steps
    if is_done:
        shutil.copytree(student, folder / "final")
    summary.write(folder, summary.Planned.of(prepared.manifest, ORDER), exit_code=0 if is_done else 75)
    return folder


def save(folder: Path, step: int, state: dict[str, object], weights: Mapping[str, torch.Tensor] | None = None) -> Path:
    """A checkpoint of one rank with these weights of the student's.

    Default: the student is the one it began with, its first vector being the step.
    """
    root = folder / "checkpoints"
    tmp = checkpoint.begin(root, step)
    if weights is None:
        weights = load_file(Path(str(state["student_path"])) / "model.safetensors")
        weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], float(step))
    save_file(
        {f"student.{name}|{kind}|0": value.flatten().clone() for name, value in weights.items() for kind in KINDS},
        tmp / "rank00000.safetensors",
    )
    record = {
        "format": FORMAT, "rank": 0, "world": 1, "optimizer_step": step, "global_steps": step,
        "parameters": {f"student.{name}": list(value.shape) for name, value in weights.items()},
        "files": ["rank00000.safetensors"],
    }  # fmt: skip
    (tmp / "rank00000.json").write_text(json.dumps(record))
    shutil.copyfile(folder / "config.yaml", tmp / "config.yaml")
    return checkpoint.commit(tmp, root, step, next_slot=step * ORDER.global_batch_size, state=state)


def _config(home: Path, student: Path) -> RunConfig:
    path = home / "recipe.yaml"
    path.write_text(
        json.dumps(
            {
                "run": {"dir": str(home / "run"), "seed": ORDER.seed},
                "data": {"source": {"kind": "jsonl", "paths": [str(home / "train.jsonl")]}, "sequence_length": 16},
                "teacher": {"model": str(home / "teacher")},
                "student": {"model": str(student)},
                "train": {"global_batch_size": ORDER.global_batch_size, "epochs": ORDER.epochs},
            }
        )
    )
    return config.load(path)


def _train(folder: Path, ledger: Ledger, step: int) -> dict[str, object]:
    """Count a step, and what the teacher did for it; returns its line of metrics."""
    slots = range((step - 1) * ORDER.global_batch_size, step * ORDER.global_batch_size)
    rows = ORDER.rows(slots.start, slots.stop)
    result = SimpleNamespace(
        slots=torch.arange(slots.start, slots.stop).numpy(), row_ids=rows, is_trained=rows >= 0, is_applied=True,
        is_bad=False,
        num_tokens=60, num_valid_tokens=40, payload_nbytes=4000,
    )  # fmt: skip
    ledger.add(result, step_s=1.0, wait_s=0.0, is_timed=True)  # type: ignore[arg-type]
    (folder / "teacher").mkdir(exist_ok=True)
    with (folder / "teacher" / "actor-00001.jsonl").open("a") as file:
        file.write(json.dumps({"slots": list(slots), "pid": 1, "time": float(step)}) + "\n")
    return {
        "step": step,
        "train/loss": 1.0,
        "train/target_tokens": 40,
        "data/slot_start": slots.start,
        "data/row_ids_sha256": hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest(),
    }
