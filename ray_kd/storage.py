"""A folder on a disk that all nodes share, or in an object store: one way to name it and to write into it.

A path is a `pathlib.Path`; a URI (s3://, gs://, abfs://) is a `UPath` over fsspec, which has the methods of one. What
a store does not have is here: rename (so nothing is renamed: a put is whole or not at all, and of a folder the file
that makes it count is put last), append (files that grow are kept locally and put whole), and folders that a library
can map or open (`fetch` makes a copy on this node).

Copies are kept under TMPDIR, in a folder of this user, for days. Credentials and endpoints come from the environment
of each process, as the store's own client reads them (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...). Clients raise
whatever they like; `store_errors` makes one RetryableError of it.
"""

import errno
import fcntl
import hashlib
import logging
import os
import re
import shutil
import stat
import tempfile
import time
import traceback
import unicodedata
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, cast

from upath import UPath

from ray_kd.errors import ConfigError, RayKDError, RetryableError, StorageFull
from ray_kd.redact import redact

SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "az")
"""Stores whose puts are whole and seen by all at once. Their clients: s3fs, gcsfs, adlfs."""

_CLIENTS = ("fsspec", "s3fs", "gcsfs", "adlfs", "upath", "botocore", "aiobotocore", "aiohttp")
_TRANSFERS = 8  # files on the way at once
_POLL_S = 5.0
_KEEP_S = 3 * 24 * 3600

logger = logging.getLogger(__name__)


def path(location: str | Path, key: str = "path") -> Path:
    """The absolute path of a location, or a UPath that behaves like one for a URI; `file://` is a path.

    key: what the location is, for messages. Raises ConfigError for a URI that is of no store, names no folder in it,
    holds a password, or needs a package that is not installed.
    """
    if isinstance(location, UPath):
        return cast(Path, location)
    text = str(location).removeprefix("file://")
    if slip := re.match(rf"({'|'.join(SCHEMES)}):/?(?!/)", text):
        raise ConfigError(f"{key} is '{text}': did you mean '{slip[1]}://{text[slip.end() :]}'?")
    if "://" not in text:
        return Path(text).expanduser().absolute()
    scheme = text.split("://")[0]
    if re.match(r"\w+://[^/@]*:[^/]*@", text):
        raise ConfigError(f"{key} is a {scheme}:// URI with a password; such values come from the environment")
    if scheme not in SCHEMES:
        allowed = ", ".join(f"{known}://" for known in SCHEMES)
        raise ConfigError(f"{key} is '{text}': allowed is a path, or a URI of {allowed}")
    try:
        # Another process may write what this one asks for: a remembered listing would be wrong.
        found = UPath(text, use_listings_cache=False)
        _ = found.fs  # opens the client
    except ImportError as error:
        raise ConfigError(f"{key} is '{text}': {scheme}:// needs another package ({error})") from error
    if not found.name:
        raise ConfigError(f"{key} is '{text}', a whole store: allowed is the URI of a folder in it")
    return cast(Path, found)


def is_remote(location: Path) -> bool:
    """Whether a path of `path` lies in an object store."""
    return isinstance(location, UPath)


@contextmanager
def store_errors() -> Iterator[None]:
    """What a store's client raises inside, and nobody has caught, becomes a RetryableError of one line.

    StorageFull for want of space, on a disk too; ConfigError for want of permission in a store.
    """
    try:
        yield
    except RayKDError:
        raise
    except Exception as error:
        line = redact(" ".join(str(error).split())) or type(error).__name__
        if is_full(error):
            raise StorageFull(f"{line[:300]}: the same command goes on when there is space") from error
        if not is_store_error(error):
            raise
        if isinstance(error, PermissionError) or "Credential" in type(error).__name__:
            raise ConfigError(
                f"the object store let nobody in ({line[:200]}): set its credentials, on every node"
            ) from error
        raise RetryableError(f"the object store failed ({type(error).__name__}: {line[:200]})") from error


