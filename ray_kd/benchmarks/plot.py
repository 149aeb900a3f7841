"""A benchmark's table as a picture: groups of bars, one bar a candidate, whiskers for the quartiles."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ray_kd import plot


@dataclass(frozen=True)
class Bar:
    """A figure with the quartiles around it."""

    value: float
    low: float
    high: float


def grouped_bars(
    path: Path, groups: Sequence[str], bars: Mapping[str, Sequence[Bar]], label: str, bound: float | None = None
) -> None:
    """Write a picture, in the format of the path's ending. bars: candidate -> one bar a group; bound: a line across."""
    figure, axes = plot.new_axes(max(6.0, 1.6 * len(groups)), 4.5)
    width = 0.8 / len(bars)
    for place, (name, values) in enumerate(bars.items()):
        middles = [bar.value for bar in values]
        whiskers = [
            [max(0.0, bar.value - bar.low) for bar in values],
            [max(0.0, bar.high - bar.value) for bar in values],
        ]
        places = [group + place * width for group in range(len(groups))]
        axes.bar(places, middles, width, yerr=whiskers, label=name)
    if bound is not None:
        axes.axhline(bound, color="black", linewidth=0.8, linestyle="--", label=f"bound: {bound:g}")
    axes.set_xticks([group + 0.4 - width / 2 for group in range(len(groups))], groups, fontsize=8)
    axes.set_ylabel(label)
    axes.legend(fontsize=8)
    plot.save(figure, path)
