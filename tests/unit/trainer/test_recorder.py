"""What rank 0 tells of a step: metrics.jsonl, the trackers and Prometheus say the same."""

import json
import time
import weakref
from types import SimpleNamespace

import numpy as np
import pytest

from ray_kd import metrics
from ray_kd.config import Train
from ray_kd.ray_metrics import Exporter
from ray_kd.trainer.recorder import Recorder

TRACKER = """
from dataclasses import dataclass

@dataclass
class Config:
    path: str = ""

class Tracker:
    def __init__(self, options, start):
        self.last_step, self._file = 0, open(options.path, "w")

    def log(self, step, metrics):
        print(step, sorted(metrics.items()), file=self._file, flush=True)

    def close(self):
        self._file.close()
"""


@pytest.fixture
def sent():
    return []


@pytest.fixture
def tracked(tmp_path, monkeypatch):
    """The config value of a tracker of a third party, and the file that it writes."""
    (tmp_path / "third_party").mkdir()
    (tmp_path / "third_party" / "charts.py").write_text(TRACKER)
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "tracked.txt"
    return {"kind": "third_party.charts", "path": str(path)}, path


@pytest.fixture
def record(tmp_path, sent, tracked):
    """Opens the recorder of a start; (tmp_path / 'run') is its folder."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()

    def open_recorder(first_step=1, rank=0, trackers=(tracked[0],)):
        spec = SimpleNamespace(
            run_dir=str(run_dir), trackers=list(trackers), config_yaml="", train=Train(num_workers=[1, 4]), num_steps=9
        )
        exporter = Exporter(
            run_dir.name, send=lambda m, value, tags: sent.append((m.name, value, tags)), pool="student"
        )
        return Recorder(spec, run_dir / "metrics.jsonl", first_step, rank, world=2, exporter=exporter)

    return open_recorder


def step(row_ids, is_trained, is_bad=False):
    return SimpleNamespace(
        num_tokens=100, payload_nbytes=6400, is_bad=is_bad, row_ids=np.array(row_ids), is_trained=np.array(is_trained)
    )


def line(number, **more):
    return {
        "step": number,
        "time": 1000.0 + number,
        "epoch": 0,
        "train/loss": 1.0 / number,
        "train/kd_loss": 0.5,
    } | more


def values(sent, name):
    return [value for sent_name, value, _ in sent if sent_name == name]


def test_counters_add_up_what_this_start_did(record, sent):
    with record() as recorder:
        recorder.add(line(1), step([1, 2, 3, -1], [True, True, False, False]), wait_s=None, is_logged=True)
        bad = line(2, **{"train/loss": float("nan"), "train/hidden_state_loss": 0.25})
        recorder.add(bad, step([4, 5, 6, 7], [True, True, True, True], is_bad=True), wait_s=0.5, is_logged=False)
        recorder.committed(2, 0.125)
    assert sum(values(sent, "raykd_tokens_total")) == 200
    assert sum(values(sent, "raykd_rows_total")) == 7
    assert sum(values(sent, "raykd_wire_bytes_total")) == 12800
    quarantined = [(value, tags["reason"]) for name, value, tags in sent if name == "raykd_rows_quarantined_total"]
    assert quarantined == [(1, "teacher"), (4, "step")]
    assert values(sent, "raykd_train_bad_steps_total") == [1]
    assert values(sent, "raykd_train_loss") == [1.0], "the last that was a number stays"
    assert values(sent, "raykd_train_last_step_timestamp_seconds")[1:] == [1001.0, 1002.0]
    assert [tags["term"] for name, _, tags in sent if name == "raykd_train_term_loss"] == ["hidden_state"]
    assert values(sent, "raykd_teacher_wait_seconds") == values(sent, "raykd_teacher_wait_seconds_total") == [0.5]
    assert len(values(sent, "raykd_train_step_seconds")) == 1, "the first step of a start waits for what loads"
    assert values(sent, "raykd_checkpoint_last_commit_step") == [2]
    assert values(sent, "raykd_checkpoint_write_seconds") == [0.125]


def test_at_first_it_tells_of_the_workers_and_that_no_step_is_overdue(record, sent):
    with record():
        pass
    (start,) = values(sent, "raykd_train_start_timestamp_seconds")
    assert values(sent, "raykd_train_last_step_timestamp_seconds") == [start]
    assert values(sent, "raykd_train_num_steps") == [9]
    pool = {name: (value, tags["pool"]) for name, value, tags in sent if name.startswith("raykd_pool")}
    assert pool == {
        "raykd_pool_actors": (2, "student"), "raykd_pool_min_actors": (1, "student"),
        "raykd_pool_max_actors": (4, "student"),
    }  # fmt: skip


def test_other_ranks_tell_nothing(record, sent, tmp_path, tracked):
    with record(rank=1) as recorder:
        recorder.add(line(1), step([1], [True]), wait_s=1.0, is_logged=True)
        recorder.publish()
    assert sent == []
    assert list((tmp_path / "run").iterdir()) == []
    assert not tracked[1].exists()


def test_after_a_restart_file_and_tracker_have_each_step_once(record, tmp_path, tracked):
    with record() as recorder:
        for number in (1, 2, 3):
            recorder.add(line(number), step([1], [True]), wait_s=0.0, is_logged=True)
    with record(first_step=3) as recorder:
        for number in (3, 4):
            recorder.add(line(number, **{"eval/kl": 2.0}), step([1], [True]), wait_s=0.0, is_logged=True)
    lines = [json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [one["step"] for one in lines] == [1, 2, 3, 4]
    assert {"time/steps_s", "time/waits_s"} <= lines[0].keys()
    wanted = [
        f"{one.pop('step')} {sorted((key, float(value)) for key, value in one.items() if key != 'time')}"
        for one in lines
    ]
    assert tracked[1].read_text().splitlines() == wanted
    assert "eval/kl" in wanted[2]


def test_the_lines_before_are_read_by_trackers_alone_and_not_kept(record, tmp_path, tracked, monkeypatch):
    with record() as recorder:
        for number in range(1, 6):
            recorder.add(line(number), step([1], [True]), wait_s=0.0, is_logged=True)
    live = weakref.WeakSet()

    class Line(dict):
        __hash__ = object.__hash__

    def read_metrics(path):
        for one in metrics.read_metrics(path):
            kept = Line(one)
            live.add(kept)
            yield kept

    monkeypatch.setattr("ray_kd.trainer.recorder.read_metrics", read_metrics)
    with record(first_step=6) as recorder:
        recorder.add(line(6), step([1], [True]), wait_s=0.0, is_logged=True)
        wait_for(lambda: len(tracked[1].read_text().splitlines()) == 6 if tracked[1].exists() else False)
        assert len(live) <= 1, "but for the one at hand"
    monkeypatch.setattr("ray_kd.trainer.recorder.read_metrics", lambda path: pytest.fail("nobody asked for them"))
    with record(first_step=6, trackers=[]):
        pass


def wait_for(is_so, timeout_s=20.0):
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_line_of_several_steps_has_the_seconds_of_them_all(record, tmp_path, monkeypatch):
    """Steps of 10 s each, of which they waited 9, 1, 2, ...; an evaluation of 100 s after step 4."""
    clock = iter([0.0, 10.0, 20.0, 30.0, 140.0, 150.0, 160.0])
    monkeypatch.setattr("ray_kd.trainer.recorder.time.perf_counter", lambda: next(clock))
    with record() as recorder:
        for number in range(1, 7):
            evaluated = {"eval/kl": 2.0, "time/eval_s": 100.0} if number == 4 else {}
            recorder.add(
                line(number, **evaluated), step([1], [True]), wait_s=None if number == 1 else number - 1.0,
                is_logged=number % 2 == 0,
            )  # fmt: skip
    lines = [json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(one["step"], one["time/steps_s"], one["time/waits_s"]) for one in lines] == [
        (2, 10.0, 1.0), (4, 20.0, 5.0), (6, 20.0, 9.0),
    ]  # fmt: skip
