"""What a run tells Prometheus through Ray: one table, and the one way to send a value of it.

Ray puts `ray_` before each name on the metrics port of the node and adds labels of its own (SessionName, WorkerId,
Component, ...), so that two teachers are two series. A gauge stays as long as its process and goes with it, a counter
stays on its node with its last value; Ray's histograms are right in buckets and count alone (their sum is that of the
buckets' middles), so seconds that are added up have a counter as well. Ray lets no counter begin at 0: it is there from
its first event on.
"""

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

GAUGE, COUNTER, HISTOGRAM = "gauge", "counter", "histogram"
STUDENT, TEACHER = "student", "teacher"
"""Values of the tag `pool`."""


@dataclass(frozen=True)
class Metric:
    """A metric as it is exported. Every one has the tag `run`, the name of the run folder."""

    name: str
    kind: str
    sentence: str
    tags: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    """Upper bounds, of a histogram."""


_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)

METRICS = {
    metric.name: metric
    for metric in (
        # The student, by rank 0 after every step.
        Metric("raykd_train_step", GAUGE, "Optimiser steps done."),
        Metric("raykd_train_num_steps", GAUGE, "Optimiser steps that the run will have."),
        Metric("raykd_train_epoch", GAUGE, "Epoch of the newest step, from 0."),
        Metric("raykd_train_start_timestamp_seconds", GAUGE, "Unix time at which the workers were ready to train."),
        Metric("raykd_train_last_step_timestamp_seconds", GAUGE,
               "Unix time of the newest step, or of the start; from the driver as well, which outlives its workers."),
        Metric("raykd_train_step_seconds", HISTOGRAM, "Seconds a step took, evaluation included.", (), _SECONDS),
        Metric("raykd_train_loss", GAUGE, "The objective: the weighted sum of its terms."),
        Metric("raykd_train_kd_loss_nats", GAUGE, "Divergence from the teacher a target token, T^2 included."),
        Metric("raykd_train_ce_loss_nats", GAUGE, "Cross-entropy with the labels a target token."),
        Metric("raykd_train_term_loss", GAUGE, "Another term of the loss before its weight.", ("term",)),
        Metric("raykd_train_learning_rate", GAUGE, "Learning rate of the newest step."),
        Metric("raykd_train_grad_norm", GAUGE, "Gradient norm before clipping."),
        Metric("raykd_train_bad_steps_total", COUNTER, "Steps skipped since loss or gradient were not finite."),
        Metric("raykd_teacher_topk_mass_ratio", GAUGE, "Probability that the teacher's answers name, of 1."),
        Metric("raykd_train_top1_agreement_ratio", GAUGE, "Target tokens whose likeliest token is the teacher's."),
        Metric("raykd_rows_total", COUNTER, "Rows that had their turn in a step."),
        Metric("raykd_rows_quarantined_total", COUNTER,
               "Rows left out, by reason: teacher (no usable answer) or step (a bad one).", ("reason",)),
        Metric("raykd_wire_bytes_total", COUNTER, "Bytes of teachers' answers that reached the students."),
        Metric("raykd_wire_bytes_per_token", GAUGE, "Bytes of the teacher's answer a target token."),
        Metric("raykd_teacher_wait_seconds", HISTOGRAM, "Seconds that a step waited for its rows.", (), _SECONDS),
        Metric("raykd_teacher_wait_seconds_total", COUNTER, "Seconds that steps waited for their rows."),
        Metric("raykd_eval_kl_nats", GAUGE, "Held-out KL(teacher || student) a token, over the whole vocabulary."),
        Metric("raykd_eval_topk_bucket_kl_nats", GAUGE, "Held-out KL a token over the top k and the rest."),
        Metric("raykd_eval_perplexity", GAUGE, "Held-out perplexity of the student."),
        Metric("raykd_eval_top1_agreement_ratio", GAUGE, "Held-out tokens where student and teacher agree."),
        # Checkpoints and restarts.
        Metric("raykd_checkpoint_last_commit_timestamp_seconds", GAUGE, "Unix time of the newest checkpoint."),
        Metric("raykd_checkpoint_last_commit_step", GAUGE, "Step of the newest checkpoint."),
        Metric("raykd_checkpoint_write_seconds", HISTOGRAM,
               "Seconds from a checkpoint's begin until rank 0 had written its files.", (), _SECONDS),
        Metric("raykd_worker_group_restarts_total", COUNTER, "Starts of the workers after the run's first."),
        # Both pools.
        Metric("raykd_tokens_total", COUNTER, "Tokens, padding left out: trained on, or through a teacher's model.",
               ("pool", "teacher")),
        Metric("raykd_tokens_per_second", GAUGE, "Of the newest step, or of an actor's newest block while it worked.",
               ("pool", "teacher")),
        Metric("raykd_pool_actors", GAUGE, "Teacher actors that run, or train workers.", ("pool", "teacher")),
        Metric("raykd_pool_min_actors", GAUGE, "The least of them that the config asks for.", ("pool", "teacher")),
        Metric("raykd_pool_max_actors", GAUGE, "The most of them that the config allows.", ("pool", "teacher")),
        # The teachers, by each actor after every block, and by the stream about the pools.
        Metric("raykd_teacher_queued_blocks", GAUGE, "Blocks of rows that wait for a teacher.", ("teacher",)),
        Metric("raykd_teacher_busy_seconds_total", COUNTER, "Seconds of work on blocks.", ("teacher",)),
        Metric("raykd_teacher_idle_seconds_total", COUNTER, "Seconds between blocks.", ("teacher",)),
        Metric("raykd_teacher_rows_computed_total", COUNTER, "Rows through a teacher's engine.", ("teacher",)),
        Metric("raykd_teacher_rows_from_cache_total", COUNTER, "Rows whose answer the cache had.", ("teacher",)),
        Metric("raykd_teacher_retries_total", COUNTER, "Requests to a teacher's server made again.", ("teacher",)),
    )
}  # fmt: skip

