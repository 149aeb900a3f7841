"""Experiment trackers: what metrics.jsonl gets, rank 0 sends to them as well. A file here is a kind of `run.trackers`.

A file holds a `Config`, `PACKAGE` (what must be installed), `writes_to_disk(config)` (whether it writes into the run
folder, which then must be on a disk) and a class `Tracker`, with the methods of the one below.

After a restart a tracker holds what metrics.jsonl holds: nothing of a step after the checkpoint, nothing twice, and the
lines that a kill took from it. Each has a thread of its own, for a server that hangs and a package that loads for
seconds; one that fails is named in a warning once and left out from then on, since no run should die for its charts.
"""

import logging
import math
import queue
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ray_kd import plugins, redact

logger = logging.getLogger(__name__)

GROUP = "trackers"

_CLOSE_S = 20.0
_MOST_WAITING = 10_000
_LONGEST = 300
"""Characters of a reason."""


@dataclass(frozen=True)
class Start:
    """What a tracker is told of the run."""

    run_dir: Path
    config_yaml: str
    """The resolved config, secrets masked."""
    last_step: int
    """Of the checkpoint that training goes on from, 0 at first: later points do not count any more."""


class Tracker(Protocol):
    """The class of a kind; `__init__` takes its Config and a Start."""

    last_step: int
    """Up to which it has the run's points, at most that of its Start: later ones are given to it again."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """The finite numbers of a line, under its keys."""

    def close(self) -> None:
        """Everything is written when this returns."""


class Trackers:
    """All trackers of a run. Nothing here raises, nor waits for a tracker but `close`, for 20 seconds at most."""

    def __init__(self, kinds: Sequence[Any], start: Start, history: Iterable[Mapping[str, Any]]) -> None:
        """history: the lines up to start.last_step; each tracker's thread goes through them once, at its start."""
        self._threads = [_Thread(value, start, history) for value in kinds]

    def log(self, line: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl."""
        for thread in self._threads:
            thread.put(line)

    def close(self) -> None:
        """Wait until the lines so far are written."""
        deadline = time.monotonic() + _CLOSE_S
        for thread in self._threads:
            thread.finish(deadline)


class _Thread:
    def __init__(self, value: Any, start: Start, history: Iterable[Mapping[str, Any]]) -> None:
        self._kind = plugins.kind_of(value)
        self._lines: queue.SimpleQueue[Mapping[str, Any] | None] = queue.SimpleQueue()
        self._is_given_up = False
        self._thread = threading.Thread(
            target=self._run, args=(value, start, history), name=f"tracker {self._kind}", daemon=True
        )
        self._thread.start()

    def put(self, line: Mapping[str, Any] | None) -> None:
        if self._lines.qsize() >= _MOST_WAITING:
            self._give_up(f"it is {_MOST_WAITING} lines behind")
        if not self._is_given_up:
            self._lines.put(line)

    def finish(self, deadline: float) -> None:
        self.put(None)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._give_up(f"it did not end within {_CLOSE_S:g} s")

    def _run(self, value: Any, start: Start, history: Iterable[Mapping[str, Any]]) -> None:
        try:
            module, options = plugins.options(GROUP, value, "run.trackers")
            tracker: Tracker = module.Tracker(options, start)
            for line in history:
                if line["step"] > tracker.last_step:
                    tracker.log(line["step"], _numbers(line))
            while not self._is_given_up and (next_line := self._lines.get()) is not None:
                tracker.log(next_line["step"], _numbers(next_line))
            tracker.close()
        except Exception as error:
            self._give_up(f"{type(error).__name__}: {error}")

    def _give_up(self, reason: str) -> None:
        if not self._is_given_up:
            self._is_given_up = True
            line = " ".join(redact.redact(reason).split())[:_LONGEST]  # masked whole: a part of a secret is not known
            logger.warning("the tracker '%s' gets nothing any more (metrics.jsonl has it all): %s", self._kind, line)


def _numbers(line: Mapping[str, Any]) -> dict[str, float]:
    return {
        key: float(value)
        for key, value in line.items()
        if key not in ("step", "time") and isinstance(value, int | float) and math.isfinite(value)
    }
