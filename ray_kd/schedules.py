"""A number that may change over the optimiser steps, as a pure function of the step: nothing to save or to restore.

    value(s) = start + (end - start) shape(x),   x = clip((s - from_step) / steps, 0, 1)

linear: shape(x) = x. cosine: shape(x) = (1 - cos(pi x)) / 2. constant: start at every step. Steps count from 1.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from ray_kd import plugins
from ray_kd.errors import ConfigError

SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda _: 0.0,
    "linear": lambda x: x,
    "cosine": lambda x: (1.0 - math.cos(math.pi * x)) / 2.0,
}


@dataclass(frozen=True)
class Schedule:
    """Call it with the optimiser step, from 1; build it with `parse`, which checks the values."""

    schedule: str
    """One of SHAPES."""
    start: float
    """The value up to from_step."""
    end: float = 0.0
    """The value from step from_step + steps on; has no part in a constant."""
    steps: int = 1
    """Optimiser steps from start to end; has no part in a constant."""
    from_step: int = 1
    """The last step of value start; has no part in a constant."""

    def __call__(self, step: int) -> float:
        """The value at an optimiser step. Exactly start and exactly end outside the change."""
        if self.is_constant or step <= self.from_step:
            return self.start
        if step >= self.from_step + self.steps:
            return self.end
        return self.start + (self.end - self.start) * SHAPES[self.schedule]((step - self.from_step) / self.steps)

    @property
    def is_constant(self) -> bool:
        """Whether the value is the same at every step."""
        return self.schedule == "constant"

    def is_zero_until(self, step: int | None) -> bool:
        """Whether it is 0 at every step up to this one; at every step there is, without one."""
        # Between start and end it only rises or only falls.
        return self.start == 0.0 and (0.0 if self.is_constant else self.end if step is None else self(step)) == 0.0

    @property
    def values(self) -> tuple[float, ...]:
        """The values between which all others lie."""
        return (self.start,) if self.is_constant else (self.start, self.end)


def parse(value: Any, key: str) -> Schedule:
    """A schedule from the config: a number, or {schedule: constant | linear | cosine, start, end, steps, from_step}.

    key: where the value stands in the config, for messages. Raises ConfigError for what is neither, an unknown or
    missing entry, a number that is not finite, and entries that have no part in a constant.
    """
    if not isinstance(value, Mapping):
        return Schedule("constant", _number(value, key, "a number, or {schedule, start, end, steps, from_step}"))
    shape = value.get("schedule")
    if shape not in SHAPES:
        raise ConfigError(f"{key}.schedule is {shape!r}: allowed is {' | '.join(SHAPES)}")
    taken = ["schedule", "start"] if shape == "constant" else [field.name for field in fields(Schedule)]
    for name in value:
        if name not in taken:
            raise ConfigError(
                f"{key}: unknown entry '{name}' of a {shape} schedule{plugins.nearest(str(name), taken)}. "
                f"Allowed: {', '.join(taken)}"
            )
    for name in ("start",) if shape == "constant" else ("start", "end", "steps"):
        if name not in value:
            raise ConfigError(f"{key}.{name} is missing: a {shape} schedule needs it")
    start = _number(value["start"], f"{key}.start")
    if shape == "constant":
        return Schedule(shape, start)
    return Schedule(
        shape,
        start,
        end=_number(value["end"], f"{key}.end"),
        steps=_count(value["steps"], f"{key}.steps"),
        from_step=_count(value.get("from_step", 1), f"{key}.from_step"),
    )


def _number(value: Any, key: str, allowed: str = "a number") -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):
        raise ConfigError(f"{key} is {value!r}: allowed is {allowed}")
    return float(value)


def _count(value: Any, key: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{key} is {value!r}: allowed is a number of steps, 1 or more")
    return value
