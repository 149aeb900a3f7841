"""MLflow: one run of an experiment, in files of the run folder or on a tracking server.

The id of the MLflow run is kept in the run folder and found again after a restart. Where the uri is another one by
then, or the run was deleted there, a new one begins, with the lines of metrics.jsonl. So it does where MLflow has
points of steps after the checkpoint, as it can take none back: its run is deleted (to MLflow's trash). Credentials come
from the environment of the workers, as MLflow reads them.
"""

import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass

from ray_kd import storage
from ray_kd.errors import ConfigError
from ray_kd.trackers import Start

PACKAGE = "mlflow"

_RUN_ID = "mlflow_run_id"
_STEP = "train/loss"  # which every line has, but for one that is not finite
_BATCH = 1000  # metrics of one request at most, says MLflow


@dataclass
class Config:
    uri: str | None = None
    """Tracking server (https://...), data base (sqlite:///...) or folder. Default: mlflow/ in the run folder."""
    experiment: str = "ray_kd"
    """Name of the experiment, made where it is not there."""

    def __post_init__(self) -> None:
        if self.uri is not None and not re.match(r"/|[\w+]+:/|databricks", self.uri):
            raise ConfigError(
                f"run.trackers: the uri of mlflow is '{self.uri}': allowed is https://..., sqlite:///... or an "
                "absolute path"
            )


def writes_to_disk(config: Config) -> bool:
    """Into the run folder."""
    return config.uri is None


class Tracker:
    def __init__(self, options: Config, start: Start) -> None:
        # The files of a folder are all that the small package has; MLflow asks for this consent to use them.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient

        self._client = MlflowClient(options.uri or (start.run_dir / "mlflow").as_uri())
        path = start.run_dir / _RUN_ID
        known = self._known(storage.read_text(path), options.uri) if path.exists() else None
        self.last_step = 0 if known is None else self._newest_step(known)
        if known is not None and self.last_step > start.last_step:
            self._client.delete_run(known)
            known, self.last_step = None, 0
        if known is None:
            known = self._make(options.experiment, start)
            storage.write_text(path, f"{known}\n{options.uri or ''}\n")
        else:
            self._client.update_run(known, status="RUNNING")
        self._run_id = known

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        points = [Metric(name, value, now, step) for name, value in metrics.items()]
        for first in range(0, len(points), _BATCH):
            self._client.log_batch(self._run_id, metrics=points[first : first + _BATCH])

    def close(self) -> None:
        self._client.set_terminated(self._run_id)

    def _known(self, text: str, uri: str | None) -> str | None:
        """The id of the run, as `mlflow_run_id` has it with the uri below; None where this store has no such run."""
        from mlflow.exceptions import MlflowException

        run_id, *of = text.splitlines()
        if of and of[0] != (uri or ""):
            return None
        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return run_id if run.info.lifecycle_stage == "active" else None

    def _newest_step(self, run_id: str) -> int:
        return max((point.step for point in self._client.get_metric_history(run_id, _STEP)), default=0)

    def _make(self, name: str, start: Start) -> str:
        experiment = self._client.get_experiment_by_name(name)
        identity = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        tags = {"ray_kd.run_dir": str(start.run_dir)}
        run_id: str = self._client.create_run(identity, run_name=start.run_dir.name, tags=tags).info.run_id
        self._client.log_text(run_id, start.config_yaml, "config.yaml")
        return run_id
