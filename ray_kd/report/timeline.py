"""Both pools over wall time: who worked when, how large the pool was, starts, evaluations and checkpoints.

A lane is cut into bins, and a bin's shade is the share of it in which there was work: a week of blocks takes as much
room as a minute of them. The time in which nothing ran, before a start that came much later, is drawn short.
"""

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from ray_kd.report.axes import decimate, number, round_step
from ray_kd.report.folder import Blocks, Column, Columns, Run
from ray_kd.trainer.recorder import EVAL_S, STEPS_S, WAITS_S

WIDTH, LEFT, RIGHT, TOP = 980, 150, 70, 26
LANE, STRIP, SPACE = 16, 34, 8
"""Heights of a lane and of a curve, and the space below each."""

NUM_SHADES = 4
_BINS = 480
_MOST_LANES = 12
_MOST_MARKS = 150
_LONG = 0.05
"""Of the time in which the run was on: a gap before a start that is longer is drawn as if it were that long."""
_Mark = TypeVar("_Mark")

_STEPS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400)


@dataclass
class Lane:
    """A row of rectangles: (x, width, shade from 1, text)."""

    label: str
    y: float
    kind: str
    spans: list[tuple[float, float, int, str]] = field(default_factory=list)


@dataclass
class Strip:
    """A small curve: its polyline and its highest value."""

    label: str
    y: float
    points: str
    highest: str


@dataclass
class Timeline:
    """What the template draws."""

    lanes: list[Lane] = field(default_factory=list)
    strips: list[Strip] = field(default_factory=list)
    marks: list[tuple[str, float, float, str]] = field(default_factory=list)
    """(kind, x, y, text)."""
    starts: list[tuple[float, str]] = field(default_factory=list)
    gaps: list[tuple[float, float, str]] = field(default_factory=list)
    """(x, width, how long it was)."""
    ticks: list[tuple[float, str]] = field(default_factory=list)
    began: str = ""
    height: float = 0.0


class Clock:
    """From seconds since the epoch to places of the drawing, long gaps before starts cut short."""

    def __init__(self, events: Column, starts: Column) -> None:
        self.first, self.last = float(events.min()), float(events.max())
        gaps = []
        for start in starts:
            earlier = events[events < start]
            if len(earlier) and start > earlier.max():
                gaps.append((float(earlier.max()), float(start)))
        ran_s = self.last - self.first - sum(end - begin for begin, end in gaps)
        self.short_s = max(_LONG * ran_s, 1e-3)
        self.gaps = [(begin, end) for begin, end in gaps if end - begin > self.short_s]
        times, shown = [self.first], [0.0]
        for begin, end in self.gaps:
            shown += [shown[-1] + begin - times[-1]]
            shown += [shown[-1] + self.short_s]
            times += [begin, end]
        times, shown = [*times, self.last], [*shown, shown[-1] + self.last - times[-1]]
        self._times, self._shown = np.array(times), np.array(shown)
        self._shown *= (WIDTH - LEFT - RIGHT) / max(self._shown[-1], 1e-9)

    def at(self, times: Column) -> Column:
        """Places of times; those outside the run at its ends."""
        return LEFT + np.interp(times, self._times, self._shown)

    def back(self, places: Column) -> Column:
        """Seconds since the run began at these places."""
        return np.interp(places - LEFT, self._shown, self._times) - self.first

    def ticks(self) -> list[tuple[float, str]]:
        """Round times since the beginning, none in a gap that was cut, none too close to the one before."""
        ran_s = float(self._shown[-1]) and self.last - self.first - sum(e - b - self.short_s for b, e in self.gaps)
        about = max(ran_s / 12, 1e-3)
        step = next((step for step in _STEPS_S if step >= about), None) or 86400 * round_step(about / 86400)
        found: list[tuple[float, str]] = []
        pieces = zip([self.first, *(end for _, end in self.gaps)],
                     [*(begin for begin, _ in self.gaps), self.last], strict=True)  # fmt: skip
        for begin, end in pieces:
            index = np.arange(np.ceil((begin - self.first) / step), np.floor((end - self.first) / step) + 1)
            for seconds in index * step:
                place = float(self.at(np.array([self.first + seconds]))[0])
                if not found or place - found[-1][0] > 45:
                    found.append((place, span(float(seconds))))
        return found


