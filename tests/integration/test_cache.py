"""The teacher's cache through the jobs: no row computed twice, filled offline, killed and filled again."""

import hashlib
import json
import time

import numpy as np
import pytest
import ray

from ray_kd import pipeline, schema, teacher_cache
from ray_kd.data.order import SlotOrder
from ray_kd.data.prepared import PreparedData
from ray_kd.teacher.cache import Cache
from ray_kd.teacher.stage import EngineSpec

pytestmark = pytest.mark.ray

KEPT = "teacher.cache.mode=write_through"
THREE_EPOCHS = ("train.max_steps=null", "train.epochs=3", "train.checkpoint_every=10")


@pytest.fixture(scope="module")
def three_epochs(jobs):
    return jobs.distill("cache-three-epochs", *THREE_EPOCHS, KEPT, "teacher.pool.max_actors=2")


def cache_of(jobs):
    (folder,) = (child for child in (jobs.folder / "runs" / "teacher_cache").iterdir())
    return Cache(folder, is_written=False)


def contents(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def losses(job):
    return [line["train/loss"] for line in job.metrics]


def test_in_three_epochs_the_teacher_computes_each_row_once(jobs, three_epochs):
    summary = three_epochs.summary
    assert three_epochs.exit_code == 0, three_epochs.stderr
    assert summary["teacher_rows_computed"] == summary["rows_prepared"]
    assert summary["teacher_rows_from_cache"] == 2 * summary["rows_prepared"]
    assert summary["rows_consumed"] == 3 * summary["rows_prepared"]
    cache = cache_of(jobs)
    assert cache.has(np.arange(summary["rows_prepared"])).all()
    assert len(list(cache.folder.glob("rows-*"))) == 1, "the small files were not merged"


def test_a_run_whose_rows_are_all_cached_is_the_same_run_without_a_teacher(jobs, three_epochs):
    again = jobs.distill("cache-covered", *THREE_EPOCHS, "teacher.cache.mode=read")
    assert again.exit_code == 0, again.stderr
    assert (again.summary["teacher_rows_computed"], again.summary["teacher_rows_repeated"]) == (0, 0)
    assert again.summary["teacher_rows_from_cache"] == three_epochs.summary["rows_consumed"]
    assert losses(again) == losses(three_epochs)


def test_the_stream_of_a_covered_run_builds_no_engine(jobs, three_epochs, ray_address, tmp_path, monkeypatch):
    for name in ("RAY_AUTH_MODE", "RAY_USAGE_STATS_ENABLED", "HOME"):
        monkeypatch.setenv(name, jobs.environment[name])
    cache = cache_of(jobs)
    prepared = jobs.folder / "runs" / "prepared" / cache.contents.data[:16]
    order = SlotOrder(num_rows=PreparedData(prepared).num_rows, global_batch_size=4, epochs=2, max_steps=None, seed=0)
    assert teacher_cache.covers(cache, np.ones(order.num_rows, bool), order, 0)
    no_engine = EngineSpec("no such engine", "", None, "auto", 1, num_gpus=0, threads=1)
    spec = pipeline._StreamSpec(
        run_dir=str(tmp_path), prepared_dir=str(prepared), order=order, block_rows=2,
        teachers=[pipeline._Teacher(no_engine, pipeline.Pool(), None, cache, cache.contents.request)],
        top_k=cache.contents.top_k, wire="plain",
    )  # fmt: skip
    ray.init(address=ray_address, log_to_driver=False)
    try:
        blocks = list(pipeline._stream(spec).iter_batches(batch_size=None, batch_format="pyarrow"))
    finally:
        ray.shutdown()
    assert {block.num_rows for block in blocks} == {2}
    slots = [slot for block in blocks for slot in block.column(schema.SLOT).to_pylist()]
    assert slots == list(range(order.num_slots))
    for block in blocks:
        columns = block.column(schema.WEIGHT).to_pylist(), block.column(schema.TEACHER_PAYLOAD).to_pylist()
        assert all(bool(payload) == (weight > 0) for weight, payload in zip(*columns, strict=True))


def test_answers_that_are_of_no_use_are_refused_by_name(jobs, three_epochs):
    refused = jobs.distill("cache-other-teacher", "teacher.cache.mode=read", f"teacher.model={jobs.student}")
    assert refused.exit_code == 64
    assert "answers are of another teacher" in refused.stderr
    refused = jobs.distill("cache-larger-k", KEPT, "teacher.top_k=32")
    assert refused.exit_code == 64
    assert "K = 16 tokens, less than teacher.top_k=32" in refused.stderr
    refused = jobs.distill("cache-hot", "teacher.cache.mode=read", "loss.temperature=2")
    assert refused.exit_code == 64
    assert "temperature is 1 and loss.temperature 2" in refused.stderr


@pytest.mark.extended
def test_a_smaller_k_is_cut_and_another_temperature_rescaled_where_the_loss_can(jobs, three_epochs):
    job = jobs.distill("cache-cut", KEPT, "teacher.top_k=4", "loss.temperature=2", "loss.tail=renormalize")
    assert job.exit_code == 0, job.stderr
    assert job.summary["teacher_rows_computed"] == 0


@pytest.mark.extended
def test_a_damaged_file_is_computed_again(jobs, three_epochs):
    (path,) = cache_of(jobs).folder.glob("rows-*")
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    job = jobs.distill("cache-damaged", *THREE_EPOCHS, KEPT)
    assert job.exit_code == 0, job.stderr
    assert job.summary["teacher_rows_computed"] >= 1
    assert job.summary["rows_missing"] == job.summary["rows_duplicated"] == 0
    np.testing.assert_allclose(losses(job), losses(three_epochs), rtol=1e-4)
    assert len(list((path.parent / "damaged").iterdir())) == 1


@pytest.mark.extended
def test_a_cache_filled_again_after_a_kill_has_the_same_bytes(jobs, tmp_path):
    slow = "teacher.engine={kind: fake, vocab_size: 259, delay_s: 0.2}"
    folders = {name: tmp_path / name for name in ("whole", "killed")}

    def arguments(name):
        return jobs.arguments("filled", "teacher.cache.file_rows=6", f"teacher.cache.path={folders[name]}", slow)

    whole = jobs.run("cache_teacher", *arguments("whole"))
    assert whole.exit_code == 0, whole.stderr
    process = jobs.popen("cache_teacher", *arguments("killed"))
    deadline = time.monotonic() + 120
    while len(list(folders["killed"].glob("*/rows-*"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.communicate()
    (killed,) = folders["killed"].iterdir()
    (expected,) = folders["whole"].iterdir()
    num_files = len(list(killed.iterdir()))
    assert 3 < num_files < len(list(expected.iterdir())) == 10  # of 51 rows, and the manifest
    again = jobs.run("cache_teacher", *arguments("killed"))
    assert again.exit_code == 0, again.stderr
    assert contents(killed) == contents(expected)
    (nothing,) = (line for line in jobs.run("cache_teacher", *arguments("killed")).stdout.splitlines() if "now" in line)
    assert " 0 computed now" in nothing
    assert json.loads((killed / "manifest.json").read_text())["top_k"] == 16
