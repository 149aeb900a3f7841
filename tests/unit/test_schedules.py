"""A number over the optimiser steps: its value against the definition, its ends exactly, and what is refused."""

import pytest

from ray_kd import schedules
from ray_kd.errors import ConfigError
from tests.reference.schedules import value


@pytest.mark.parametrize("shape", schedules.SHAPES)
@pytest.mark.parametrize("from_step", [1, 4])
@pytest.mark.parametrize(("start", "end"), [(4.0, 1.0), (0.0, 0.3)])
@pytest.mark.parametrize("steps", [1, 7])
def test_the_value_is_that_of_the_definition(shape, from_step, start, end, steps):
    entries = {"schedule": shape, "start": start}
    if shape != "constant":
        entries |= {"end": end, "steps": steps, "from_step": from_step}
    schedule = schedules.parse(entries, "key")
    seen = [schedule(step) for step in range(1, 16)]
    assert seen == pytest.approx([value(shape, start, end, steps, from_step, step) for step in range(1, 16)], rel=1e-15)
    assert seen[0] == start
    assert seen[-1] == (start if shape == "constant" else end)
    low, high = min(schedule.values), max(schedule.values)
    assert all(low <= one <= high for one in seen)


def test_a_resumed_run_asks_for_the_same_values():
    """Nothing but the step goes in: a schedule made anew in the middle goes on where the first one was."""
    entries = {"schedule": "cosine", "start": 3.0, "end": 0.1, "steps": 11}
    whole = [schedules.parse(entries, "key")(step) for step in range(1, 20)]
    resumed = schedules.parse(dict(entries), "key")
    assert [resumed(step) for step in range(8, 20)] == whole[7:]


def test_a_number_is_a_constant():
    schedule = schedules.parse(2, "key")
    assert (schedule(1), schedule(10**6), schedule.is_constant, schedule.values) == (2.0, 2.0, True, (2.0,))


GOOD = {"schedule": "linear", "start": 1, "end": 0, "steps": 3}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("abc", r"^key is 'abc': allowed is a number, or \{schedule"),
        (True, "^key is True: allowed is a number"),
        (None, "^key is None: allowed is a number"),
        (float("nan"), "^key is nan: allowed is a number"),
        ({"start": 1}, r"^key\.schedule is None: allowed is constant \| linear \| cosine"),
        (GOOD | {"schedule": "cos"}, r"^key\.schedule is 'cos': allowed is constant"),
        ({"schedule": "linear", "start": 1, "end": 2}, r"^key\.steps is missing: a linear schedule needs it"),
        ({"schedule": "cosine", "end": 1, "steps": 2}, r"^key\.start is missing: a cosine schedule needs it"),
        ({"schedule": "constant"}, r"^key\.start is missing"),
        ({"schedule": "constant", "start": 1, "end": 2}, "^key: unknown entry 'end' of a constant schedule"),
        (GOOD | {"step": 3}, r"^key: unknown entry 'step'.*did you mean 'steps'\?"),
        (GOOD | {"steps": 0}, r"^key\.steps is 0: allowed is a number of steps, 1 or more"),
        (GOOD | {"steps": 2.5}, r"^key\.steps is 2\.5"),
        (GOOD | {"from_step": 0}, r"^key\.from_step is 0"),
        (GOOD | {"end": "low"}, r"^key\.end is 'low': allowed is a number"),
        (GOOD | {"start": float("inf")}, r"^key\.start is inf"),
    ],
)
def test_what_is_no_schedule_is_one_line(entries, message):
    with pytest.raises(ConfigError, match=message) as error:
        schedules.parse(entries, "key")
    assert "\n" not in str(error.value)
