"""The feed: a thread that pulls rows from the stream, collates them and hands out whole steps.

Starting it is the first act of the train function: the data executor and the teacher then load while torch,
DeepSpeed and the student do. Only the wait for a finished micro-batch is left on the training thread, and it is
measured, after the first step.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray_kd.errors import RetryableError
from ray_kd.payloads import FeatureSpec

if TYPE_CHECKING:
    import pyarrow as pa

    from ray_kd.trainer.collate import MicroBatch


@dataclass(frozen=True)
class ExpectedFeatures:
    """What the feature terms expect of every payload."""

    spec: FeatureSpec
    width: int
    """D, of the teacher's hidden states."""
    num_heads: int
    """Of the teacher; 0 without attention."""


@dataclass(frozen=True)
class Expected:
    """What the loss expects of every payload."""

    payload: str
    """Kind: topk_logprobs, hidden_states or features."""
    width: int
    """K log-probabilities, or the width D of the teacher's hidden states."""
    temperature: float
    """Which log-probabilities must have been taken at."""
    features: ExpectedFeatures | None = None
    """What a payload of features has beside its log-probabilities."""


_QUEUED_MICRO_BATCHES = 4  # decoded ahead of the step; more would add to the run-ahead, and hide nothing


class Feed:
    """Micro-batches of one worker, in the order of the slots.

    blocks: yields pyarrow tables of rows (an iterable of a Ray Train dataset shard).
    timeout_s: longest wait for one micro-batch; RetryableError after it, so a dead stream cannot hang a worker.
    """

    def __init__(
        self, blocks: Callable[[], Iterable["pa.Table"]], *, micro_batch_size: int, accumulation: int,
        expected: Expected, timeout_s: float,
    ) -> None:  # fmt: skip
        self._blocks = blocks
        self._micro_batch_size = micro_batch_size
        self._accumulation = accumulation
        self._expected = expected
        self._timeout_s = timeout_s
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=_QUEUED_MICRO_BATCHES)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._pump, name="feed", daemon=True)
        self._thread.start()

    def next_step(self) -> tuple[list["MicroBatch"], float]:
        """The micro-batches of the next optimiser step and the seconds waited for them."""
        start = time.perf_counter()
        return [self._next() for _ in range(self._accumulation)], time.perf_counter() - start

    def close(self) -> None:
        """Let the thread go; rows already pulled are dropped (their slots are not committed)."""
        self._stopped.set()

    def _next(self) -> "MicroBatch":
        try:
            item = self._queue.get(timeout=self._timeout_s)
        except queue.Empty:
            raise RetryableError(
                f"no rows from the teacher stage for {self._timeout_s:.0f} s (train.timeout_s): "
                "look at the teacher pool in the Ray dashboard or its logs"
            ) from None
        if isinstance(item, BaseException):
            raise item
        return item

    def _pump(self) -> None:
        try:
            for micro_batch in self._micro_batches():
                if not self._put(micro_batch):
                    return
            self._put(RuntimeError("the stream ended before the run's last slot"))
        except BaseException as error:  # handed to the training thread, which raises it
            self._put(error)

    def _micro_batches(self) -> Iterator["MicroBatch"]:
        from ray_kd.trainer.collate import collate  # imports torch: after the stream has been started

        for block in self._blocks():
            for start in range(0, block.num_rows, self._micro_batch_size):
                yield collate(block.slice(start, self._micro_batch_size), self._expected)

    def _put(self, item: Any) -> bool:
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=0.5)
                return True
            except queue.Full:
                continue
        return False
