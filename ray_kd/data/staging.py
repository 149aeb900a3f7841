"""A folder that appears complete or not at all: written under a temporary name, renamed when it is whole.

Several drivers may prepare the same data at once: each writes its own temporary folder, the first to finish wins and
the others use what it made. A temporary folder whose driver is gone is removed. Needs a file system with atomic
rename of folders and flock: a local disk, NFS 4 or the like, seen by every node that prepares. In an object store the
staged files are copied to their place, the manifest last; two drivers that do so at once copy the same bytes.
"""

import fcntl
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ray_kd import storage
from ray_kd.data.manifest import MANIFEST_NAME
from ray_kd.errors import ConfigError

_PREFIX = ".preparing-"
_STARTED = ".started"
_OLD_S = 7 * 24 * 3600


@contextmanager
def staging(parent: Path) -> Iterator[Path]:
    """An empty temporary folder in `parent`, locked while the block runs and removed with whatever is left in it."""
    if storage.is_remote(parent):
        with _staging_remote(parent) as folder:
            yield folder
        return
    folder = parent / f"{_PREFIX}{uuid.uuid4().hex[:12]}"
    lock_path = folder.with_suffix(".lock")
    with storage.refused_if_unwritable(parent, "data.prepared_dir"):
        parent.mkdir(parents=True, exist_ok=True)
        lock = _locked(lock_path)
    with lock:
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            lock_path.unlink(missing_ok=True)


def commit(folder: Path, final: Path, is_whole: Callable[[Path], bool]) -> None:
    """Rename a staged folder to its final name, unless another driver has put a whole one there meanwhile.

    What stands there and is not whole (a disk that lost data) is removed first.
    """
    if storage.is_remote(final):
        if not is_whole(final):
            # Never removed first: another driver may have completed it just now. Equal names hold equal bytes.
            names = storage.sizes(folder).keys() - {_STARTED, MANIFEST_NAME}
            storage.copy_files(folder, final, names)
            storage.copy_files(folder, final, [MANIFEST_NAME])
        return
    if final.exists() and not is_whole(final):
        broken = folder.with_name(f"{folder.name}.broken")
        os.rename(final, broken)
        storage.remove(broken)
    try:
        os.rename(folder, final)
    except OSError:
        if not is_whole(final):
            raise


def sweep(parent: Path) -> list[str]:
    """Remove temporary folders whose driver is gone; returns their names."""
    if storage.is_remote(parent):
        return _sweep_remote(parent)
    removed = []
    for lock_path in parent.glob(f"{_PREFIX}*.lock"):
        with lock_path.open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # its driver is alive
            shutil.rmtree(lock_path.with_suffix(""), ignore_errors=True)
            lock_path.unlink(missing_ok=True)
            removed.append(lock_path.stem)
    return removed


@contextmanager
def _staging_remote(parent: Path) -> Iterator[Path]:
    folder = parent / f"{_PREFIX}{int(time.time())}-{uuid.uuid4().hex[:12]}"
    try:
        (folder / _STARTED).write_text("")
    except PermissionError as error:
        raise ConfigError(f"data.prepared_dir '{parent}' cannot be written: {error}") from error
    try:
        yield folder
    finally:
        storage.remove(folder)


def _sweep_remote(parent: Path) -> list[str]:
    """No lock says whose driver is gone, so what is a week old goes."""
    found = (re.fullmatch(rf"{re.escape(_PREFIX)}(\d+)-\w+", entry.name) for entry in storage.children(parent))
    old = [match[0] for match in found if match and time.time() - int(match[1]) > _OLD_S]
    for name in old:
        storage.remove(parent / name)
    return old


def _locked(path: Path) -> IO[str]:
    while True:
        lock = path.open("a")
        fcntl.flock(lock, fcntl.LOCK_EX)
        if os.fstat(lock.fileno()).st_nlink:
            return lock
        lock.close()  # a sweep saw the file before it was locked, and removed it
