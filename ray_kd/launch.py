"""Run a Ray Train trainer from a driver that stays in charge: progress, signals, and errors with an exit code.

`fit` runs in a thread, since Ray Train's own Ctrl-C handler would abort the workers before they can save. The main
thread shows progress; the first Ctrl-C or SIGTERM asks the workers to save and leave, the second leaves at once.
"""

import logging
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ray_kd import storage
from ray_kd.errors import RayKDError, RetryableError, StorageFull

if TYPE_CHECKING:
    from types import FrameType

    from ray.exceptions import RayError
    from ray.train.torch import TorchTrainer

logger = logging.getLogger(__name__)

_POLL_S = 0.25


def fit(run: Callable[[], Any], *, on_poll: Sequence[Callable[[], object]], request_stop: Callable[[], None]) -> None:
    """Call run (a trainer's fit) and wait for it. The calls of on_poll are made a few times a second.

    request_stop is called at the first signal. Raises the mapped error of a failed run, and RetryableError at the
    second signal.
    """
    outcome: list[BaseException | None] = []

    def target() -> None:
        try:
            run()
            outcome.append(None)
        except BaseException as error:  # carried to the main thread
            outcome.append(error)

    thread = threading.Thread(target=target, name="fit", daemon=True)
    is_asked = False
    with _first_signal() as is_signalled:
        thread.start()
        while thread.is_alive():
            thread.join(_POLL_S)
            if is_signalled.is_set() and not is_asked:
                request_stop()
                is_asked = True
            for call in on_poll:
                call()
    if outcome[0] is not None:
        raise _mapped(outcome[0]) from outcome[0]


def trainer_class(starts_ray: bool) -> "type[TorchTrainer]":
    """Ray Train's trainer. starts_ray: on a Ray that this process started, whose workers have its environment.

    There the controller needs no runtime environment to carry variables, and so the processes that it starts for the
    data need none: Ray hands them workers that are running already, instead of starting two interpreters for each.
    """
    import ray
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
    from ray.train.v2._internal.execution.controller import TrainController

    class OnOwnRay(TorchTrainer):
        def _create_default_callbacks(self) -> Any:
            # It would remove what a dead controller left on a cluster; this Ray ends with this process.
            found = super()._create_default_callbacks()  # type: ignore[misc] # typed as Train v1's
            return [callback for callback in found if not isinstance(callback, PlacementGroupCleanerCallback)]

        def _initialize_and_run_controller(self, **arguments: Any) -> Any:
            controller: Any = ray.remote(TrainController).options(num_cpus=0).remote(**arguments)
            ray.get(controller.run.remote())
            return ray.get(controller.get_result.remote())

    return OnOwnRay if starts_ray else TorchTrainer


@contextmanager
def interruptible() -> Iterator[None]:
    """Outside of training SIGTERM and Ctrl-C raise RetryableError at once: nothing is lost."""

    def handler(signum: int, _: "FrameType | None") -> None:
        raise RetryableError(f"stopped by {signal.Signals(signum).name}; the same command goes on")

    with _handlers(handler):
        yield


@contextmanager
def _first_signal() -> Iterator[threading.Event]:
    is_signalled = threading.Event()

    def handler(signum: int, _: "FrameType | None") -> None:
        name = signal.Signals(signum).name
        if is_signalled.is_set():
            raise RetryableError(f"stopped by a second {name}; the same command goes on from the last checkpoint")
        logger.info("%s: saving a checkpoint after this step, then leaving (again: leave at once)", name)
        is_signalled.set()

    with _handlers(handler):
        yield is_signalled


@contextmanager
def _handlers(handler: "Callable[[int, FrameType | None], None]") -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.signal(signum, handler) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, previous in before.items():
            signal.signal(signum, previous)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, then what it came from. A RayTaskError, whose text is a traceback, only stands for its `cause`."""
    from ray.exceptions import RayTaskError

    if isinstance(error, RayTaskError):
        cause = error.cause
    else:
        yield error
        cause = error.__cause__
    if isinstance(cause, BaseException):
        yield from _chain(cause)


def _ours(error: BaseException) -> RayKDError | None:
    """What our own code said, if it stands anywhere behind the error: the outermost of it, without what it carries."""
    found = next((inner for inner in _chain(error) if isinstance(inner, RayKDError)), None)
    return None if found is None else type(found)(str(found))


def of_task(error: "RayError", what: str) -> BaseException:
    """The error with the exit code that fits a Ray task that failed: what our code said, a lost process, or a bug."""
    from ray.exceptions import RayTaskError

    if (ours := _ours(error)) is not None:
        return ours
    if isinstance(error, RayTaskError):
        return RuntimeError(f"{what}: {type(error.cause).__name__}: {error.cause}")
    return RetryableError(f"{what} failed: {str(error).strip().splitlines()[0]}")


def _mapped(error: BaseException) -> BaseException:
    """The error with the exit code that fits: what a worker of ours said, lost infrastructure, or a bug."""
    from ray.exceptions import RayActorError, RayError
    from ray.train import ControllerError, WorkerGroupError

    causes: list[BaseException] = [error]
    if isinstance(error, WorkerGroupError):
        causes = [getattr(cause, "_base_exc", cause) for cause in error.worker_failures.values()]
    elif isinstance(error, ControllerError):
        causes = [error.controller_failure]
    for cause in causes:
        if (ours := _ours(cause)) is not None:
            return ours
        if storage.is_full(cause):  # Ray Train keeps a list of checkpoints there, in a process of its own
            return StorageFull(
                "no space left on device for the run folder: the same command goes on when there is space"
            )
    lost = next((c for c in causes if isinstance(c, RayActorError) or type(c).__module__.startswith("ray.train")), None)
    if lost is not None or isinstance(error, RayError):
        line = str(lost or error).strip().splitlines()[0]
        return RetryableError(f"a worker was lost and train.max_failures restarts were used up: {line}")
    return RuntimeError(f"{type(causes[0]).__name__}: {causes[0]}")
