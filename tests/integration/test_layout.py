"""A cluster of three nodes beside the head: a layout that fits runs, one that would starve is refused."""

import pytest

from tests.conftest import Jobs
from tests.local_cluster import local_cluster

pytestmark = pytest.mark.ray

TEACHER = {"ray-subcluster": "teacher", "pool": "teacher"}
SETTINGS = (
    "teacher.engine={kind: fake, vocab_size: 259}", "eval.kl=topk", "eval.max_rows=4", "cluster.wait_s=6",
    "teacher.pool.label_selector={ray-subcluster: teacher}", "train.label_selector={pool: student}",
)  # fmt: skip


@pytest.fixture(scope="module")
def nodes(tmp_path_factory, ray_environment):
    """Jobs on a head without CPUs, two teacher nodes of two and a student node of one."""
    with local_cluster(ray_environment) as cluster:
        for name in ("teacher-1", "teacher-2"):
            cluster.add(name, 2, TEACHER)
        cluster.add("student", 1, {"pool": "student"})
        yield Jobs(tmp_path_factory.mktemp("nodes"), ray_environment, cluster.address)


def test_a_layout_that_fits_runs(nodes):
    job = nodes.distill("fits", *SETTINGS, "teacher.pool.num_cpus=0.25", "teacher.pool.max_actors=2")
    assert job.exit_code == 0, job.stderr
    assert job.summary["rows_missing"] == 0


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            # Placed today; when a teacher node dies, its teacher takes the CPU of the reads on the other.
            ("teacher.pool.num_cpus=1", "teacher.pool.min_actors=2", "teacher.pool.max_actors=2"),
            ("can starve after the loss of a teacher node", "2 teachers of 1 CPUs", "set teacher.pool.num_cpus=0.25"),
        ),
        pytest.param(
            ("teacher.pool.num_cpus=0.25", "train.label_selector={pool: nobody}"),
            ("train.label_selector={pool: nobody} is carried by none of the cluster's 4 nodes", "cluster.wait_s=6"),
            marks=pytest.mark.extended,
        ),
        pytest.param(
            ("train.num_workers=2", "train.cpus_per_worker=1"),
            ("no room for 1 of 2 train workers labelled {pool: student}", "lower train.num_workers"),
            marks=pytest.mark.extended,
        ),
    ],
    ids=["starves", "labels", "too small"],
)
def test_one_that_does_not_is_refused(nodes, overrides, expected):
    job = nodes.distill("refused", *SETTINGS, *overrides)
    assert job.exit_code == 64, job.stderr
    (line,) = [line for line in job.stderr.splitlines() if "error:" in line]
    assert all(part in line for part in expected), line
