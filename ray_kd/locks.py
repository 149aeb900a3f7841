"""One writer per run folder: the driver holds it exclusively, its train workers share a second lock while they live.

After a SIGKILL of the driver its last workers live on for seconds and may still be writing a checkpoint; the next
driver waits for them before it touches anything.

On a disk that is flock: released by the kernel when a process dies, on local disks and on NFS 4. An object store has
no locks, so there each holder keeps a small file changing (a lease); whoever finds one that has not changed for
LEASE_S takes its holder for dead. No clocks are compared. Two drivers that start within the same moment both write
the lease, and the one whose name is found there a little later has it. A holder that stood still for longer than
LEASE_S may find another in its place: both locks give a `Held`, to be asked before anything is written.
"""

import fcntl
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ray_kd import storage
from ray_kd.errors import ConfigError, RetryableError

logger = logging.getLogger(__name__)

BEAT_S = 5.0
LEASE_S = 45.0

_DRIVER, _WRITERS = ".driver.lock", ".writers.lock"
_SETTLE_S = 1.0


class Lost(RetryableError):
    """Another run has taken the run folder over: this one must not write there any more."""


class Held:
    """A lock that is held, as far as is known."""

    def __init__(self) -> None:
        self.lost_to: str | None = None

    def check(self) -> None:
        """Raise Lost when another holder was found in the place of this one."""
        if self.lost_to is not None:
            raise Lost(f"this run stood still for too long, and {self.lost_to} has its run.dir now")


@contextmanager
def driver_lock(run_dir: Path, timeout_s: float = 120.0) -> Iterator[Held]:
    """Hold the run folder for one driver.

    Raises ConfigError when another driver holds it, RetryableError when workers of a dead one outlive timeout_s.
    """
    if storage.is_remote(run_dir):
        _wait_for_leases(run_dir, timeout_s)
        with _lease(run_dir / _DRIVER, settle_s=_SETTLE_S) as held:
            if held.lost_to is not None:
                raise _held(run_dir, held.lost_to)
            yield held
        return
    with storage.open_own(run_dir / _DRIVER, "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise _held(run_dir, lock.read().strip()) from None
        lock.truncate(0)
        lock.write(_who())
        lock.flush()
        _wait_for_writers(run_dir, timeout_s)
        yield Held()


@contextmanager
def writer_lock(run_dir: Path) -> Iterator[Held]:
    """Held by every train worker while it may write to the run folder."""
    if storage.is_remote(run_dir):
        with _lease(run_dir / _WRITERS / uuid.uuid4().hex) as held:
            yield held
        return
    with storage.open_own(run_dir / _WRITERS, "a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield Held()


def holders(run_dir: Path) -> list[str]:
    """Who holds the run folder now, in words. Writes nothing.

    On a disk this takes the locks for an instant. In an object store it waits for two beats where there is a lease: one
    that does not change in that time is not of a living holder, or of one that stands still.
    """
    if storage.is_remote(run_dir):
        if before := _leases(run_dir):
            time.sleep(2 * BEAT_S)
        return [json.loads(text)["holder"] for name, text in _leases(run_dir).items() if before.get(name) != text]
    found = []
    for name in (_DRIVER, _WRITERS):
        if not (run_dir / name).exists():
            continue
        # NFS wants a file that is open for writing; a disk does not, and who asks may have no right to write.
        with (run_dir / name).open("r+" if os.access(run_dir / name, os.W_OK) else "r") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                found.append(f"driver {lock.read().strip()}" if name == _DRIVER else "train workers")
    return found


def _wait_for_writers(run_dir: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    with storage.open_own(run_dir / _WRITERS, "a+") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise _outlived(run_dir, timeout_s) from None
                time.sleep(0.2)


def _wait_for_leases(run_dir: Path, timeout_s: float) -> None:
    """Until no lease of an earlier run has changed for LEASE_S; at once where there is none. Removes the dead ones."""
    seen = _leases(run_dir)
    start = quiet_since = time.monotonic()
    while seen and time.monotonic() < quiet_since + LEASE_S:
        time.sleep(BEAT_S / 5)
        now = _leases(run_dir)
        if now.get(_DRIVER, seen.get(_DRIVER)) != seen.get(_DRIVER):
            raise _held(run_dir, json.loads(now[_DRIVER])["holder"])
        if now != seen:
            seen, quiet_since = now, time.monotonic()
        if time.monotonic() > start + max(timeout_s, LEASE_S) and now:
            raise _outlived(run_dir, timeout_s)
    for name in seen:
        (run_dir / name).unlink(missing_ok=True)


def _leases(run_dir: Path) -> dict[str, str]:
    """Name in run_dir -> content, of the leases that are there."""
    names = [_DRIVER, *(f"{_WRITERS}/{name}" for name in storage.sizes(run_dir / _WRITERS))]
    found = {}
    for name in names:
        try:
            found[name] = storage.read_text(run_dir / name)
        except FileNotFoundError:  # given up meanwhile, or there is no driver
            continue
    return found


@contextmanager
def _lease(lease: Path, settle_s: float = 0.0) -> Iterator[Held]:
    """Keep a file changing while the block runs, and remove it then. settle_s: how long another may still write it."""
    me = f"{_who()} ({uuid.uuid4().hex[:8]})"
    held, ended = Held(), threading.Event()

    def look() -> None:
        if (holder := _holder(lease)) != me:
            held.lost_to = holder or "nobody"

    def keep() -> None:
        count = 0
        while not ended.wait(BEAT_S) and held.lost_to is None:
            try:
                look()
                if held.lost_to is None:
                    count += 1
                    lease.write_text(json.dumps({"holder": me, "beat": count}), encoding="utf-8")
            except Exception as error:  # whatever the store's client raises: the next beat may come through
                logger.warning("'%s' could not be renewed: %s", lease, error)

    lease.write_text(json.dumps({"holder": me, "beat": 0}), encoding="utf-8")
    if settle_s:
        time.sleep(settle_s)
        look()
    thread = threading.Thread(target=keep, name="lease", daemon=True)
    thread.start()
    try:
        yield held
    finally:
        ended.set()
        thread.join()
        try:
            if _holder(lease) == me:
                lease.unlink()
        except Exception as error:  # the run's own outcome counts; the next one waits for the lease to run out
            logger.warning("'%s' could not be given up: %s", lease, error)


def _holder(lease: Path) -> str | None:
    try:
        return str(json.loads(storage.read_text(lease))["holder"])
    except FileNotFoundError:
        return None


def _who() -> str:
    return f"pid {os.getpid()} on {os.uname().nodename}"


def _held(run_dir: Path, holder: str | None) -> ConfigError:
    return ConfigError(
        f"run.dir '{run_dir}' is being written by another run ({holder}): wait for it, or choose another run.dir"
    )


def _outlived(run_dir: Path, timeout_s: float) -> RetryableError:
    return RetryableError(f"workers of an earlier run still hold '{run_dir}' after {timeout_s:.0f} s: try again later")
