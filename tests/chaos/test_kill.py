"""Processes die: no row is lost or trained twice, and the run that went on is the run that was never interrupted."""

import json
import signal
import time

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from ray_kd import checkpoint, storage
from tests.conftest import Jobs

pytestmark = pytest.mark.ray

# Two ranks with their parts of the optimizer's state, and dropout on: a resume that lost a random state would show.
SETTINGS = (
    "train.num_workers=2", "train.zero_stage=2", "train.max_steps=null", "train.epochs=1", "train.checkpoint_every=3",
    "eval.max_rows=4",
)  # fmt: skip


@pytest.fixture(scope="module")
def dropout_student(jobs):
    """A student whose attention drops out, so that its random state matters."""
    model = AutoModelForCausalLM.from_pretrained(jobs.student)
    model.config.attention_dropout = 0.2
    folder = jobs.folder / "dropout-student"
    model.save_pretrained(folder)
    for file in jobs.student.glob("token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture(scope="module")
def settings(dropout_student):
    return (*SETTINGS, f"student.model={dropout_student}")


@pytest.fixture(scope="module")
def uninterrupted(jobs, settings):
    job = jobs.distill("uninterrupted", *settings)
    assert job.exit_code == 0, job.stderr
    return job


def assert_same_run(job, uninterrupted):
    """Bitwise: losses, gradient norms, evaluation and weights; and every row once."""
    assert job.exit_code == 0, job.stderr
    kept = ("step", "train/loss", "train/grad_norm", "train/learning_rate", "data/row_ids_sha256", "eval/kl")
    lines = [[line.get(key) for key in kept] for line in job.metrics]
    assert lines == [[line.get(key) for key in kept] for line in uninterrupted.metrics]
    summary = job.summary
    assert summary["rows_missing"] == summary["rows_duplicated"] == 0
    assert summary["rows_consumed"] == uninterrupted.summary["rows_consumed"]
    assert summary["eval"] == uninterrupted.summary["eval"]
    ours = storage.fetch(job.run_dir / "final", marker="config.json")
    final = AutoModelForCausalLM.from_pretrained(ours).state_dict()
    expected = AutoModelForCausalLM.from_pretrained(uninterrupted.run_dir / "final").state_dict()
    assert all(torch.equal(final[name], expected[name]) for name in expected)


def train_workers(address):
    """The train workers of the Ray at this address, by the title Ray gives them."""
    raylets = [
        p for p in psutil.process_iter(["cmdline"]) if f"--gcs-address={address}" in " ".join(p.info["cmdline"] or [])
    ]
    children = [child for raylet in raylets for child in raylet.children(recursive=True)]
    return [p for p in children if p.cmdline() and p.cmdline()[0].startswith("ray::RayTrainWorker")]


def test_the_driver_is_killed(local_jobs, jobs, settings, uninterrupted):
    """SIGKILL, which also takes its local Ray down; the same command again."""
    local_jobs.data.write_bytes(jobs.data.read_bytes())
    overrides = (*settings, f"teacher.model={jobs.teacher}")
    process = local_jobs.start("killed", *overrides)
    local_jobs.wait_for_step("killed", 5, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    job = local_jobs.distill("killed", *overrides)
    assert_same_run(job, uninterrupted)
    assert job.summary["restarts"] == 1
    assert job.summary["teacher_rows_repeated"] > 0


@pytest.mark.chaos
def test_the_driver_of_a_run_in_an_object_store_is_killed(
    tmp_path_factory, ray_environment, object_store, jobs, settings, uninterrupted
):
    """The same with run.dir, and with it prepared data, checkpoints and final/, in a store."""
    remote = Jobs(tmp_path_factory.mktemp("remote-jobs"), ray_environment | object_store.environment, None)
    remote.runs = f"{object_store.uri}/team"
    remote.data.write_bytes(jobs.data.read_bytes())
    overrides = (*settings, f"teacher.model={jobs.teacher}")
    process = remote.start("killed", *overrides)
    root = remote.run_dir("killed") / "checkpoints"
    while process.poll() is None and not checkpoint.folders(root):
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    job = remote.distill("killed", *overrides)
    starts = [json.loads(line)["start_slot"] for line in storage.read_lines(job.run_dir / "attempts.jsonl")]
    assert starts[0] == 0
    assert starts[1] > 0
    assert_same_run(job, uninterrupted)
    assert job.summary["restarts"] == 1
    present = {found.name for found in job.run_dir.iterdir()}
    assert {"config.yaml", "run.json", "metrics.jsonl", "driver.log", "final", "summary.json"} <= present
    assert present.isdisjoint({".driver.lock", ".writers.lock", ".stop", ".refused"})
    evaluated = remote.run("evaluate", str(job.run_dir), "--json")
    assert evaluated.exit_code == 0, evaluated.stderr
    assert json.loads(evaluated.stdout)["kl"] == pytest.approx(job.summary["eval"]["after"]["kl"], rel=1e-5)
    again = remote.distill("killed", *overrides)
    assert "finished already" in again.stdout


def test_a_worker_is_killed(jobs, settings, uninterrupted):
    """One of two: Ray Train starts the group again; it goes on from our newest checkpoint."""
    process = jobs.start("worker-killed", *settings)
    jobs.wait_for_step("worker-killed", 4, process)
    workers = train_workers(jobs.address)
    assert len(workers) == 2
    workers[-1].kill()
    job = jobs.finish("worker-killed", process)
    assert_same_run(job, uninterrupted)
    assert job.summary["restarts"] == 1


@pytest.mark.chaos
def test_sigterm_saves_and_leaves(jobs, settings, uninterrupted):
    process = jobs.start("terminated", *settings)
    jobs.wait_for_step("terminated", 2, process)
    process.send_signal(signal.SIGTERM)
    stopped = jobs.finish("terminated", process)
    assert stopped.exit_code == 75
    assert stopped.stderr.count("error:") == 1
    assert "the same command goes on" in stopped.stderr
    assert stopped.summary["exit_code"] == 75
    at = stopped.summary["steps"]
    assert 2 <= at < uninterrupted.summary["steps"]
    job = jobs.distill("terminated", *settings)
    assert_same_run(job, uninterrupted)
    assert job.summary["teacher_rows_computed"] >= job.summary["rows_consumed"]
