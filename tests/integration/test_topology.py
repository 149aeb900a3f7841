"""The same losses and gradient norms for every ZeRO stage and every split of the global batch, through the real job."""

import pytest

pytestmark = pytest.mark.ray

SETTINGS = ("train.global_batch_size=8", "train.max_steps=5", "train.checkpoint_every=0", "eval.max_rows=4")


@pytest.fixture(scope="module")
def plain(jobs):
    """One rank, eight micro-batches, stage 0."""
    job = jobs.distill("plain", *SETTINGS, "train.zero_stage=0")
    assert job.exit_code == 0, job.stderr
    return job


@pytest.mark.parametrize(
    ("stage", "workers"),
    [pytest.param(1, 2, marks=pytest.mark.extended), pytest.param(2, 1, marks=pytest.mark.extended), (3, 2)],
    ids=str,
)
def test_stages_and_ranks_agree(jobs, plain, stage, workers):
    job = jobs.distill(
        f"stage{stage}-{workers}", *SETTINGS, f"train.zero_stage={stage}", f"train.num_workers={workers}"
    )
    assert job.exit_code == 0, job.stderr
    for ours, theirs in zip(job.metrics, plain.metrics, strict=True):
        assert ours["data/row_ids_sha256"] == theirs["data/row_ids_sha256"]
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], abs=1e-5)
        assert ours["train/grad_norm"] == pytest.approx(theirs["train/grad_norm"], abs=1e-5)
    assert job.summary["rows_missing"] == job.summary["rows_duplicated"] == 0
    for name, value in plain.summary["eval"]["after"].items():
        assert job.summary["eval"]["after"][name] == pytest.approx(value, rel=1e-4), name


def test_two_workers_and_a_teacher_on_two_cores(local_jobs):
    """Half a CPU each, on a Ray of the job's own: with as many logical CPUs as cores this layout waits for ever."""
    job = local_jobs.distill(
        "two", "train.num_workers=2", "train.cpus_per_worker=0.5", "teacher.pool.num_cpus=0.5", "train.max_steps=2"
    )
    assert job.exit_code == 0, job.stderr
    assert job.summary["rows_missing"] == 0


@pytest.mark.extended
def test_a_pool_grows_when_its_teachers_are_busy(jobs):
    """A minute of work for one, through names of Ray's executor that are private."""
    slow = "teacher.engine={kind: fake, vocab_size: 259, delay_s: 1.5}"
    job = jobs.distill("elastic", slow, "teacher.pool.max_actors=2", "train.max_steps=10")
    assert job.exit_code == 0, job.stderr
    (pool,) = job.summary["teacher_pools"]
    assert pool["most_actors"] == 2
    assert 1 < pool["mean_actors"] < 2
    assert sum(actor["rows_computed"] > 0 for actor in job.summary["teacher_actors"]) == 2
    assert job.summary["teacher_rows_computed"] == job.summary["rows_consumed"] == 40
    assert job.summary["teacher_wait_fraction"] > 0.5, "the teacher is the slower one, and that is said"
