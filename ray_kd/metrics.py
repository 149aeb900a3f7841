"""metrics.jsonl: one object per logged optimiser step, whole flushed lines, cut to the checkpoint on resume."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


class MetricLogger:
    """Appends metric lines to a JSONL file; NaN and infinity become null, since JSON has no word for them.

    last_step: lines of later steps, and a line cut short by a kill, are removed first.
    """

    def __init__(self, path: Path, last_step: int) -> None:
        kept = [line for line in read_metrics(path) if line["step"] <= last_step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(_dump(line) for line in kept), encoding="utf-8")
        temporary.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Append one line and flush it."""
        self._file.write(_dump(metrics))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a metrics file, oldest first; nothing when there is no file."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


def _dump(metrics: Mapping[str, Any]) -> str:
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
    return json.dumps(clean, allow_nan=False) + "\n"
