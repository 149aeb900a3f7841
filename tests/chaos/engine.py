"""The fake teacher with faults on demand: `teacher.engine: {kind: tests.chaos.engine, ...}`."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ray_kd import schema
from ray_kd.payloads import TopKLogprobs
from ray_kd.teacher.engine import Request, Rows
from ray_kd.teacher.engines import fake


@dataclass
class Config(fake.Config):
    """Options; a token of -1 is in no row."""

    construct_s: float = 0.0
    """Seconds the constructor takes."""
    notes: str = ""
    """Folder in which each constructor puts a file named by its process, and the one call that hangs a file `hung`."""
    hangs: bool = False
    """The first call of all never returns."""
    deadly_token: int = -1
    """A row with it ends the process."""
    nan_token: int = -1
    """A row with it is answered with NaN."""


class Engine(fake.Engine):
    """As the fake engine but for what `Config` says."""

    def __init__(self, config: Config, **options: Any) -> None:
        super().__init__(config, **options)
        self._faults = config
        if config.notes:
            (Path(config.notes) / str(os.getpid())).touch()
        time.sleep(config.construct_s)

    def annotate(self, rows: Rows, request: Request) -> list[Any]:
        """The fake engine's answers, or none."""
        faults = self._faults
        if faults.hangs and _is_first(Path(faults.notes) / "hung"):
            time.sleep(3600)
        if (rows[schema.INPUT_IDS] == faults.deadly_token).any():
            os._exit(1)
        answers: list[Any] = super().annotate(rows, request)
        for place in np.flatnonzero((rows[schema.INPUT_IDS] == faults.nan_token).any(axis=1)):
            known = answers[place]
            answers[place] = TopKLogprobs(known.ids, known.logprobs * np.nan, known.temperature, known.vocab_size)
        return answers


def _is_first(flag: Path) -> bool:
    try:
        flag.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