def timeline_of(run: Run) -> Timeline | None:
    """The timeline of a run; None where nothing in it says when it was."""
    steps = _Steps(run)
    starts = _known(run.starts.get("time"))
    teachers = [(one, *one.spans) for one in run.actors]
    events = [starts, steps.ends, steps.evaluated, *(_known(one.get("time")) for one in run.pools.values())]
    events += [edge for _, begins, ends in teachers for edge in (begins, ends)]
    every = np.concatenate(events)
    if not len(every) or every.max() <= every.min():
        return None
    clock, drawn, y = Clock(np.sort(every), np.sort(starts)), Timeline(), float(TOP + LANE + SPACE)
    drawn.ticks = clock.ticks()
    drawn.gaps = [_gap(clock, begin, end) for begin, end in clock.gaps]
    drawn.began = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(clock.first))
    slots = run.starts.get("start_slot")[np.isfinite(run.starts.get("time"))]
    drawn.starts = _thinned([
        (float(place), f"start {index + 1}, from slot {slot:,.0f}")
        for index, (place, slot) in enumerate(zip(clock.at(starts), slots, strict=True))
    ])  # fmt: skip
    drawn.marks = _marks(run, steps, clock)
    for label, begins, ends in _lanes(teachers):
        drawn.lanes.append(Lane(label, y, "teacher", _spans(clock, begins, ends, label)))
        y += LANE + SPACE / 2
    for name, columns in run.pools.items():
        for column, what in (("actors", "actors"), ("queue", "blocks waiting")):
            drawn.strips.append(_strip(clock, columns, column, f"{name} {what}".strip(), y))
            y += STRIP + SPACE
    for kind, label, begins, ends in steps.lanes():
        if len(begins):
            drawn.lanes.append(Lane(label, y, kind, _spans(clock, begins, ends, label)))
            y += LANE + SPACE / 2
    drawn.height = y + 22
    return drawn


class _Steps:
    """When the logged steps of the surviving history began and ended: one of these is all steps since the line before.

    Of lines without the seconds of their steps, which earlier versions wrote, all until the first line of a start
    counts as its loading, and the wait of its last step as the wait of a line.
    """

    def __init__(self, run: Run) -> None:
        ends, numbers = run.metrics.get("time"), run.metrics.get("step")
        is_known = np.isfinite(ends)
        steps_s, waits_s, wait_s, eval_s = (
            run.metrics.get(name)[is_known] for name in (STEPS_S, WAITS_S, "train/data_wait_s", EVAL_S)
        )
        self.numbers, self.ends = numbers[is_known], ends[is_known]
        self.evaluated = self.ends + np.nan_to_num(eval_s)
        """When the evaluation after a step ended, where there was one."""
        before = np.concatenate([[np.nan], self.ends])[: len(self.ends)]
        starts = np.sort(_known(run.starts.get("time")))
        # The newest start before a step's end: one that came after the step before means that this step began anew.
        newest = np.concatenate([[np.nan], starts])[np.searchsorted(starts, self.ends, side="right")]
        self._is_first = np.isnan(before) | (newest > before)
        evaluated_before = np.concatenate([[np.nan], self.evaluated])[: len(self.ends)]
        begins = np.where(self._is_first, np.where(np.isfinite(newest), newest, self.ends), evaluated_before)
        self._begins = np.minimum(begins, self.ends)
        trained_from = np.maximum(self.ends - np.nan_to_num(steps_s), self._begins)
        self._trained_from = np.where(self._is_first, trained_from, self._begins)
        is_summed = np.isfinite(waits_s)
        waited = np.where(is_summed, waits_s, np.where(self._is_first, 0.0, np.nan_to_num(wait_s)))
        self._waited_until = np.minimum(self._trained_from + waited, self.ends)

    def lanes(self) -> list[tuple[str, str, Column, Column]]:
        """(kind, label, starts, ends): loading and the first step of each start, training, waiting, evaluations."""
        first, is_evaluated = self._is_first, self.evaluated > self.ends
        # Of the first line of a start nothing is left for training where it is of the first step alone.
        is_trained, is_waited = self.ends > self._waited_until, self._waited_until > self._trained_from
        return [
            ("start", "loading, first step", self._begins[first], self._trained_from[first]),
            ("student", "student: training", self._waited_until[is_trained], self.ends[is_trained]),
            ("wait", "student: waiting", self._trained_from[is_waited], self._waited_until[is_waited]),
            ("evaluation", "student: evaluating", self.ends[is_evaluated], self.evaluated[is_evaluated]),
        ]

    def at(self, step: float) -> float | None:
        """When a logged step ended."""
        place = np.searchsorted(self.numbers, step)
        is_there = place < len(self.numbers) and self.numbers[place] == step
        return float(self.ends[place]) if is_there else None


