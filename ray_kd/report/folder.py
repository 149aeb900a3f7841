"""What a report reads of a run folder: a finished run's, a failed one's, one's that is on, or an old one's.

Numbers are kept as columns of float64, so that a million steps take megabytes.
"""

import json
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from ray_kd import checkpoint, run_folder, storage, summary
from ray_kd.errors import EXIT_DONE, ConfigError, DataError, RayKDError, RetryableError
from ray_kd.teacher.journal import POOLS, read_journal
from ray_kd.trainer.loop import CHECKPOINTS, EVAL_BEFORE, METRICS, QUARANTINE

Column = NDArray[np.float64]

RUNNING, FINISHED, STOPPED, FAILED, UNKNOWN = "running", "finished", "stopped", "failed", "not ended"
"""How a run stands."""

_FIRST_REASONS = 12


class Columns:
    """The numbers of JSON lines by their names; NaN where a line has none, or null."""

    def __init__(self) -> None:
        self._values: dict[str, array[float]] = {}
        self.num_lines = 0

    def add(self, line: dict[str, Any]) -> None:
        """Add a line's numbers; what is text or a list in it is left out."""
        for name, value in line.items():
            if isinstance(value, (int, float)):
                column = self._values.setdefault(name, array("d"))
                column.extend([np.nan] * (self.num_lines - len(column)))
                column.append(value)
        self.num_lines += 1

    @property
    def names(self) -> list[str]:
        return list(self._values)

    def get(self, name: str) -> Column:
        """The column of this name; all NaN where no line has it."""
        values = self._values.get(name, array("d"))
        return np.pad(np.array(values), (0, self.num_lines - len(values)), constant_values=np.nan)


@dataclass
class Blocks:
    """What one teacher actor did, a block of rows after another."""

    teacher: str
    node: str
    pid: int
    columns: Columns = field(default_factory=Columns)

    @property
    def spans(self) -> tuple[Column, Column]:
        """(starts, ends) of its work in seconds since the epoch, without blocks that say no time."""
        ends, busy = self.columns.get("time"), self.columns.get("busy_s")
        is_known = np.isfinite(ends) & np.isfinite(busy)
        return (ends - busy)[is_known], ends[is_known]


@dataclass
class Run:
    """A run folder as it is now."""

    folder: Path
    holders: Sequence[str]
    """Who writes there; empty when nobody does."""
    config: dict[str, Any]
    """As config.yaml has it, secrets masked; empty for a run that failed before it was written."""
    figures: dict[str, Any]
    """As summary.json, of now."""
    exit_code: int | None
    """None: the last start has not ended, or was killed."""
    metrics: Columns
    eval_before: dict[str, Any]
    starts: Columns
    actors: list[Blocks]
    pools: dict[str, Columns]
    """Teacher's name -> sizes and queue over time."""
    checkpoint_steps: list[int]
    quarantined: int
    reasons: list[tuple[str, int]]
    """The commonest reasons of quarantined rows and records, with their counts."""
    first_quarantined: list[dict[str, Any]]
    samples: list[dict[str, str]]

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def status(self) -> str:
        if self.holders:
            return RUNNING
        if self.exit_code is None:
            return UNKNOWN
        return {EXIT_DONE: FINISHED, RetryableError.exit_code: STOPPED}.get(self.exit_code, FAILED)

    @property
    def cause(self) -> str:
        """Why it ended before its last step, in a line; empty where it did not, or nobody wrote it down."""
        return self.figures.get("cause") or "" if self.status in (STOPPED, FAILED) else ""

    @property
    def last_step(self) -> int:
        """The newest that was logged."""
        steps = self.metrics.get("step")
        return int(steps[-1]) if len(steps) else 0


def read(folder: Path, holders: Sequence[str] = ()) -> Run:
    """Read a run folder, of `storage.path`. holders: who is writing there (`locks.holders`).

    Raises ConfigError for a folder that is no run's, DataError where a file of it cannot be read.
    """
    names = run_folder.IDENTITY, run_folder.SUMMARY, run_folder.ATTEMPTS
    if not any((folder / name).exists() for name in names):
        raise ConfigError(f"'{folder}' is no run folder: it has none of {', '.join(names)}")
    try:
        return _read(folder, holders)
    except RayKDError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        line = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(f"'{folder}' cannot be reported, something in it is damaged ({line[:200]}): "
                        f"jobs/doctor.py {folder} says what") from error  # fmt: skip


def _read(folder: Path, holders: Sequence[str]) -> Run:
    config = yaml.safe_load(_text(folder / run_folder.CONFIG)) or {}
    starts = _columns(folder / run_folder.ATTEMPTS)
    figures, exit_code = _figures(folder, starts.num_lines, bool(holders))
    actors: dict[tuple[str, str, int], Blocks] = {}
    for line in read_journal(folder):
        key = (line.get("teacher", ""), line.get("node", ""), line["pid"])
        actors.setdefault(key, Blocks(*key)).columns.add(line)
    pools: dict[str, Columns] = {}
    for line in sorted(read_journal(folder, POOLS), key=lambda line: line["time"]):
        pools.setdefault(line["teacher"], Columns()).add(line)
    reasons: Counter[str] = Counter()
    first: list[dict[str, Any]] = []
    for text in storage.read_lines(folder / QUARANTINE):
        if text.endswith("\n"):
            line = json.loads(text)
            reasons[str(line.get("reason", ""))] += 1
            if len(first) < _FIRST_REASONS:
                first.append(line)
    return Run(
        folder=folder,
        holders=holders,
        config=config,
        figures=figures,
        exit_code=exit_code,
        metrics=_columns(folder / METRICS),
        eval_before=json.loads(_text(folder / EVAL_BEFORE) or "{}"),
        starts=starts,
        actors=list(actors.values()),
        pools=pools,
        checkpoint_steps=[checkpoint.step_of(found) for found in checkpoint.folders(folder / CHECKPOINTS)],
        quarantined=reasons.total(),
        reasons=reasons.most_common(_FIRST_REASONS),
        first_quarantined=first,
        samples=json.loads(_text(folder / run_folder.SAMPLES) or '{"samples": []}')["samples"],
    )


def _figures(folder: Path, num_starts: int, is_on: bool) -> tuple[dict[str, Any], int | None]:
    """(figures of now, exit code): summary.json, or where it is of an earlier start what it would be."""
    known: dict[str, Any] = json.loads(_text(folder / run_folder.SUMMARY) or "{}")
    if known and not is_on and num_starts <= 1 + known.get("restarts", num_starts):
        return known, int(known["exit_code"])
    planned = summary.Planned(**{name: known[name] for name in summary.Planned.__annotations__ if name in known})
    return summary.build(folder, planned, RetryableError.exit_code), None


def _columns(path: Path) -> Columns:
    columns = Columns()
    for text in storage.read_lines(path):
        if text.endswith("\n"):  # else it is being written, or a kill cut it
            columns.add(json.loads(text))
    return columns


def _text(path: Path) -> str:
    return storage.read_text(path) if path.exists() else ""