def is_full(error: BaseException) -> bool:
    """Whether there was no space, or no quota, left for a file."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    # safetensors and pyarrow have exceptions of their own, and Ray those of other processes.
    return any(words in str(error).lower() for words in (f"os error {errno.ENOSPC})", f"[errno {errno.ENOSPC}]"))


@contextmanager
def refused_if_unwritable(where: Path, key: str = "") -> Iterator[None]:
    """An OSError inside becomes the ConfigError that `where`, the value of `key`, cannot be written.

    Not for want of space, which may change, nor when a store failed, unless it was the bucket's name or its rights.
    """
    try:
        yield
    except OSError as error:
        is_of_the_name = not is_remote(where) or isinstance(error, PermissionError | FileNotFoundError)
        if is_full(error) or not is_of_the_name:
            raise
        raise ConfigError(f"{key} '{where}' cannot be written: {error.strerror or error}".lstrip()) from error


def is_store_error(error: BaseException) -> bool:
    """Whether an exception came through a store's client: clients share no class, but they are in the traceback."""
    frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(name.split(".")[0] in _CLIENTS for name in [*frames, type(error).__module__])


def filesystem(location: Path) -> tuple[Any, str]:
    """The fsspec file system of a remote path, and the path's name in it."""
    assert isinstance(location, UPath)
    return location.fs, location.path.rstrip("/")


def for_arrow(location: Path) -> tuple[str, Any]:
    """(path, pyarrow file system) of a location, as Ray Train takes them; None for the file system of a disk."""
    if not is_remote(location):
        return str(location), None
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    fs, name = filesystem(location)
    return name, PyFileSystem(FSSpecHandler(fs))


def is_inside(name: str) -> bool:
    """Whether a name out of a manifest or a listing, POSIX, is of something inside the folder that it is joined to."""
    is_text = not any(unicodedata.category(character) == "Cc" for character in name)
    return is_text and "\\" not in name and not {"", ".", ".."} & set(name.split("/"))


def make_folder(folder: Path) -> None:
    """Make a folder and those above it; a store has none, and asked for one its client would make a bucket."""
    if not is_remote(folder):
        folder.mkdir(parents=True, exist_ok=True)


def write_text(target: Path, text: str) -> None:
    """Write whole or not at all."""
    if is_remote(target):
        target.write_text(text, encoding="utf-8")
        return
    temporary = target.with_name(f".{target.name}-{uuid.uuid4().hex[:8]}.tmp")  # ranks may write the same at once
    with _removed_if_it_fails(temporary):
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)


@contextmanager
def _removed_if_it_fails(temporary: Path) -> Iterator[None]:
    """What a full disk leaves of a file would be there for good."""
    try:
        yield
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def create_text(target: Path, text: str) -> None:
    """Write a file on a disk whole, unless there is one: of several who do so at once, one is heard."""
    temporary = target.with_name(f".{target.name}-{uuid.uuid4().hex[:8]}.tmp")
    temporary.write_text(text, encoding="utf-8")
    with suppress(FileExistsError):
        os.link(temporary, target)
    temporary.unlink()


def write_bytes(target: Path, content: bytes | memoryview) -> None:
    """Write a file on a disk whole or not at all."""
    temporary = target.with_name(f".{target.name}-{uuid.uuid4().hex[:8]}.tmp")
    with _removed_if_it_fails(temporary):
        temporary.write_bytes(content)
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


def read_last_lines(source: Path, nbytes: int) -> list[str]:
    """The whole lines in the last nbytes of a remote file; none when there is no file."""
    fs, name = filesystem(source)
    try:
        tail = bytes(fs.cat_file(name, start=-nbytes))
    except FileNotFoundError:
        return []
    lines = tail.decode(errors="replace").splitlines(keepends=True)
    return [line for line in lines[len(tail) == nbytes :] if line.endswith("\n")]


def read_ranges(ranges: Sequence[tuple[Path, int, int]]) -> list[bytes]:
    """Bytes [start, stop) of each remote file named, many at once."""
    fs, _ = filesystem(ranges[0][0])
    names, starts, stops = zip(*((filesystem(file)[1], start, stop) for file, start, stop in ranges), strict=True)
    return [bytes(part) for part in fs.cat_ranges(list(names), list(starts), list(stops), on_error="raise")]


def open_own(target: Path, mode: str, encoding: str | None = None) -> IO[Any]:
    """Open a file on a disk for writing, but not through a link (ConfigError), which may lead anywhere."""
    if target.is_symlink():
        raise ConfigError(f"'{target}' is a link: nothing is written through it, remove it")
    # The link may come between the look and this.
    return open(target, mode, encoding=encoding, opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666))


