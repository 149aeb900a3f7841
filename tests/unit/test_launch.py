"""The driver while Ray Train runs: the first signal asks, the second leaves, errors keep their exit code."""

import os
import signal
import threading
import time

import pytest

from ray_kd import launch
from ray_kd.errors import ConfigError, DataError, RetryableError, StorageFull
from ray_kd.locks import Lost


def run(target, **more):
    launch.fit(target, on_poll=more.get("on_poll", []), request_stop=more.get("request_stop", lambda: None))


def test_the_first_signal_asks_the_workers_to_stop():
    stop = threading.Event()
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    run(lambda: stop.wait(10), request_stop=stop.set)
    assert stop.is_set()


def test_the_second_signal_leaves_at_once():
    release = threading.Event()
    for delay in (0.3, 0.8):
        threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT)).start()
    start = time.monotonic()
    with pytest.raises(RetryableError, match="second SIGINT"):
        run(lambda: release.wait(10))
    release.set()
    assert time.monotonic() - start < 5


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    run(lambda: None)
    assert signal.getsignal(signal.SIGTERM) is before


def test_outside_of_training_a_signal_is_retryable():
    with launch.interruptible(), pytest.raises(RetryableError, match="SIGTERM"):
        signal.raise_signal(signal.SIGTERM)


def test_an_error_of_ours_in_a_worker_keeps_its_class():
    from ray.train import WorkerGroupError

    def fails():
        raise WorkerGroupError("details", {0: ConfigError("dtype 'x' is unknown")})

    with pytest.raises(ConfigError, match="dtype 'x'"):
        run(fails)


def test_an_error_of_ours_in_a_task_keeps_its_class():
    """As it comes when a task of the stream fails: the worker's error wraps Ray's, and that one ours."""
    from ray.data.exceptions import UserCodeException
    from ray.exceptions import RayTaskError
    from ray.train import WorkerGroupError

    def fails():
        ours = UserCodeException("in a map")
        ours.__cause__ = DataError("no usable record")
        wrapped = RayTaskError("read", "a long traceback", ours).as_instanceof_cause()
        outer = RuntimeError("next(iterator)")
        outer.__cause__ = wrapped
        raise WorkerGroupError("details", {0: outer})

    with pytest.raises(DataError, match=r"^no usable record$"):
        run(fails)


def test_the_outermost_of_our_errors_counts():
    def fails():
        try:
            raise ConfigError("what it came from")
        except ConfigError as error:
            raise RetryableError("what it means") from error

    with pytest.raises(RetryableError, match="what it means"):
        run(fails)


def test_a_run_that_lost_its_folder_leaves_without_a_word_to_the_workers(monkeypatch):
    asked = []

    def lost():
        raise Lost("another has it")

    with pytest.raises(Lost, match="another has it"):
        run(lambda: time.sleep(1), on_poll=[lost], request_stop=lambda: asked.append(1))
    assert asked == []


def test_a_lost_worker_is_retryable_and_a_bug_is_not():
    from ray.exceptions import RayActorError
    from ray.train import WorkerGroupError

    def lost():
        raise WorkerGroupError("details", {1: RayActorError()})

    def bug():
        raise WorkerGroupError("details", {0: KeyError("oops")})

    with pytest.raises(RetryableError, match="a worker was lost"):
        run(lost)
    with pytest.raises(RuntimeError, match="KeyError: 'oops'"):
        run(bug)


def test_a_disk_that_is_full_for_rays_own_files_is_a_full_disk():
    from ray.train import ControllerError

    def full():
        line = "[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left on device"
        raise ControllerError(OSError(line))

    with pytest.raises(StorageFull, match="no space left on device for the run folder"):
        run(full)


def test_progress_is_polled():
    polls = []
    run(lambda: time.sleep(0.6), on_poll=[lambda: polls.append(1)])
    assert len(polls) >= 2


def test_a_task_that_failed_says_what_our_code_said_or_that_it_was_lost_or_is_a_bug():
    from ray.exceptions import OutOfMemoryError, RayTaskError, WorkerCrashedError

    def failed(cause):
        return RayTaskError("_call", "Traceback ...", cause).as_instanceof_cause()

    refused = launch.of_task(failed(ConfigError("LlamaForCausalLM cannot be used")), "saving the head")
    assert (type(refused), str(refused)) == (ConfigError, "LlamaForCausalLM cannot be used")
    for lost in (WorkerCrashedError(), OutOfMemoryError("killed\nby the monitor")):
        error = launch.of_task(lost, "saving the head")
        assert isinstance(error, RetryableError)
        assert str(error).startswith("saving the head failed: ")
        assert "\n" not in str(error)
    bug = launch.of_task(failed(KeyError("x")), "saving the head")
    assert type(bug) is RuntimeError
    assert str(bug) == "saving the head: KeyError: 'x'"


def test_what_is_overridden_for_an_own_ray_are_methods_that_ray_train_calls():
    """They have the names of private methods: a Ray that renames one would do without the override, unnoticed."""
    from ray.train.torch import TorchTrainer

    own = launch.trainer_class(starts_ray=True)
    overridden = {name for name in vars(own) if name.startswith("_") and not name.startswith("__")}
    assert overridden - {"_abc_impl"} == {"_initialize_and_run_controller", "_create_default_callbacks"}
    assert overridden < {*dir(TorchTrainer), "_abc_impl"}
    assert launch.trainer_class(starts_ray=False) is TorchTrainer
