"""The table of what is exported, and that each value goes out by its metric's kind, with all of its tags."""

import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from ray_kd.ray_metrics import COUNTER, GAUGE, HISTOGRAM, METRICS, Exporter, _Ray

SOURCES = [path for path in Path("ray_kd").rglob("*.py") if path.name != "ray_metrics.py"]
UNITS = ("seconds", "bytes", "nats", "ratio", "total", "rate", "norm", "loss", "perplexity")
"""How a name ends that is no number of things; learning rate, norm, loss and perplexity have no unit."""
COUNTS = {"raykd_train_step", "raykd_train_num_steps", "raykd_train_epoch", "raykd_checkpoint_last_commit_step",
          "raykd_tokens_per_second", "raykd_wire_bytes_per_token", "raykd_pool_actors", "raykd_pool_min_actors",
          "raykd_pool_max_actors", "raykd_teacher_queued_blocks"}  # fmt: skip


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_a_metric_is_named_as_prometheus_asks(metric):
    assert re.fullmatch(r"raykd_[a-z0-9_]+", metric.name)
    assert (metric.kind == COUNTER) == metric.name.endswith("_total")
    assert metric.name.endswith(UNITS) or metric.name in COUNTS
    assert metric.sentence.endswith(".")
    assert (metric.kind == HISTOGRAM) == bool(metric.buckets)
    assert list(metric.buckets) == sorted(set(metric.buckets))
    assert all(bound > 0 for bound in metric.buckets), "Ray takes no others"


def test_every_metric_is_sent_somewhere_and_nothing_else():
    sent = {name for path in SOURCES for name in re.findall(r'"(raykd_\w+)"', path.read_text())}
    assert sent == set(METRICS)


@pytest.fixture
def sent():
    return []


@pytest.fixture
def exporter(sent):
    return Exporter("mine", send=lambda *what: sent.append(what), pool="teacher", teacher="coder")


def test_a_value_has_the_tags_of_its_metric_and_no_others(exporter, sent):
    exporter.send("raykd_train_loss", 2)
    exporter.send("raykd_tokens_total", 3, teacher="writer")
    exporter.send("raykd_train_term_loss", 0.5)
    assert [(metric.name, value, tags) for metric, value, tags in sent] == [
        ("raykd_train_loss", 2.0, {"run": "mine"}),
        ("raykd_tokens_total", 3.0, {"run": "mine", "pool": "teacher", "teacher": "writer"}),
        ("raykd_train_term_loss", 0.5, {"run": "mine", "term": ""}),
    ]


def test_what_is_no_number_and_what_adds_nothing_is_not_sent(exporter, sent):
    for value in (None, float("nan"), float("inf")):
        exporter.send("raykd_train_loss", value)
    exporter.send("raykd_tokens_total", 0)
    assert sent == []
    exporter.send("raykd_train_epoch", 0)
    assert [value for _, value, _ in sent] == [0.0]


def test_a_name_that_is_in_no_table_is_our_mistake(exporter):
    with pytest.raises(KeyError):
        exporter.send("raykd_tokens", 1)


def test_without_ray_nothing_is_sent():
    exporter = Exporter("mine")
    for name in METRICS:
        exporter.send(name, 1.0)


def test_ray_gets_each_by_its_kind(monkeypatch):
    """Ray's own classes, in the place of its C++ side a list: an increment of a gauge would be an AttributeError."""
    from ray.util import metrics

    recorded = []
    monkeypatch.setattr(
        metrics.Metric, "_record", lambda self, value, tags=None: recorded.append((type(self).__name__, value, tags))
    )
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray_kd.ray_metrics._RAY", _Ray())
    exporter = Exporter("mine", pool="student")
    for metric in METRICS.values():
        exporter.send(metric.name, 2.0)
        exporter.send(metric.name, 3.0)
    kinds = {GAUGE: "Gauge", COUNTER: "Counter", HISTOGRAM: "Histogram"}
    wanted = [(kinds[metric.kind], value) for metric in METRICS.values() for value in (2.0, 3.0)]
    assert [(kind, value) for kind, value, _ in recorded] == wanted
    assert all(tags["run"] == "mine" for _, _, tags in recorded)


def test_a_gauge_is_set_again_and_again(monkeypatch):
    """Ray drops one that was not set for two report intervals: a stalled trainer would raise no alert."""
    from ray.util import metrics

    recorded, is_alive = [], True
    monkeypatch.setattr(metrics.Metric, "_record", lambda self, value, tags=None: recorded.append((self._name, value)))
    monkeypatch.setattr("ray.is_initialized", lambda: is_alive)
    monkeypatch.setattr("ray._config", SimpleNamespace(metrics_report_interval_ms=lambda: 1000))
    monkeypatch.setattr("ray_kd.ray_metrics._RAY", _Ray())
    others = set(threading.enumerate())
    exporter, second = Exporter("mine"), Exporter("mine")
    exporter.send("raykd_train_step", 1)
    second.send("raykd_train_step", 2)
    exporter.send("raykd_rows_total", 8)
    exporter.send("raykd_train_epoch", 0)
    exporter.forget("raykd_train_epoch")
    del recorded[:]
    (thread,) = set(threading.enumerate()) - others
    deadline = time.monotonic() + 20
    while len(recorded) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    is_alive = False
    thread.join(timeout=20)
    assert not thread.is_alive()
    assert set(recorded) == {("raykd_train_step", 2)}, "the epoch was taken back"
    assert len(recorded) >= 2
