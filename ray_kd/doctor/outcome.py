"""What the run leaves: final/ and summary.json."""

import itertools
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from ray_kd import run_folder, storage
from ray_kd.doctor.models import problem_of_model
from ray_kd.doctor.report import BROKEN, OK, WARNING, Finding, Run
from ray_kd.errors import EXIT_DONE, ConfigError


def check_final(run: Run) -> Iterator[Finding]:
    """final/ can be opened."""
    final = run.folder / run_folder.FINAL
    if not (final / "config.json").exists():
        yield Finding("final", OK, "not there yet: it is written after the last step")
    elif (problem := problem_of_model(final)) is None:
        yield Finding("final", OK, "complete")
    elif run.newest is None:
        yield Finding("final", BROKEN, problem, "no checkpoint is there to write it from")
    else:
        aside = _free_name(final.with_name(f"{final.name}.damaged"))
        advice = f"--fix moves it to {aside.name}/, and the same command writes it again"
        mend = partial(storage.move_folder, final, aside, "config.json")
        yield Finding("final", BROKEN, problem, advice, blocks=True, mend=mend)  # a start takes it for written


def check_summary(run: Run) -> Iterator[Finding]:
    """summary.json says what is counted here."""
    path = run.folder / run_folder.SUMMARY
    if not path.exists():
        yield Finding("summary", OK, "not there: no attempt came to an end, good or bad")
        return
    try:
        run.is_finished = run_folder.finished_summary(run.folder) is not None
        summary = json.loads(storage.read_text(path))
        steps, exit_code = summary["steps"], summary["exit_code"]
    except (ConfigError, KeyError, TypeError) as error:
        aside = _free_name(path.with_name(f"{path.name}.damaged"))
        seen = str(error) if isinstance(error, ConfigError) else f"{path.name} is not what ray_kd writes"
        advice = f"--fix moves it to {aside.name}, and the next start writes another"
        yield Finding("summary", BROKEN, seen, advice, blocks=True, mend=partial(_move_file, path, aside))
        return
    seen = f"of {steps} steps, exit code {exit_code}"
    different = {name: count for name, count in run.counted.items() if summary.get(name) != count}
    if steps != run.step or not run.counted:
        # A killed attempt leaves the summary of the one before it; that of a finished run fits its last checkpoint.
        state = WARNING if exit_code == EXIT_DONE else OK
        yield Finding("summary", state, f"{seen}; not compared: there are no counts of the same step")
    elif different:
        said = ", ".join(f"{name} {summary.get(name)} (counted {count})" for name, count in different.items())
        advice = f"trust the checkpoint; without {path.name} the same command writes another"
        yield Finding("summary", BROKEN, f"{seen}, and wrong about {said}", advice)
    else:
        yield Finding("summary", OK, f"{seen}: {', '.join(f'{name} {count}' for name, count in run.counted.items())}")


def _free_name(path: Path) -> Path:
    """The path, or with a number where something is there already."""
    if not path.exists():
        return path
    return next(other for count in itertools.count(2) if not (other := path.with_name(f"{path.name}-{count}")).exists())


def _move_file(source: Path, target: Path) -> None:
    target.write_bytes(source.read_bytes())
    source.unlink()
