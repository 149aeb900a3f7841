"""A checkpoint is a folder that is complete or absent: files of all ranks, `state.json`, and `manifest.json` last.

In: files that ranks wrote into `begin`'s temporary folder, and a JSON state with the ledger (the next slot).
Out: `<root>/step_00000100/`. On a disk it is renamed into place after everything in it was hashed and synced; in an
object store its files are put one by one and the manifest last, which is the commit there. Readers take only folders
whose manifest verifies. Cost: one sha256 pass at commit (spread over the ranks with `put_files`) and one by each
process that chooses a checkpoint (`newest_verified` on a disk, `local_copy` from a store). Needs no torch or ray.

On every rank:                                       on rank 0, after a barrier:
    tmp = begin(root, step, rank); barrier               commit(tmp, root, step, next_slot, state, hashes of all)
    ... write files ...                                  rotate(root, newest=step, keep_last=2)
    hashes = put_files(tmp, root, step, my_files)
"""

import errno
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray_kd import storage
from ray_kd.errors import ConfigError, RetryableError

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
STATE = "state.json"
DAMAGED = "damaged"
_TMP = ".tmp-"
_STEP_FOLDER = re.compile(r"step_(\d{8,})")

Hashes = dict[str, dict[str, Any]]
"""Path inside the checkpoint (POSIX) -> {"sha256": hex, "size": bytes}."""

logger = logging.getLogger(__name__)


class CorruptCheckpoint(RetryableError):
    """A checkpoint is not what its manifest says; the message names the file and what is wrong with it."""


def begin(root: Path, step: int, rank: int = 0) -> Path:
    """The temporary folder to write step's files into. Rank 0 clears and creates it; a barrier must follow.

    Clearing makes a retry of the same step safe: nothing of a killed attempt gets into the new manifest.
    For an object store every rank gets a folder of its own on its node, and rank 0 clears the place in the store.
    """
    if storage.is_remote(root):
        if rank == 0:
            storage.remove(root / _folder_name(step), first=MANIFEST)
        tmp = storage.scratch(f"{root} being written") / f"{_folder_name(step)}-{rank}"
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir()
        return tmp
    tmp = root / f"{_TMP}{_folder_name(step)}"
    if rank == 0:
        storage.remove(tmp)
        tmp.mkdir(parents=True)
    return tmp


def put_files(tmp: Path, root: Path, step: int, files: Iterable[str]) -> Hashes:
    """Sync and hash this rank's files (paths inside tmp), and put them in the store where root is in one.

    Each rank sends what it gets to rank 0, which then reads none of the files.
    """
    names = list(files)
    hashes = hash_files(tmp, names)
    if storage.is_remote(root):
        try:
            storage.upload(tmp, root / _folder_name(step), names)
        finally:
            shutil.rmtree(tmp)
    return hashes


def hash_files(folder: Path, files: Iterable[str]) -> Hashes:
    """sha256 and size of files (paths inside folder), each synced to disk first. Reads every byte once.

    Syncing here and not in `commit` matters on shared storage: only the node that wrote can flush its pages.
    """
    names = list(files)
    with ThreadPoolExecutor(max_workers=4) as pool:  # sha256 releases the GIL
        return dict(zip(names, pool.map(lambda name: _record(folder / name, sync=True), names), strict=True))


def commit(
    tmp: Path, root: Path, step: int, next_slot: int, state: Mapping[str, Any], hashes: Mapping[str, Any] | None = None
) -> Path:
    """Turn the temporary folder into checkpoint step; call on rank 0 after all ranks wrote. Returns its folder.

    next_slot: the ledger, the first slot of the stream that is not in these weights. state: the trainer's own JSON.
    hashes: what the ranks' `put_files` returned, merged; on a disk, files not in it are hashed here.
    Raises CorruptCheckpoint when a precomputed record does not fit the file that is there, ValueError when state is
    not JSON.
    """
    document = {"schema_version": SCHEMA_VERSION, "step": step, "next_slot": next_slot, "state": dict(state)}
    if storage.is_remote(root):
        return _commit_remote(root / _folder_name(step), step, _json(document), dict(hashes or {}))
    _write_json(tmp / STATE, document)
    present = _plain_files(tmp)
    records = dict(hashes or {})
    _compare_sizes(tmp, records, {name: present[name] for name in present if name in records})
    records.update(hash_files(tmp, sorted(present.keys() - records.keys())))
    _write_json(tmp / MANIFEST, {"schema_version": SCHEMA_VERSION, "step": step, "files": records})
    _sync_folder(tmp)

    final = root / _folder_name(step)
    if final.exists():
        # A run that fell back past a broken checkpoint reaches its step again: the new one replaces it.
        _discard(final)
    tmp.rename(final)
    _sync_folder(root)
    return final


def _commit_remote(folder: Path, step: int, state: str, records: Hashes) -> Path:
    storage.write_text(folder / STATE, state)
    data = state.encode()
    records[STATE] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    present = storage.sizes(folder)
    _compare_sizes(folder, records, present)
    _refuse_extra(folder, records, present)
    manifest = {"schema_version": SCHEMA_VERSION, "step": step, "files": records}
    storage.write_text(folder / MANIFEST, _json(manifest))
    return folder


