"""A student node leaves and comes back: the run goes on with the workers there is room for, and is the same run."""

import json
import time

import psutil
import pytest

from ray_kd import storage
from tests.conftest import Jobs
from tests.local_cluster import local_cluster

pytestmark = [pytest.mark.ray, pytest.mark.chaos]

TEACHER = {"ray-subcluster": "teacher", "pool": "teacher"}
STUDENT = {"pool": "student"}
SETTINGS = (
    "eval.kl=topk", "eval.max_rows=4", "train.max_steps=null", "train.epochs=2", "train.zero_stage=2",
    "train.checkpoint_every=1000", "train.cpus_per_worker=1", "train.label_selector={pool: student}",
    "teacher.pool.label_selector={ray-subcluster: teacher}",
)  # fmt: skip
ENGINE = "teacher.engine={{kind: fake, vocab_size: 259, delay_s: {}}}"


def num_workers(address):
    """Train workers of the Ray at this address that are alive, by the title Ray gives them."""
    raylets = [
        p for p in psutil.process_iter(["cmdline"]) if f"--gcs-address={address}" in " ".join(p.info["cmdline"] or [])
    ]
    children = {child.pid: child for raylet in raylets for child in raylet.children(recursive=True)}
    return sum(
        title[:1] != [] and title[0].startswith("ray::RayTrainWorker") for title in map(_title, children.values())
    )


def _title(process):
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def newest_time(path):
    lines = [line for line in storage.read_lines(path) if line.endswith("\n")]
    return json.loads(lines[-1])["time"] if lines else 0.0


def wait_until(is_so, process, timeout_s=90):
    start = time.monotonic()
    while not is_so():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - start < timeout_s, "it never came to that"
        time.sleep(0.2)
    return time.monotonic() - start


@pytest.mark.timeout(900)
def test_a_student_node_leaves_and_comes_back(tmp_path_factory, ray_environment):
    with local_cluster(ray_environment, num_cpus=3, labels=TEACHER) as cluster:
        for name in ("student-1", "student-2"):
            cluster.add(name, 1, STUDENT)
        elastic = Jobs(tmp_path_factory.mktemp("elastic"), ray_environment, cluster.address)
        undisturbed = elastic.distill("undisturbed", *SETTINGS, ENGINE.format(0), "train.num_workers=2")
        assert undisturbed.exit_code == 0, undisturbed.stderr

        def starts():
            lines = storage.read_lines(elastic.run_dir("elastic") / "attempts.jsonl")
            return [json.loads(line)["start_slot"] for line in lines]

        process = elastic.start(
            "elastic", *SETTINGS, ENGINE.format(0.4), "train.num_workers=[1,2]", "train.resize_every_s=1",
        )  # fmt: skip
        elastic.wait_for_step("elastic", 3, process)
        assert num_workers(cluster.address) == 2

        cluster.kill("student-2")
        gone_s = wait_until(lambda: len(starts()) == 2, process)
        wait_until(lambda: num_workers(cluster.address) == 1, process)
        # Until it has trained: asked before, it has nothing to save and leaves at once.
        attempts, metrics = (elastic.run_dir("elastic") / name for name in ("attempts.jsonl", "metrics.jsonl"))
        wait_until(lambda: newest_time(metrics) > newest_time(attempts), process)

        cluster.add("student-2", 1, STUDENT)
        back_s = wait_until(lambda: len(starts()) == 3, process)
        wait_until(lambda: num_workers(cluster.address) == 2, process)
        job = elastic.finish("elastic", process)

    assert job.exit_code == 0, job.stderr
    print(f"the group started again {gone_s:.0f} s after the loss, {back_s:.0f} s after the return")
    first, second, third = starts()
    assert first == second == 0, "after the loss from the newest checkpoint, and there was none yet"
    assert third > 0, "after the return from one that was saved for it"
    assert job.summary["restarts"] == 2
    assert job.summary["rows_missing"] == job.summary["rows_duplicated"] == 0
    assert job.summary["rows_consumed"] == undisturbed.summary["rows_consumed"]
    assert [line["step"] for line in job.metrics] == [line["step"] for line in undisturbed.metrics]
    for ours, theirs in zip(job.metrics, undisturbed.metrics, strict=True):
        assert ours["data/row_ids_sha256"] == theirs["data/row_ids_sha256"]
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], abs=1e-6)
