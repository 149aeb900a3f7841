"""One writer per run folder: the driver holds it exclusively, its train workers share a second lock while they live.

After a SIGKILL of the driver its last workers live on for seconds and may still be writing a checkpoint; the next
driver waits for their lock before it touches anything. flock: released by the kernel when a process dies, on local
disks and on NFS 4; the folder must be shared by the nodes that write to it.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ray_kd.errors import ConfigError, RetryableError

_DRIVER, _WRITERS = ".driver.lock", ".writers.lock"


@contextmanager
def driver_lock(run_dir: Path, timeout_s: float = 60.0) -> Iterator[None]:
    """Hold the run folder for one driver.

    Raises ConfigError when another driver holds it, RetryableError when workers of a dead one outlive timeout_s.
    """
    with (run_dir / _DRIVER).open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise ConfigError(
                f"run.dir '{run_dir}' is being written by another run ({lock.read().strip()}): "
                "wait for it, or choose another run.dir"
            ) from None
        lock.truncate(0)
        lock.write(f"pid {os.getpid()} on {os.uname().nodename}")
        lock.flush()
        _wait_for_writers(run_dir, timeout_s)
        yield


@contextmanager
def writer_lock(run_dir: Path) -> Iterator[None]:
    """Held by every train worker while it may write to the run folder."""
    with (run_dir / _WRITERS).open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield


def _wait_for_writers(run_dir: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    with (run_dir / _WRITERS).open("a+") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise RetryableError(
                        f"workers of an earlier run still hold '{run_dir}' after {timeout_s:.0f} s: try again later"
                    ) from None
                time.sleep(0.2)