def local_copy(folder: Path, *, of_writer: bool = False) -> Path:
    """A verified checkpoint as a folder that can be opened: itself on a disk, else a verified copy on this node.

    of_writer: the caller is the run itself, which gives up a checkpoint whose bytes in the store are not what its
    manifest says, so that its next start takes the one before it. Raises CorruptCheckpoint for such a one, and for a
    copy that is bad where the original is good.
    """
    if not storage.is_remote(folder):
        return folder
    manifest = storage.read_text(folder / MANIFEST)
    group = f"{folder.parent} {'in training' if of_writer else 'read'}"
    try:
        return storage.fetch(folder, group=group, version=manifest, check=verify)
    except CorruptCheckpoint as error:
        copy = error
    try:
        verify(folder)
    except CorruptCheckpoint as error:
        if of_writer:
            (folder / MANIFEST).unlink(missing_ok=True)
        raise CorruptCheckpoint(f"{error}; it is given up for the one before it" if of_writer else str(error)) from None
    raise CorruptCheckpoint(f"{copy}, in the copy on {os.uname().nodename}; the original is good: look at that disk")


def verify(folder: Path, full: bool = True) -> None:
    """Raise CorruptCheckpoint unless folder holds exactly the manifest's files, with its sizes and sha256 sums.

    full=False compares names and sizes only: no file is read, so a flipped byte goes unnoticed. Raises ConfigError for
    a schema version this code does not know: such a checkpoint is not damaged.
    """
    records = _read_manifest(folder)
    with _unreadable_is_corrupt(folder):
        present = _plain_files(folder)
        present.pop(MANIFEST, None)
        _compare_sizes(folder, records, present)
        _refuse_extra(folder, records, present)
        if full:
            with ThreadPoolExecutor(max_workers=4) as pool:
                found = pool.map(lambda name: (name, _record(folder / name)), sorted(records))
                for name, record in found:
                    if record["sha256"] != records[name]["sha256"]:
                        raise CorruptCheckpoint(f"{folder / name}: sha256 differs from {MANIFEST}")


def newest_verified(root: Path, full: bool = True) -> Path | None:
    """The newest checkpoint under root that verifies, or None. Each broken one is skipped with a warning saying why.

    In an object store names and sizes are compared here, and the bytes when they are brought (`local_copy`).
    """
    full = full and not storage.is_remote(root)
    for _, folder in reversed(_committed(root)):
        try:
            verify(folder, full=full)
        except CorruptCheckpoint as error:
            logger.warning("checkpoint %s is skipped for an older one: %s", folder.name, error)
        else:
            return folder
    return None


def recover(root: Path) -> Path | None:
    """The newest checkpoint that verifies, and nothing beside the good ones: orphans are swept, and what was passed
    over lies in `damaged/` (in a store it stays, until `local_copy` has seen its bytes).

    Call before training, by the one process that writes checkpoints. Left where it is, a broken one would count as one
    of the last, and the good ones before it would go at the next commits.
    """
    sweep(root)
    newest = newest_verified(root)
    if not storage.is_remote(root):
        for folder in folders(root):
            if newest is None or step_of(folder) > step_of(newest):
                set_aside(folder)
    return newest


def folders(root: Path) -> list[Path]:
    """All checkpoints with a manifest, oldest first; not verified."""
    return [folder for _, folder in _committed(root)]


def step_of(folder: Path) -> int:
    """The step of a checkpoint's folder, by its name."""
    return int(folder.name.removeprefix("step_"))


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint: schema_version, step, next_slot and state.

    Its own bytes are checked against the manifest first (the other files are not: `verify`).
    Raises CorruptCheckpoint naming the file, and ConfigError for a schema version this code does not know.
    """
    record = _read_manifest(folder).get(STATE)
    path = folder / STATE
    if record is None or not path.exists():
        raise CorruptCheckpoint(f"{path}: missing")
    with _unreadable_is_corrupt(path):
        if _record(path) != record:
            raise CorruptCheckpoint(f"{path}: sha256 differs from {MANIFEST}")
        content = path.read_bytes()
    try:
        document: dict[str, Any] = json.loads(content)
        _check_version(path, document["schema_version"])
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise CorruptCheckpoint(f"{path}: cannot be read ({type(error).__name__})") from error
    return document


def orphans(root: Path) -> list[Path]:
    """What killed attempts left, or a living one is writing: temporary folders, step folders without a manifest."""
    return [
        path
        for path in storage.children(root)
        if path.name.startswith(_TMP) or (_STEP_FOLDER.fullmatch(path.name) and not (path / MANIFEST).exists())
    ]


def sweep(root: Path) -> list[str]:
    """Remove the orphans and return their names.

    Call at start, by the one process that owns the run, before any rank writes. Other names are left alone.
    """
    found = orphans(root)
    for path in found:
        storage.remove(path)
    return [path.name for path in found]


def set_aside(folder: Path) -> Path:
    """Move a checkpoint to DAMAGED beside it, where nothing here looks for one; returns where it is now."""
    home = folder.parent / DAMAGED
    storage.make_folder(home)
    taken = {path.name for path in storage.children(home)}
    names = itertools.chain([folder.name], (f"{folder.name}-{count}" for count in itertools.count(2)))
    target = home / next(name for name in names if name not in taken)
    storage.move_folder(folder, target, first=MANIFEST)
    return target


def rotate(root: Path, newest: int, keep_last: int, keep: Collection[int] = ()) -> list[int]:
    """Delete all checkpoints but step newest, the keep_last - 1 before it and those in keep; returns the deleted.

    newest: the step just committed. Later ones are of a history that was given up (they did not verify), and would
    otherwise count as the newest and push the good ones out.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last is {keep_last}, it must be at least 1")
    committed = _committed(root)
    kept = [step for step, _ in committed if step <= newest][-keep_last:]
    deleted = []
    for step, folder in committed:
        if step not in kept and (step > newest or step not in keep):
            _discard(folder)
            deleted.append(step)
    return deleted


