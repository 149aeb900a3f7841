"""Timing on a machine that others use too: candidates take turns, and what counts is the ratio within a round."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """One candidate. Ratios are to the floor's time in the same round."""

    median_s: float
    ratio: float
    """Median over the rounds."""
    low: float
    """Lower quartile of the ratio."""
    high: float
    """Upper quartile of the ratio."""


def in_turns(
    floor: Callable[[], object], candidates: Mapping[str, Callable[[], object]], rounds: int
) -> dict[str, Timing]:
    """Time each candidate once a round, after one round that is not counted. The floor is timed before and after."""
    floors: list[float] = []
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    ratios: dict[str, list[float]] = {name: [] for name in candidates}
    for round_ in range(rounds + 1):
        before = _seconds(floor)
        taken = {name: _seconds(call) for name, call in candidates.items()}
        base = (before + _seconds(floor)) / 2
        if round_ == 0:
            continue
        floors.append(base)
        for name, value in taken.items():
            seconds[name].append(value)
            ratios[name].append(value / base)
    timings = {"floor": Timing(statistics.median(floors), 1.0, 1.0, 1.0)}
    for name in candidates:
        low, middle, high = statistics.quantiles(ratios[name], n=4) if rounds > 1 else ratios[name] * 3
        timings[name] = Timing(statistics.median(seconds[name]), middle, low, high)
    return timings


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
