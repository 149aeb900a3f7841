"""What the teacher pools are doing, noted while the stream runs: how many actors, how many blocks wait for them.

Ray Data's executor calls back at each step of its scheduling loop, in a process of its own. A line is added to the
run folder's `teacher_pool/` whenever a pool grows or shrinks, and every few seconds. The names of the executor's
parts are private to Ray; an integration test reads the lines of a real run.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ray.data import DataContext
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.operators.actor_pool_map_operator import ActorPoolMapOperator

from ray_kd import storage
from ray_kd.teacher.journal import POOLS, Journal

if TYPE_CHECKING:
    from ray.data._internal.execution.streaming_executor import StreamingExecutor

_EVERY_S = 5.0
_CONFIG = "ray_kd.teacher_pools"


class PoolNotes(ExecutionCallback):
    """For `DataContext.custom_execution_callback_classes`, once the pools are `announced`."""

    def __init__(self) -> None:
        self._journal: Journal | None = None
        self._seen: dict[str, tuple[int, ...]] = {}
        self._due = 0.0

    @staticmethod
    def announce(context: DataContext, run_dir: Path, names: Sequence[str]) -> None:
        """Whose the actor pools of the dataset are, in its order."""
        context.set_config(_CONFIG, (str(run_dir), list(names)))

    def before_execution_starts(self, executor: "StreamingExecutor") -> None:
        run_dir, self._names = executor._data_context.get_config(_CONFIG)
        self._journal = Journal(storage.path(run_dir), POOLS)

    def on_execution_step(self, executor: "StreamingExecutor") -> None:
        topology = executor._topology
        if self._journal is None or topology is None:
            return
        is_due = time.monotonic() >= self._due
        pools = [operator for operator in topology if isinstance(operator, ActorPoolMapOperator)]
        for name, operator in zip(self._names, pools, strict=True):
            info = operator.get_actor_info()
            actors = (info.running, info.pending, info.restarting)
            if not is_due and actors == self._seen.get(name):
                continue
            self._seen[name] = actors
            self._due = time.monotonic() + _EVERY_S
            self._journal.add(
                {
                    "teacher": name,
                    "time": time.time(),
                    "actors": info.running,
                    "pending": info.pending,
                    "restarting": info.restarting,
                    "queue": topology[operator].total_enqueued_input_blocks(),
                    "in_flight": operator.num_active_tasks(),
                }
            )
