"""What the run has done: its metrics, rows, refused rows, ledger and teachers, each counted again here."""

import base64
import hashlib
import itertools
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from ray_kd import run_folder, storage
from ray_kd.data.order import SlotOrder
from ray_kd.doctor.lines import bad_lines, lines_of, read_lines
from ray_kd.doctor.report import BROKEN, OK, WARNING, Finding, Run, not_checked
from ray_kd.teacher.journal import JOURNAL, POOLS, count_rows
from ray_kd.trainer.loop import METRICS, QUARANTINE

_CHUNK = 2**20  # slots looked at together


def check_metrics(run: Run) -> Iterator[Finding]:
    """metrics.jsonl: whole lines, in order, without holes."""
    keys = ("step", "data/slot_start", "data/row_ids_sha256")
    run.metrics = yield from lines_of(run, "metrics", run.folder / METRICS, keys, blocks=True)
    steps = [line["step"] for line in run.metrics]
    for place, (before, step) in enumerate(itertools.pairwise(steps), start=1):
        if step <= before:
            seen = f"step {step} stands there {'twice' if step in steps[:place] else f'after step {before}'}"
            yield Finding("metrics", BROKEN, seen, "two runs may have written this file")
            break
    if missing := sorted(set(_logged_steps(run)) - set(steps)):
        seen = f"{len(missing)} steps up to the newest checkpoint have no line, first step {missing[0]}"
        yield Finding("metrics", WARNING, seen, "they are lost, or train.log_every was larger then")
    behind = [step for step in steps if step > run.step]
    if behind:
        seen = f"{len(steps)} lines; those of steps {behind[0]} to {behind[-1]} are after the newest checkpoint"
        yield Finding("metrics", OK, seen, "a start cuts them and trains these steps again")
    else:
        yield Finding("metrics", OK, f"{len(steps)} lines{f', up to step {steps[-1]}' if steps else ''}")


def check_rows(run: Run) -> Iterator[Finding]:
    """Each line of metrics.jsonl is of the rows that the order gives its step."""
    order = run.order
    if order is None:
        yield not_checked("rows", "prepared data")
    elif wrong := [line["step"] for line in run.metrics if not _has_rows_of(order, line)]:
        seen = f"{len(wrong)} steps trained other rows than the order gives them, first step {wrong[0]}"
        advice = "the weights are not of this config and data: use another run.dir"
        yield Finding("rows", BROKEN, seen, advice, blocks=True)
    else:
        yield Finding("rows", OK, f"the digests of {len(run.metrics)} steps are those of the order")


def check_quarantine(run: Run) -> Iterator[Finding]:
    """quarantine.jsonl and attempts.jsonl can be read."""
    refused = yield from lines_of(run, "quarantine", run.folder / QUARANTINE, ("reason",))
    run.quarantined_slots = {line["slot"] for line in refused if "slot" in line}
    attempts = yield from lines_of(run, "attempts", run.folder / run_folder.ATTEMPTS, ("start_slot",))
    starts = ", ".join(str(line["start_slot"]) for line in attempts[-5:])
    yield Finding("quarantine", OK, f"{len(refused)} records and rows refused")
    yield Finding("attempts", OK, f"{len(attempts)}{f', the last from slots {starts}' if starts else ''}")


