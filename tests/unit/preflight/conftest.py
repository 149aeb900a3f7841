"""A run that can start, and its findings."""

import json

import pytest

from ray_kd import config
from ray_kd.preflight import examine
from tests.preflight_case import record
from tests.tiny import tiny_llama


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preflight")
    tiny_llama(folder / "teacher", layers=4, seed=1)
    tiny_llama(folder / "student", layers=2, seed=2)
    lines = [json.dumps(record(f"Say {i}.", f"It is {i}, and {i} again.")) for i in range(30)]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def settings(home, tmp_path):
    return [f"run.dir={tmp_path}/runs/new", f"data.source={{kind: jsonl, paths: [{home}/train.jsonl]}}",
            "data.sequence_length=64", "data.eval_fraction=0.2", f"teacher.model={home}/teacher", "teacher.top_k=16",
            f"student.model={home}/student"]  # fmt: skip


@pytest.fixture
def look(settings):
    """The findings for the config with overrides, by check."""

    def looked(*overrides, **options):
        report = examine(lambda: config.load(None, [*settings, *overrides]), **options)
        assert all("\n" not in finding.seen for finding in report.findings)
        return report

    return looked
