"""Scales, ticks and few enough points: what a chart needs before anything is drawn."""

import itertools
import math
from dataclasses import dataclass

import numpy as np

from ray_kd.report.folder import Column

MAX_POINTS = 600
"""Of a curve, however long the run."""

_LOG_RATIO = 50.0
"""Of the largest to the smallest value, from which on a scale is logarithmic."""
_NOISE = 1e-6
"""Of the largest value: what spans less is drawn as a flat line, as float32 is no more exact."""


def decimate(xs: Column, ys: Column, most: int = MAX_POINTS) -> tuple[Column, Column]:
    """At most this many points: of each bucket of neighbours the lowest and the highest, and the curve's ends.

    NaN counts as no value; a bucket of nothing else stays as one, which leaves a gap.
    """
    if len(xs) <= most:
        return xs, ys
    edges = np.linspace(0, len(xs), max(1, (most - 2) // 2) + 1).astype(int)
    kept = [0, len(xs) - 1]
    for start, stop in itertools.pairwise(edges):
        values = ys[start:stop]
        if np.isnan(values).all():
            kept.append(int(start))
        else:
            kept += [int(start + np.nanargmin(values)), int(start + np.nanargmax(values))]
    places = np.unique(kept)
    return xs[places], ys[places]


def smooth(ys: Column, window: int) -> Column:
    """The centred mean over so many neighbours (fewer at the ends), NaN left out."""
    is_value = np.isfinite(ys)
    sums = np.concatenate([[0.0], np.cumsum(np.where(is_value, ys, 0.0))])
    counts = np.concatenate([[0], np.cumsum(is_value)])
    at = np.arange(len(ys))
    low, high = np.maximum(at - window // 2, 0), np.minimum(at + window // 2 + 1, len(ys))
    count = counts[high] - counts[low]
    return np.where(count > 0, (sums[high] - sums[low]) / np.maximum(count, 1), np.nan)


@dataclass(frozen=True)
class Scale:
    """From values to places between `start` and `stop` of the drawing."""

    low: float
    high: float
    start: float
    stop: float
    is_log: bool = False

    @classmethod
    def of_steps(cls, steps: Column, start: float, stop: float) -> "Scale":
        """From the first step to the last."""
        low, high = float(np.nanmin(steps)), float(np.nanmax(steps))
        return cls(low, high if high > low else low + 1, start, stop)

    @classmethod
    def over(cls, values: Column, start: float, stop: float, *, may_be_log: bool = True) -> "Scale":
        """One that holds these values, at least one of them finite; logarithmic where they span decades."""
        low, high = float(np.nanmin(values)), float(np.nanmax(values))
        if may_be_log and low > 0 and high / low >= _LOG_RATIO:
            return cls(low / 1.1, high * 1.1, start, stop, is_log=True)
        largest = max(abs(low), abs(high))
        room = (high - low) * 0.05 if high - low > _NOISE * largest else largest * 0.1
        if room < 1e-300:  # nothing but zeros, or as good as that
            room = 1.0
        if 0 <= low < high * 0.5 or 0 <= low - room < room:
            return cls(0.0, high + room, start, stop)
        return cls(low - room, high + room, start, stop)

    def at(self, values: Column) -> Column:
        """The places of values."""
        low, high = (math.log(self.low), math.log(self.high)) if self.is_log else (self.low, self.high)
        shares = ((np.log(values) if self.is_log else values) - low) / (high - low)
        return self.start + shares * (self.stop - self.start)

    def ticks(self, about: int = 5) -> list[tuple[float, str]]:
        """(place, label) of round values on the scale."""
        values = self._powers(about) if self.is_log else self._multiples(about)
        texts = [number(value) for value in values] if self.is_log else _texts(values)
        return [(float(place), text) for place, text in zip(self.at(np.array(values)), texts, strict=True)]

    def _multiples(self, about: int) -> list[float]:
        step = round_step((self.high - self.low) / about)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return sorted({float(f"{index * step:.15g}") for index in range(first, last + 1)})

    def _powers(self, about: int) -> list[float]:
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        every = max(1, -(-(last - first) // (2 * about)))
        factors = (1, 2, 5) if last - first <= 2 else (1, 3) if last - first <= 3 else (1,)
        values = [factor * 10.0**power for power in range(first, last + 1, every) for factor in factors]
        return [value for value in values if self.low <= value <= self.high]


def round_step(step: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is not below a step."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9))


def number(value: float) -> str:
    """A short text of a number: at most four digits that count."""
    if value and not 1e-4 <= abs(value) < 1e7:
        return _power(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _power(value: float, digits: int = 2) -> str:
    """With so many digits after the point of the mantissa at most."""
    mantissa, _, power = f"{value:.{digits}e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}" if value else "0"


def _texts(values: list[float]) -> list[str]:
    """Of multiples of a step, in one way for all, with as many digits as tell neighbours apart."""
    step = min((b - a for a, b in itertools.pairwise(values)), default=abs(values[0]) or 1.0)
    largest = max(map(abs, values)) or 1.0
    decimals = -math.floor(math.log10(step) + 1e-9)
    digits = math.floor(math.log10(largest) + 1e-9) + decimals
    # No mixture of 0.0001 and 5e-5; but 1.000002 says more than 1.000002e0.
    if largest >= 1e7 or (decimals > 4 and (digits <= 2 or largest < 1e-4)):
        return [_power(value, max(2, digits)) for value in values]
    return [f"{value:,.{max(0, decimals)}f}" for value in values]
