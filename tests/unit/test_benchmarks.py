"""The benchmarks compute what they say: candidates agree with each other, and ratios are within a round."""

import argparse
import itertools
import json

import pytest
import torch

from ray_kd import config
from ray_kd.benchmarks import loss as bench
from ray_kd.benchmarks import options, pipeline, timing
from ray_kd.benchmarks.plot import Bar, grouped_bars
from tests.fake_prepared import write_prepared

SMALL = bench.Setting(num_tokens=24, width=16, vocab_size=400, top_k=8, ce_weight=0.5)


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "drop"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", ["naive autograd", "autograd in forward"])
def test_the_candidates_compute_the_same_loss_and_gradients(name, temperature, tail):
    setting = bench.Setting(**vars(SMALL) | {"temperature": temperature, "tail": tail})
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


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (options.plot_path, "b.foo", r"'b.foo' ends in none of .png, .svg, .pdf"),
        (options.out_path, "/nowhere/b.json", r"'/nowhere/b.json' is no file in a folder that exists"),
        (options.shape, "64,32,1000", "is not tokens x width x vocabulary"),
        (options.shape, "64x0x1000", "is not tokens x width x vocabulary"),
        (options.whole(1), "0", "'0' is not a whole number of 1 or more"),
        (options.whole(1), "two", "'two' is not a whole number"),
        (options.positive, "0", "'0' is not a number above 0"),
        (options.positive, "nan", "'nan' is not a number above 0"),
    ],
)
def test_what_cannot_be_used_is_said_before_anything_is_timed(kind, text, message):
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        kind(text)


def test_what_can_be_used_is_read(tmp_path, monkeypatch):
    assert options.plot_path(f"{tmp_path}/b.svg") == tmp_path / "b.svg"
    assert (options.shape("64x32x1000"), options.whole(1)("3"), options.positive("2.5")) == ((64, 32, 1000), 3, 2.5)
    monkeypatch.setattr(options.plot, "is_possible", lambda: False)
    with pytest.raises(argparse.ArgumentTypeError, match=r"needs matplotlib: pip install '.\[bench\]'"):
        options.plot_path(f"{tmp_path}/b.png")


@pytest.mark.parametrize(("temperature", "factor"), [(1.0, 1.0), (2.0, 4.0)])
def test_ours_and_ligers_dense_jsd_are_one_but_for_the_square_of_the_temperature(temperature, factor):
    setting = bench.Setting(**vars(SMALL) | {"temperature": temperature, "ce_weight": 0.0})
    ours, theirs = bench.draw(setting), bench.draw(setting)
    expected, got = bench.ours_dense(setting, ours), factor * bench.liger_jsd(setting, theirs)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    expected.backward()
    got.backward()
    for one, other in zip(ours.leaves(), theirs.leaves(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-3, atol=1e-6)


def test_reading_is_timed_in_three_orders(tmp_path):
    prepared = write_prepared(tmp_path / "prepared", num_rows=600)
    (tmp_path / "run").mkdir()
    settings = ["run.dir=x", "data.source=text", "teacher.model=t", "student.model=s"]
    (tmp_path / "run" / "config.yaml").write_text(config.to_yaml(config.load(None, settings)))
    work = pipeline.Work(str(tmp_path / "run"), str(prepared), "s", 10, 1, 1)
    costs = pipeline.read_costs(work)
    assert list(costs) == ["in the file's order", "in an epoch's", "at random"]
    assert all(0 < cost < 1e5 for cost in costs.values())


def test_a_runs_timeline_is_read_from_what_it_wrote(tmp_path):
    """Ten steps of 2 s from 100 on; the teacher is busy for a second of every step but the first three."""
    lines = [
        {"step": step, "time": 100.0 + 2 * step, "train/data_wait_s": 0.1, "train/target_tokens": 50,
         "teacher/bytes_per_token": 256.0}
        for step in range(1, 11)
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "teacher").mkdir()
    blocks = [{"slots": [step], "time": 101.0 + 2 * step, "busy_s": 1.0} for step in range(3, 10)]
    (tmp_path / "teacher" / "one.jsonl").write_text("".join(json.dumps(block) + "\n" for block in blocks))
    timeline = pipeline.of_run(tmp_path, started=90.0)
    assert pipeline.WARM_UP_STEPS == 3
    assert timeline.first_step_s == 12.0
    assert timeline.seconds == 14.0
    assert timeline.tokens_per_second == 25.0
    assert timeline.wait_fraction == pytest.approx(0.05)
    assert timeline.teacher_busy == pytest.approx(0.5)
    assert timeline.to_dict()["nbytes"] == 256.0
