"""The benchmarks compute what they say: candidates agree with each other, and ratios are within a round."""

import itertools

import pytest
import torch

from ray_kd.benchmarks import loss as bench
from ray_kd.benchmarks import timing

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
