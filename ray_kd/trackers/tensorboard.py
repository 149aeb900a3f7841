"""TensorBoard: event files of the run. `tensorboard --logdir RUN_DIR/..` compares runs.

After a restart the new file says from which step on it counts (purge_step); TensorBoard drops the older files' points
of these steps. A small file beside them says up to which step they hold every point, for a kill between two flushes and
for a start without this tracker. One flush every flush_s seconds, in the tracker's thread.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ray_kd import storage
from ray_kd.trackers import Start

PACKAGE = "tensorboard"

_WHOLE_UP_TO = "ray_kd_last_step"


@dataclass
class Config:
    dir: str | None = None
    """Folder of the event files, of this run alone. Default: tensorboard/ in the run folder."""
    flush_s: int = 30
    """Seconds until points are in the file."""


def writes_to_disk(config: Config) -> bool:
    """Into the run folder."""
    return config.dir is None


class Tracker:
    def __init__(self, options: Config, start: Start) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = Path(options.dir).expanduser() if options.dir else start.run_dir / "tensorboard"
        self._path = folder / _WHOLE_UP_TO
        is_new = not (self._path.exists() and any(folder.glob("events.out.tfevents.*")))
        self.last_step = 0 if is_new else min(start.last_step, int(storage.read_text(self._path)))
        self._newest_step = self.last_step
        if not is_new:
            self._note()  # at first: what comes after this step is dropped from now on
        self._writer = SummaryWriter(str(folder), purge_step=self.last_step + 1, flush_secs=options.flush_s)
        self._flush_s, self._flushed_at = options.flush_s, time.monotonic()
        if is_new:
            self._writer.add_text("config", f"```yaml\n{start.config_yaml}```")
            self._writer.flush()
            self._note()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._newest_step = step
        if time.monotonic() - self._flushed_at >= self._flush_s:
            self._writer.flush()
            self._note()
            self._flushed_at = time.monotonic()

    def close(self) -> None:
        self._writer.close()
        self._note()

    def _note(self) -> None:
        storage.write_text(self._path, f"{self._newest_step}\n")
