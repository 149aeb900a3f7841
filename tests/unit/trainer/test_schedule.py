"""Learning rates by hand."""

import itertools

import pytest

from ray_kd.trainer.schedule import SCHEDULES, learning_rate


def rates(schedule, warmup=4, steps=12):
    return [learning_rate(s, peak=1.0, schedule=schedule, warmup_steps=warmup, num_steps=steps) for s in range(1, 13)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_is_linear_and_reaches_the_peak(schedule):
    assert rates(schedule)[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_decay():
    assert rates("constant")[-1] == 1.0
    assert rates("linear")[4:] == pytest.approx([1 - i / 8 for i in range(8)])
    cosine = rates("cosine")[4:]
    assert cosine[4] == pytest.approx(0.5)
    assert all(a > b > 0 for a, b in itertools.pairwise(cosine))


def test_a_warm_up_longer_than_the_run_only_warms_up():
    assert rates("cosine", warmup=100)[-1] == pytest.approx(0.12)


def test_no_warm_up_starts_at_the_peak():
    assert rates("cosine", warmup=0)[0] == 1.0