def append_text(target: Path, text: str) -> None:
    """Add whole lines to a small file that is written seldom; in a store, by one process at a time.

    A line that a kill or a full disk cut short goes first: it would take the new one with it. The lock keeps a line
    that another process is still writing from being taken for one.
    """
    if is_remote(target):
        target.write_text("".join(read_lines(target)) + text, encoding="utf-8")
        return
    with open_own(target, "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            file.truncate(whole)
        file.write(text.encode())


def sizes(folder: Path) -> dict[str, int]:
    """Path inside a remote folder (POSIX) -> bytes, of all files below it.

    Empty keys that end in a slash, which some tools make for folders, are none. Raises ConfigError for a key that would
    be a path out of the folder, were it copied or moved: keys are any text.
    """
    fs, root = filesystem(folder)
    try:
        found: dict[str, dict[str, Any]] = fs.find(root, detail=True)
    except FileNotFoundError:
        return {}
    prefix = f"{root}/"
    inside = {
        name.removeprefix(prefix): int(info["size"]) for name, info in found.items()
        if name.startswith(prefix) and (info["size"] or not name.endswith("/"))
    }  # fmt: skip
    for name in inside:
        if not is_inside(name):
            raise ConfigError(f"'{folder}' has a file named {name!a}, which is no path inside of it: remove it")
    return inside


def children(folder: Path) -> list[Path]:
    """Files and folders in a folder, sorted by name; none where there is no folder. A store that fails raises."""
    if not is_remote(folder):
        return sorted(folder.iterdir()) if folder.is_dir() else []
    fs, root = filesystem(folder)
    try:
        found = fs.ls(root, detail=False)
    except FileNotFoundError:
        return []
    names = {str(name).rstrip("/").rsplit("/", 1)[1] for name in found if str(name).rstrip("/") != root}
    return [folder / name for name in sorted(names)]


def remove(folder: Path, first: str | None = None) -> None:
    """Delete a folder, if it is there; of a link the link alone.

    first: the file that makes a remote one count, deleted before the others.
    """
    if not is_remote(folder):
        if folder.is_symlink():
            folder.unlink()
        elif folder.exists():
            shutil.rmtree(folder)
        return
    fs, root = filesystem(folder)
    names = list(sizes(folder))
    if first in names:
        fs.rm_file(f"{root}/{first}")
        names.remove(first)
    if names:
        fs.rm([f"{root}/{name}" for name in names])


def move_folder(source: Path, target: Path, first: str | None = None) -> None:
    """Give a folder another name on its disk or in its store; first: as in `remove`."""
    if not is_remote(source):
        source.rename(target)
        return
    copy_files(source, target, sizes(source))
    remove(source, first)


@contextmanager
def drafted_file(target: Path) -> Iterator[Path]:
    """A local file to write: target itself on a disk, else one that is put there when the block ends well."""
    if not is_remote(target):
        yield target
        return
    with _draft_home() as home:
        yield home / target.name
        upload(home, target.parent, [target.name])


@contextmanager
def drafted_folder(target: Path, last: str) -> Iterator[Path]:
    """The same for a folder that the block makes; `last`, whose presence makes it count, is put after all else.

    What an upload that was killed left there is removed first.
    """
    if not is_remote(target):
        yield target
        return
    with _draft_home() as home:
        draft = home / target.name
        yield draft
        names = [found.relative_to(draft).as_posix() for found in draft.rglob("*") if found.is_file()]
        remove(target, first=last)
        upload(draft, target, [name for name in names if name != last])
        upload(draft, target, [last])


@contextmanager
def _draft_home() -> Iterator[Path]:
    home = scratch(f"draft {uuid.uuid4().hex}")
    try:
        yield home
    finally:
        shutil.rmtree(home, ignore_errors=True)


def upload(source: Path, target: Path, names: Iterable[str]) -> None:
    """Put files of a local folder into a remote one, several at once."""
    fs, root = filesystem(target)
    _transfer(lambda name: fs.put_file(str(source / name), f"{root}/{name}"), names)


def copy_files(source: Path, target: Path, names: Iterable[str]) -> None:
    """Copy files of a remote folder to another one of its store."""
    fs, root = filesystem(source)
    _, other = filesystem(target)
    _transfer(lambda name: fs.cp_file(f"{root}/{name}", f"{other}/{name}"), names)


def fetch(
    source: Path | str,
    *,
    version: str = "",
    marker: str | None = None,
    group: str | None = None,
    check: Callable[[Path], None] | None = None,
) -> Path:
    """A local copy of a remote file or folder; a local path as it is.

    All processes of a node share one copy; the first makes it. It is made again when the version differs: a text that
    tells one content from another, or what the store says of the file `marker` in the folder. Copies of one group (by
    default of one source) replace each other. check: called on a new copy, which is dropped when it raises.
    """
    wanted = path(source)
    if not is_remote(wanted):
        return wanted
    if marker is not None:
        fs, root = filesystem(wanted / marker)
        version = str(fs.ukey(root))
    with _locked_home(group or str(wanted)) as home:
        kept = home / hashlib.sha256(version.encode()).hexdigest()[:16] / wanted.name
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
    seen = top.lstat()
    if seen.st_uid != os.getuid() or not stat.S_ISDIR(seen.st_mode):
        raise ConfigError(f"'{top}' is not a folder of this user: set TMPDIR to one of your own")
    if stat.S_IMODE(seen.st_mode) & 0o077:
        raise ConfigError(f"'{top}' is open to other users (mode {stat.S_IMODE(seen.st_mode):o}): chmod it to 700")
    folder = top / hashlib.sha256(name.encode()).hexdigest()[:16]
    try:
        folder.mkdir()
    except FileExistsError:
        return folder
    for other in top.iterdir():
        # Gone, or in use: another process is quicker.
        with suppress(FileNotFoundError, BlockingIOError):
            if time.time() - other.stat().st_mtime > _KEEP_S:
                with (other / ".lock").open("a") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(other)
    return folder


@contextmanager
def _locked_home(name: str) -> Iterator[Path]:
    while (lock := _lock(home := scratch(name))) is None:
        pass
    with lock:
        os.utime(home)
        yield home


def _lock(home: Path) -> IO[str] | None:
    """The lock of a home, held; None when the home was swept meanwhile."""
    with suppress(FileNotFoundError):
        lock = (home / ".lock").open("a")
        fcntl.flock(lock, fcntl.LOCK_EX)
        if os.fstat(lock.fileno()).st_nlink:
            return lock
        lock.close()
    return None


class GrowingFile:
    """A text file written line by line: flushed at once on a disk; in a store kept here, and there once published."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self.is_remote = is_remote(target)
        self._pending: Future[None] | None = None
        self._pool: ThreadPoolExecutor | None = None
        self.nbytes = 0
        if not self.is_remote:
            self._file: IO[str] = open_own(target, "a", encoding="utf-8")
            return
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._file = tempfile.NamedTemporaryFile("w", encoding="utf-8")  # noqa: SIM115 (closed by close)
        for line in read_lines(target):
            self.write(line)

    def write(self, line: str) -> None:
        """Add a line, its newline included."""
        self._file.write(line)
        self._file.flush()
        self.nbytes += len(line.encode())

    def flush(self) -> None:
        """What was written is flushed already; here for those who take this for a stream."""

    def publish(self, wait: bool = True) -> None:
        """Let others see what was written. wait=False: soon; where that fails it is warned of and tried next time."""
        if self._pool is None:
            return
        pending, self._pending = self._pending, None
        if pending is not None and (error := pending.exception()) is not None:
            logger.warning("'%s' could not be put and will be again: %s", self._target, error)
        fs, name = filesystem(self._target)
        pending = self._pool.submit(fs.put_file, self._file.name, name)
        if wait:
            pending.result()
        else:
            self._pending = pending

    def close(self) -> None:
        """Publish and close."""
        try:
            self.publish()
        finally:
            self._file.close()


class Flag:
    """A file that another process may write. `is_set` looks at each call on a disk, every few seconds in a store."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._every_s = _POLL_S if is_remote(target) else 0.0
        self._next = 0.0

    def is_set(self, at_once: bool = False) -> bool:
        """Whether it is time to look (it is with at_once) and the file is there; a store that fails says no."""
        now = time.monotonic()
        if now < self._next and not at_once:
            return False
        self._next = now + self._every_s
        try:
            return self._target.exists()
        except Exception as error:
            if not is_store_error(error):
                raise
            logger.warning("'%s' could not be looked at: %s", self._target, error)
            return False


def _download(source: Path, target: Path) -> None:
    fs, root = filesystem(source)
    names = sizes(source)
    if not names:
        fs.get_file(root, str(target))
        return
    for parent in {(target / name).parent for name in names}:
        parent.mkdir(parents=True, exist_ok=True)
    _transfer(lambda name: fs.get_file(f"{root}/{name}", str(target / name)), names)


def _transfer(move: Callable[[str], None], names: Iterable[str]) -> None:
    with ThreadPoolExecutor(max_workers=_TRANSFERS) as pool:
        list(pool.map(move, names))
