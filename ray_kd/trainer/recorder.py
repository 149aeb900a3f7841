"""What rank 0 tells of each step: a line of metrics.jsonl, the same to the trackers, and its figures to Prometheus.

The line is written first; what a tracker loses in a kill it is given again at the next start.
"""

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_kd import storage
from ray_kd.config import worker_range
from ray_kd.metrics import MetricLogger, read_metrics
from ray_kd.ray_metrics import STUDENT, Exporter
from ray_kd.trackers import Start, Trackers

if TYPE_CHECKING:
    from ray_kd.trainer.loop import TrainSpec
    from ray_kd.trainer.step import StepResult

_OF_STEP = {
    "step": "raykd_train_step",
    "time": "raykd_train_last_step_timestamp_seconds",
    "epoch": "raykd_train_epoch",
    "train/loss": "raykd_train_loss",
    "train/kd_loss": "raykd_train_kd_loss_nats",
    "train/ce_loss": "raykd_train_ce_loss_nats",
    "train/learning_rate": "raykd_train_learning_rate",
    "train/grad_norm": "raykd_train_grad_norm",
    "train/top1_agreement": "raykd_train_top1_agreement_ratio",
    "teacher/topk_mass": "raykd_teacher_topk_mass_ratio",
    "teacher/bytes_per_token": "raykd_wire_bytes_per_token",
    "eval/kl": "raykd_eval_kl_nats",
    "eval/topk_bucket_kl": "raykd_eval_topk_bucket_kl_nats",
    "eval/perplexity": "raykd_eval_perplexity",
    "eval/top1_agreement": "raykd_eval_top1_agreement_ratio",
}
"""Key of a line -> the gauge with its value."""

_TERM, _LOSS = "train/", "_loss"

STEPS_S, WAITS_S, EVAL_S = "time/steps_s", "time/waits_s", "time/eval_s"
"""Keys of a line: seconds of the steps since the line before, and of their waits for the teacher, both without the
first step of a start and without evaluations; seconds of the evaluation that followed its step."""


class _History:
    """The first lines of metrics.jsonl, read whenever they are asked for: they are not kept, and the file grows."""

    def __init__(self, path: Path, num_lines: int) -> None:
        self._path, self._num_lines = path, num_lines

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return itertools.islice(read_metrics(self._path), self._num_lines)


class Recorder:
    """Does something on rank 0 alone.

    path: of metrics.jsonl. first_step: of this start; what is there of it and of later ones is removed.
    world: number of workers.
    """

    def __init__(
        self, spec: "TrainSpec", path: Path, first_step: int, rank: int, world: int,
        exporter: Exporter | None = None,
    ) -> None:  # fmt: skip
        self._is_first = rank == 0
        self._tokens = 0
        self._steps_s = self._waits_s = 0.0
        self._start = self._step_start = time.perf_counter()
        if not self._is_first:
            return
        run_dir = storage.path(spec.run_dir)
        self._logger = MetricLogger(path, last_step=first_step - 1)
        self._trackers = Trackers(
            spec.trackers, Start(run_dir, spec.config_yaml, first_step - 1), _History(path, self._logger.num_kept)
        )  # fmt: skip
        self._exporter = exporter or Exporter(run_dir.name, pool=STUDENT)
        least, most = worker_range(spec.train)
        now = time.time()
        for name, value in {
            "raykd_train_start_timestamp_seconds": now,
            "raykd_train_last_step_timestamp_seconds": now,
            "raykd_train_num_steps": spec.num_steps,
            "raykd_pool_actors": world,
            "raykd_pool_min_actors": least,
            "raykd_pool_max_actors": most,
        }.items():
            self._exporter.send(name, value)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_first:
            try:
                self._logger.close()
            finally:
                self._trackers.close()

    def publish(self) -> None:
        """Make the lines so far visible, where the run folder is in an object store."""
        if self._is_first:
            self._logger.publish()

    def add(self, metrics: dict[str, Any], result: "StepResult", *, wait_s: float | None, is_logged: bool) -> None:
        """Count a step and, when it is logged, write its line. wait_s: None where it was no wait for the teacher."""
        self._tokens += result.num_tokens
        if not self._is_first:
            return
        now = time.perf_counter()
        step_s = now - self._step_start
        self._export(metrics, result, wait_s, step_s)
        self._step_start = now
        if wait_s is not None:
            self._steps_s += step_s - metrics.get(EVAL_S, 0.0)
            self._waits_s += wait_s
        if is_logged:
            line = metrics | {
                "train/tokens_per_second": self._tokens / (now - self._start),
                STEPS_S: self._steps_s,
                WAITS_S: self._waits_s,
            }
            self._logger.log(line)
            self._trackers.log(line)
            self._tokens, self._start = 0, now
            self._steps_s = self._waits_s = 0.0

    def committed(self, step: int, write_s: float) -> None:
        """A checkpoint counts from now on; write_s: what rank 0's files of it took."""
        self._exporter.send("raykd_checkpoint_last_commit_timestamp_seconds", time.time())
        self._exporter.send("raykd_checkpoint_last_commit_step", step)
        self._exporter.send("raykd_checkpoint_write_seconds", write_s)

    def _export(self, metrics: dict[str, Any], result: "StepResult", wait_s: float | None, step_s: float) -> None:
        send = self._exporter.send
        for key, name in _OF_STEP.items():
            send(name, metrics.get(key))
        for key in metrics.keys() - _OF_STEP.keys():
            if key.startswith(_TERM) and key.endswith(_LOSS):
                send("raykd_train_term_loss", metrics[key], term=key.removeprefix(_TERM).removesuffix(_LOSS))
        is_row = result.row_ids >= 0
        send("raykd_tokens_total", result.num_tokens)
        send("raykd_tokens_per_second", result.num_tokens / step_s)
        send("raykd_rows_total", int(is_row.sum()))
        send("raykd_rows_quarantined_total", int((is_row & ~result.is_trained).sum()), reason="teacher")
        send("raykd_wire_bytes_total", result.payload_nbytes)
        if result.is_bad:
            send("raykd_train_bad_steps_total", 1)
            send("raykd_rows_quarantined_total", int(result.is_trained.sum()), reason="step")
        if wait_s is not None:
            send("raykd_train_step_seconds", step_s)
            send("raykd_teacher_wait_seconds", wait_s)
            send("raykd_teacher_wait_seconds_total", wait_s)