def _folder_name(step: int) -> str:
    return f"step_{step:08d}"


def _committed(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of everything with a manifest, oldest first."""
    matches = ((_STEP_FOLDER.fullmatch(path.name), path) for path in storage.children(root))
    return sorted((int(match[1]), path) for match, path in matches if match and (path / MANIFEST).exists())


def _discard(folder: Path) -> None:
    if storage.is_remote(folder):
        storage.remove(folder, first=MANIFEST)
        return
    # Renamed first: a kill inside rmtree must leave an orphan for `sweep`, not a checkpoint with a hole.
    doomed = folder.with_name(f"{_TMP}delete-{folder.name}")
    storage.remove(doomed)
    folder.rename(doomed)
    storage.remove(doomed)


def _read_manifest(folder: Path) -> Hashes:
    """The manifest's records, after checking that it can be read, is this version, and belongs to this folder."""
    path = folder / MANIFEST
    if not storage.is_remote(folder) and (link := next((p for p in (folder, path) if p.is_symlink()), None)):
        raise CorruptCheckpoint(f"{link}: is a link")
    try:
        with _unreadable_is_corrupt(path):
            document = json.loads(storage.read_text(path))
        version, step = document["schema_version"], document["step"]
        records = {
            str(name): {"sha256": str(r["sha256"]), "size": int(r["size"])} for name, r in document["files"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptCheckpoint(f"{path}: cannot be read ({type(error).__name__}: {error})") from error
    _check_version(path, version)
    if (outside := next((name for name in records if not storage.is_inside(name)), None)) is not None:
        raise CorruptCheckpoint(f"{path}: {outside!a} is no path inside the checkpoint")
    if _folder_name(step) != folder.name:
        raise CorruptCheckpoint(f"{path}: is of step {step}, not of {folder.name}")
    return records


def _check_version(path: Path, version: int) -> None:
    if version != SCHEMA_VERSION:
        raise ConfigError(
            f"{path}: schema_version {version}, this code reads {SCHEMA_VERSION}: go on with the ray_kd that wrote it, "
            f"or name another run.dir"
        )


@contextmanager
def _unreadable_is_corrupt(where: Path) -> Iterator[None]:
    """A file that is gone or whose bytes the disk has lost is damage; that the storage failed says nothing about it."""
    try:
        yield
    except OSError as error:
        line = f"{error.filename or where}: cannot be read ({type(error).__name__}: {error.strerror or error})"
        if isinstance(error, FileNotFoundError | IsADirectoryError) or error.errno == errno.EIO:
            raise CorruptCheckpoint(line) from error
        if storage.is_remote(where):
            raise
        raise RetryableError(line) from error


def _plain_files(folder: Path) -> dict[str, int]:
    """Path inside folder -> size in bytes. A link or device is refused: its bytes would lie outside the checkpoint."""
    if storage.is_remote(folder):
        try:
            return storage.sizes(folder)
        except ConfigError as error:
            raise CorruptCheckpoint(str(error)) from error
    files = {}
    for path in folder.rglob("*"):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise CorruptCheckpoint(f"{path}: neither a plain file nor a folder")
        if path.is_file():
            files[path.relative_to(folder).as_posix()] = path.stat().st_size
    return files


def _compare_sizes(folder: Path, records: Mapping[str, Any], present: Mapping[str, int]) -> None:
    for name, record in records.items():
        if name not in present:
            raise CorruptCheckpoint(f"{folder / name}: missing")
        if present[name] != record["size"]:
            raise CorruptCheckpoint(f"{folder / name}: {present[name]} bytes, not {record['size']}")


def _refuse_extra(folder: Path, records: Mapping[str, Any], present: Mapping[str, int]) -> None:
    extra = sorted(present.keys() - records.keys())
    if extra:
        raise CorruptCheckpoint(f"{folder / extra[0]}: not in {MANIFEST}")


def _record(path: Path, sync: bool = False) -> dict[str, Any]:
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"sha256": digest, "size": file.tell()}


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(_json(document))
        file.flush()
        os.fsync(file.fileno())


def _json(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=1, sort_keys=True, allow_nan=False)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
