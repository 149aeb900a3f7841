"""The benchmarks compute what they say: candidates agree with each other, and ratios are within a round."""

import itertools
import sys

import pytest
import torch

from ray_kd.benchmarks import loss as bench
from ray_kd.benchmarks import timing
from ray_kd.benchmarks.plot import Bar, grouped_bars
from ray_kd.errors import ConfigError

SMALL = bench.Setting(num_tokens=24, width=16, vocab_size=400, top_k=8, ce_weight=0.5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", ["naive autograd", "autograd in forward"])
def test_the_candidates_compute_the_same_loss_and_gradients(name, temperature):
    setting = bench.Setting(**vars(SMALL) | {"temperature": temperature})
    ours, theirs = bench.draw(setting), bench.draw(setting)
    expected, got = bench.ours(setting, ours), bench.CANDIDATES[name](setting, theirs)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    expected.backward()
    got.backward()
    for one, other in zip(ours.leaves(), theirs.leaves(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-7)


def test_errors_are_against_float64():
    for dtype, bound in (("float32", 1e-5), ("bfloat16", 2e-2)):
        errors = bench.gradient_errors(bench.Setting(**vars(SMALL) | {"dtype": dtype}), "ours")
        assert errors.keys() == {"hidden", "weight"}
        assert 0 < max(errors.values()) < bound


def test_a_frozen_head_has_no_gradient_and_a_floor_of_two_products():
    setting = bench.Setting(**vars(SMALL) | {"is_head_frozen": True})
    batch = bench.draw(setting)
    assert bench.Floor(setting, batch, 16).grad_weight is None
    bench.step(setting, batch, bench.ours)()
    assert batch.hidden.grad is not None
    assert batch.weight.grad is None


def test_ratios_are_to_the_floor_of_the_same_round(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    timings = timing.in_turns(lambda: None, {"a": lambda: None, "b": lambda: next(clock)}, rounds=3)
    assert timings["a"].ratio == 1
    assert timings["b"].ratio == 2
    assert timings["floor"].median_s == 1


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_table_becomes_a_picture(tmp_path, ending):
    path = tmp_path / f"plot.{ending}"
    bars = {"ours": [Bar(1.1, 1.05, 1.2), Bar(1.2, 1.2, 1.2)], "naive": [Bar(1.8, 1.7, 1.9), Bar(2.0, 1.9, 2.2)]}
    grouped_bars(path, ["small\nfloat32", "large\nbfloat16"], bars, "time / floor", bound=1.15)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG" if ending == "png" else b"<?xml")
    assert len(content) > 5000


def test_a_plot_without_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"needs matplotlib; pip install 'ray_kd\[bench\]'"):
        grouped_bars(tmp_path / "plot.png", ["a"], {"ours": [Bar(1, 1, 1)]}, "time")