def check_ledger(run: Run) -> Iterator[Finding]:
    """The ledger of the newest checkpoint against the order: every row up to its next slot was trained once."""
    order, run.counted = run.order, {}
    if order is None or not run.document:
        yield not_checked("ledger", "prepared data" if run.document else "checkpoint")
        return
    next_slot, ledger = int(run.document["next_slot"]), run.document["state"]["ledger"]
    if next_slot != run.step * order.global_batch_size or next_slot > order.num_slots:
        seen = f"next slot {next_slot} is not that of step {run.step} with {order.global_batch_size} rows a step"
        yield Finding("ledger", BROKEN, seen, f"was {run_folder.CONFIG} changed?", blocks=True)
        return
    trained, absent, others = _compare_rows(order, next_slot, ledger["trained"])
    # Where the checkpoint itself counts as many refused, a line of the quarantine may be lost, and no row is.
    is_explained = len(absent) == ledger["totals"]["rows_refused"]
    lost = set() if is_explained else absent - run.quarantined_slots
    twice = int(ledger["totals"]["rows_duplicated"])
    run.counted = {
        "rows_prepared": order.num_rows,
        "rows_planned": order.num_planned_rows,
        "rows_consumed": trained,
        "rows_missing": order.num_planned_rows - trained - (len(absent) - len(lost)),
        "rows_duplicated": twice,
        "rows_quarantined": len(absent) - len(lost),
        "steps": run.step,
    }
    logged = [line for line in run.metrics if line["step"] <= run.step and "train/target_tokens" in line]
    if len(logged) == run.step:
        run.counted["target_tokens"] = sum(line["train/target_tokens"] for line in logged)
    if lost or twice or others:
        seen = f"{len(lost)} rows up to slot {next_slot} were neither trained nor refused"
        seen += f", {twice} were trained twice, {others} before their turn"
        yield Finding("ledger", BROKEN, seen, "please report it", blocks=True)
    else:
        seen = f"each row up to slot {next_slot} was trained once ({trained}) or refused ({len(absent)})"
        yield Finding("ledger", OK, seen)


def check_teachers(run: Run) -> Iterator[Finding]:
    """The journals of teachers and pools, which the summary is counted from."""
    is_whole = True
    for folder, keys in ((JOURNAL, ("slots", "pid")), (POOLS, ("teacher", "time", "actors", "queue"))):
        for path in storage.children(run.folder / folder):
            lines = read_lines(path, keys)
            # A cut line is what a killed actor leaves, and no one adds to its file.
            if lines.bad:
                is_whole = False
                yield bad_lines(run, "teacher", path, lines, blocks=True)
    if is_whole:
        rows = count_rows(run.folder)
        counts = f"{rows.computed} rows computed, {rows.repeated} of them again, {rows.from_cache} from the cache"
        yield Finding("teacher", OK, f"{counts} (actors: {len(rows.actors)})")


def _logged_steps(run: Run) -> range:
    """The steps up to the newest checkpoint that surely have a line, as train.log_every is now."""
    every = run.config.train.log_every if run.config is not None else max(1, run.step)
    return range(every, run.step + 1, every)


def _has_rows_of(order: SlotOrder, line: dict[str, Any]) -> bool:
    """Whether a line of metrics is of the rows that the order gives its step."""
    stop = line["step"] * order.global_batch_size
    start = stop - order.global_batch_size
    if start < 0:
        return False
    digest = hashlib.sha256(order.rows(start, stop).astype("<i8").tobytes()).hexdigest()
    return (line["data/slot_start"], line["data/row_ids_sha256"]) == (start, digest)


def _compare_rows(order: SlotOrder, next_slot: int, packed: str) -> tuple[int, set[int], int]:
    """(rows trained up to next_slot, the slots up to there whose rows were not, rows trained of other slots).

    packed: a bit an (epoch, row) pair, as the checkpoint keeps them.
    """
    bits = np.frombuffer(zlib.decompress(base64.b64decode(packed)), dtype=np.uint8)
    size = order.num_rows * -(-order.num_planned_rows // order.num_rows)
    is_trained = np.unpackbits(bits, count=size).astype(np.bool_)
    trained, absent = 0, set()
    for start in range(0, next_slot, _CHUNK):
        stop = min(start + _CHUNK, next_slot)
        slots, rows = np.arange(start, stop), order.rows(start, stop)
        slots, rows = slots[rows >= 0], rows[rows >= 0]  # without dummies
        found = is_trained[slots // order.num_rows * order.num_rows + rows]
        trained += int(found.sum())
        absent |= set(slots[~found].tolist())
    return trained, absent, int(is_trained.sum()) - trained
