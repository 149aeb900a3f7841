"""Examines a run folder: what is there, what is damaged, whether the run can go on, and from which step.

In: a run folder on a disk or in an object store. Out: a `Report` of findings. Without `fix` nothing is written. With it
the run's lock is held, leftovers are removed, and what is damaged is moved aside: no checkpoint that has its manifest
and no line is deleted.
Cost: every byte of the checkpoints and of the prepared data is read once. No Ray and no torch here.

The checks stand in the order in which they run, and a later one uses what an earlier one found (`Run`).
"""

import base64
import hashlib
import itertools
import json
import zlib
from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ray_kd import checkpoint, locks, run_folder, storage
from ray_kd import config as configuration
from ray_kd.config import RunConfig
from ray_kd.data.order import SlotOrder
from ray_kd.data.prepared import PreparedData
from ray_kd.errors import EXIT_DONE, ConfigError, DataError
from ray_kd.refusal import REFUSAL
from ray_kd.teacher.journal import JOURNAL, POOLS, count_rows
from ray_kd.trainer.best import best_step
from ray_kd.trainer.loop import CHECKPOINTS, METRICS, QUARANTINE, RESIZE_FLAG, STOP_FLAG

OK, WARNING, BROKEN = "ok", "warning", "broken"

DAMAGED_LINES = "damaged.jsonl"
"""In the run folder: the lines that `fix` took out of other files."""

_LOCK_TIMEOUT_S = 10.0
_CHUNK = 2**20  # slots looked at together


@dataclass(frozen=True)
class Finding:
    """What one check saw."""

    check: str
    state: str
    """ok | warning (nothing is lost by it) | broken."""
    seen: str
    advice: str = ""
    blocks: bool = False
    """The run cannot go on, or should not, before this is put right."""
    mend: Callable[[], object] | None = field(default=None, repr=False)
    """What `fix` does about it."""

    def __str__(self) -> str:
        return f"{self.state:<9}{self.check:<15}{self.seen}{f': {self.advice}' if self.advice else ''}"


