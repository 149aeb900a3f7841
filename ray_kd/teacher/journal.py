"""The teacher's work over all actors and restarts, counted from the journal its stage keeps."""

import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ray_kd.storage import GrowingFile, children, make_folder, read_lines

JOURNAL = "teacher"
"""Folder of the journal in the run folder, a file or more an actor."""

_MAX_PUT_BYTES = 2**16


class Journal:
    """One actor's lines, one per block. In an object store a file is put whole for each line, so files stay small."""

    def __init__(self, run_dir: Path) -> None:
        self._folder = run_dir / JOURNAL
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


@dataclass(frozen=True)
class TeacherRows:
    """The teacher's work for training, over all actors and restarts."""

    computed: int
    """Rows through the engine."""
    repeated: int
    """Of these, rows of slots that had been computed before."""
    from_cache: int


def read_journal(run_dir: Path) -> Iterator[dict[str, Any]]:
    """The lines of all actors. One cut short by a kill is the actor's last and is left out."""
    for path in children(run_dir / JOURNAL):
        for text in read_lines(path):
            if text.endswith("\n"):
                yield json.loads(text)


def count_rows(run_dir: Path) -> TeacherRows:
    """Count what the journal says. Memory: one byte a slot."""
    done = np.zeros(1024, dtype=np.bool_)
    computed = from_cache = 0
    for line in read_journal(run_dir):
        slots = line["slots"]
        computed += len(slots)
        from_cache += line.get("cached", 0)  # not in the lines of a run from before the cache
        if slots and max(slots) >= len(done):
            done = np.concatenate([done, np.zeros(max(slots) + 1, dtype=np.bool_)])
        done[slots] = True
    return TeacherRows(computed, computed - int(done.sum()), from_cache)
