"""The look that all pictures share. matplotlib is imported when one is drawn."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TEACHER, STUDENT, REFERENCE = "tab:orange", "tab:blue", "black"
"""Colours, the same in every picture."""


def is_possible() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def new_axes(width: float = 6.0, height: float = 4.0) -> "tuple[Figure, Axes]":
    """A picture of one plot, in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.4, alpha=0.5)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)
    return figure, axes


def save(figure: "Figure", path: Path) -> None:
    """Write it in the format of the path's ending."""
    figure.savefig(path, dpi=120)