@dataclass(frozen=True)
class Report:
    """The findings of all checks, and what follows from them."""

    run_dir: str
    state: str
    """running | finished | resumable | blocked."""
    verdict: str
    findings: list[Finding]
    mended: list[Finding]
    """What was found first and has been put right."""

    @property
    def is_broken(self) -> bool:
        return any(finding.state == BROKEN for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        plain = {"run_dir": self.run_dir, "state": self.state, "verdict": self.verdict, "is_broken": self.is_broken}
        lists = {"findings": self.findings, "mended": self.mended}
        return plain | {name: [_plain(finding) for finding in found] for name, found in lists.items()}

    def __str__(self) -> str:
        return "\n".join([*(f"mended   {f.check:<15}{f.seen}" for f in self.mended), *map(str, self.findings),
                          "", self.verdict])  # fmt: skip


@dataclass
class Run:
    """A run folder under examination, and what the checks so far found in it."""

    folder: Path
    writers: list[str] = field(default_factory=list)
    checkpoints: dict[Path, dict[str, Any] | str] = field(default_factory=dict)
    """Folder -> its state.json, or what is wrong with it; each is read once."""
    newest: Path | None = None
    """The checkpoint that a start takes."""
    document: dict[str, Any] = field(default_factory=dict)
    """Its state.json."""
    config: RunConfig | None = None
    prepared: PreparedData | None = None
    metrics: list[dict[str, Any]] = field(default_factory=list)
    quarantined_slots: set[int] = field(default_factory=set)
    counted: dict[str, int] = field(default_factory=dict)
    """Counts of summary.json, from the data, the newest checkpoint and the metrics."""
    is_finished: bool = False

    @property
    def step(self) -> int:
        """Steps that a start does not train again."""
        return int(self.document.get("step", 0))

    @property
    def order(self) -> SlotOrder | None:
        """The order of the rows, where config and prepared data can be read."""
        if self.config is None or self.prepared is None:
            return None
        return SlotOrder(
            num_rows=self.prepared.num_rows,
            global_batch_size=self.config.train.global_batch_size,
            epochs=self.config.train.epochs,
            max_steps=self.config.train.max_steps,
            seed=self.config.run.seed,
        )


def examine(folder: Path, fix: bool = False) -> Report:
    """Check everything in a run folder; with fix, put right what can be.

    Raises ConfigError when there is no run, and with fix when one is being written; RetryableError when workers of a
    dead one hold it.
    """
    if not any((folder / name).exists() for name in (run_folder.CONFIG, run_folder.IDENTITY, CHECKPOINTS)):
        raise ConfigError(
            f"'{folder}' holds no run: it has no {run_folder.CONFIG}, {run_folder.IDENTITY} or {CHECKPOINTS}/"
        )
    with locks.driver_lock(folder, _LOCK_TIMEOUT_S) if fix else nullcontext() as held:
        run = Run(folder, writers=[] if fix else locks.holders(folder))
        findings: list[Finding] = []
        mended: list[Finding] = []
        for check in CHECKS:
            found = list(check(run))
            mendable = [finding for finding in found if finding.mend is not None]
            if held is not None and mendable:
                for finding in mendable:
                    held.check()
                    assert finding.mend is not None
                    finding.mend()
                mended += mendable
                found = list(check(run))
            findings += found
    state, verdict = _verdict(run, findings)
    return Report(str(folder), state, verdict, findings, mended)


def check_writers(run: Run) -> Iterator[Finding]:
    """Who holds the folder now."""
    if run.writers:
        yield Finding("writers", OK, f"written now by {', '.join(run.writers)}: what follows may change meanwhile")
    else:
        yield Finding("writers", OK, "nobody writes here")


def check_checkpoints(run: Run) -> Iterator[Finding]:
    """Every checkpoint in full, and the one that a start takes."""
    root = run.folder / CHECKPOINTS
    run.newest, run.document = None, {}
    good = []
    for folder in reversed(checkpoint.folders(root)):
        if folder not in run.checkpoints:
            run.checkpoints[folder] = _read_checkpoint(folder)
        found = run.checkpoints[folder]
        if not isinstance(found, str):
            good.append(folder)
        elif (folder / checkpoint.MANIFEST).exists():  # else it was rotated away while it was read
            advice = f"a start passes over it; --fix moves it to {CHECKPOINTS}/{checkpoint.DAMAGED}/"
            mend = partial(checkpoint.set_aside, folder)
            yield Finding("checkpoints", BROKEN, found.replace(f"{root}/", ""), advice, mend=mend)
    if not good:
        yield Finding("checkpoints", OK, "none that can be used: a start begins with step 1")
        return
    run.newest, newest = good[0], run.checkpoints[good[0]]
    assert isinstance(newest, dict)
    run.document, best = newest, best_step(root)
    ledger = newest["state"]["ledger"]
    totals = ledger["totals"]
    seen = f"verified in full: {', '.join(folder.name for folder in reversed(good))}"
    seen += f" (best: step {best})" if best is not None else ""
    seen += f"; a start takes step {run.step}, next slot {run.document['next_slot']}: {ledger['rows_consumed']} rows "
    seen += f"trained, {totals['rows_duplicated']} twice, {totals['rows_refused']} refused"
    yield Finding("checkpoints", OK, seen)


def check_leftovers(run: Run) -> Iterator[Finding]:
    """Files and folders that only a living run has a use for."""
    if run.writers:
        return
    found = checkpoint.orphans(run.folder / CHECKPOINTS)
    found += [path for path in storage.children(run.folder) if _is_leftover(path.name)]
    for path in found:
        seen = f"{_name_in(run.folder, path)} of a killed attempt"
        yield Finding("leftovers", WARNING, seen, "--fix removes it", mend=partial(_delete, path))
    if not found:
        yield Finding("leftovers", OK, "none")


def check_config(run: Run) -> Iterator[Finding]:
    """config.yaml loads. Each checkpoint has a copy."""
    path = run.folder / run_folder.CONFIG
    try:
        run.config = configuration.load(path, [f"run.dir={run.folder}"])
    except ConfigError as error:
        copy = None if run.newest is None else run.newest / run_folder.CONFIG
        if copy is None or not copy.exists():
            yield Finding("config", BROKEN, str(error), "a start with your own config writes it again")
        else:
            mend = partial(_copy_text, copy, path)
            yield Finding("config", BROKEN, str(error), f"--fix takes the copy in {copy.parent.name}", mend=mend)
    else:
        yield Finding("config", OK, f"{run_folder.CONFIG} loads")


def check_identity(run: Run) -> Iterator[Finding]:
    """run.json is there and is of this config."""
    path = run.folder / run_folder.IDENTITY
    if not path.exists() and run.newest is None:
        yield Finding("identity", OK, f"no {path.name} yet: no start came to training")
        return
    try:
        run_folder.content_of(run.folder)
        if run.config is not None:
            run_folder.check_identity(run.folder, run.config)
    except (ConfigError, KeyError, TypeError) as error:
        seen = str(error) if isinstance(error, ConfigError) else f"{path.name} is not what ray_kd writes"
        yield Finding("identity", BROKEN, seen, "restore it from a copy of the run folder", blocks=True)
    else:
        yield Finding("identity", OK, f"{path.name} is of this config")


def check_prepared(run: Run) -> Iterator[Finding]:
    """The prepared data, every byte."""
    run.prepared = None
    if run.config is None or not (run.folder / run_folder.IDENTITY).exists():
        yield _not_checked("prepared data", run_folder.CONFIG if run.config is None else run_folder.IDENTITY)
        return
    try:
        folder = run_folder.prepared_of(run.folder, run.config)
    except (ConfigError, KeyError, TypeError):
        yield _not_checked("prepared data", run_folder.IDENTITY)
        return
    if not folder.exists():
        yield Finding("prepared data", WARNING, f"'{folder}' is not there", "a start prepares it again")
        return
    try:
        prepared = PreparedData(folder)
        run.prepared = prepared
        prepared.verify()
    except DataError as error:
        yield Finding("prepared data", BROKEN, str(error), "then a start prepares it again", blocks=True)
    else:
        rows = f"{prepared.num_rows} rows, {prepared.manifest.eval_rows} held out"
        yield Finding("prepared data", OK, f"'{folder}' verified in full: {rows}")


def check_student(run: Run) -> Iterator[Finding]:
    """The model that the student began as: a start loads it before the checkpoint."""
    configured = None if run.config is None else run.config.student.model
    model = run.document["state"]["student_path"] if run.document and configured is None else configured
    if model is None:
        yield Finding("student", OK, "is made of the teacher's layers when training starts")
    elif not (Path(model).is_absolute() or "://" in model):  # the config makes paths absolute
        yield Finding("student", OK, f"'{model}' is of the hub and was not looked at")
    elif (problem := _problem_of_model(storage.path(model))) is None:
        yield Finding("student", OK, f"'{model}' is complete")
    elif configured is None:
        advice = "remove the folder, and a start makes it again of the teacher's layers"
        yield Finding("student", WARNING, f"'{model}': {problem}", advice)
    else:
        advice = "put the model back, or name where it is now"
        yield Finding("student", BROKEN, f"'{model}': {problem}", advice, blocks=True)


def check_metrics(run: Run) -> Iterator[Finding]:
    """metrics.jsonl: whole lines, in order, without holes."""
    keys = ("step", "data/slot_start", "data/row_ids_sha256")
    run.metrics = yield from _lines_of(run, "metrics", run.folder / METRICS, keys, blocks=True)
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
        yield _not_checked("rows", "prepared data")
    elif wrong := [line["step"] for line in run.metrics if not _has_rows_of(order, line)]:
        seen = f"{len(wrong)} steps trained other rows than the order gives them, first step {wrong[0]}"
        advice = "the weights are not of this config and data: use another run.dir"
        yield Finding("rows", BROKEN, seen, advice, blocks=True)
    else:
        yield Finding("rows", OK, f"the digests of {len(run.metrics)} steps are those of the order")


def check_quarantine(run: Run) -> Iterator[Finding]:
    """quarantine.jsonl and attempts.jsonl can be read."""
    refused = yield from _lines_of(run, "quarantine", run.folder / QUARANTINE, ("reason",))
    run.quarantined_slots = {line["slot"] for line in refused if "slot" in line}
    attempts = yield from _lines_of(run, "attempts", run.folder / run_folder.ATTEMPTS, ("start_slot",))
    starts = ", ".join(str(line["start_slot"]) for line in attempts[-5:])
    yield Finding("quarantine", OK, f"{len(refused)} records and rows refused")
    yield Finding("attempts", OK, f"{len(attempts)}{f', the last from slots {starts}' if starts else ''}")


def check_ledger(run: Run) -> Iterator[Finding]:
    """The ledger of the newest checkpoint against the order: every row up to its next slot was trained once."""
    order, run.counted = run.order, {}
    if order is None or not run.document:
        yield _not_checked("ledger", "prepared data" if run.document else "checkpoint")
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
            lines = _read_lines(path, keys)
            # A cut line is what a killed actor leaves, and no one adds to its file.
            if lines.bad:
                is_whole = False
                yield _bad_lines(run, "teacher", path, lines, blocks=True)
    if is_whole:
        rows = count_rows(run.folder)
        counts = f"{rows.computed} rows computed, {rows.repeated} of them again, {rows.from_cache} from the cache"
        yield Finding("teacher", OK, f"{counts} (actors: {len(rows.actors)})")


def check_final(run: Run) -> Iterator[Finding]:
    """final/ can be opened."""
    final = run.folder / run_folder.FINAL
    if not (final / "config.json").exists():
        yield Finding("final", OK, "not there yet: it is written after the last step")
    elif (problem := _problem_of_model(final)) is None:
        yield Finding("final", OK, "complete")
    elif run.newest is None:
        yield Finding("final", BROKEN, problem, "no checkpoint is there to write it from")
    else:
        aside = _free_name(final.with_name(f"{final.name}.damaged"))
        advice = f"--fix moves it to {aside.name}/, and the same command writes it again"
        mend = partial(storage.move_folder, final, aside, "config.json")
        yield Finding("final", BROKEN, problem, advice, blocks=True, mend=mend)  # a start takes it for written


def check_summary(run: Run) -> Iterator[Finding]:
    """summary.json says what is counted here."""
    path = run.folder / run_folder.SUMMARY
    if not path.exists():
        yield Finding("summary", OK, "not there: no attempt came to an end, good or bad")
        return
    try:
        run.is_finished = run_folder.finished_summary(run.folder) is not None
        summary = json.loads(storage.read_text(path))
        steps, exit_code = summary["steps"], summary["exit_code"]
    except (ConfigError, KeyError, TypeError) as error:
        aside = _free_name(path.with_name(f"{path.name}.damaged"))
        seen = str(error) if isinstance(error, ConfigError) else f"{path.name} is not what ray_kd writes"
        advice = f"--fix moves it to {aside.name}, and the next start writes another"
        yield Finding("summary", BROKEN, seen, advice, blocks=True, mend=partial(_move_file, path, aside))
        return
    seen = f"of {steps} steps, exit code {exit_code}"
    different = {name: count for name, count in run.counted.items() if summary.get(name) != count}
    if steps != run.step or not run.counted:
        # A killed attempt leaves the summary of the one before it; that of a finished run fits its last checkpoint.
        state = WARNING if exit_code == EXIT_DONE else OK
        yield Finding("summary", state, f"{seen}; not compared: there are no counts of the same step")
    elif different:
        said = ", ".join(f"{name} {summary.get(name)} (counted {count})" for name, count in different.items())
        advice = f"trust the checkpoint; without {path.name} the same command writes another"
        yield Finding("summary", BROKEN, f"{seen}, and wrong about {said}", advice)
    else:
        yield Finding("summary", OK, f"{seen}: {', '.join(f'{name} {count}' for name, count in run.counted.items())}")


CHECKS: tuple[Callable[[Run], Iterator[Finding]], ...] = (
    check_writers, check_checkpoints, check_leftovers, check_config, check_identity, check_prepared, check_student,
    check_metrics, check_rows, check_quarantine, check_ledger, check_teachers, check_final, check_summary,
)  # fmt: skip


def _verdict(run: Run, findings: list[Finding]) -> tuple[str, str]:
    broken = [finding for finding in findings if finding.state == BROKEN]
    also = f" {len(broken)} of the findings above are broken." if broken else ""
    blocking = next((finding for finding in broken if finding.blocks), None)
    order = run.order
    of = f" of {order.num_steps}" if order else ""
    if run.writers:
        return "running", f"The run is under way, its newest checkpoint is of step {run.step}{of}.{also}"
    if run.is_finished and not any(finding.check == "final" for finding in broken):
        return "finished", f"The run is finished: its student is in {run_folder.FINAL}/.{also}"
    if blocking is not None:
        return "blocked", f"The run cannot go on because of {blocking.check}: {blocking.seen}."
    if run.step == 0:
        return "resumable", f"The run begins with step 1{of} with the same command.{also}"
    return "resumable", f"The run can go on from step {run.step}{of} with the same command.{also}"


def _read_checkpoint(folder: Path) -> dict[str, Any] | str:
    """The state of a checkpoint, every byte of which is verified, or what is wrong with it."""
    try:
        checkpoint.verify(folder)
        return checkpoint.read_state(folder)
    except checkpoint.CorruptCheckpoint as error:
        return str(error)


def _is_leftover(name: str) -> bool:
    """Whether a name in a run folder is one that is there only while something is being written or asked."""
    return run_folder.is_draft(name) or name.startswith(".probe-") or name in (STOP_FLAG, RESIZE_FLAG, REFUSAL)


def _problem_of_model(folder: Path) -> str | None:
    """What is missing or cut in a model folder; of each weights file the header and the size are looked at."""
    try:
        config, index = folder / "config.json", folder / "model.safetensors.index.json"
        json.loads(storage.read_text(config))
        shards = {path.name for path in storage.children(folder) if path.suffix == ".safetensors"}
        if index.exists():
            shards |= set(json.loads(storage.read_text(index))["weight_map"].values())
        if not shards:
            return "no safetensors"
        for name in sorted(shards):
            _check_safetensors(folder / name)
    except FileNotFoundError as error:
        return f"'{error.filename or error}' is missing"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"cannot be opened ({type(error).__name__}: {error})"
    return None


def _check_safetensors(path: Path) -> None:
    """Raise ValueError for a file that is cut: https://github.com/huggingface/safetensors#format ."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size:
            raise ValueError(f"{path.name} is cut, or not safetensors")
        tensors = json.loads(file.read(length))
    tensors.pop("__metadata__", None)
    end = 8 + length + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    if end != size:
        raise ValueError(f"{path.name} has {size} bytes, its header says {end}")


@dataclass
class _Lines:
    """A file of JSON lines."""

    whole: list[tuple[bytes, dict[str, Any]]] = field(default_factory=list)
    bad: list[tuple[int, bytes]] = field(default_factory=list)
    """(number from 1, what stands there) of the lines that are no object with the keys wanted."""
    rest: bytes = b""
    """What follows the last newline: a line that was being written."""


def _read_lines(path: Path, keys: Collection[str]) -> _Lines:
    content = path.read_bytes() if path.exists() else b""
    *texts, rest = content.split(b"\n")
    lines = _Lines(rest=rest)
    for number, text in enumerate(texts, start=1):
        try:
            document = json.loads(text)
        except ValueError:
            document = None
        if isinstance(document, dict) and document.keys() >= set(keys):
            lines.whole.append((text, document))
        else:
            lines.bad.append((number, text))
    return lines


def _lines_of(
    run: Run, check: str, path: Path, keys: Collection[str], blocks: bool = False
) -> Generator[Finding, None, list[dict[str, Any]]]:
    """Findings about a file's lines; returns the good ones. blocks: a start reads them and would fail."""
    lines = _read_lines(path, keys)
    if lines.bad:
        yield _bad_lines(run, check, path, lines, blocks)
    if lines.rest and not run.writers:
        mend = partial(_take_out_bad_lines, run, path, lines)
        yield Finding(check, WARNING, f"{path.name} ends in a line that was cut short", "--fix cuts it", mend=mend)
    return [document for _, document in lines.whole]


def _bad_lines(run: Run, check: str, path: Path, lines: _Lines, blocks: bool) -> Finding:
    seen = f"{len(lines.bad)} lines of {path.name} cannot be read, first line {lines.bad[0][0]}"
    mend = partial(_take_out_bad_lines, run, path, lines)
    return Finding(check, BROKEN, seen, f"--fix moves them to {DAMAGED_LINES}", blocks, mend)


def _take_out_bad_lines(run: Run, path: Path, lines: _Lines) -> None:
    """Write the good lines back, and the others to DAMAGED_LINES. Twice is as once."""
    taken = [*lines.bad, *([(len(lines.whole) + len(lines.bad) + 1, lines.rest)] if lines.rest else [])]
    name = _name_in(run.folder, path)
    records = [{"file": name, "line": number, "text": text.decode(errors="replace")} for number, text in taken]
    damaged = run.folder / DAMAGED_LINES
    known = set(storage.read_lines(damaged))
    texts = [json.dumps(record) + "\n" for record in records]
    storage.append_text(damaged, "".join(text for text in texts if text not in known))
    storage.write_text(path, "".join(text.decode() + "\n" for text, _ in lines.whole))


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


def _not_checked(check: str, what: str) -> Finding:
    return Finding(check, WARNING, f"not checked: there is no usable {what}")


def _plain(finding: Finding) -> dict[str, Any]:
    return {item.name: getattr(finding, item.name) for item in fields(finding) if item.name != "mend"}


def _name_in(folder: Path, path: Path) -> str:
    return str(path).removeprefix(f"{folder}/")


def _free_name(path: Path) -> Path:
    """The path, or with a number where something is there already."""
    if not path.exists():
        return path
    return next(other for count in itertools.count(2) if not (other := path.with_name(f"{path.name}-{count}")).exists())


def _copy_text(source: Path, target: Path) -> None:
    storage.write_text(target, storage.read_text(source))


def _move_file(source: Path, target: Path) -> None:
    target.write_bytes(source.read_bytes())
    source.unlink()


def _delete(path: Path) -> None:
    if path.is_dir():
        storage.remove(path)
    else:
        path.unlink()
