"""metrics.jsonl: one object per logged optimiser step, whole flushed lines, cut to the checkpoint on resume."""

import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ray_kd.storage import GrowingFile, read_lines, write_text

_PUBLISH_EVERY_S = 10.0


class MetricLogger:
    """Appends metric lines to a JSONL file; NaN and infinity become null, since JSON has no word for them.

    last_step: lines of later steps, and a line cut short by a kill, are removed first; `num_kept` are left.
    """

    def __init__(self, path: Path, last_step: int) -> None:
        kept = [_dump(line) for line in read_metrics(path) if line["step"] <= last_step]
        write_text(path, "".join(kept))
        self.num_kept = len(kept)
        self._file = GrowingFile(path)
        self._published_at = time.monotonic()

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Append one line and flush it."""
        self._file.write(_dump(metrics))
        # The file is put whole: the larger it is, the more seldom.
        if time.monotonic() - self._published_at > _PUBLISH_EVERY_S * (1 + self._file.nbytes / 2**20):
            self._published_at = time.monotonic()
            self._file.publish(wait=False)

    def publish(self) -> None:
        """Make every line visible to others, where the file lies in an object store: before a checkpoint's commit."""
        self._file.publish()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a metrics file, oldest first; nothing when there is no file."""
    for line in read_lines(path):
        if line.endswith("\n"):
            yield json.loads(line)


def _dump(metrics: Mapping[str, Any]) -> str:
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
    return json.dumps(clean, allow_nan=False) + "\n"
