"""A folder on a disk that all nodes share, or in an object store: one way to name it and to write into it.

A path is a `pathlib.Path`; a URI (s3://, gs://, abfs://, whatever fsspec knows) is a `UPath`, which has the methods of
one. What a store does not have is here: rename (so nothing is renamed: a put is whole or not at all, and of a folder
the file that makes it count is put last), append (files that grow are kept locally and put whole), and folders that a
library can map or open (`fetch` makes a copy on this node).

Copies are kept under TMPDIR, in a folder of this user. Credentials and endpoints come from the environment of each
process, as the store's own client reads them (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...).
"""

import fcntl
import hashlib
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, cast

from fsspec.implementations.memory import MemoryFileSystem
from upath import UPath

from ray_kd.errors import ConfigError, RetryableError

_TRANSFERS = 8  # files on the way at once
_POLL_S = 5.0
_KEEP_S = 3 * 24 * 3600


def path(location: str | Path) -> Path:
    """The absolute path of a location, or a UPath that behaves like one for a URI; `file://` is a path.

    Raises ConfigError for a URI that nothing installed can open.
    """
    if isinstance(location, UPath):
        return cast(Path, location)
    text = str(location).removeprefix("file://")
    if "://" not in text:
        return Path(text).expanduser().absolute()
    scheme = text.split("://")[0]
    try:
        # Another process may write what this one asks for: a remembered listing would be wrong.
        found = UPath(text, use_listings_cache=False)
        fs = found.fs  # opens the client
    except ValueError as error:
        raise ConfigError(f"'{text}': no file system is known for {scheme}:// ({error})") from error
    except ImportError as error:
        raise ConfigError(f"'{text}': {scheme}:// needs another package ({error})") from error
    if isinstance(fs, MemoryFileSystem) or not found.name:
        kind = "in one process only" if found.name else "a whole store"
        raise ConfigError(f"'{text}' is {kind}: allowed is a path, or the URI of a folder that all nodes see")
    return cast(Path, found)


def is_remote(location: Path) -> bool:
    """Whether a path of `path` lies in an object store."""
    return isinstance(location, UPath)


def filesystem(location: Path) -> tuple[Any, str]:
    """The fsspec file system of a remote path, and the path's name in it."""
    assert isinstance(location, UPath)
    return location.fs, location.path


def for_arrow(location: Path) -> tuple[str, Any]:
    """(path, pyarrow file system) of a location, as Ray Train takes them; None for the file system of a disk."""
    if not is_remote(location):
        return str(location), None
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    fs, name = filesystem(location)
    return name.rstrip("/"), PyFileSystem(FSSpecHandler(fs))


def write_text(target: Path, text: str) -> None:
    """Write whole or not at all."""
    if is_remote(target):
        target.write_text(text, encoding="utf-8")
        return
    temporary = target.with_name(f".{target.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(target)


def read_text(source: Path) -> str:
    """All of a small file, in one request: one that is being replaced is read as it was or as it is."""
    if not is_remote(source):
        return source.read_text(encoding="utf-8")
    fs, name = filesystem(source)
    return bytes(fs.cat_file(name)).decode()


def read_lines(source: Path) -> Iterator[str]:
    """The lines of a file, newlines included; nothing when there is none."""
    if is_remote(source):
        with suppress(FileNotFoundError):
            yield from read_text(source).splitlines(keepends=True)
    elif source.exists():
        with source.open(encoding="utf-8") as file:
            yield from file


def append_text(target: Path, text: str) -> None:
    """Add to a small file that is written seldom and by one process at a time."""
    if is_remote(target):
        target.write_text("".join(read_lines(target)) + text, encoding="utf-8")
        return
    with target.open("a", encoding="utf-8") as file:
        file.write(text)


def sizes(folder: Path) -> dict[str, int]:
    """Path inside a remote folder (POSIX) -> bytes, of all files below it."""
    fs, root = filesystem(folder)
    prefix = root.rstrip("/") + "/"
    try:
        found: dict[str, dict[str, Any]] = fs.find(root, detail=True)
    except FileNotFoundError:
        return {}
    return {name.removeprefix(prefix): int(info["size"]) for name, info in found.items() if name.startswith(prefix)}


def remove(folder: Path, first: str | None = None) -> None:
    """Delete a folder, if it is there. first: the file that makes a remote one count, deleted before the others."""
    if not is_remote(folder):
        shutil.rmtree(folder, ignore_errors=not folder.exists())
        return
    names = sorted(sizes(folder), key=lambda name: name != first)
    for name in names:
        (folder / name).unlink(missing_ok=True)


@contextmanager
def drafted_file(target: Path) -> Iterator[Path]:
    """A local file to write: target itself on a disk, else one that is put there when the block ends well."""
    if not is_remote(target):
        yield target
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder, target.name)
        upload(Path(folder), target.parent, [target.name])


@contextmanager
def drafted_folder(target: Path, last: str) -> Iterator[Path]:
    """The same for a folder that the block makes; `last`, whose presence makes it count, is put after all else."""
    if not is_remote(target):
        yield target
        return
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder, target.name)
        yield draft
        names = [found.relative_to(draft).as_posix() for found in draft.rglob("*") if found.is_file()]
        upload(draft, target, [name for name in names if name != last])
        upload(draft, target, [last])


