"""A run whose teacher is behind HTTP: the same training as with the teacher here, and refusals that end it at once."""

import pytest

from tests.conftest import Jobs
from tests.fault_server import Fault, FaultServer, serving

pytestmark = pytest.mark.ray


def http(server: FaultServer) -> str:
    return f"teacher.engine={{kind: http, url: {server.url}, backoff_s: 0.01}}"


def test_a_run_is_that_of_the_same_teacher_without_a_server(jobs: Jobs):
    """The server stumbles twice; it answers from the fake engine's distribution."""
    with serving(FaultServer()) as server:
        server.fault = lambda number, prompts: Fault(status=503) if number in (1, 4) else None
        over_http = jobs.distill("http-teacher", http(server), "train.max_steps=3")
        num_asked = len(server.asked)
    here = jobs.distill("http-teacher-here", "teacher.engine=fake", "train.max_steps=3")
    assert (over_http.exit_code, here.exit_code) == (0, 0), over_http.stderr + here.stderr
    for key in ("train/loss", "train/grad_norm", "data/row_ids_sha256"):
        assert [line[key] for line in over_http.metrics] == [line[key] for line in here.metrics]
    assert over_http.summary["rows_quarantined"] == 0
    assert over_http.summary["restarts"] == 0
    assert num_asked > 5


@pytest.mark.extended
def test_what_the_server_refuses_ends_the_run(jobs: Jobs):
    with serving(FaultServer(max_logprobs=5)) as server:
        job = jobs.distill("http-refused", http(server))
    assert job.exit_code == 64
    assert "sends 5 tokens a position, teacher.top_k is 16" in job.stderr
    assert job.stderr.count("\n") <= 3
