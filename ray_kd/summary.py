"""summary.json: what the run did, over all its attempts, written on success and on failure."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ray_kd import checkpoint, run_folder, storage
from ray_kd.data.manifest import Manifest
from ray_kd.data.order import SlotOrder
from ray_kd.metrics import read_metrics
from ray_kd.teacher.journal import count_rows, read_pools
from ray_kd.trainer.ledger import Totals
from ray_kd.trainer.loop import CHECKPOINTS, EVAL_BEFORE, METRICS


@dataclass(frozen=True)
class Planned:
    """What the data and the order promise; zeros for a run that failed before it had data."""

    rows_prepared: int = 0
    rows_planned: int = 0
    records_quarantined: int = 0

    @classmethod
    def of(cls, manifest: Manifest, order: SlotOrder) -> "Planned":
        """From the prepared data and the order of the run."""
        return cls(manifest.num_rows, order.num_planned_rows, manifest.quarantined)


def write(run_dir: Path, planned: Planned | None, exit_code: int, cause: str | None = None) -> dict[str, Any]:
    """Write summary.json and return it. planned None: an attempt that failed early keeps what an earlier one knew.

    cause: why the run ended before its last step, in one line.
    """
    path = run_dir / run_folder.SUMMARY
    known = json.loads(storage.read_text(path)) if planned is None and path.exists() else {}
    before = Planned(**{field.name: known.get(field.name, 0) for field in fields(Planned)})
    document = build(run_dir, planned or before, exit_code, cause)
    run_folder.write_json(path, document)
    return document


def build(run_dir: Path, planned: Planned, exit_code: int, cause: str | None = None) -> dict[str, Any]:
    """The summary of the surviving history: the newest verified checkpoint and what led to it.

    Rows are counted from what went through the optimiser (trainer/ledger.py), not from the slots planned; teacher
    rows from the actors' journal, over all restarts. Every figure is a number; `cause` is null once the run is done,
    `eval` without eval data.
    """
    folder = checkpoint.newest_verified(run_dir / CHECKPOINTS, full=False)
    state = checkpoint.read_state(folder)["state"]["ledger"] if folder else None
    totals = Totals(**state["totals"]) if state else Totals()
    rows_consumed = int(state["rows_consumed"]) if state else 0
    teacher_rows = count_rows(run_dir)
    starts = sum(1 for _ in storage.read_lines(run_dir / run_folder.ATTEMPTS))
    return {
        "rows_prepared": planned.rows_prepared,
        "rows_planned": planned.rows_planned,
        "rows_consumed": rows_consumed,
        "rows_missing": planned.rows_planned - rows_consumed - totals.rows_refused,
        "rows_duplicated": totals.rows_duplicated,
        "rows_quarantined": totals.rows_refused,
        "records_quarantined": planned.records_quarantined,
        "teacher_rows_computed": teacher_rows.computed,
        "teacher_rows_repeated": teacher_rows.repeated,
        "teacher_rows_from_cache": teacher_rows.from_cache,
        "teacher_pools": [asdict(pool) for pool in read_pools(run_dir)],
        "teacher_actors": [actor.report() for actor in teacher_rows.actors],
        "steps": totals.steps,
        "steps_skipped": totals.steps_skipped,
        "bad_steps": totals.bad_steps,
        "epochs": rows_consumed / max(1, planned.rows_prepared),
        "tokens": totals.tokens,
        "target_tokens": totals.target_tokens,
        "bytes_per_target_token": totals.payload_nbytes / max(1, totals.target_tokens),
        "wall_s": totals.wall_s,
        "tokens_per_second": totals.tokens / totals.step_s if totals.step_s > 0 else 0.0,
        "teacher_wait_fraction": totals.wait_s / totals.timed_step_s if totals.timed_step_s > 0 else 0.0,
        "restarts": max(0, starts - 1),
        "exit_code": exit_code,
        "cause": cause,
        "eval": evaluation(run_dir),
    }


def describe(summary: dict[str, Any]) -> str:
    """What the run achieved, in a few lines for a person."""
    bad_steps = summary.get("bad_steps", 0)  # runs of earlier versions did not count them
    skipped = f" ({bad_steps} bad, skipped)" if bad_steps else ""
    lines = [
        f"{summary['steps']} steps{skipped}, "
        f"{summary['tokens']:,} tokens at {summary['tokens_per_second']:,.0f} tokens/s, "
        f"teacher wait {summary['teacher_wait_fraction']:.1%}, {summary['restarts']} restarts",
        f"rows: {summary['rows_consumed']:,} trained of {summary['rows_planned']:,} planned, "
        f"{summary['rows_missing']} missing, {summary['rows_duplicated']} duplicated, "
        f"{summary['rows_quarantined']} quarantined",
    ]
    lines += [_describe_actor(actor) for actor in summary.get("teacher_actors", []) if actor["rows_computed"]]
    if summary["eval"]:
        lines.append(describe_eval(summary["eval"]))
    return "\n".join(lines)


def _describe_actor(actor: dict[str, Any]) -> str:
    name = f"teacher {actor['teacher']}".rstrip()
    parts = [f"{name} (pid {actor['pid']} on {actor['node']}): {actor['rows_computed']:,} rows"]
    parts += [f"{actor['tokens_per_second']:,.0f} tokens/s"] if actor["tokens"] else []
    parts += [f"busy {actor['busy_fraction']:.0%}"]
    parts += [f"batches {actor['batch_fill']:.0%} full"] if actor["places"] else []
    parts += [f"{actor['retries']} retries"] if actor["retries"] else []
    return ", ".join(parts)


METRIC_LABELS = {
    "kl": "KL(teacher || student), nats a token",
    "topk_bucket_kl": "top-k + bucket KL, nats a token",
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
    "top1_agreement": "top-1 agreement with the teacher",
}
"""Name of a held-out metric -> what it is called."""


def describe_eval(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """A small table of held-out metrics; columns: heading -> metrics."""
    rows = [f"{'held-out':<38}" + "".join(f"{heading:>12}" for heading in columns)]
    for name, label in METRIC_LABELS.items():
        values = [metrics.get(name) for metrics in columns.values()]
        if any(value is not None for value in values):
            cells = ["" if value is None else _short(value) for value in values]
            rows.append(f"{label:<38}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(rows)


def _short(value: float) -> str:
    return f"{value:,.3f}" if value < 1e6 else f"{value:.3g}"


def evaluation(run_dir: Path, last_step: int | None = None) -> dict[str, Any] | None:
    """Held-out metrics before training and at the newest evaluation up to last_step; None without eval data."""
    path = run_dir / EVAL_BEFORE
    if not path.exists():
        return None
    before = json.loads(storage.read_text(path))
    after = before
    for line in read_metrics(run_dir / METRICS):
        if last_step is not None and line["step"] > last_step:
            break
        after = {key.removeprefix("eval/"): v for key, v in line.items() if key.startswith("eval/")} or after
    return {"before": before, "after": after}