def upload(source: Path, target: Path, names: Iterable[str]) -> None:
    """Put files of a local folder into a remote one, several at once."""
    fs, root = filesystem(target)
    _transfer(lambda name: fs.put_file(str(source / name), f"{root.rstrip('/')}/{name}"), names)


def copy_folder(source: Path, target: Path, last: str) -> None:
    """Copy a remote folder within its store, `last` after all else."""
    fs, root = filesystem(source)
    _, other = filesystem(target)
    names = sizes(source).keys()
    _transfer(lambda name: fs.cp_file(f"{root}/{name}", f"{other}/{name}"), names - {last})
    fs.cp_file(f"{root}/{last}", f"{other}/{last}")


def fetch(
    source: Path | str, *, group: str | None = None, version: str = "", check: Callable[[Path], None] | None = None
) -> Path:
    """A local copy of a remote file or folder that does not change; a local path as it is.

    All processes of a node share one copy; the first makes it. group, version: of things that follow each other (the
    checkpoints of a run) only the last one fetched is kept. check: called on a new copy, which is dropped when it
    raises. Raises RetryableError when the source cannot be read.
    """
    wanted = path(source)
    if not is_remote(wanted):
        return wanted
    home = scratch(group or str(wanted))
    os.utime(home)
    kept = home / hashlib.sha256(version.encode()).hexdigest()[:16] / wanted.name
    with (home / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if kept.exists():
            return kept
        for other in home.iterdir():
            if other.is_dir():
                shutil.rmtree(other)
        partial = home / f".partial-{uuid.uuid4().hex}" / wanted.name
        partial.parent.mkdir()
        try:
            _download(wanted, partial)
            if check is not None:
                check(partial)
        except BaseException:
            shutil.rmtree(partial.parent)
            raise
        partial.parent.rename(kept.parent)
    return kept


def scratch(name: str) -> Path:
    """A folder of this user on this node for what belongs to `name`, the same in every process.

    Making a new one removes those that were not used for days; whatever is in them can be fetched again.
    """
    top = Path(tempfile.gettempdir(), f"ray_kd-{os.getuid()}")
    top.mkdir(mode=0o700, exist_ok=True)
    if top.stat().st_uid != os.getuid():
        raise ConfigError(f"'{top}' belongs to another user: set TMPDIR to a folder of your own")
    folder = top / hashlib.sha256(name.encode()).hexdigest()[:16]
    if not folder.exists():
        folder.mkdir(exist_ok=True)
        for other in top.iterdir():
            if time.time() - other.stat().st_mtime > _KEEP_S:
                shutil.rmtree(other, ignore_errors=True)  # another process may be at it too
    return folder


class GrowingFile:
    """A text file written line by line: flushed at once on a disk; in a store kept here, and there once published."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self.is_remote = is_remote(target)
        self._pending: Future[None] | None = None
        self._pool: ThreadPoolExecutor | None = None
        self.nbytes = 0
        if not self.is_remote:
            self._file: IO[str] = target.open("a", encoding="utf-8")
            return
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._file = tempfile.NamedTemporaryFile("w", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self._file.writelines(read_lines(target))

    def write(self, line: str) -> None:
        """Add a line, its newline included."""
        self._file.write(line)
        self._file.flush()
        self.nbytes += len(line.encode())

    def flush(self) -> None:
        """What was written is flushed already; here for those who take this for a stream."""

    def publish(self, wait: bool = True) -> None:
        """Let others see what was written. wait=False: soon, without waiting; the next call raises what went wrong."""
        if self._pool is None:
            return
        if self._pending is not None:
            self._pending.result()
        fs, name = filesystem(self._target)
        self._pending = self._pool.submit(fs.put_file, self._file.name, name)
        if wait:
            self._pending.result()

    def close(self) -> None:
        """Publish and close."""
        self.publish()
        self._file.close()


class Flag:
    """A file that another process may write. `is_set` looks at each call on a disk, every few seconds in a store."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._every_s = _POLL_S if is_remote(target) else 0.0
        self._next = 0.0

    def is_set(self, at_once: bool = False) -> bool:
        """Whether it is time to look (it is with at_once) and the file is there."""
        now = time.monotonic()
        if now < self._next and not at_once:
            return False
        self._next = now + self._every_s
        return self._target.exists()


def _download(source: Path, target: Path) -> None:
    fs, root = filesystem(source)
    try:
        names = sizes(source)
        if not names:
            fs.get_file(root, str(target))
            return
        for parent in {(target / name).parent for name in names}:
            parent.mkdir(parents=True, exist_ok=True)
        _transfer(lambda name: fs.get_file(f"{root.rstrip('/')}/{name}", str(target / name)), names)
    except OSError as error:
        raise RetryableError(f"'{source}' cannot be copied to this node: {error}") from error


def _transfer(move: Callable[[str], None], names: Iterable[str]) -> None:
    with ThreadPoolExecutor(max_workers=_TRANSFERS) as pool:
        list(pool.map(move, names))
