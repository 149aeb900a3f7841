"""Each tracker writes what its package's own reader reads, and after a restart has each step once."""

import json
import logging
import os
import shutil
import struct
import subprocess
import sys
import threading

import pytest

from ray_kd import config, plugins, validate
from ray_kd.errors import ConfigError
from ray_kd.trackers import GROUP, Start, Trackers, mlflow

KINDS = plugins.available(GROUP)


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Packages keep settings and caches there; nothing of the user's is read."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in list(os.environ):
        if name.startswith(("WANDB_", "MLFLOW_")):
            monkeypatch.delenv(name)


def line(step, of):
    """A line of metrics.jsonl; `of` tells the attempts apart."""
    return {
        "step": step, "time": 1.0, "epoch": 0, "train/loss": of + step / 8, "train/is_applied": True,
        "train/grad_norm": None, "data/row_ids_sha256": "ab", **({"eval/kl": of + 0.5} if step % 2 == 0 else {}),
    }  # fmt: skip


def attempt(value, run_dir, last_step, steps, of, history=()):
    start = Start(run_dir, "run: {seed: 7}\n", last_step)
    trackers = Trackers([value], start, history)
    for step in steps:
        trackers.log(line(step, of))
    trackers.close()


def tensorboard_points(run_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    accumulator.Reload()
    assert "seed: 7" in str(accumulator.Tensors("config/text_summary"))
    return {
        name: [(event.step, event.value) for event in accumulator.Scalars(name)]
        for name in accumulator.Tags()["scalars"]
    }


def mlflow_points(run_dir):
    from mlflow import MlflowClient

    client = MlflowClient((run_dir / "mlflow").as_uri())
    experiment = client.get_experiment_by_name("ray_kd")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("mine", "FINISHED")
    assert run.data.tags["ray_kd.run_dir"] == str(run_dir)
    assert (
        "seed: 7"
        in (run_dir / "mlflow" / experiment.experiment_id / run.info.run_id / "artifacts/config.yaml").read_text()
    )
    return {
        name: [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }


def wandb_messages(data):
    """W&B reads its files in Go alone: LevelDB's log format, behind seven bytes that name it.

    Blocks of 32 KiB; a piece has a checksum (4), a length (2) and a kind (1): whole, first, middle or last.
    """
    assert data[:4] == b":W&B"
    at, message = 7, b""
    while at + 7 <= len(data):
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        message += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield message
            message = b""
        if (left := 2**15 - at % 2**15) < 7:
            at += left


def wandb_points(run_dir):
    from wandb.proto import wandb_internal_pb2

    (path,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    assert (run_dir / "wandb_run_id").read_text().strip() in path.name
    points, settings = {}, {}
    for message in wandb_messages(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(message)
        if record.WhichOneof("record_type") == "run":
            settings |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        if record.WhichOneof("record_type") == "history":
            values = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
            }
            for name in values.keys() - {"_step", "_runtime", "_timestamp"}:
                points.setdefault(name, []).append((values["_step"], values[name]))
    assert settings["run"] == {"seed": 7}
    return points


READERS = {"tensorboard": tensorboard_points, "mlflow": mlflow_points, "wandb": wandb_points}


@pytest.fixture(params=KINDS)
def kind(request):
    pytest.importorskip(plugins.load(GROUP, request.param).PACKAGE, reason=f"{request.param} is not installed")
    return request.param


def test_every_tracker_is_read_back_by_a_test():
    assert set(KINDS) == set(READERS)


def test_a_run_that_is_killed_and_goes_on_has_each_step_once(kind, run_dir):
    """Killed after step 5, gone on from the checkpoint of step 3, and once more from step 6, its last."""
    first = [line(step, of=1) for step in range(1, 6)]
    second = [line(step, of=2) for step in range(4, 7)]
    attempt(kind, run_dir, 0, range(1, 6), of=1)
    attempt(kind, run_dir, 3, range(4, 7), of=2, history=first[:3])
    attempt(kind, run_dir, 6, range(7, 9), of=3, history=first[:3] + second)
    third = [line(step, of=3) for step in range(7, 9)]
    points = READERS[kind](run_dir)
    assert set(points) == {"epoch", "train/loss", "train/is_applied", "eval/kl"}
    lines = first[:3] + second + third
    assert points["train/loss"] == [(one["step"], one["train/loss"]) for one in lines]
    assert points["eval/kl"] == [(one["step"], one["eval/kl"]) for one in lines if "eval/kl" in one]


def test_one_that_is_new_to_the_run_gets_the_lines_before(kind, run_dir):
    attempt(kind, run_dir, 2, [3], of=1, history=[line(1, of=1), line(2, of=1)])
    assert READERS[kind](run_dir)["train/loss"] == [(1, 1.125), (2, 1.25), (3, 1.375)]


@pytest.mark.parametrize("is_killed", [False, True])
def test_one_that_was_left_out_of_a_start_gets_its_lines(kind, run_dir, is_killed, monkeypatch):
    """Steps 1 to 3, 4 to 6 without it, 7 to 9; and where the first start was killed before it wrote anything."""
    if is_killed:
        monkeypatch.setattr(f"ray_kd.trackers.{kind}.Tracker.log", lambda *_: None)
    attempt(kind, run_dir, 0, range(1, 4), of=1)
    monkeypatch.undo()
    attempt(kind, run_dir, 6, range(7, 10), of=1, history=[line(step, of=1) for step in range(1, 7)])
    points = READERS[kind](run_dir)["train/loss"]
    assert points == [(step, 1 + step / 8) for step in range(1, 10)]


def test_tensorboard_lacks_nothing_that_a_kill_kept_from_the_disk(run_dir):
    """Killed at step 5, of which nothing was flushed, and gone on from step 4; then killed again, from step 6."""
    pytest.importorskip("tensorboard")
    kill = """
import os, pathlib, sys, json
from ray_kd.trackers import Start, tensorboard
run_dir, last, stop = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
tracker = tensorboard.Tracker(tensorboard.Config(flush_s=600), Start(run_dir, "run: {seed: 7}", last))
for step in range(tracker.last_step + 1, stop + 1):
    tracker.log(step, {"train/loss": 0.5 if step > last else 1 + step / 8})
os._exit(9)
"""
    for last, stop in ((0, 5), (4, 7)):
        assert subprocess.run([sys.executable, "-c", kill, str(run_dir), str(last), str(stop)]).returncode == 9
    attempt("tensorboard", run_dir, 6, range(7, 9), of=1, history=[line(step, of=1) for step in range(1, 7)])
    assert tensorboard_points(run_dir)["train/loss"] == [(step, 1 + step / 8) for step in range(1, 9)]
    assert len(text_events(run_dir)) == 1, "the config is told once"


def text_events(run_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"tensors": 0})
    accumulator.Reload()
    return accumulator.Tensors("config/text_summary")


def test_mlflow_begins_a_new_run_where_the_store_is_another(run_dir, tmp_path):
    pytest.importorskip("mlflow")
    history = [line(step, of=1) for step in range(1, 7)]
    other = {"kind": "mlflow", "uri": str(tmp_path / "other")}
    attempt("mlflow", run_dir, 0, range(1, 4), of=1)
    attempt(other, run_dir, 3, range(4, 7), of=1, history=history[:3])
    (tmp_path / "other").rename(run_dir / "moved")
    moved = {"kind": "mlflow", "uri": str(run_dir / "moved")}
    attempt(moved, run_dir, 6, [7], of=1, history=history)
    shutil.rmtree(run_dir / "mlflow")
    (run_dir / "moved").rename(run_dir / "mlflow")
    from mlflow import MlflowClient

    client = MlflowClient((run_dir / "mlflow").as_uri())
    runs = client.search_runs([client.get_experiment_by_name("ray_kd").experiment_id])
    steps = [[point.step for point in client.get_metric_history(run.info.run_id, "train/loss")] for run in runs]
    assert sorted(steps) == [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 7]]


@pytest.mark.parametrize("how", ["in the trash", "gone"])
def test_mlflow_begins_a_new_run_where_its_own_was_deleted(run_dir, how):
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    attempt("mlflow", run_dir, 0, range(1, 4), of=1)
    run_id = (run_dir / "mlflow_run_id").read_text().split()[0]
    if how == "gone":
        shutil.rmtree(next((run_dir / "mlflow").glob(f"*/{run_id}")))
    else:
        MlflowClient((run_dir / "mlflow").as_uri()).delete_run(run_id)
    attempt("mlflow", run_dir, 3, [4], of=1, history=[line(step, of=1) for step in range(1, 4)])
    assert mlflow_points(run_dir)["train/loss"] == [(step, 1 + step / 8) for step in range(1, 5)]


FAILING = """
from dataclasses import dataclass

@dataclass
class Config:
    pass

class Tracker:
    last_step = 0
    def __init__(self, options, start):
        pass
    def log(self, step, metrics):
        raise OSError("the server is gone")
    def close(self):
        pass
"""


@pytest.fixture
def third_party(tmp_path, monkeypatch):
    """Writes a tracker of a third party and returns its kind."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name, source):
        (tmp_path / f"{name}_package").mkdir()
        (tmp_path / f"{name}_package" / "charts.py").write_text(source)
        return f"{name}_package.charts"

    return write


def test_one_that_fails_is_named_once_and_the_others_go_on(run_dir, third_party, caplog):
    pytest.importorskip("tensorboard")
    kind = third_party("failing", FAILING)
    with caplog.at_level(logging.WARNING):
        trackers = Trackers([kind, "tensorboard"], Start(run_dir, "seed: 7", 0), [])
        for step in range(1, 4):
            trackers.log(line(step, of=1))
        trackers.close()
    (message,) = caplog.messages
    assert f"'{kind}'" in message
    assert "the server is gone" in message
    assert len(tensorboard_points(run_dir)["train/loss"]) == 3


def test_what_a_library_says_of_its_secrets_is_masked(run_dir, third_party, monkeypatch, caplog):
    """Also where the text is cut within one."""
    monkeypatch.setenv("WANDB_API_KEY", "s3cretvalue123456")
    said = f"401 for https://me:hunter22@host {'x' * 230} with key s3cretvalue123456"
    kind = third_party("telling", FAILING.replace('"the server is gone"', repr(said)))
    with caplog.at_level(logging.WARNING):
        attempt(kind, run_dir, 0, [1], of=1)
    (message,) = caplog.messages
    assert "401 for https://***@host" in message
    assert "hunter22" not in message
    assert "s3c" not in message


def test_one_that_hangs_costs_the_end_a_moment_and_the_steps_nothing(run_dir, third_party, monkeypatch, caplog):
    kind = third_party("hanging", FAILING.replace("raise OSError", "import time; time.sleep(60); str"))
    monkeypatch.setattr("ray_kd.trackers._CLOSE_S", 0.2)
    before = threading.active_count()
    trackers = Trackers([kind], Start(run_dir, "", 0), [])
    with caplog.at_level(logging.WARNING):
        trackers.log(line(1, of=1))
        trackers.close()
    assert "did not end within 0.2 s" in caplog.messages[0]
    assert threading.active_count() <= before + 1


def test_what_is_no_tracker_is_refused(tmp_path, third_party):
    kind = third_party("other", "from dataclasses import dataclass\n\n@dataclass\nclass Config:\n    pass\n")
    with pytest.raises(ConfigError, match=rf"run\.trackers\[0\]: kind '{kind}' is no tracker: .* no Tracker"):
        validate.check_settings(load(tmp_path, f"run.trackers=[{kind}]"))


def load(tmp_path, *overrides):
    path = tmp_path / "run.yaml"
    path.write_text(
        "run: {dir: " + str(tmp_path / "run") + "}\n"
        "data: {source: {kind: text, paths: [x]}}\nteacher: {model: x}\nstudent: {model: y}\n"
    )
    return config.load(path, overrides)


@pytest.mark.parametrize("value", ["[tensorboard, wandb]", "[{kind: wandb, mode: online, project: mine}]", "[]"])
def test_a_config_with_trackers_is_valid(tmp_path, value):
    pytest.importorskip("tensorboard")
    pytest.importorskip("wandb")
    validate.check_settings(load(tmp_path, f"run.trackers={value}"))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("[tensorbord]", "run.trackers[0]: unknown kind 'tensorbord'; did you mean 'tensorboard'?"),
        (
            "[tensorboard, {kind: tensorboard, dir: /x}]",
            "run.trackers[1] is 'tensorboard': allowed is each tracker once",
        ),
        ("[{kind: wandb, mode: off}]", "mode of wandb is 'False': allowed is offline | online"),
        ("[{kind: wandb, colour: x}]", "run.trackers[0]: unknown option 'colour' of kind 'wandb'"),
        ("[{kind: wandb, api_key: x}]", "run.trackers.0.api_key is named like a credential"),
        ("[{kind: mlflow, uri: mlruns}]", "uri of mlflow is 'mlruns'"),
        (
            "[{kind: mlflow, uri: 'mysql+pymysql://u:hunter22@h/db'}]",
            "run.trackers.0.uri is a mysql+pymysql:// URI with a password",
        ),
        ("[7]", "run.trackers[0] is 7: allowed is a kind or {kind: ..., options}"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, value, said):
    pytest.importorskip("tensorboard")
    with pytest.raises(ConfigError) as error:
        validate.check_settings(load(tmp_path, f"run.trackers={value}"))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_one_that_is_not_installed_is_refused_with_the_extra(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"run\.trackers\[0\] is '\w+' and \w+ is not installed here: pip install '\.\[trackers\]'"
    ):
        validate.check_settings(load(tmp_path, f"run.trackers=[{kind}]"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_folder_in_an_object_store_is_refused_where_a_disk_is_needed(tmp_path, kind):
    pytest.importorskip(plugins.load(GROUP, kind).PACKAGE)
    with pytest.raises(
        ConfigError, match=rf"run\.trackers\[0\] '{kind}' writes to a disk and run\.dir is 's3://bucket/run'"
    ):
        validate.check_settings(load(tmp_path, "run.dir=s3://bucket/run", f"run.trackers=[{kind}]"))
    elsewhere = "uri: https://mlflow.example" if kind == "mlflow" else f"dir: {tmp_path}"
    validate.check_settings(load(tmp_path, "run.dir=s3://bucket/run", f"run.trackers=[{{kind: {kind}, {elsewhere}}}]"))


def test_a_relative_folder_starts_where_the_user_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded = load(tmp_path, "run.trackers=[{kind: tensorboard, dir: charts}]")
    assert loaded.run.trackers == [{"kind": "tensorboard", "dir": str(tmp_path / "charts")}]


@pytest.mark.parametrize(
    "uri",
    ["mysql+pymysql://u@h/db", "postgresql+psycopg2://u@h/db", "sqlite:////x.db", "https://x", "/x", "databricks",
     "databricks://profile", "file:///x"],
)  # fmt: skip
def test_uris_of_mlflow(uri):
    assert mlflow.Config(uri=uri).uri == uri


def test_trackers_are_no_part_of_a_runs_identity(tmp_path):
    from ray_kd import run_folder

    without, with_one = load(tmp_path), load(tmp_path, "run.trackers=[tensorboard]")
    assert run_folder.identity(without) == run_folder.identity(with_one)
