"""The folders of a run: can they be written, whose are they, and is there room.

Nothing is made: a folder that is not there yet is judged by the nearest one above it that is.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ray_kd import checkpoint, locks, objectives, pipeline, run_folder, storage, teacher_cache
from ray_kd.config import RunConfig, each_teacher
from ray_kd.errors import ConfigError, RayKDError, RetryableError
from ray_kd.preflight.report import FAILED, OK, SKIPPED, WARNING, Finding, Subject
from ray_kd.teacher.cache import DISABLED, WRITE_THROUGH
from ray_kd.trainer.loop import CHECKPOINTS

_STATE_NBYTES = 12
"""Of a trained parameter in a checkpoint: fp32 weight and two moments."""
_DTYPE_NBYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_RAY_STOPS_AT = 0.95
"""Full disk, at which Ray spills no more objects (local_fs_capacity_threshold)."""


def nearest(folder: Path) -> Path:
    """The folder, or the nearest above it that is there; in a store, which has no folders, itself."""
    if storage.is_remote(folder):
        return folder
    # Path.exists raises where it may not look.
    return next(path for path in (folder, *folder.parents) if os.path.exists(path))


def _prove_writable(folder: Path, key: str = "run.dir") -> None:
    """Raise the ConfigError that the run would end with, where it cannot make the folder or write into it."""
    run_folder.prove_writable(nearest(folder), key)
    if not storage.is_remote(folder):
        with storage.refused_if_unwritable(folder, key), suppress(FileNotFoundError):
            folder.lstat()  # a name may be too long to be made


def is_finished(subject: Subject) -> bool:
    """Whether run.dir holds a run that is done: the same command then looks at nothing but whether it is that one."""
    try:
        folder = run_folder.run_dir(subject.config)
        if storage.is_remote(folder):
            if subject.is_offline:
                return False
        elif not os.path.exists(folder / run_folder.SUMMARY):
            return False
        with storage.store_errors():
            return run_folder.finished_summary(folder) is not None
    except RayKDError:  # 'run.dir' says so
        return False


def check_run_dir(subject: Subject) -> Iterator[Finding]:
    """Can it be written, whose is it, and where would a start go on."""
    config, folder = subject.config, run_folder.run_dir(subject.config)
    if storage.is_remote(folder) and subject.is_offline:
        yield Finding("run.dir", SKIPPED, f"'{folder}' is not looked at with --offline")
        return
    _prove_writable(folder)
    if is_finished(subject):
        run_folder.check_identity(folder, config)
        if run_folder.has_moved(folder, config):
            run_folder.check_content(folder, pipeline.content_of(config, pipeline.plan_of(config)))
        yield Finding("run.dir", OK, f"the run in '{folder}' is finished: the same command ends at once")
        return
    if not (folder / run_folder.IDENTITY).exists():
        seen = f"'{folder}' holds no run yet, and can be written and read: the first step is 1"
        yield Finding("run.dir", OK, seen)
        return
    if holders := locks.holders(folder):
        seen = f"'{folder}' is in use by {', '.join(holders)}: wait for it, or choose another run.dir"
        yield Finding("run.dir", FAILED, seen, ConfigError.exit_code)
    run_folder.check_identity(folder, config)
    if subject.plan is None:
        yield Finding("run.dir", SKIPPED, "whether its data and models are the same: 'records' did not find out")
    else:
        run_folder.check_content(folder, pipeline.content_of(config, subject.plan))
    newest = checkpoint.newest_verified(folder / CHECKPOINTS, full=False)
    step = 0 if newest is None else checkpoint.step_of(newest)
    yield Finding("run.dir", OK, f"the run in '{folder}' is this one: a start goes on with step {step + 1}")


def check_permissions(subject: Subject) -> Iterator[Finding]:
    """The other folders that a run writes."""
    config = subject.config
    folders = {"data.prepared_dir": run_folder.prepared_dir(config), "TMPDIR": Path(tempfile.gettempdir())}
    if config.student.init is not None:
        folders["student_init"] = run_folder.run_dir(config).parent / "student_init"
    if config.teacher.cache.mode != DISABLED:
        folders["teacher.cache.path"] = teacher_cache.folder(config)
    local = {key: folder for key, folder in folders.items() if not storage.is_remote(folder)}
    for key, folder in folders.items():
        if key in local or not subject.is_offline:
            _prove_writable(folder, key)
    yield Finding("permissions", OK, f"{', '.join(local if subject.is_offline else folders)} can be written")


def check_disk(subject: Subject) -> Iterator[Finding]:
    """Free space against what the run keeps, and what Ray needs in TMPDIR."""
    temporary = Path(tempfile.gettempdir())
    usage = shutil.disk_usage(temporary)
    if usage.used + usage.free and usage.used / (usage.used + usage.free) > _RAY_STOPS_AT:
        yield Finding(
            "disk", WARNING, f"the disk of TMPDIR '{temporary}' is more than {_RAY_STOPS_AT:.0%} full, where Ray stops "
            "spilling objects: free some of it, or set TMPDIR to another disk",
        )  # fmt: skip
    needs = list(_needs(subject))
    total, left = sum(need.nbytes for need in needs), sum(need.left for need in needs)
    shown = ", ".join(f"{need.what} {need.nbytes / 1e9:,.1f}" for need in needs)
    folder = run_folder.run_dir(subject.config)
    if storage.is_remote(folder):
        yield Finding(
            "disk", OK, f"the store of run.dir takes {total / 1e9:,.1f} GB ({shown}); its quota is not known here"
        )
        return
    home = nearest(folder)
    free = shutil.disk_usage(home).free
    seen = f"{free / 1e9:,.1f} GB are free at '{home}', and the run keeps up to {total / 1e9:,.1f} GB ({shown})"
    if left < total:
        seen += f", of which {left / 1e9:,.1f} GB are still to be written"
    if free >= left:
        yield Finding("disk", OK, seen)
        return
    yield Finding("disk", FAILED, f"{seen}: free some, lower train.keep_checkpoints, or choose another run.dir",
                  RetryableError.exit_code)  # fmt: skip


@dataclass(frozen=True)
class _Need:
    """What a run keeps, in bytes."""

    what: str
    nbytes: float
    there: float = 0
    """Of them, on the disk already."""
    least: float = 0
    """Needed free all the same."""

    @property
    def left(self) -> float:
        return max(self.nbytes - self.there, self.least)


def _needs(subject: Subject) -> Iterator[_Need]:
    """What is there is not looked for in a store, whose quota nobody knows here."""
    config, folder = subject.config, run_folder.run_dir(subject.config)
    assert subject.trained is not None
    assert subject.total is not None
    is_local = not storage.is_remote(folder) and os.path.exists(folder)
    written = checkpoint.folders(folder / CHECKPOINTS) if is_local else []
    has_best = config.train.keep_best and (config.data.eval_source is not None or config.data.eval_fraction > 0)
    count = config.train.keep_checkpoints + has_best + 1  # a new one is whole before the oldest goes
    one = float(_STATE_NBYTES * subject.trained)
    there = sum(_nbytes(path) for path in written)
    yield _Need(f"{count} checkpoints", count * one, there, least=one)
    final = float(_DTYPE_NBYTES[config.student.dtype] * subject.total)
    is_there = is_local and (folder / run_folder.FINAL / "config.json").exists()
    yield _Need("final", final, final * is_there)
    if config.student.init is not None:
        made = 4.0 * subject.total
        yield _Need("student_init", made, made * any(_has_student(path) for path in written[-1:]))
    if config.teacher.cache.mode == WRITE_THROUGH and subject.manifest is not None:
        # Those of several teachers together are as wide as the mixture of their answers.
        nbytes = float(subject.manifest.target_tokens * objectives.planned_nbytes_per_token(config))
        yield _Need("cache", nbytes, sum(_nbytes(path) for path in _caches(config, subject.manifest.fingerprint)))


def _caches(config: RunConfig, fingerprint: str) -> list[Path]:
    """The folder of each teacher's answers to this data, there or not."""
    home = teacher_cache.folder(config)
    homes = [home if one is None else home / str(one.name) for one, _ in each_teacher(config)]
    return [path / fingerprint[:16] for path in homes]


def _nbytes(folder: Path) -> int:
    if not os.path.exists(folder):
        return 0
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _has_student(folder: Path) -> bool:
    """Whether the student that a checkpoint began with is still where it was made."""
    try:
        return (Path(checkpoint.read_state(folder)["state"]["student_path"]) / "config.json").exists()
    except (checkpoint.CorruptCheckpoint, KeyError):  # 'run.dir' says what of it can be used
        return False
