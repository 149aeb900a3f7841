"""Workers that come and go with the cluster's nodes (`train.num_workers: [min, max]`): what is done around Ray's part.

Ray Train decides: after a failure it starts as many workers as the living nodes have room for, and while all is well
it looks every `train.resize_every_s` whether there is room for more, or less. Either way the group of workers, and with
it the stream, is started again from the newest checkpoint. Before a resize that Ray decides in peace, this module has
the workers save first, so that no row is trained again; after a lost node what came after the newest checkpoint is.
"""

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import ReschedulingState, ResizingState, RestartingState

from ray_kd import storage

if TYPE_CHECKING:
    from ray.train.v2._internal.execution.context import TrainRunContext
    from ray.train.v2._internal.execution.controller.state import TrainControllerState

logger = logging.getLogger(__name__)

_POLL_S = 0.2
_LONGEST_SAVE_S = 300.0
_PROBE_S = 30.0


class Resizing(ControllerCallback):
    """Runs in Ray Train's controller. Nothing that fails here ends the run: it only costs rows trained again.

    flag: the file that asks the workers to save and leave; the first of them removes it when it leaves.
    """

    def __init__(self, flag: Path, timeout_s: float) -> None:
        self._flag = str(flag)
        self._timeout_s = min(timeout_s, _LONGEST_SAVE_S)
        self._requester = ""

    def after_controller_start(self, train_run_context: "TrainRunContext") -> None:
        self._requester = f"train-{train_run_context.run_id}"

    def after_controller_state_update(
        self, previous_state: "TrainControllerState", current_state: "TrainControllerState"
    ) -> None:
        try:
            if isinstance(current_state, ResizingState):
                self._have_saved()
            elif isinstance(current_state, RestartingState | ReschedulingState):
                self._see_lost_nodes()
        except Exception:
            logger.exception("before a resize of the workers")

    def _have_saved(self) -> None:
        """Ask the workers to save and to leave, and wait until they have: Ray ends them next, and starts the new."""
        flag = storage.path(self._flag)
        flag.touch()
        deadline = time.monotonic() + self._timeout_s
        try:
            while flag.exists() and time.monotonic() < deadline:
                time.sleep(_POLL_S)
        finally:
            flag.unlink(missing_ok=True)

    def _see_lost_nodes(self) -> None:
        """Have Ray count again without the nodes that are gone.

        It counts every 20 s, and takes a node for alive until some heartbeats are missing: workers are dead before
        that, and a group of the old size would wait for its node until its start times out.
        """
        import ray
        from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
            get_or_create_autoscaling_coordinator,
        )
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        task = ray.remote(num_cpus=0, max_retries=0)(_answer)
        answers = [
            task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote()
            for node in ray.nodes()
            if node["Alive"]
        ]
        # A node that is gone answers with an error, once Ray knows.
        ray.wait(answers, num_returns=len(answers), timeout=_PROBE_S, fetch_local=False)
        coordinator = get_or_create_autoscaling_coordinator()
        ray.get(coordinator.get_reserved_resources.remote(self._requester, recompute=True), timeout=_PROBE_S)


def _answer() -> None:
    return None
