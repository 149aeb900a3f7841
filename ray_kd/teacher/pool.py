"""The teacher pools while the stream runs: how many actors each should have, and notes of how many it has.

Ray Data's executor calls back at each step of its scheduling loop, in a process of its own. Ray's own autoscaler looks
at an instant: whenever two blocks come free together a pool counts as overloaded, and idle a moment later. A pool that
was far ahead of its student started a teacher every ten seconds and threw it away. Here the share of the time in which
actors had work decides.

A line is added to the run folder's `teacher_pool/` whenever a pool changes, and every few seconds; Prometheus is told
the same. The names of the
executor's parts are private to Ray; integration tests run them.
"""

import logging
import math
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray.data import DataContext
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.operators.actor_pool_map_operator import ActorPoolMapOperator

from ray_kd import storage
from ray_kd.ray_metrics import TEACHER, Exporter
from ray_kd.teacher.journal import POOL_NOTE_S, POOLS, Journal

if TYPE_CHECKING:
    from ray.data._internal.execution.streaming_executor import StreamingExecutor

logger = logging.getLogger(__name__)

_CLOSE_S = 5.0
_CONFIG = "ray_kd.teacher_pools"
_AVERAGED_S = 10.0
_SETTLED_S = 15.0  # after a change, before the next
_BUSY = 0.9
"""Above this share of the time with work, and with blocks waiting, the pool grows."""
_ROOM = 0.8
"""Below this share for those who would be left, it shrinks by one."""


class Size:
    """How many actors a pool should have, from how many of them have work, looked at again and again."""

    def __init__(self, least: int, most: int) -> None:
        self.least, self.most = least, most
        self.wanted = least
        self._busy = 0.0  # actors with work, averaged over the last seconds
        self._seen_at = self._changed_at = math.inf  # not yet

    def look(self, now: float, running: int, active: int, queue: int) -> int:
        """now: seconds; running: actors that are there; active: of these, with a block; queue: blocks that wait."""
        self._changed_at = min(self._changed_at, now)
        self._busy += (active - self._busy) * (1 - math.exp(-max(0.0, now - self._seen_at) / _AVERAGED_S))
        self._seen_at = now
        if running != self.wanted:
            self._changed_at = now  # one is loading its model still, or is finishing its block
        elif now >= self._changed_at + _SETTLED_S:
            if queue and self._busy > _BUSY * running and self.wanted < self.most:
                self.wanted, self._changed_at = min(2 * self.wanted, self.most), now
            elif self.wanted > self.least and self._busy < _ROOM * (running - 1):
                self.wanted, self._changed_at = self.wanted - 1, now
        return self.wanted


class PoolKeeper(ExecutionCallback):
    """For `DataContext.custom_execution_callback_classes`, once the pools are `announced`.

    It runs in the loop that moves every block: lines are written by a thread, and what goes wrong here is a warning.
    """

    def __init__(self) -> None:
        self._sizes: dict[str, Size] = {}
        self._seen: dict[str, tuple[int, ...]] = {}
        self._due = 0.0
        self._names: list[str] = []
        self._lines: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._is_broken = False

    @staticmethod
    def announce(context: DataContext, run_dir: Path, names: Sequence[str]) -> None:
        """Whose the actor pools of the dataset are, in its order."""
        context.set_config(_CONFIG, (str(run_dir), list(names)))

    def before_execution_starts(self, executor: "StreamingExecutor") -> None:
        run_dir, self._names = executor._data_context.get_config(_CONFIG)
        self._exporter = Exporter(storage.path(run_dir).name, pool=TEACHER)
        self._writer = threading.Thread(target=self._write, args=(run_dir,), name="teacher_pool", daemon=True)
        self._writer.start()

    def on_execution_step(self, executor: "StreamingExecutor") -> None:
        if self._is_broken:
            return
        try:
            self._keep(executor._topology)
        except Exception:  # of names that Ray changed: its own autoscaler goes on
            self._is_broken = True
            logger.warning("the sizes of the teacher pools are not looked after any more", exc_info=True)

    def after_execution_succeeds(self, executor: "StreamingExecutor") -> None:
        self._close()

    def after_execution_fails(self, executor: "StreamingExecutor", error: Exception) -> None:
        self._close()

    def _keep(self, topology: Any) -> None:
        now = time.monotonic()
        is_due = now >= self._due
        if is_due:
            self._due = now + POOL_NOTE_S
        pools = [operator for operator in topology if isinstance(operator, ActorPoolMapOperator)]
        for name, operator in zip(self._names, pools, strict=True):
            info, blocks = operator.get_actor_info(), topology[operator].total_enqueued_input_blocks()
            (pool,) = operator.get_autoscaling_actor_pools()
            size = self._sizes.setdefault(name, Size(pool.min_size(), pool.max_size()))
            wanted = size.look(now, info.running, info.active, blocks)
            if (pool.min_size(), pool.max_size()) != (wanted, wanted):
                pool._config = replace(pool._config, min_size=wanted, max_size=wanted, initial_size=wanted)
            actors = (info.running, info.pending, info.restarting)
            if is_due or actors != self._seen.get(name):
                self._seen[name] = actors
                self._note(name, *actors, queue=blocks, in_flight=operator.num_active_tasks())
                for metric, value in {
                    "raykd_pool_actors": info.running,
                    # With nothing left to compute Ray ends the actors, and the students go on.
                    "raykd_pool_min_actors": 0 if operator.has_execution_finished() else size.least,
                    "raykd_pool_max_actors": size.most,
                    "raykd_teacher_queued_blocks": blocks,
                }.items():
                    self._exporter.send(metric, value, teacher=name)

    def _close(self) -> None:
        for name in self._names:
            self._note(name, 0, 0, 0, queue=0, in_flight=0)
        self._lines.put(None)
        self._writer.join(_CLOSE_S)

    def _note(self, name: str, running: int, pending: int, restarting: int, **others: int) -> None:
        counts = {"actors": running, "pending": pending, "restarting": restarting}
        self._lines.put({"teacher": name, "time": time.time(), **counts, **others})

    def _write(self, run_dir: str) -> None:
        try:
            journal = Journal(storage.path(run_dir), POOLS)
            while (line := self._lines.get()) is not None:
                journal.add(line)
        except Exception:
            logger.warning("the sizes of the teacher pools are not noted any more", exc_info=True)
