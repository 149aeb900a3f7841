"""The curves of a run over its steps, and charts of them: geometry for the template, which does the drawing."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from ray_kd.report.axes import MAX_POINTS, Scale, decimate, number, smooth
from ray_kd.report.folder import Column, Columns, Run

WIDTH, HEIGHT = 480, 230
LEFT, RIGHT, TOP, BOTTOM = 58, 24, 8, 40
NUM_COLOURS, NUM_DASHES = 7, 4
"""Of the style sheet: neighbours differ in both, so that a curve is known without its colour."""

_SMOOTHED_FROM = 80
"""Points of a curve, from which on a mean is drawn over them."""
_RATE, _OF_LOSS = _SCHEDULES = ("Learning rate", "Schedules of the loss")


@dataclass(frozen=True)
class Series:
    """One curve: values over steps, NaN where there is none."""

    name: str
    steps: Column
    values: Column
    is_sparse: bool = False
    """Few points far from each other: they are marked."""


@dataclass
class Line:
    """A curve as it is drawn."""

    name: str
    style: int
    parts: list[str]
    """Points of polylines in the drawing, one after each gap."""
    mean: str = ""
    """A polyline of the means, where the curve is long."""
    marks: list[tuple[str, str]] = field(default_factory=list)
    data: str = ""
    """The points themselves, step and value, for the script."""

    @property
    def colour(self) -> int:
        return self.style % NUM_COLOURS

    @property
    def dash(self) -> int:
        return self.style % NUM_DASHES


@dataclass
class Chart:
    """Several curves over the steps, with one scale."""

    title: str
    unit: str
    series: list[Series]
    max_points: int = MAX_POINTS
    is_noisy: bool = True
    """Measured; a schedule is not: it has no mean, and a linear scale."""

    @cached_property
    def x(self) -> Scale:
        return Scale.of_steps(np.concatenate([one.steps for one in self.series]), LEFT, WIDTH - RIGHT)

    @cached_property
    def y(self) -> Scale:
        values = np.concatenate([one.values for one in self.series])
        return Scale.over(values, HEIGHT - BOTTOM, TOP, may_be_log=self.is_noisy)

    @property
    def x_ticks(self) -> list[tuple[float, str]]:
        ticks = [(place, text.removesuffix(".0")) for place, text in self.x.ticks(6)]
        return [tick for tick in ticks if "." not in tick[1]]  # no step is half

    @property
    def y_ticks(self) -> list[tuple[float, str]]:
        return self.y.ticks()

    @property
    def label(self) -> str:
        """What the chart shows, in words."""
        return f"{self.title}, {self.unit}. " + "; ".join(map(_in_words, self.series))

    @cached_property
    def lines(self) -> list[Line]:
        return [self._line(place, one) for place, one in enumerate(self.series)]

    def _line(self, place: int, one: Series) -> Line:
        steps, values = decimate(one.steps, one.values, self.max_points)
        line = Line(one.name, place, list(self._polylines(steps, values)))
        is_value = np.isfinite(values)
        pairs = list(zip(steps[is_value], values[is_value], strict=True))
        line.data = " ".join(f"{step:.0f},{value:.4g}" for step, value in pairs)
        if one.is_sparse and len(pairs) <= 60:
            line.marks = [tuple(point.split(",")) for part in line.parts for point in part.split()]  # type: ignore[misc]
        elif self.is_noisy and not one.is_sparse and len(one.values) >= _SMOOTHED_FROM:
            means = smooth(one.values, max(5, len(one.values) // 30))
            at = np.unique(np.linspace(0, len(means) - 1, 150).astype(int))
            line.mean = " ".join(self._polylines(one.steps[at], means[at]))
        else:  # a value between gaps makes no line
            line.marks = [tuple(part.split(",")) for part in line.parts if " " not in part]  # type: ignore[misc]
        return line

    def _polylines(self, steps: Column, values: Column) -> Iterator[str]:
        xs, ys = self.x.at(steps), self.y.at(values)
        is_value = np.isfinite(values)
        for run in np.split(np.arange(len(xs)), np.flatnonzero(np.diff(is_value)) + 1):
            if len(run) and is_value[run[0]]:
                yield " ".join(f"{xs[i]:.1f},{ys[i]:.1f}" for i in run)


def charts_of(run: Run) -> list[Chart]:
    """All charts of one run that it has numbers for."""
    found = []
    for title, unit, wanted in _groups(run.metrics):
        series = [made for name, label in wanted if (made := _series(run, name, label)) is not None]
        if series:
            found.append(Chart(title, unit, _without_twins(series), is_noisy=title not in _SCHEDULES))
    return found


def charts_over(runs: Sequence[Run], names: Sequence[str]) -> list[Chart]:
    """The charts of several runs, each with one curve a run. names: of the runs, as the legend has them."""
    # Nine charts of so many points stay below a megabyte.
    most = max(40, min(MAX_POINTS, 4000 // len(runs)))
    wanted: dict[str, tuple[str, str]] = {}
    for run in runs:
        for title, unit, curves in _groups(run.metrics):
            for name, label in curves:
                is_alone = len(curves) == 1 or label == title.lower()
                wanted.setdefault(name, (title if is_alone else f"{title}: {label}", unit))
    found = []
    for name, (title, unit) in wanted.items():
        made = [_series(run, name, of) for run, of in zip(runs, names, strict=True)]
        if any(made):
            # A run without this curve keeps its place in the legend: the others keep their colours.
            series = [one or _nothing(of) for one, of in zip(made, names, strict=True)]
            is_noisy = title.partition(":")[0] not in _SCHEDULES
            found.append(Chart(title, unit, series, most, is_noisy))
    return found


def _groups(metrics: Columns) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """(title, unit, [(column, label)]) of the charts, in their order."""
    names = metrics.names
    terms = [name for name in names if re.fullmatch(r"train/.+_loss(_\d+)?", name)]
    features = [name for name in terms if name not in ("train/kd_loss", "train/ce_loss")]
    weights = [name for name in names if name.startswith("train/weight/")]
    rates = [name for name in names if name.startswith("train/learning_rate")]
    return [
        ("Loss", "nats a token", [
            ("train/loss", "loss"), ("train/kd_loss", "KD term"), ("train/ce_loss", "cross-entropy (labels)"),
        ]),
        ("Feature terms, before their weights", "mean", [(name, _plain(name)) for name in features]),
        ("Held-out KL", "nats a token", [
            ("eval/kl", "KL(teacher || student)"), ("eval/topk_bucket_kl", "top-k + bucket KL"),
        ]),
        ("Held-out perplexity", "perplexity", [("eval/perplexity", "perplexity")]),
        ("Top-1 agreement with the teacher", "share of the tokens", [
            ("train/top1_agreement", "training rows"), ("eval/top1_agreement", "held-out rows"),
        ]),
        ("Throughput", "tokens/s", [
            ("train/tokens_per_second", "student pool"), ("teacher/tokens_per_second", "one teacher"),
        ]),
        ("Waiting for the teacher", "seconds a step", [("train/data_wait_s", "wait")]),
        (_RATE, "", [(name, _plain(name)) for name in rates]),
        ("Gradient norm, before clipping", "L2", [("train/grad_norm", "gradient norm")]),
        ("Probability within the teacher's top k", "share", [("teacher/topk_mass", "top-k mass")]),
        ("On the wire", "bytes a token", [("teacher/bytes_per_token", "bytes")]),
        (_OF_LOSS, "", [
            ("train/temperature", "temperature"), *((name, f"weight of {_plain(name)}") for name in weights),
        ]),
    ]  # fmt: skip


def _series(run: Run, name: str, label: str) -> Series | None:
    """A column of the metrics, and where it is held-out the student before; None where it has no number."""
    steps, values = run.metrics.get("step"), run.metrics.get(name)
    is_held_out = name.startswith("eval/")
    before = run.eval_before.get(name.removeprefix("eval/")) if is_held_out else None
    if is_held_out:
        steps, values = steps[np.isfinite(values)], values[np.isfinite(values)]
    if before is not None and len(values):  # alone it is a number for the table
        steps, values = np.append(0.0, steps), np.append(float(before), values)
    values = np.where(np.isfinite(values), values, np.nan)
    return Series(label, steps, values, is_sparse=is_held_out) if np.isfinite(values).any() else None


def _nothing(name: str) -> Series:
    return Series(f"{name} (none)", np.array([np.nan]), np.array([np.nan]))


def _without_twins(series: list[Series]) -> list[Series]:
    """Curves that are the same at every step are one, with both names."""
    kept: list[Series] = []
    for one in series:
        for place, other in enumerate(kept):
            if np.array_equal(one.values, other.values, equal_nan=True) and np.array_equal(one.steps, other.steps):
                kept[place] = Series(f"{other.name} = {one.name}", one.steps, one.values, one.is_sparse)
                break
        else:
            kept.append(one)
    return kept


def _plain(name: str) -> str:
    return name.rpartition("/")[2].replace("_", " ")


def _in_words(one: Series) -> str:
    is_value = np.isfinite(one.values)
    if not is_value.any():
        return one.name
    steps, values = one.steps[is_value], one.values[is_value]
    return (
        f"{one.name}: {number(values[0])} at step {steps[0]:.0f}, {number(values[-1])} at step {steps[-1]:.0f}, "
        f"between {number(values.min())} and {number(values.max())}"
    )
