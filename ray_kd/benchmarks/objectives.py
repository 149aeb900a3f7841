"""What the terms of an objective are worth: runs that differ in `loss.terms` alone, each once a seed.

A seed shuffles the data, and with it which rows a run of so many steps sees; the runs of one seed see the same rows in
the same order and begin with the same student, and all are measured on the same held-out records. So objectives are
compared seed by seed.
"""

import itertools
import json
import math
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_kd import config as configuration
from ray_kd import run_folder, storage
from ray_kd.benchmarks.plot import Bar
from ray_kd.config import RunConfig
from ray_kd.errors import ConfigError, RayKDError
from ray_kd.payloads import FEATURES, TOPK_LOGPROBS
from ray_kd.summary import METRIC_LABELS
from ray_kd.trainer.loop import CHECKPOINTS

METRICS = ("kl", "perplexity")
"""Held-out; smaller is better."""

Runner = Callable[[list[str]], int]
"""Runs a command to its end and returns its exit code."""


@dataclass(frozen=True)
class Objective:
    """A value of `loss.terms`, and the payload that has what it needs."""

    name: str
    terms: str
    payload: str = TOPK_LOGPROBS


STUDENT_LAYERS = (0, 1, 2, 8, 10, 11, 19, 20, 21, 22, 23, 24, 27, 28, 29)
"""The teacher's, a choice by block influence: named here, so that every seed begins with the same student."""

OBJECTIVES = (
    Objective("CE", "[{kind: ce}]"),
    Objective("KD", "[{kind: kd}]"),
    Objective("KD + CE", "[{kind: kd}, {kind: ce, weight: 0.5}]"),
    # After the student's 5th, 10th and last layer, which were the teacher's 11th, 23rd and last; cosine, since a few
    # channels of SmolLM2's middle layers would be all that a mean squared error sees.
    Objective(
        "KD + CE + hidden states",
        "[{kind: kd}, {kind: ce, weight: 0.5}, {kind: hidden_state, measure: cosine, layers: [5, 10, -1]}]",
        FEATURES,
    ),
)


@dataclass(frozen=True)
class Result:
    """A finished run."""

    objective: str
    seed: int
    before: dict[str, float]
    """Held-out metrics of the student it began with."""
    after: dict[str, float]
    wall_s: float
    """Training and the evaluations in it, without what starts before the first step."""
    teacher_rows_computed: int
    """The others' answers were kept from an earlier run of the seed."""


@dataclass(frozen=True)
class Study:
    """Which runs there are, and where."""

    config: str
    overrides: Sequence[str]
    eval_path: Path
    """Held-out records, all of which are used (see `write_held_out`)."""
    folder: Path
    steps: int

    def check(self) -> None:
        """Raise ConfigError for overrides of what the study itself sets, and for those the config refuses."""
        own = {setting.partition("=")[0] for setting in self.settings(OBJECTIVES[0], 0)[len(self.overrides) :]}
        for override in self.overrides:
            key = override.partition("=")[0]
            if any(f"{key}.".startswith(f"{one}.") or f"{one}.".startswith(f"{key}.") for one in own):
                raise ConfigError(f"{key} is set by the benchmark (train.max_steps by --steps): allowed are other keys")
        configuration.load(self.config, self.overrides)

    def run_dir(self, objective: Objective, seed: int) -> Path:
        """Names what a run is, so that one of other steps is another."""
        name = objective.name.lower().replace(" + ", "-").replace(" ", "-")
        return self.folder / f"{name}-{self.steps}-steps-seed-{seed}"

    def settings(self, objective: Objective, seed: int) -> list[str]:
        """The overrides of a run, the study's own last."""
        source = f"{{kind: jsonl, paths: [{json.dumps(str(self.eval_path))}]}}"
        return [
            *self.overrides,
            f"run.dir={self.run_dir(objective, seed)}",
            f"run.seed={seed}",
            f"data.eval_source={source}",
            "data.eval_fraction=0",
            f"student.init.layers={list(STUDENT_LAYERS)}",
            "eval.max_rows=0",
            "eval.prompts=[]",
            f"loss.terms={objective.terms}",
            f"teacher.payload={objective.payload}",
            "teacher.cache.mode=write_through",
            # A cache holds one kind of answer.
            f"teacher.cache.path={self.folder / 'teacher_cache' / objective.payload}",
            f"train.max_steps={self.steps}",
            "train.eval_every=0",
            "train.checkpoint_every=0",
            "train.keep_best=false",
        ]