def _lanes(teachers: Sequence[tuple[Blocks, Column, Column]]) -> list[tuple[str, Column, Column]]:
    """Label, starts and ends of each lane: actors that were not there at the same time share one.

    Where there are more lanes than one can look at, one stands for all actors of a teacher.
    """
    known = sorted(
        ((one.teacher, float(begins.min()), float(ends.max()), (begins, ends)) for one, begins, ends in teachers
         if len(begins)), key=lambda entry: entry[:2]
    )  # fmt: skip
    lanes: list[tuple[str, list[tuple[Column, Column]]]] = []
    ended: list[float] = []
    for teacher, first, last, spans in known:
        free = (place for place, (of, _) in enumerate(lanes) if of == teacher and ended[place] <= first)
        if (place := next(free, None)) is None:
            lanes.append((teacher, [spans]))
            ended.append(last)
        else:
            lanes[place][1].append(spans)
            ended[place] = last
    if len(lanes) > _MOST_LANES:
        together: dict[str, list[tuple[Column, Column]]] = {}
        for teacher, own in lanes:
            together.setdefault(teacher, []).extend(own)
        lanes = list(together.items())
        counts = {teacher: f" ({len(own)} actors)" for teacher, own in lanes}
    else:
        seen = [teacher for teacher, _ in lanes]
        counts = {}
    labels = [f"teacher {teacher}".rstrip() + counts.get(teacher, "") for teacher, _ in lanes]
    if not counts:
        labels = [
            f"{label} {seen[: place + 1].count(teacher)}" if seen.count(teacher) > 1 else label
            for place, (label, teacher) in enumerate(zip(labels, seen, strict=True))
        ]
    return [
        (label, np.concatenate([b for b, _ in own]), np.concatenate([e for _, e in own]))
        for label, (_, own) in zip(labels, lanes, strict=True)
    ]


def _spans(clock: Clock, begins: Column, ends: Column, label: str) -> list[tuple[float, float, int, str]]:
    """Rectangles of neighbouring bins of one shade. Work of several at once is shaded by the busiest bin."""
    edges = np.linspace(LEFT, WIDTH - RIGHT, _BINS + 1)
    work = np.diff(_covered(edges, clock.at(begins), clock.at(ends))) / (edges[1] - edges[0])
    work /= max(1.0, float(work.max()))
    shades = np.where(work < 0.02, 0, np.ceil(work.clip(0, 1) * NUM_SHADES - 1e-6)).astype(int)
    cuts = np.concatenate([[0], np.flatnonzero(np.diff(shades)) + 1, [_BINS]])
    times = clock.back(edges)
    return [
        (float(edges[a]), float(edges[b] - edges[a]), int(shades[a]),
         f"{label}: {span(times[a])} to {span(times[b])}, {work[a:b].mean():.0%} of the time")
        for a, b in itertools.pairwise(cuts) if shades[a]
    ]  # fmt: skip


def _covered(edges: Column, begins: Column, ends: Column) -> Column:
    """How much of the intervals lies before each edge, summed over them."""

    def before(points: Column) -> Column:
        points = np.sort(points)
        index = np.searchsorted(points, edges)
        return index * edges - np.concatenate([[0.0], np.cumsum(points)])[index]

    return before(begins) - before(ends)


def _strip(clock: Clock, columns: Columns, name: str, label: str, y: float) -> Strip:
    """A step function: a line of the pool holds until the next."""
    ends = np.array([begin for begin, _ in clock.gaps])  # whoever was there went unheard
    times = np.concatenate([columns.get("time"), ends])
    values = np.concatenate([np.nan_to_num(columns.get(name)), np.zeros_like(ends)])
    order = np.argsort(times, kind="stable")
    times, values = decimate(times[order], values[order])
    xs = np.repeat(clock.at(times), 2)[1:]
    highest = float(values.max(initial=0))
    ys = y + STRIP - np.repeat(values, 2)[:-1] / max(highest, 1e-9) * STRIP
    return Strip(label, y, " ".join(f"{x:.1f},{v:.1f}" for x, v in zip(xs, ys, strict=True)), number(highest))


def _marks(run: Run, steps: _Steps, clock: Clock) -> list[tuple[str, float, float, str]]:
    evaluated = np.zeros(run.metrics.num_lines, np.bool_)
    for name in run.metrics.names:
        if name.startswith("eval/"):
            evaluated |= np.isfinite(run.metrics.get(name))
    found: list[tuple[str, float, float, str]] = []
    for kind, wanted, what in (
        ("evaluation", _thinned(run.metrics.get("step")[evaluated].tolist()), "evaluation after step"),
        ("checkpoint", run.checkpoint_steps, "checkpoint that is kept, of step"),
    ):
        for step in wanted:
            if (ended := steps.at(step)) is not None:
                found.append((kind, float(clock.at(np.array([ended]))[0]), TOP + LANE / 2, f"{what} {step:.0f}"))
    return found


def _thinned(marks: list[_Mark]) -> list[_Mark]:
    """Every nth of them, so that they are few enough to look at."""
    return marks[:: max(1, -(-len(marks) // _MOST_MARKS))]


def _gap(clock: Clock, begin: float, end: float) -> tuple[float, float, str]:
    first, last = clock.at(np.array([begin, end]))
    return float(first), float(last - first), span(end - begin)


def _known(times: Column) -> Column:
    return times[np.isfinite(times)]


def span(seconds: float) -> str:
    """Seconds in words of two units at most: 8 s, 4:16 min, 3:05 h, 2 d 4 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    if whole < 2 * 86400:
        return f"{whole // 3600}:{whole % 3600 // 60:02d} h"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"
