"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

import math

SCHEDULES = ("cosine", "linear", "constant")


def learning_rate(step: int, *, peak: float, schedule: str, warmup_steps: int, num_steps: int) -> float:
    """Learning rate of optimiser step `step` (from 1): linear warm-up to `peak`, then cosine or linear to 0.

    The last step still has a positive rate: the decay reaches 0 one step after it.
    """
    if step <= warmup_steps:
        return peak * step / warmup_steps
    if schedule == "constant":
        return peak
    progress = (step - warmup_steps - 1) / max(1, num_steps - warmup_steps)
    if schedule == "linear":
        return peak * (1.0 - progress)
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
