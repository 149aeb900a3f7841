"""`ray job submit` as the README has it: on a head with dashboard and token, followed, stopped, resubmitted."""

import json
import re
import subprocess

import pytest

from tests.conftest import REPOSITORY, Jobs
from tests.ray_head import RAY, ray_head

pytestmark = pytest.mark.ray

STEPS = 300
SUBMIT = ("submit", "--working-dir", ".", "--runtime-env", "jobs/runtime_env.yaml")
SCRAPED = (
    "train_step", "train_num_steps", "train_loss", "train_kd_loss_nats", "train_learning_rate", "train_grad_norm",
    "train_top1_agreement_ratio", "train_last_step_timestamp_seconds", "rows_total", "wire_bytes_total",
    "wire_bytes_per_token", "teacher_topk_mass_ratio", "train_step_seconds_bucket", "teacher_wait_seconds_bucket",
    "teacher_wait_seconds_total", "tokens_total", "tokens_per_second", "pool_actors", "pool_min_actors",
    "pool_max_actors", "teacher_busy_seconds_total", "teacher_rows_computed_total",
    "checkpoint_last_commit_timestamp_seconds", "checkpoint_last_commit_step", "checkpoint_write_seconds_bucket",
)  # fmt: skip


@pytest.fixture(scope="module")
def head(ray_environment):
    with ray_head(ray_environment, num_cpus=6) as started:
        yield started


@pytest.fixture(scope="module")
def submitted(tmp_path_factory, ray_environment):
    """Tiny models and data; only their folder is used, the jobs are submitted."""
    return Jobs(tmp_path_factory.mktemp("submitted"), ray_environment, None)


def submit(head, submission_id, *entrypoint, wait=True):
    """A job as `ray job submit` starts it; wait=False leaves it running."""
    arguments = (*SUBMIT, "--submission-id", submission_id, *([] if wait else ["--no-wait"]), "--", *entrypoint)
    return head.cli(*arguments, cwd=REPOSITORY)


def distill(submitted, name, *overrides):
    return ("python", "jobs/distill.py", *submitted.arguments(name, *overrides))


def test_who_has_no_token_or_a_wrong_one_reaches_nothing(head):
    assert head.status_of("/api/jobs/", token="") == 401
    assert head.status_of("/api/jobs/", token="0" * 64) == 403
    assert head.status_of("/api/jobs/", token=head.token) == 200


def test_the_code_that_runs_is_what_was_submitted(head):
    """In the driver and on the nodes: a cluster's image needs the dependencies alone."""
    script = (
        "import ray, ray_kd; ray.init(log_to_driver=False); "
        "where = ray.remote(lambda: __import__('ray_kd').__file__); "
        "print('FROM', ray_kd.__file__, ray.get(where.remote()))"
    )
    done = submit(head, "where", "python", "-c", script)
    assert done.returncode == 0, done.stdout + done.stderr
    driver, worker = re.search(r"FROM (\S+) (\S+)", done.stdout).groups()
    assert "working_dir_files" in driver
    assert "working_dir_files" in worker


def test_a_job_is_watched_stopped_and_goes_on_when_submitted_again(head, submitted):
    entrypoint = distill(
        submitted, "life", f"train.max_steps={STEPS}", "train.epochs=1000", "train.checkpoint_every=10"
    )
    run_dir = submitted.run_dir("life")
    assert submit(head, "life-1", *entrypoint, wait=False).returncode == 0

    def metadata():
        job = head.job("life-1")
        assert job["status"] in ("PENDING", "RUNNING"), job["message"]
        return job["metadata"]

    step = head.wait("a step in the metadata", lambda: (metadata() or {}).get("step"))
    done, of = map(int, step.split("/"))
    assert 0 <= done < of == STEPS
    assert metadata() | {
        "run": "life", "run_dir": str(run_dir), "teacher": str(submitted.teacher), "student": str(submitted.student),
    } == metadata()  # fmt: skip

    def missing():
        """Names that the metrics port does not have yet; () when it has all."""
        text = head.scrape()
        return [name for name in SCRAPED if f"ray_raykd_{name}{{" not in text]

    head.wait("all metrics at the metrics port", lambda: not missing(), timeout_s=120)
    series = [line for line in head.scrape().splitlines() if line.startswith("ray_raykd_")]
    assert all('run="life"' in line for line in series)
    # The trainer's and the driver's, which is still there when all workers are gone.
    assert len([line for line in series if line.startswith("ray_raykd_train_last_step_timestamp_seconds")]) == 2
    pools = {
        pool
        for line in series
        if line.startswith("ray_raykd_tokens_total")
        for pool in re.findall(r'pool="(\w+)"', line)
    }
    assert pools == {"student", "teacher"}
    (train_run,) = [run for run in head.get("/api/train/v2/runs/v1")["train_runs"] if run["name"] == "life"]
    assert train_run["status"] == "RUNNING"
    datasets = head.get(f"/api/data/datasets/{head.job('life-1')['job_id']}")["datasets"]
    (dataset,) = [one for one in datasets if one["dataset"].startswith("life")]
    assert "MapBatches(Teacher)" in [operator["name"] for operator in dataset["operators"]]

    follower = subprocess.Popen(
        [RAY, "job", "logs", "--follow", "life-1"], env=head.environment, stdout=subprocess.PIPE, text=True
    )
    assert head.cli("stop", "life-1", cwd=REPOSITORY).returncode == 0
    followed, _ = follower.communicate(timeout=120)
    stopped = head.job("life-1")
    assert stopped["status"] == "STOPPED"
    reached = int(re.search(r"stopped after step (\d+) of", followed)[1])
    assert 0 < reached < STEPS
    assert stopped["metadata"]["step"] == f"{reached}/{STEPS}"
    assert (stopped["metadata"]["exit_code"], stopped["metadata"]["cause"]) == (
        "75", f"stopped after step {reached} of {STEPS}; the same command goes on from there",
    )  # fmt: skip

    again = submit(head, "life-2", *entrypoint)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"training: step {reached + 1} to {STEPS}" in again.stdout
    finished = head.job("life-2")
    assert (finished["status"], finished["driver_exit_code"]) == ("SUCCEEDED", 0)
    assert finished["metadata"]["step"] == f"{STEPS}/{STEPS}"
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["rows_missing"], summary["rows_duplicated"], summary["steps"]) == (0, 0, STEPS)


@pytest.mark.parametrize(
    ("submission_id", "override", "line"),
    [
        ("misspelt", "train.zero_stag=3", "error: unknown key 'train.zero_stag'"),
        ("relative", "run.dir=runs/mine", "error: run.dir is '"),
    ],
)
def test_a_failed_job_says_why_in_its_message(head, submitted, submission_id, override, line):
    assert submit(head, submission_id, *distill(submitted, "failed", override)).returncode != 0
    job = head.job(submission_id)
    assert (job["status"], job["driver_exit_code"]) == ("FAILED", 64)
    assert job["message"].strip().splitlines()[-1].startswith(line)
