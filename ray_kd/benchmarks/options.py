"""The command line that the benchmark jobs share: what could not be used is refused before anything is timed."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from ray_kd import plot

FORMATS = (".png", ".svg", ".pdf")


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The description as it is written, and the default behind each option's help."""


def add_common(parser: argparse.ArgumentParser, rounds: int) -> None:
    """--rounds, --out and --plot."""
    parser.add_argument("--rounds", type=whole(1), default=rounds, help="turns of each candidate that count")
    parser.add_argument("--out", type=out_path, metavar="FILE", help="write the figures as JSON, as they come")
    parser.add_argument("--plot", type=plot_path, metavar="FILE", help="draw them at the end, as .png, .svg or .pdf")


def whole(least: int) -> Callable[[str], int]:
    """The type of a whole number of at least that."""

    def number(text: str) -> int:
        if not text.removeprefix("-").isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of {least} or more")
        return int(text)

    return number


def positive(text: str) -> float:
    """The type of a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number above 0")
    return value


def shape(text: str) -> tuple[int, int, int]:
    """The type of tokens x width x vocabulary, such as 1024x576x49152."""
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"'{text}' is not tokens x width x vocabulary, such as 1024x576x49152")
    return int(parts[0]), int(parts[1]), int(parts[2])


def out_path(text: str) -> Path:
    """The type of a file to write."""
    path = Path(text)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"'{text}' is no file in a folder that exists")
    return path


def plot_path(text: str) -> Path:
    """The type of a picture to write."""
    path = out_path(text)
    if path.suffix not in FORMATS:
        raise argparse.ArgumentTypeError(f"'{text}' ends in none of {', '.join(FORMATS)}")
    if not plot.is_possible():
        raise argparse.ArgumentTypeError("a plot needs matplotlib: pip install '.[bench]'")
    return path
