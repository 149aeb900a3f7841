"""The folders of a run: can they be written, whose are they, and is there room.

Nothing is made: a folder that is not there yet is judged by the nearest one above it that is.
"""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ray_kd import checkpoint, locks, objectives, pipeline, run_folder, storage, teacher_cache
from ray_kd.config import each_teacher
from ray_kd.errors import ConfigError, RetryableError
from ray_kd.preflight.report import FAILED, OK, SKIPPED, WARNING, Finding, Subject
from ray_kd.teacher.cache import DISABLED
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
    return next(path for path in (folder, *folder.parents) if path.exists())


def check_run_dir(subject: Subject) -> Iterator[Finding]:
    """Can it be written, whose is it, and where would a start go on."""
    config, folder = subject.config, run_folder.run_dir(subject.config)
    if storage.is_remote(folder) and subject.is_offline:
        yield Finding("run.dir", SKIPPED, f"'{folder}' is not looked at with --offline")
        return
    run_folder.prove_writable(nearest(folder))
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
    if run_folder.finished_summary(folder) is not None:
        yield Finding("run.dir", OK, f"the run in '{folder}' is finished: the same command ends at once")
        return
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
            run_folder.prove_writable(nearest(folder), key)
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
    needs = _needs(subject)
    total = sum(needs.values())
    shown = ", ".join(f"{name} {nbytes / 1e9:,.1f}" for name, nbytes in needs.items())
    folder = run_folder.run_dir(subject.config)
    if storage.is_remote(folder):
        yield Finding(
            "disk", OK, f"the store of run.dir takes {total / 1e9:,.1f} GB ({shown}); its quota is not known here"
        )
        return
    home = nearest(folder)
    free = shutil.disk_usage(home).free
    seen = f"{free / 1e9:,.1f} GB are free at '{home}', and the run keeps up to {total / 1e9:,.1f} GB ({shown})"
    if free >= total:
        yield Finding("disk", OK, seen)
        return
    yield Finding("disk", FAILED, f"{seen}: free some, lower train.keep_checkpoints, or choose another run.dir",
                  RetryableError.exit_code)  # fmt: skip


def _needs(subject: Subject) -> dict[str, float]:
    """What -> bytes. One checkpoint more than are kept: it is whole before the oldest goes."""
    config = subject.config
    assert subject.trained is not None
    assert subject.total is not None
    has_best = config.train.keep_best and (config.data.eval_source is not None or config.data.eval_fraction > 0)
    count = config.train.keep_checkpoints + has_best + 1
    needs: dict[str, float] = {
        f"{count} checkpoints": count * _STATE_NBYTES * subject.trained,
        "final": _DTYPE_NBYTES[config.student.dtype] * subject.total,
    }
    if config.student.init is not None:
        needs["student_init"] = 4.0 * subject.total
    if config.teacher.cache.mode != DISABLED and subject.manifest is not None:
        teachers = len(each_teacher(config))
        nbytes = objectives.planned_nbytes_per_token(config)
        needs["cache"] = float(subject.manifest.target_tokens * nbytes * teachers)
    return needs
