"""The value of a schedule at a step, written from its definition; shares no code with `ray_kd/schedules.py`."""

import math


def value(shape: str, start: float, end: float, steps: int, from_step: int, step: int) -> float:
    if shape == "constant":
        return start
    done = min(max(step - from_step, 0), steps)
    if shape == "linear":
        return (start * (steps - done) + end * done) / steps
    turn = math.pi * done / steps
    # The half of a cosine wave from its crest (start) to its trough (end).
    return (start + end) / 2 + (start - end) / 2 * math.cos(turn)
