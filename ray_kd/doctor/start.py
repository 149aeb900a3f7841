"""What a start needs: checkpoints, config, identity, prepared data and the student; and what it would sweep."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ray_kd import checkpoint, run_folder, storage
from ray_kd import config as configuration
from ray_kd.data.prepared import PreparedData
from ray_kd.doctor.models import problem_of_model
from ray_kd.doctor.report import BROKEN, OK, WARNING, Finding, Run, name_in, not_checked
from ray_kd.errors import ConfigError, DataError
from ray_kd.refusal import REFUSAL
from ray_kd.trainer.best import best_step
from ray_kd.trainer.loop import CHECKPOINTS, RESIZE_FLAG, STOP_FLAG


def check_writers(run: Run) -> Iterator[Finding]:
    """Who holds the folder now."""
    if run.writers:
        yield Finding("writers", OK, f"written now by {', '.join(run.writers)}: what follows may change meanwhile")
    else:
        yield Finding("writers", OK, "nobody writes here")


def check_checkpoints(run: Run) -> Iterator[Finding]:
    """Every checkpoint in full, and the one that a start takes."""
    root = run.folder / CHECKPOINTS
    run.newest, run.document = None, {}
    good = []
    for folder in reversed(checkpoint.folders(root)):
        if folder not in run.checkpoints:
            run.checkpoints[folder] = _read_checkpoint(folder)
        found = run.checkpoints[folder]
        if not isinstance(found, str):
            good.append(folder)
        elif (folder / checkpoint.MANIFEST).exists():  # else it was rotated away while it was read
            advice = f"a start passes over it; --fix moves it to {CHECKPOINTS}/{checkpoint.DAMAGED}/"
            mend = partial(checkpoint.set_aside, folder)
            yield Finding("checkpoints", BROKEN, found.replace(f"{root}/", ""), advice, mend=mend)
    if not good:
        yield Finding("checkpoints", OK, "none that can be used: a start begins with step 1")
        return
    run.newest, newest = good[0], run.checkpoints[good[0]]
    assert isinstance(newest, dict)
    run.document, best = newest, best_step(root)
    ledger = newest["state"]["ledger"]
    totals = ledger["totals"]
    seen = f"verified in full: {', '.join(folder.name for folder in reversed(good))}"
    seen += f" (best: step {best})" if best is not None else ""
    seen += f"; a start takes step {run.step}, next slot {run.document['next_slot']}: {ledger['rows_consumed']} rows "
    seen += f"trained, {totals['rows_duplicated']} twice, {totals['rows_refused']} refused"
    yield Finding("checkpoints", OK, seen)


def check_leftovers(run: Run) -> Iterator[Finding]:
    """Files and folders that only a living run has a use for."""
    if run.writers:
        return
    found = checkpoint.orphans(run.folder / CHECKPOINTS)
    found += [path for path in storage.children(run.folder) if _is_leftover(path.name)]
    for path in found:
        seen = f"{name_in(run.folder, path)} of a killed attempt"
        yield Finding("leftovers", WARNING, seen, "--fix removes it", mend=partial(_delete, path))
    if not found:
        yield Finding("leftovers", OK, "none")


def check_config(run: Run) -> Iterator[Finding]:
    """config.yaml loads. Each checkpoint has a copy."""
    path = run.folder / run_folder.CONFIG
    try:
        run.config = configuration.load(path, [f"run.dir={run.folder}"])
    except ConfigError as error:
        copy = None if run.newest is None else run.newest / run_folder.CONFIG
        if copy is None or not copy.exists():
            yield Finding("config", BROKEN, str(error), "a start with your own config writes it again")
        else:
            mend = partial(_copy_text, copy, path)
            yield Finding("config", BROKEN, str(error), f"--fix takes the copy in {copy.parent.name}", mend=mend)
    else:
        yield Finding("config", OK, f"{run_folder.CONFIG} loads")


def check_identity(run: Run) -> Iterator[Finding]:
    """run.json is there and is of this config."""
    path = run.folder / run_folder.IDENTITY
    if not path.exists() and run.newest is None:
        yield Finding("identity", OK, f"no {path.name} yet: no start came to training")
        return
    try:
        run_folder.content_of(run.folder)
        if run.config is not None:
            run_folder.check_identity(run.folder, run.config)
    except (ConfigError, KeyError, TypeError) as error:
        seen = str(error) if isinstance(error, ConfigError) else f"{path.name} is not what ray_kd writes"
        yield Finding("identity", BROKEN, seen, "restore it from a copy of the run folder", blocks=True)
    else:
        yield Finding("identity", OK, f"{path.name} is of this config")


def check_prepared(run: Run) -> Iterator[Finding]:
    """The prepared data, every byte."""
    run.prepared = None
    if run.config is None or not (run.folder / run_folder.IDENTITY).exists():
        yield not_checked("prepared data", run_folder.CONFIG if run.config is None else run_folder.IDENTITY)
        return
    try:
        folder = run_folder.prepared_of(run.folder, run.config)
    except (ConfigError, KeyError, TypeError):
        yield not_checked("prepared data", run_folder.IDENTITY)
        return
    if not folder.exists():
        yield Finding("prepared data", WARNING, f"'{folder}' is not there", "a start prepares it again")
        return
    try:
        prepared = PreparedData(folder)
        run.prepared = prepared
        prepared.verify()
    except DataError as error:
        yield Finding("prepared data", BROKEN, str(error), "then a start prepares it again", blocks=True)
    else:
        rows = f"{prepared.num_rows} rows, {prepared.manifest.eval_rows} held out"
        yield Finding("prepared data", OK, f"'{folder}' verified in full: {rows}")


def check_student(run: Run) -> Iterator[Finding]:
    """The model that the student began as: a start loads it before the checkpoint."""
    configured = None if run.config is None else run.config.student.model
    model = run.document["state"]["student_path"] if run.document and configured is None else configured
    if model is None:
        yield Finding("student", OK, "is made of the teacher's layers when training starts")
    elif not (Path(model).is_absolute() or "://" in model):  # the config makes paths absolute
        yield Finding("student", OK, f"'{model}' is of the hub and was not looked at")
    elif (problem := problem_of_model(storage.path(model))) is None:
        yield Finding("student", OK, f"'{model}' is complete")
    elif configured is None:
        advice = "remove the folder, and a start makes it again of the teacher's layers"
        yield Finding("student", WARNING, f"'{model}': {problem}", advice)
    else:
        advice = "put the model back, or name where it is now"
        yield Finding("student", BROKEN, f"'{model}': {problem}", advice, blocks=True)


def _read_checkpoint(folder: Path) -> dict[str, Any] | str:
    """The state of a checkpoint, every byte of which is verified, or what is wrong with it."""
    try:
        checkpoint.verify(folder)
        return checkpoint.read_state(folder)
    except checkpoint.CorruptCheckpoint as error:
        return str(error)


def _is_leftover(name: str) -> bool:
    """Whether a name in a run folder is one that is there only while something is being written or asked."""
    return run_folder.is_draft(name) or name.startswith(".probe-") or name in (STOP_FLAG, RESIZE_FLAG, REFUSAL)


def _copy_text(source: Path, target: Path) -> None:
    storage.write_text(target, storage.read_text(source))


def _delete(path: Path) -> None:
    if path.is_dir():
        storage.remove(path)
    else:
        path.unlink()