def run_command(command: list[str]) -> int:
    """Its messages go nowhere (driver.log has them), its error line to the terminal. An interrupt, which the terminal
    sends to both, waits for the run to end in order."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue


def measure(
    study: Study, objectives: Sequence[Objective], seeds: Sequence[int], run: Runner = run_command
) -> Iterator[Result]:
    """Run what is not finished, seed after seed, and yield what each run came to.

    Raises ConfigError when a finished run there is another one than this study's, and RayKDError with the exit code
    of a run that failed. The checkpoints of a finished run, 12 bytes a parameter, are removed.
    """
    for seed in seeds:
        for objective in objectives:
            settings = study.settings(objective, seed)
            config = configuration.load(study.config, settings)
            run_dir = study.run_dir(objective, seed)
            if run_folder.finished_summary(run_dir) is None:
                exit_code = run([sys.executable, "-m", "ray_kd", "distill", study.config, *settings])
                if exit_code != 0:
                    raise _failed(run_dir, exit_code)
            yield _result(objective, seed, run_dir, config)


def write_held_out(source: Path, target: Path, every: int) -> None:
    """Each `every`-th line of a JSONL file: fewer records to measure, and some of all its parts."""
    with source.open(encoding="utf-8") as file:
        storage.write_text(target, "".join(itertools.islice(file, None, None, every)))


def table(results: Sequence[Result]) -> str:
    """Mean and standard deviation over the seeds, an objective a line."""
    headings = (
        "objective",
        "seeds",
        *(f"{metric} {when}" for metric in METRICS for when in ("start", "end")),
        "wall s",
    )
    lines = ["".join(f"{heading:<26}" if i == 0 else f"{heading:>20}" for i, heading in enumerate(headings))]
    for name, runs in _by_objective(results).items():
        columns = [[getattr(r, when)[metric] for r in runs] for metric in METRICS for when in ("before", "after")]
        cells = [_spread(column) for column in [*columns, [r.wall_s for r in runs]]]
        lines.append(f"{name:<26}{len(runs):>20}" + "".join(f"{cell:>20}" for cell in cells))
    return "\n".join(lines)


def verdict(results: Sequence[Result], metric: str) -> str:
    """Which objective ends lowest, which comes next, and whether their difference exceeds the spread of the seeds.

    The spread is the larger of the two standard deviations over seeds. Of the seeds that both were run with.
    """
    by_objective = _by_objective(results)
    label = METRIC_LABELS[metric]
    if len(by_objective) < 2:
        return f"{label}: one objective is no comparison"
    seeds = set.intersection(*({run.seed for run in runs} for runs in by_objective.values()))
    ends = {
        name: {run.seed: run.after[metric] for run in runs if run.seed in seeds} for name, runs in by_objective.items()
    }
    best, second = sorted(ends, key=lambda name: statistics.fmean(ends[name].values()))[:2]
    difference = statistics.fmean(ends[second].values()) - statistics.fmean(ends[best].values())
    said = f"{label}: '{best}' ends lowest, {difference:.4f} below '{second}'"
    if len(seeds) < 2:
        return f"{said}; one seed says nothing of the spread"
    spread = max(statistics.stdev(ends[name].values()) for name in (best, second))
    lower = sum(ends[best][seed] < ends[second][seed] for seed in seeds)
    is_more = "exceeds" if difference > spread else "does not exceed"
    return f"{said}; that {is_more} the spread of the seeds ({spread:.4f}), and it is lower in {lower} of {len(seeds)}"


def bars(results: Sequence[Result]) -> tuple[list[str], dict[str, list[Bar]]]:
    """For `grouped_bars`, both groups in nats a token: the seeds' mean at the end, the lowest and the highest."""
    groups = {
        "KL(teacher || student)": lambda run: run.after["kl"],
        "ln perplexity": lambda run: math.log(run.after["perplexity"]),
    }
    found: dict[str, list[Bar]] = {}
    for name, runs in _by_objective(results).items():
        values = [[figure(run) for run in runs] for figure in groups.values()]
        found[name] = [Bar(statistics.fmean(one), min(one), max(one)) for one in values]
    return list(groups), found


def _result(objective: Objective, seed: int, run_dir: Path, config: RunConfig) -> Result:
    run_folder.check_identity(run_dir, config)
    summary = run_folder.finished_summary(run_dir)
    assert summary is not None, f"{run_dir} ended with 0 and is not finished"
    shutil.rmtree(run_dir / CHECKPOINTS, ignore_errors=True)
    held_out: dict[str, Any] = summary["eval"]
    return Result(
        objective=objective.name,
        seed=seed,
        before={metric: held_out["before"][metric] for metric in METRICS},
        after={metric: held_out["after"][metric] for metric in METRICS},
        wall_s=summary["wall_s"],
        teacher_rows_computed=summary["teacher_rows_computed"],
    )


def _failed(run_dir: Path, exit_code: int) -> RayKDError:
    error = RayKDError(
        f"the run '{run_dir}' ended with exit code {exit_code} (its driver.log says more); "
        "the same command goes on, without the runs that are finished"
    )
    error.exit_code = exit_code
    return error


def _by_objective(results: Sequence[Result]) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.objective, []).append(result)
    return found


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):,.3f}"
    return f"{mean} ± {statistics.stdev(values):,.3f}" if len(values) > 1 else mean
