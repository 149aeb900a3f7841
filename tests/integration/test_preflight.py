"""The checks before a run, on a real cluster: it is joined for a moment, and looked at as the run would."""

import json

import pytest

from tests.conftest import Jobs

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def jobs(tmp_path_factory, ray_environment, ray_address):
    return Jobs(tmp_path_factory.mktemp("preflight"), ray_environment, ray_address)


@pytest.mark.parametrize(
    ("override", "exit_code", "state"), [("eval.max_rows=4", 0, "ok"), ("train.num_workers=1000", 64, "failed")]
)
def test_a_cluster_is_looked_at_and_left(jobs, override, exit_code, state):
    more = ("train.global_batch_size=1000",) if exit_code else ()
    job = jobs.run("preflight", *jobs.arguments("new", override, *more), "--json")
    assert job.exit_code == exit_code, job.stdout + job.stderr
    findings = json.loads(job.stdout)["findings"]
    layout = next(finding for finding in findings if finding["check"] == "layout")
    assert layout["state"] == state, layout
    assert not jobs.run_dir("new").exists()
