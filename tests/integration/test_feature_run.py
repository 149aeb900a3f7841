"""A run with every kind of term on a real Ray, between models of different widths: what it logs, that its terms fall,
what it leaves, and that a run that was killed and went on is bitwise the same, projectors included."""

import json
import re
import signal

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ray_kd import checkpoint
from ray_kd.trainer.fragments import read_parameters
from tests.tiny import tiny_llama

pytestmark = pytest.mark.ray

TERMS = [
    {"kind": "kd", "weight": 1.0},
    {"kind": "ce", "weight": {"schedule": "linear", "start": 0.2, "end": 0.6, "steps": 8}},
    {"kind": "hidden_state", "weight": 0.1, "layers": [1, -1], "projector": "linear", "projector_learning_rate": 1e-2},
    {"kind": "attention", "weight": 20.0, "measure": "kl", "layers": [-1], "heads": "mean", "mask": "attention"},
]
LOSSES = ("kd_loss", "ce_loss", "hidden_state_loss", "attention_loss")
PROJECTORS = {f"hidden_state.{place}.weight": [64, 48] for place in (0, 1)}
"""Width of the teacher x width of the student, for each of two layers."""


@pytest.fixture(scope="module")
def settings(jobs):
    """A student of 48 channels for a teacher of 64."""
    tiny_llama(jobs.folder / "narrow", layers=2, hidden=48, seed=2)
    return (
        f"student.model={jobs.folder}/narrow", "teacher.payload=features", f"loss.terms={json.dumps(TERMS)}",
        "train.max_steps=null", "train.epochs=2", "train.checkpoint_every=3", "train.learning_rate=3.0e-3",
        "teacher.wire=compact",
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(jobs, settings):
    return jobs.distill("features", *settings)


def test_the_terms_fall_and_sum_to_the_loss(finished):
    assert finished.exit_code == 0, finished.stderr
    assert "loss.terms[3]: the student's attention is eager" in finished.stdout
    assert re.search(r"teacher\.payload=features takes up to \d+ bytes a token", finished.stdout)
    metrics = finished.metrics
    for line in metrics:
        step = line["step"]
        weights = (1.0, 0.2 + 0.4 * min(step - 1, 8) / 8, 0.1, 20.0)
        assert line["train/weight/ce"] == pytest.approx(weights[1])
        assert "train/weight/kd" not in line
        weighed = sum(weight * line[f"train/{name}"] for weight, name in zip(weights, LOSSES, strict=True))
        assert line["train/loss"] == pytest.approx(weighed, rel=1e-5)
    for name in LOSSES:
        values = [line[f"train/{name}"] for line in metrics]
        quarter = max(1, len(values) // 4)
        assert sum(values[-quarter:]) < sum(values[:quarter]), name


def test_projectors_are_trained_and_kept_and_left_out_of_the_model(finished):
    newest = checkpoint.newest_verified(finished.run_dir / "checkpoints")
    saved = dict(read_parameters(newest, prefix="projectors."))
    assert {name: list(value.shape) for name, value in saved.items()} == PROJECTORS
    final = finished.run_dir / "final"
    assert not [name for name in load_file(final / "model.safetensors") if "projector" in name]
    model = AutoModelForCausalLM.from_pretrained(final)
    assert model.config.hidden_size == 48
    student = dict(read_parameters(newest, prefix="student."))
    assert all(torch.equal(parameter, student[name]) for name, parameter in model.named_parameters())
    card = (final / "README.md").read_text()
    shown = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert shown["loss"]["terms"] == TERMS


def test_killed_and_gone_on_is_the_same_run(local_jobs, jobs, settings, finished):
    """SIGKILL of the driver between two checkpoints, which also takes its local Ray down; the same command again."""
    local_jobs.data.write_bytes(jobs.data.read_bytes())
    overrides = (*settings, f"teacher.model={jobs.teacher}")
    process = local_jobs.start("features-killed", *overrides)
    local_jobs.wait_for_step("features-killed", 5, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    resumed = local_jobs.distill("features-killed", *overrides)
    assert resumed.exit_code == 0, resumed.stderr
    assert resumed.summary["restarts"] == 1
    kept = [key for key in finished.metrics[0] if key.startswith(("train/", "data/row", "data/slot"))]
    kept = [key for key in kept if key not in ("train/tokens_per_second", "train/data_wait_s")]
    assert {f"train/{name}" for name in LOSSES} <= set(kept)
    assert [[line[key] for key in kept] for line in resumed.metrics] == [
        [line[key] for key in kept] for line in finished.metrics
    ]
    ours, theirs = (
        dict(read_parameters(checkpoint.newest_verified(one.run_dir / "checkpoints"))) for one in (resumed, finished)
    )
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


@pytest.mark.extended
def test_zero_3_on_two_workers_trains_the_same_objective(jobs, settings, finished):
    """Counts are those of both ranks, and partitioned projectors are projectors."""
    spread = jobs.distill("features-zero3", *settings, "train.num_workers=2", "train.zero_stage=3")
    assert spread.exit_code == 0, spread.stderr
    for one, whole in zip(spread.metrics, finished.metrics, strict=True):
        for name in ("loss", *LOSSES):
            assert one[f"train/{name}"] == pytest.approx(whole[f"train/{name}"], rel=2e-3), (one["step"], name)


@pytest.mark.extended
def test_features_from_the_cache_are_those_that_were_computed(jobs, settings, finished):
    cached = jobs.distill("features-cached", *settings, "teacher.cache.mode=write_through")
    assert cached.exit_code == 0, cached.stderr
    assert cached.summary["teacher_rows_from_cache"] > 0
    for one, whole in zip(cached.metrics, finished.metrics, strict=True):
        for name in ("loss", *LOSSES):
            assert one[f"train/{name}"] == whole[f"train/{name}"], (one["step"], name)


def test_another_projector_rate_is_another_run(jobs, settings, finished):
    job = jobs.distill("features", *settings, "loss.terms.2.projector_learning_rate=1.0e-3")
    assert job.exit_code == 64
    assert "holds another run: its loss.terms is" in job.stderr
