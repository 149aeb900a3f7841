"""TensorBoard: event files of the run. `tensorboard --logdir RUN_DIR/..` compares runs.

After a restart the new file says from which step on it counts (purge_step); TensorBoard drops the older files' points
of these steps. One flush every flush_s seconds, in the tracker's thread.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ray_kd.trackers import Start

PACKAGE = "tensorboard"


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
        self.last_step = start.last_step if any(folder.glob("events.out.tfevents.*")) else 0
        self._writer = SummaryWriter(str(folder), purge_step=self.last_step + 1, flush_secs=options.flush_s)
        if not self.last_step:
            self._writer.add_text("config", f"```yaml\n{start.config_yaml}```")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()
