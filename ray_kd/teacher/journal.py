"""The teacher's work over all actors and restarts, counted from the journal its stage keeps."""

import json
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_kd.storage import GrowingFile, children, make_folder, read_lines

JOURNAL = "teacher"
"""Folder of the journal in the run folder, a file or more an actor."""

POOL_NOTE_S = 5.0
"""Seconds between two lines about a pool, at most, while the stream runs."""

POOLS = "teacher_pool"
"""Folder of the same kind for the sizes and queues of the pools (`pool.py`)."""

_MAX_PUT_BYTES = 2**16


class Journal:
    """One actor's lines, one per block. In an object store a file is put whole for each line, so files stay small."""

    def __init__(self, run_dir: Path, folder: str = JOURNAL) -> None:
        self._folder = run_dir / folder
        make_folder(self._folder)
        self._name = uuid.uuid4().hex
        self._count = 0
        self._file = self._next()

    def add(self, line: dict[str, Any]) -> None:
        """Add a line; a killed actor loses none on a disk, at most the last one in a store."""
        self._file.write(json.dumps(line) + "\n")
        if not self._file.is_remote or self._file.nbytes < _MAX_PUT_BYTES:
            self._file.publish(wait=False)
        else:
            self._file.close()
            self._file = self._next()

    def _next(self) -> GrowingFile:
        self._count += 1
        return GrowingFile(self._folder / f"{self._name}-{self._count:05d}.jsonl")


@dataclass
class Actor:
    """What one teacher actor did, or the readers of one machine where answers came from the cache alone."""

    teacher: str
    """Its name among several; empty for a single one."""
    node: str
    pid: int
    rows_computed: int = 0
    """Through the engine."""
    rows_from_cache: int = 0
    blocks: int = 0
    busy_s: float = 0.0
    """Seconds of work on blocks, loading the model left out."""
    idle_s: float = 0.0
    """Seconds between blocks: nothing was there to do, or the student was behind."""
    tokens: int = 0
    """That had to go through the model."""
    places: int = 0
    """Tokens of the forwards, padding included."""
    retries: int = 0
    """Requests made again."""

    def report(self) -> dict[str, Any]:
        """What was counted, and what follows from it: tokens_per_second, busy_fraction, batch_fill."""
        return asdict(self) | {
            "tokens_per_second": self.tokens / self.busy_s if self.busy_s else 0.0,
            "busy_fraction": self.busy_s / (self.busy_s + self.idle_s) if self.busy_s else 0.0,
            "batch_fill": self.tokens / self.places if self.places else 0.0,
        }


@dataclass(frozen=True)
class TeacherRows:
    """The teachers' work for training, over all actors and restarts."""

    computed: int
    """Rows through an engine; a row that several teachers answer counts for each."""
    repeated: int
    """Of these, rows of slots that had been computed before."""
    from_cache: int
    actors: list[Actor]
    """In the order of their teachers, and of their first blocks."""


def read_journal(run_dir: Path, folder: str = JOURNAL) -> Iterator[dict[str, Any]]:
    """The lines of all actors. One cut short by a kill is the actor's last and is left out."""
    for path in children(run_dir / folder):
        for text in read_lines(path):
            if text.endswith("\n"):
                yield json.loads(text)


def count_rows(run_dir: Path) -> TeacherRows:
    """Count what the journal says. Memory: one byte a slot and teacher."""
    done_by: dict[str, NDArray[np.bool_]] = {}
    actors: dict[tuple[str, str, int], Actor] = {}
    first_at: dict[tuple[str, str, int], float] = {}
    for line in read_journal(run_dir):
        slots = line["slots"]
        # What a line of a run from before these were there does not have counts as nothing.
        key = (line.get("teacher", ""), line.get("node", ""), line["pid"])
        actor = actors.setdefault(key, Actor(*key))
        first_at[key] = min(line.get("time", 0.0), first_at.get(key, np.inf))
        actor.blocks += 1
        actor.rows_computed += len(slots)
        actor.rows_from_cache += line.get("cached", 0)
        for name in ("busy_s", "idle_s", "tokens", "places", "retries"):
            setattr(actor, name, getattr(actor, name) + line.get(name, 0))
        done = done_by.setdefault(key[0], np.zeros(1024, dtype=np.bool_))
        if slots and max(slots) >= len(done):
            done_by[key[0]] = done = np.concatenate([done, np.zeros(max(slots) + 1, dtype=np.bool_)])
        done[slots] = True
    computed = sum(actor.rows_computed for actor in actors.values())
    return TeacherRows(
        computed,
        repeated=computed - sum(int(done.sum()) for done in done_by.values()),
        from_cache=sum(actor.rows_from_cache for actor in actors.values()),
        actors=[actors[key] for key in sorted(actors, key=lambda key: (key[0], first_at[key]))],
    )


@dataclass(frozen=True)
class Pool:
    """A teacher pool over the run, from its lines."""

    teacher: str
    most_actors: int
    mean_actors: float
    """Over the time in which it had any; near the least where the cache had most of the rows."""
    mean_queue: float
    """Blocks that waited for an actor, over the same time."""


def read_pools(run_dir: Path) -> list[Pool]:
    """The pools of a run; none where the cache had every answer."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for line in sorted(read_journal(run_dir, POOLS), key=lambda line: line["time"]):
        lines.setdefault(line["teacher"], []).append(line)
    return [_pool(name, own) for name, own in sorted(lines.items())]


def _pool(name: str, lines: list[dict[str, Any]]) -> Pool:
    """A line tells how it was until the next one, but not through the time in which nothing ran."""
    actors, queue, at = (np.array([line[key] for line in lines], float) for key in ("actors", "queue", "time"))
    seconds = np.minimum(np.diff(at, append=at[-1]), 2 * POOL_NOTE_S) * (actors > 0)
    total = max(float(seconds.sum()), 1e-9)
    return Pool(name, int(actors.max()), float(actors @ seconds / total), float(queue @ seconds / total))