Send = Callable[[Metric, float, dict[str, str]], None]


class Exporter:
    """Sends values of one process and run to Ray, whose own thread takes them to the node: some microseconds each.

    Where Ray is not initialised when this is made, as in a test of the loop alone, it sends nothing.
    tags: of every value, where its metric has them. send: in place of Ray's.
    """

    def __init__(self, run: str, send: Send | None = None, **tags: str) -> None:
        import ray

        self._send = send or (_RAY if ray.is_initialized() else None)
        self._tags = {"run": run} | tags

    def send(self, name: str, value: float | None, **tags: str) -> None:
        """Set a gauge, add to a counter or observe in a histogram.

        Nothing is sent of None and of what is not finite (the gauge stays as it was), nor of nothing to add.
        """
        metric = METRICS[name]
        if self._send is None or value is None or not math.isfinite(value) or (metric.kind == COUNTER and value <= 0):
            return
        given = self._tags | tags
        self._send(metric, float(value), {key: given.get(key, "") for key in tag_keys(metric)})

    def forget(self, name: str) -> None:
        """Let Ray drop a gauge of this process and run: what it said is over."""
        if isinstance(self._send, _Ray):
            self._send.forget(name, self._tags["run"])


def tag_keys(metric: Metric) -> tuple[str, ...]:
    """All tags of a metric."""
    return ("run", *metric.tags)


class _Ray:
    """Ray's own metrics, made when they are first needed.

    Ray drops a gauge that was not set for two of its report intervals (20 s), and with it the time of the last step of
    a trainer that hangs: a thread sets all of them again as long as their process lives. One for all of the process, or
    an older value might come after a newer one.
    """

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}
        self._lock = threading.Lock()  # a checkpoint is counted by the thread that wrote it
        self._thread: threading.Thread | None = None
        self._gauges: dict[tuple[str, tuple[str, ...]], tuple[Any, float, dict[str, str]]] = {}

    def __call__(self, metric: Metric, value: float, tags: dict[str, str]) -> None:
        with self._lock:
            if metric.name not in self._made:
                self._made[metric.name] = _made(metric)
            made = self._made[metric.name]
            if metric.kind == COUNTER:
                made.inc(value, tags)
            elif metric.kind == HISTOGRAM:
                made.observe(value, tags)
            else:
                made.set(value, tags)
                self._gauges[metric.name, tuple(tags.values())] = (made, value, tags)
                if self._thread is None:
                    self._thread = threading.Thread(target=self._set_again, name="gauges", daemon=True)
                    self._thread.start()

    def forget(self, name: str, run: str) -> None:
        """A gauge of a run, with all other tags."""
        with self._lock:
            for key in [key for key, (_, _, tags) in self._gauges.items() if key[0] == name and tags["run"] == run]:
                del self._gauges[key]

    def _set_again(self) -> None:
        import ray

        every_s = max(1.0, ray._config.metrics_report_interval_ms() / 1000) / 2
        while True:
            time.sleep(every_s)
            with self._lock:
                if not ray.is_initialized():
                    self._thread = None
                    self._gauges.clear()
                    return
                for made, value, tags in self._gauges.values():
                    made.set(value, tags)


_RAY = _Ray()


def _made(metric: Metric) -> Any:
    from ray.util import metrics

    keys = tag_keys(metric)
    if metric.kind == HISTOGRAM:
        return metrics.Histogram(metric.name, metric.sentence, list(metric.buckets), keys)
    return (metrics.Gauge if metric.kind == GAUGE else metrics.Counter)(metric.name, metric.sentence, keys)
