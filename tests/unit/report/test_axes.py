"""Scales and few enough points: extremes stay, ticks are round and within."""

import numpy as np
import pytest

from ray_kd.report.axes import Scale, decimate, number, smooth
from ray_kd.report.timeline import Clock, span


@pytest.mark.parametrize("count", [601, 5_000, 100_000])
def test_extremes_survive_decimation(count):
    rng = np.random.default_rng(0)
    xs, ys = np.arange(count, dtype=float), rng.normal(size=count)
    low, high = rng.choice(count, 2, replace=False)
    ys[low], ys[high] = -50.0, 50.0
    few_xs, few_ys = decimate(xs, ys, 600)
    assert len(few_xs) <= 600
    assert (np.diff(few_xs) > 0).all()
    assert (few_ys == ys[few_xs.astype(int)]).all()
    assert {low, high, 0, count - 1} <= set(few_xs.astype(int))
    for at in np.array_split(np.arange(count), 50):
        few = few_ys[(few_xs >= at[0]) & (few_xs <= at[-1])]
        assert few.max() >= np.quantile(ys[at], 0.9)
        assert few.min() <= np.quantile(ys[at], 0.1)


def test_few_points_are_left_alone_and_holes_stay():
    xs = np.arange(10.0)
    assert decimate(xs, xs, 10)[0] is xs
    ys = np.ones(10_000)
    ys[3_000:4_000] = np.nan
    few_xs, few_ys = decimate(np.arange(10_000.0), ys, 100)
    hole = np.isnan(few_ys)
    assert hole.any()
    assert ((few_xs >= 3_000) & (few_xs < 4_000))[hole].all()


def test_a_moving_mean_leaves_holes_out():
    ys = np.array([1.0, 3.0, np.nan, 5.0, 7.0])
    assert smooth(ys, 3) == pytest.approx([2.0, 2.0, 4.0, 6.0, 6.0])
    assert np.isnan(smooth(np.full(3, np.nan), 3)).all()


@pytest.mark.parametrize(
    ("values", "is_log"),
    [([1.0, 20.0], False), ([0.01, 20.0], True), ([0.0, 20.0], False), ([5.0, 5.0], False), ([0.0, 0.0], False),
     ([-3.0, 9.0], False), ([1e-9, 1e9], True), ([256.25, 256.35], False), ([1e-5, 2e-4], False)],
)  # fmt: skip
def test_ticks_are_on_the_scale_and_differ(values, is_log):
    scale = Scale.over(np.array(values), 200.0, 10.0)
    assert scale.is_log == is_log
    ticks = scale.ticks()
    assert 2 <= len(ticks) <= 12
    assert all(10 - 1e-6 <= place <= 200 + 1e-6 for place, _ in ticks)
    assert len({text for _, text in ticks}) == len(ticks)
    places = scale.at(np.array(values))
    assert ((places >= 10) & (places <= 200)).all()


@pytest.mark.parametrize("values", [
    [1.0, 1.0 + 6e-8], [0.5, 0.5 + 1e-13], [1.0, 1.0 - 1.1e-16], [3e-14, 9e-14], [5e-324, 2e-323], [-1.0, -1.0 + 6e-8],
    [1.0, 1.000003], [1.00002e-5, 1.00009e-5], [123_456_701.0, 123_458_709.0], [5.0e6, 1.9e7], [2e15, 2e15 + 1],
])  # fmt: skip
def test_values_that_are_almost_the_same_have_ticks_that_differ(values):
    scale = Scale.over(np.array(values), 200.0, 10.0)
    ticks = scale.ticks()
    assert 2 <= len(ticks) <= 12
    assert len({text for _, text in ticks}) == len(ticks)
    assert all(len(text) <= 11 for _, text in ticks), "there is room for no more"
    assert ((scale.at(np.array(values)) >= 10) & (scale.at(np.array(values)) <= 200)).all()


def test_noise_of_floats_is_a_flat_line():
    rng = np.random.default_rng(0)
    scale = Scale.over(1 + rng.uniform(-6e-8, 6e-8, 1000), 200.0, 10.0)
    assert np.ptp(scale.at(1 + np.array([-6e-8, 6e-8]))) < 0.01
    assert [text for _, text in scale.ticks()] == ["0.90", "0.95", "1.00", "1.05", "1.10"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (3.28227, "3.282"), (0.00005, "5e-5"), (123456.7, "123,457"), (2.5e9, "2.5e9"), (-0.5, "-0.5")],
)
def test_numbers_are_short(value, text):
    assert number(value) == text


def test_a_long_gap_is_short_and_times_stay_true():
    events = np.array([0.0, 100.0, 100_000.0, 100_100.0])
    clock = Clock(events, np.array([0.0, 100_000.0]))
    places = clock.at(events)
    assert places[1] - places[0] == pytest.approx(places[3] - places[2])
    assert places[2] - places[1] < 0.2 * (places[1] - places[0])
    assert clock.back(places) == pytest.approx(events)
    assert (np.diff([place for place, _ in clock.ticks()]) > 0).all()


@pytest.mark.parametrize(
    ("seconds", "text"), [(8.2, "8 s"), (256, "4:16 min"), (11_100, "3:05 h"), (187_200, "2 d 4 h")]
)
def test_spans_in_words(seconds, text):
    assert span(seconds) == text
