"""Weights & Biases: offline by default, in wandb/ of the run folder; `wandb sync RUN_DIR/wandb/offline-run-*` sends it.

The id of the run is kept in the run folder. Offline a restart writes the run anew from metrics.jsonl and removes what
the attempt before left, so that there is one folder to send, without a point too many: send it when the run is done.
Online a restart goes on in the same run, which W&B does not let go back: it ignores the steps that it has already,
which keep the values of the first time. The key comes from the environment of the workers (WANDB_API_KEY).
"""

import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from ray_kd import storage
from ray_kd.errors import ConfigError
from ray_kd.trackers import Start

PACKAGE = "wandb"

_RUN_ID = "wandb_run_id"


@dataclass
class Config:
    project: str = "ray_kd"
    """Project of the run."""
    entity: str | None = None
    """User or team. Default: the account's."""
    mode: str = "offline"
    """offline (files, sent by `wandb sync`) | online."""
    dir: str | None = None
    """Folder in which wandb/ is made. Default: the run folder."""

    def __post_init__(self) -> None:
        if self.mode not in ("offline", "online"):
            raise ConfigError(f"run.trackers: the mode of wandb is '{self.mode}': allowed is offline | online")


def writes_to_disk(config: Config) -> bool:
    """Into the run folder."""
    return config.dir is None


class Tracker:
    def __init__(self, options: Config, start: Start) -> None:
        import wandb

        folder = Path(options.dir).expanduser() if options.dir else start.run_dir
        path = start.run_dir / _RUN_ID
        if not path.exists():
            storage.write_text(path, uuid.uuid4().hex[:12] + "\n")
        run_id = storage.read_text(path).strip()
        is_online = options.mode == "online"
        if not is_online:
            for old in (folder / "wandb").glob(f"offline-run-*-{run_id}"):
                shutil.rmtree(old)
        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=options.project, entity=options.entity, name=start.run_dir.name, id=run_id, dir=str(folder),
            mode="online" if is_online else "offline", resume="allow" if is_online else None,
            config=yaml.safe_load(start.config_yaml),
            # Nothing of the machine and its code is kept, and nothing printed: the worker has a log of its own.
            settings=wandb.Settings(
                silent=True, console="off", disable_git=True, save_code=False, x_disable_stats=True
            ),
        )  # fmt: skip
        self.last_step = min(start.last_step, self._run.step - 1) if is_online and self._run.resumed else 0

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        import wandb

        self._run.finish()
        wandb.teardown()  # ends its process, which may still write when `finish` returns
