"""The checks before a run, through the job and its table: what passes, what each broken thing is called, and that
nothing is left behind. The cluster is a list of nodes instead of a Ray."""

import json
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import pytest

from ray_kd import cli, preflight
from ray_kd.cluster import Look
from ray_kd.config import RunConfig
from ray_kd.data.packing import Rows
from ray_kd.errors import ConfigError
from ray_kd.layout import Node
from ray_kd.preflight import FAILED, OK, SKIPPED, WARNING, alignment
from tests.fault_server import FaultServer, serving
from tests.preflight_case import files_below, of, record, states


@dataclass
class Cluster:
    """A cluster of these nodes, for as long as it is joined."""

    alive: list[Node]
    can_grow: bool = False
    problem: Exception | None = None
    shared: list[str] = field(default_factory=list)

    def look(self) -> Look:
        return Look(self.alive, [], self.can_grow)

    def object_store_nbytes(self) -> int:
        return 10_000

    def check_shared(self, folder, timeout_s, key) -> None:
        self.shared.append(str(folder))
        if self.problem is not None:
            raise self.problem

    @contextmanager
    def join(self, _: RunConfig):
        yield self


JOINS = ("cluster.address=127.0.0.1:6379",)


def test_a_run_that_can_start_is_said_to_and_nothing_is_left(look, tmp_path):
    report = look()
    assert report.exit_code == 0
    *others, last = report.findings
    assert {finding.state for finding in others} == {OK}, str(report)
    assert (last.check, last.state) == ("forward", SKIPPED)
    assert files_below(tmp_path) == []
    assert "30 of all 30 records usable" in of(report, "records")[0].seen
    template, decoded = of(report, "template")
    assert "<|im_start|>assistant\\n' it trains 'It is 0, and 0 again.<|im_end|>'" in template.seen
    assert decoded.seen.startswith("in all 30 records the labels, decoded, are the answers' text")
    assert "16 documents in" in of(report, "alignment")[0].seen
    assert "2 layers of width 64" in of(report, "models")[1].seen
    assert str(report).endswith("Nothing failed, 1 skipped: the run can start.")


def test_one_that_failed_does_not_keep_the_others_from_being_looked_at(look, tmp_path):
    report = look("teacher.top_k=1000", "data.source.paths=[nowhere.jsonl]", "student.lora.r=0")
    assert states(report, "config", "settings", "sources", "records", "models", "student", "run.dir", "layout") == {
        "config": [OK], "settings": [FAILED], "sources": [FAILED], "records": [SKIPPED], "models": [FAILED],
        "student": [SKIPPED], "run.dir": [OK], "layout": [SKIPPED],
    }  # fmt: skip
    assert of(report, "settings")[0].seen == "student.lora.r is 0: allowed is 1 or more"
    assert "at most the teacher's vocabulary of 259" in of(report, "models")[0].seen
    assert report.exit_code == ConfigError.exit_code
    assert report.verdict.startswith("3 failed, ")
    assert files_below(tmp_path) == []


