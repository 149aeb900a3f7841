"""A model folder on the tasks of lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness).

The model is loaded as everywhere here (safetensors alone, no code from its folder) and handed over. The harness is an
optional dependency, imported when a task is asked for.
"""

import contextlib
import importlib.util
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_kd import plugins
from ray_kd.errors import ConfigError


@dataclass(frozen=True)
class Harness:
    """Tasks whose definitions and data are there; `open_harness` makes it, before any model is loaded."""

    tasks: tuple[str, ...]
    """Names, groups and tags of tasks."""
    limit: int | None
    """Documents of each task at most."""
    manager: Any

    def run(self, path: str, *, device: str, batch_size: int) -> list[dict[str, Any]]:
        """One entry a task and metric: task, metric, filter, value, stderr or None, num_documents.

        The model computes in its own dtype. No chat template; shots, prompts and metrics are the task's own.
        """
        from ray_kd import models

        with _quiet():
            from lm_eval import simple_evaluate
            from lm_eval.models.huggingface import HFLM

            language_model = HFLM(
                pretrained=models.load_causal_lm(path, device=device),
                tokenizer=models.load_tokenizer(path),
                batch_size=batch_size,
            )
            found: Any = simple_evaluate(
                model=language_model,
                tasks=list(self.tasks),
                task_manager=self.manager,
                limit=self.limit,
                log_samples=False,
            )
        counts = found["n-samples"]
        return [
            {"task": task, **_metric(key), "value": value, "stderr": _stderr(values, key)}
            | {"num_documents": counts[task]["effective"] if task in counts else None}
            for task, values in sorted(found["results"].items())
            for key, value in sorted(values.items())
            if isinstance(value, float | int) and "," in key and "_stderr," not in key
        ]


def open_harness(tasks: Sequence[str], folder: Path | None, limit: int | None) -> Harness:
    """Find the tasks and load their data (from the hub, where it is not in its cache or on this disk).

    tasks: names or patterns such as mmlu_*; folder: of task definitions of one's own (YAML), besides the harness's.
    Raises ConfigError when the harness is not installed, a task unknown, or its data not to be had.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("--lm-eval needs lm-evaluation-harness: pip install '.[lm-eval]'")
    with _quiet():
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=None if folder is None else str(folder))
        unknown = [task for task in tasks if not manager.match_tasks([task])]
        if unknown:
            raise ConfigError(
                f"--lm-eval: unknown task '{unknown[0]}'{plugins.nearest(unknown[0], manager.all_tasks)}"
                f" ({len(manager.all_tasks)} are known: `lm_eval ls tasks` lists the harness's)"
            )
        names = tuple(manager.match_tasks(list(tasks)))
        for name in names:
            try:
                manager.load([name])
            except (OSError, ValueError) as error:  # no network, no such data set, a malformed definition
                reason = " ".join(str(error).split())
                raise ConfigError(f"--lm-eval: task '{name}' cannot be loaded: {reason}") from error
    return Harness(names, limit, manager)


def _metric(key: str) -> dict[str, str]:
    name, _, how = key.partition(",")
    return {"metric": name, "filter": how}


def _stderr(values: dict[str, Any], key: str) -> float | None:
    name, _, how = key.partition(",")
    found = values.get(f"{name}_stderr,{how}")
    return float(found) if isinstance(found, float | int) else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Its log ends, and what it prints goes to stderr, where its progress bars are: stdout may be read as JSON."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(sys.stderr):
        yield
