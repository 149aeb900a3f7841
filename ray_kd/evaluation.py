"""The evaluate job: one document about a run's student, in this process, without Ray.

Held-out metrics and where they come from in one pass; what teacher, student before and student after say to prompts;
tasks of lm-evaluation-harness. What can be refused is refused before a model is loaded; models are loaded one by one.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_kd import cluster, plugins, results, run_folder, storage
from ray_kd.config import RunConfig, each_teacher
from ray_kd.trainer.loop import EVAL_BEFORE

TEACHER, BEFORE, AFTER = "teacher", "student before", "student after"
"""Whose answers stand side by side; of several teachers each has its name behind."""


@dataclass(frozen=True)
class Asked:
    """What of a run is to be measured."""

    model: str | None = None
    """A model folder; None for the run's final/."""
    max_rows: int | None = None
    """Held-out rows, 0 for all; None for the run's own number."""
    prompts: Sequence[str] = ()
    max_new_tokens: int | None = None
    """Of each answer; None for the run's own number."""
    tasks: Sequence[str] = ()
    """Of lm-evaluation-harness."""
    tasks_dir: Path | None = None
    """Definitions of tasks of one's own."""
    tasks_limit: int | None = None
    """Documents of each task at most."""


def evaluate(config: RunConfig, asked: Asked) -> dict[str, Any]:
    """Everything measured, as JSON has it.

    run, model, and the metrics of eval/evaluator.py and eval/breakdown.py under their names
    before        the metrics of the student before training, where they are of the same rows; else null
    generations   with prompts: prompt, and answers by `TEACHER`, `BEFORE`, `AFTER`; null for a teacher on a server
    lm_eval       with tasks: what eval/harness.py's run returns

    Raises ConfigError for what cannot be measured, DataError when the run has no held-out rows.
    """
    import torch

    from ray_kd.eval import open_harness

    run_dir = run_folder.run_dir(config)
    speakers = _speakers(config, asked.model) if asked.prompts else {}
    harness = open_harness(asked.tasks, asked.tasks_dir, asked.tasks_limit) if asked.tasks else None
    document: dict[str, Any] = {"run": str(run_dir), "model": results.student_of(config, asked.model)}
    document |= results.evaluate(config, model=asked.model, max_rows=asked.max_rows)
    document["before"] = _before(run_dir, document)
    if asked.prompts:
        length = config.eval.max_new_tokens if asked.max_new_tokens is None else asked.max_new_tokens
        document["generations"] = _side_by_side(speakers, asked.prompts, length)
    if harness is not None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        document["lm_eval"] = harness.run(document["model"], device=device, batch_size=config.eval.batch_size)
    return document


def _before(run_dir: Path, measured: dict[str, Any]) -> dict[str, Any] | None:
    """The metrics of the first step's student, where they were taken on as many rows and tokens: on the same ones."""
    path = run_dir / EVAL_BEFORE
    before: dict[str, Any] = json.loads(storage.read_text(path)) if path.exists() else {}
    is_same = all(before.get(name) == measured[name] for name in ("num_rows", "num_tokens"))
    return before if is_same else None


def _speakers(config: RunConfig, model: str | None) -> dict[str, tuple[str, str | None] | None]:
    """Name -> model and revision; None for a teacher whose weights are not here. Raises ConfigError for one missing."""
    from ray_kd import models

    speakers: dict[str, tuple[str, str | None] | None] = {}
    for one, alone in each_teacher(config):
        teacher = alone.teacher
        module, _ = plugins.options("teacher.engines", teacher.engine, "teacher.engine")
        is_here = module.Engine.is_local_model
        speakers[TEACHER if one is None else f"{TEACHER} {one.name}"] = (
            (teacher.model, teacher.revision) if is_here else None
        )
    speakers[BEFORE] = (results.first_student(config), config.student.revision)
    speakers[AFTER] = (results.student_of(config, model), None)
    for name, speaker in speakers.items():
        if speaker is not None and not storage.is_remote(storage.path(speaker[0])):
            models.check_model(*speaker, name.partition(" ")[0])
    return speakers


def _side_by_side(
    speakers: dict[str, tuple[str, str | None] | None], prompts: Sequence[str], max_new_tokens: int
) -> list[dict[str, Any]]:
    """The greedy answers to each prompt; one model in memory at a time."""
    import torch

    torch.set_num_threads(cluster.physical_cores())
    answers = {
        name: [None] * len(prompts) if speaker is None else results.answers(*speaker, prompts, max_new_tokens)
        for name, speaker in speakers.items()
    }
    return [
        {"prompt": prompt, "answers": {name: said[place] for name, said in answers.items()}}
        for place, prompt in enumerate(prompts)
    ]
