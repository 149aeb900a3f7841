"""Rows that end their teacher's process every time: noted before they are asked, then asked alone, then refused.

An actor notes the slots it is about to ask for in a file of its own and takes them out again afterwards. One that dies
leaves its note: Ray starts it again and gives it the same block, and the note tells what it was asked for. One death
may be anybody's, of a machine or of memory that another took. So rows that were there at `ALONE_AFTER` deaths are asked
one by one, and one that was there at `REFUSED_AFTER` has a RowError for an answer, for the rest of the run.

Each attempt has notes of its own: an actor that was ended with its stream leaves one as well, which says nothing about
the row. All but that last one go along to the next attempt: a row that hangs its teacher may end the attempt first.
Cost: two writes of a few bytes a block, not synced, since what a process wrote outlives it. In an object store, where a
write is a request, nothing is noted: there such a row fails the run when Ray's retries are used up.
"""

import json
import shutil
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ray_kd import storage
from ray_kd.teacher.engine import RowError

FOLDER = "teacher_deaths"
"""In the run folder: a folder of notes for the attempt that is on, and the rows refused so far."""

ALONE_AFTER = 2
REFUSED_AFTER = 4
"""Deaths; Ray must start an actor again as often as that."""

_REFUSED = "refused.jsonl"


def begin(run_dir: Path) -> str | None:
    """Name an attempt, with what the notes of the one before say of rows; None where nothing is noted.

    Call as a stream starts.
    """
    if storage.is_remote(run_dir):
        return None
    attempt = uuid.uuid4().hex
    folder = run_dir / FOLDER / attempt
    folder.mkdir(parents=True)
    for earlier in storage.children(run_dir / FOLDER):
        if earlier.is_dir() and not earlier.is_symlink() and earlier != folder:
            _carry_over(earlier, folder)
            shutil.rmtree(earlier)
    return attempt


def _carry_over(earlier: Path, folder: Path) -> None:
    """Of each slot the deaths noted but one: that may be the end of the stream."""
    counts: dict[str, Counter[int]] = defaultdict(Counter)
    for path in storage.children(earlier):
        teacher, slots = _parsed(storage.read_text(path))
        counts[teacher].update(slots)
    for teacher, deaths in counts.items():
        repeated = [slot for slot, count in deaths.items() for _ in range(count - 1)]
        (folder / uuid.uuid4().hex).write_text(json.dumps([teacher, repeated]))


def _parsed(text: str) -> tuple[str, list[int]]:
    """Teacher and numbers of a note; no numbers of one that is empty or was not written whole: a full disk cuts it."""
    try:
        teacher, numbers = json.loads(text)
    except ValueError:
        return "", []
    return teacher, numbers


class Deaths:
    """What one actor knows of those before it, and what it leaves to those after it.

    attempt: as of `begin`; None notes nothing. teacher: its name among several, for slots are asked of each.
    """

    def __init__(self, run_dir: Path, attempt: str | None, teacher: str = "") -> None:
        self._teacher = teacher
        self._at_deaths: Counter[int] = Counter()
        self._refused: set[int] = set()
        self._note: Path | None = None
        if attempt is None:
            return
        self._refusals = run_dir / FOLDER / _REFUSED
        self._refused = {row_id for line in storage.read_lines(self._refusals) for row_id in self._own(line)}
        # The notes of the living are counted as well; their slots come to this actor only if they die.
        for path in storage.children(run_dir / FOLDER / attempt):
            self._at_deaths.update(self._own(storage.read_text(path)))
        self._note = run_dir / FOLDER / attempt / uuid.uuid4().hex

    def error(self, slot: int, row_id: int) -> RowError | None:
        """The answer to a row that is not asked for any more."""
        if self._at_deaths[slot] >= REFUSED_AFTER and row_id not in self._refused:
            self._refused.add(row_id)
            storage.append_text(self._refusals, json.dumps([self._teacher, [row_id]]) + "\n")
        if row_id not in self._refused:
            return None
        return RowError(f"the teacher's process ended {REFUSED_AFTER} times while it was asked for this row")

    def groups(self, slots: NDArray[np.integer], places: Sequence[int]) -> list[list[int]]:
        """The places to ask for together: all of them, or each alone after deaths with one of their slots."""
        is_suspect = any(self._at_deaths[int(slots[place])] >= ALONE_AFTER for place in places)
        return [[place] for place in places] if is_suspect else [list(places)] if len(places) else []

    @contextmanager
    def noted(self, slots: Sequence[int]) -> Iterator[None]:
        """While these are asked for."""
        if self._note is None:
            yield
            return
        self._note.write_text(json.dumps([self._teacher, slots]))
        try:
            yield
        finally:
            self._note.write_text("")

    def _own(self, text: str) -> list[int]:
        """The numbers in a note, if it is of this teacher's actors."""
        name, numbers = _parsed(text)
        return numbers if name == self._teacher else []