def test_the_job_prints_the_table_and_ends_with_the_code_of_the_run(home, settings, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{}")
    assert cli.main("preflight", [str(recipe), *settings]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "ok       config         every key is known and every value in its range"
    assert cli.main("preflight", [str(recipe), *settings, "--json", "teacher.topk=3"]) == 64
    document = json.loads(capsys.readouterr().out)
    assert document["exit_code"] == 64
    assert "unknown key 'teacher.topk'" in document["findings"][0]["seen"]
    assert {finding["state"] for finding in document["findings"][1:]} == {SKIPPED}
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_records_that_cannot_be_used_are_65_and_named(look, home):
    bad = home / "bad.jsonl"
    bad.write_text('{"text": 1}\n' * 3 + json.dumps(record("a", "b")) + "\n")
    (failed, usable) = of(look(f"data.source.paths=[{bad}]"), "records")
    assert (failed.state, failed.exit_code, usable.state) == (FAILED, 65, OK)
    assert f"3 of all 4 records of data.source (75.0%) cannot be used, the first at {bad}:1" in failed.seen
    assert "field 'messages' is missing (3)" in failed.seen
    # A run refuses its settings before it reads a record.
    assert look(f"data.source.paths=[{bad}]").exit_code == 65
    assert look(f"data.source.paths=[{bad}]", "teacher.top_k=1000").exit_code == 64
    (warned, _) = of(look(f"data.source.paths=[{bad}]", "data.max_bad_fraction=0.8"), "records")
    assert warned.state == WARNING


def write(path, num_bad, num_good):
    lines = ['{"text": 1}'] * num_bad + [json.dumps(record(f"Say {i}.", f"It is {i}.")) for i in range(num_good)]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_limit_of_bad_records_is_that_of_all_records(look, tmp_path):
    long = write(tmp_path / "long.jsonl", 20, 600)
    report = look(f"data.source.paths=[{long}]")
    warned, usable = of(report, "records")
    assert (warned.state, usable.state, report.exit_code) == (WARNING, OK, 0)
    assert "20 of the first 200 records of data.source (10.0%) cannot be used" in warned.seen
    assert "more than data.max_bad_fraction=0.05 allows, if the rest is alike" in warned.seen

    few, many = write(tmp_path / "few.jsonl", 1, 3), write(tmp_path / "many.jsonl", 0, 36)
    both = [f"data.source.paths=[{few}]", f"data.eval_source={{kind: jsonl, paths: [{many}]}}", "data.eval_fraction=0"]
    report = look(*both)
    assert (of(report, "records")[0].state, report.exit_code) == (WARNING, 0)
    assert "1 of all 40 records of data.source and data.eval_source (2.5%)" in of(report, "records")[0].seen
    write(many, 3, 36)
    assert look(*both).exit_code == 65
    write(many, 0, 0)
    (failed, *_) = of(look(*both, "data.max_bad_fraction=1"), "records")
    assert (failed.state, failed.exit_code) == (FAILED, 65)
    assert failed.seen.startswith("data.eval_source has no ")


@pytest.mark.parametrize(("fraction", "outcome"), [("0.01", "none for evaluation"), ("0.999", "none to train on")])
def test_a_split_that_leaves_a_side_empty_is_refused(look, tmp_path, fraction, outcome):
    five = write(tmp_path / "five.jsonl", 0, 5)
    report = look(f"data.source.paths=[{five}]", f"data.eval_fraction={fraction}")
    (failed,) = of(report, "records")
    assert (failed.state, report.exit_code) == (FAILED, 64)
    assert failed.seen == f"data.eval_fraction={fraction} of 5 documents leaves {outcome}"


@pytest.mark.parametrize(("override", "check"), [("data.source=5", "sources"), ("teacher.engine=5", "settings")])
def test_a_value_that_is_no_kind_is_refused_by_one_check(look, override, check):
    report = look(override)
    assert report.exit_code == 64
    assert f"{override.split('=')[0]} is 5: allowed is a kind or {{kind: ..., options}}" in of(report, check)[0].seen
    assert of(report, "packages")[0].state == OK


def test_the_object_store_of_a_local_ray_has_its_limits(look, monkeypatch):
    monkeypatch.setattr("ray._private.utils.estimate_available_memory", lambda: 500 * 10**9)
    monkeypatch.setattr("ray._private.utils.get_shared_memory_bytes", lambda: 64 * 2**20)  # as a container has it
    assert "in an object store of 10.0 GB" in of(look(), "layout")[-1].seen
    monkeypatch.setattr("ray._private.utils.get_shared_memory_bytes", lambda: 100 * 10**9)
    assert "in an object store of 95.0 GB" in of(look(), "layout")[-1].seen


def test_warnings_of_the_run_itself_are_in_the_table(look):
    report = look("teacher.cache.path=/somewhere", "data.eval_fraction=0", "data.sequence_length=5000")
    assert states(report, "settings", "sources", "models") == {
        "settings": [OK, WARNING], "sources": [WARNING], "models": [OK, OK, WARNING, WARNING]
    }  # fmt: skip
    assert of(report, "settings")[1].seen == "teacher.cache.path has no effect: teacher.cache.mode is disabled"
    assert report.exit_code == 0


def test_a_template_that_trains_something_else_is_shown(look, home, monkeypatch):
    monkeypatch.setattr(alignment, "_answers", lambda one, subject: ["what it never said"])
    (_, warned) = of(look(), "template")
    assert warned.state == WARNING
    assert "30 of 30 records" in warned.seen
    assert "'what it never said' of the assistant is not trained" in warned.seen


def rows(positions, labels):
    """One row of the document 5 6 7 and two of padding."""
    arrays = (np.array([values], np.int32) for values in ([5, 6, 7, 2, 2], labels, positions))
    return Rows(*arrays, num_target_bytes=np.zeros(1, np.int32))


@pytest.mark.parametrize(
    ("positions", "labels", "problem"),
    [
        ([0, 1, 2, 0, 1], [-100, 6, 7, -100, -100], None),
        ([0, 1, 2, 3, 4], [-100, 6, 7, -100, -100], "do not hold each document once"),
        ([0, 1, 3, 0, 1], [-100, 6, 7, -100, -100], "do not count up"),
        ([0, 1, 2, 0, 1], [-100, 7, 6, -100, -100], "not the tokens"),
        ([0, 1, 2, 0, 1], [-100, -100, 7, -100, -100], "do not hold each document once"),
    ],
)
def test_rows_that_are_packed_wrongly_are_seen(positions, labels, problem):
    document = alignment.Document(np.array([5, 6, 7], np.int32), np.array([False, True, True]), np.ones(3, np.int32))
    found = alignment._problem_of_rows(rows(positions, labels), [document])
    assert (found is None) if problem is None else (problem in found)


def test_a_teacher_that_is_off_by_one_is_seen(look, monkeypatch):
    from ray_kd.teacher.engines.fake import Engine

    true = Engine.logprobs

    def shifted(self, tokens, *temperature):
        return true(self, np.roll(tokens, 1) if temperature else tokens)  # which an engine's own calls have

    monkeypatch.setattr(Engine, "logprobs", shifted)
    (failed,) = of(look(), "alignment")
    assert (failed.state, failed.exit_code) == (FAILED, 70)


def test_the_layout_is_held_against_the_nodes_of_the_cluster(look, tmp_path):
    fitting = Cluster([Node("head", 4, 0, {})])
    report = look(*JOINS, join=fitting.join)
    assert [finding.state for finding in of(report, "layout")] == [OK, OK, WARNING]
    assert "Ray's object store has 0.0 GB: it will spill" in of(report, "layout")[2].seen
    assert fitting.shared == [str(tmp_path)]  # the nearest folder there is

    small = Cluster([Node("head", 1, 0, {})])
    failed = of(look(*JOINS, join=small.join), "layout")[0]
    assert (failed.state, failed.exit_code) == (FAILED, 64)
    assert "the layout needs 2.25 CPUs" in failed.seen
    grows = Cluster([Node("head", 1, 0, {})], can_grow=True)
    assert of(look(*JOINS, join=grows.join), "layout")[0].seen.startswith("not now: its autoscaler has to start nodes")

    blind = Cluster(fitting.alive, problem=ConfigError("run.dir 'x' is not on storage that all nodes share"))
    assert of(look(*JOINS, join=blind.join), "layout")[-1].seen == str(blind.problem)


def test_offline_asks_nobody(look):
    def join(_):
        pytest.fail("the cluster was joined")

    engine = "teacher.engine={kind: http, url: 'http://127.0.0.1:9'}"
    report = look("cluster.address=10.0.0.1:6379", "cluster.insecure=true", engine, offline=True, join=join)
    assert states(report, "layout", "server") == {"layout": [SKIPPED], "server": [SKIPPED]}
    assert report.exit_code == 0


def test_a_cluster_in_the_open_is_refused_and_a_dashboard_warned_about(look, monkeypatch):
    report = look("cluster.address=10.0.0.1:6379", offline=True)
    (failed,) = of(report, "network")
    assert "the Ray cluster at '10.0.0.1:6379' is on another machine and would be joined without a token" in failed.seen
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://me:secret@10.0.0.1:8265")
    (warned,) = of(look(), "network")
    assert warned.seen.startswith("the dashboard at RAY_API_SERVER_ADDRESS is reached in clear text")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert of(look(), "network")[0].state == OK


def test_labels_and_gpus_that_a_local_ray_has_not_are_refused(look):
    (failed,) = of(look("train.label_selector={pool: student}"), "layout")
    assert failed.seen.startswith("train.label_selector is {'pool': 'student'}: a local Ray has no labels")
    (failed,) = of(look("teacher.pool.num_gpus=64"), "layout")
    assert "the layout needs 64 GPUs" in failed.seen


def test_a_server_is_asked_one_record_and_its_refusal_is_the_run_s(look):
    with serving(FaultServer()) as server:
        engine = f"teacher.engine={{kind: http, url: '{server.url}'}}"
        (found,) = of(look(engine), "server")
        assert found.state == OK
        assert "targets of the first record, 16 log-probabilities each" in found.seen
        server.max_logprobs = 8
        (found,) = of(look(engine), "server")
        assert (found.state, found.exit_code) == (FAILED, 64)
        assert "--max-logprobs" in found.seen
        url = server.url
    (found,) = of(look(f"teacher.engine={{kind: http, url: '{url}'}}"), "server")
    assert (found.state, found.exit_code) == (FAILED, 75)


def test_packages_are_held_against_what_is_required(look, monkeypatch):
    from importlib import metadata

    true = metadata.version
    monkeypatch.setattr(
        "ray_kd.preflight.packages.metadata.version", lambda name: "1.0" if name == "torch" else true(name)
    )
    (warned,) = of(look(), "packages")
    assert (warned.state, "torch 1.0 (allowed: " in warned.seen) == (WARNING, True)

    def absent(name):
        if name == "vllm":
            raise metadata.PackageNotFoundError(name)
        return true(name)

    monkeypatch.setattr("ray_kd.preflight.packages.metadata.version", absent)
    failed = of(look("teacher.engine=vllm"), "packages")[0]
    assert (failed.state, failed.exit_code) == (FAILED, 64)
    assert failed.seen == "vllm is not installed here for teacher.engine=vllm: pip install '.[vllm]'"
    (warned,) = of(look("teacher.engine=vllm", *JOINS, offline=True), "packages")
    assert (warned.state, warned.seen.startswith("vllm is not installed here")) == (WARNING, True)


def test_every_check_says_something(look):
    names = [check.name for check in preflight.CHECKS]
    assert [name for name in names if not of(look(), name)] == []


def test_what_the_run_would_warn_of_is_warned_of_here(look):
    """How many steps there are is known where data is prepared, or the config says at most how many."""
    report = look("train.max_steps=6", "train.warmup_steps=10", "train.checkpoint_every=50")
    said = " ".join(one.seen for one in report.findings if one.state == WARNING)
    assert "train.warmup_steps=10 is longer than the run of 6 steps" in said
    assert "train.checkpoint_every=50 has no effect" in said


def test_offline_asks_no_store_for_prepared_data(look, object_store, monkeypatch):
    monkeypatch.setattr("ray_kd.data.manifest.is_intact", lambda *_: pytest.fail("the store was asked"))
    (skipped,) = of(look(f"run.dir={object_store.uri}/mine", offline=True), "prepared data")
    assert (skipped.state, "--offline" in skipped.seen) == (SKIPPED, True)
