"""The job that Ray's dashboard shows of a driver: what run it is, how far it came, and why it failed.

Ray writes down a job's metadata when it is submitted and has no call to change it, so a submitted driver changes the
record itself, in Ray's own store (ray/dashboard/modules/job/common.py). Nobody else writes there while the driver is
alive: the job's supervisor does before it starts and after it has ended, and keeps the metadata it finds. A driver
that joined a cluster directly gives its metadata when it joins, and they stay as they are.
"""

import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from ray_kd import redact
from ray_kd.config import RunConfig, StudentInit
from ray_kd.errors import ConfigError

if TYPE_CHECKING:
    from ray.job_config import JobConfig

logger = logging.getLogger(__name__)

_STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"  # from SIGTERM to SIGKILL: Ray's 3 are too few to save a checkpoint
_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # of the drivers that a job's supervisor starts
_SUBMISSION_ID = "job_submission_id"
_SHOW_EVERY_S = 5.0
_CALL_S = 2.0


def describe(config: RunConfig) -> dict[str, str]:
    """What a job's metadata say of a run from its start: its name, folder, models. Credentials are masked."""
    student = config.student
    plain = {
        "run": PurePath(config.run.dir).name,
        "run_dir": config.run.dir,
        "teacher": ", ".join(one.model for one in config.teachers) or config.teacher.model,
    }
    if student.model is not None:
        plain["student"] = student.model
    elif student.init is not None:  # neither, where the job only prepares data
        plain["student"] = f"{config.teacher.model}: {_of_init(student.init)}"
    return {name: redact.redact(value) for name, value in plain.items()}


def _of_init(init: StudentInit) -> str:
    """As it is given on the command line: layers=15 hidden_size=512."""
    given = {item.name: getattr(init, item.name) for item in fields(init)}
    defaults = {item.name: item.default for item in fields(init)}
    return " ".join(f"{name}={value}" for name, value in given.items() if value != defaults[name])


def job_config(config: RunConfig) -> "JobConfig":
    """For `ray.init` of a driver that joins a cluster: with metadata, unless its job has a record (`Job`)."""
    from ray.job_config import JobConfig

    return JobConfig(metadata=describe(config) if _submitted() is None else None)


def check_outputs(config: RunConfig) -> None:
    """Refuse, in a submitted job, folders to write in the copy that Ray made of its working folder. Raises ConfigError.

    Each node has its own, and deletes it. A driver begins in it, so relative paths lie there.
    """
    if not (_job_config().get("runtime_env") or {}).get("working_dir"):
        return
    for key, value in (
        ("run.dir", config.run.dir),
        ("data.prepared_dir", config.data.prepared_dir),
        ("teacher.cache.path", config.teacher.cache.path),
    ):
        if value and "://" not in value and Path(value).absolute().is_relative_to(Path.cwd()):
            raise ConfigError(
                f"{key} is '{value}', in the copy of the working folder that Ray made for this job and deletes: "
                "allowed is an absolute path elsewhere that all nodes share, or a URI (s3://...)"
            )


class Job:
    """The record of the submitted job that this driver is; without one, every call does nothing.

    A store that does not answer is no reason to end a run: what could not be shown is shown at the next call.
    """

    def __init__(self) -> None:
        self._id = (_submitted() or {}).get(_SUBMISSION_ID)
        if self._id is not None and _STOP_WAIT not in os.environ:
            logger.warning(
                "`ray job stop` would kill this driver 3 s after its SIGTERM, before a checkpoint is saved: submit it "
                "with --runtime-env jobs/runtime_env.yaml, or set %s=120 in its env_vars", _STOP_WAIT,
            )  # fmt: skip
        self._shown: dict[str, str] = {}
        self._wanted: dict[str, str] = {}
        self._next = 0.0

    def show(self, metadata: Mapping[str, str], *, at_once: bool = True) -> None:
        """Add to the job's metadata. Not at_once: only when some seconds have passed since the last call that did."""
        if self._id is None:
            return
        self._wanted.update(metadata)
        now = time.monotonic()
        if self._wanted == self._shown or not (at_once or now >= self._next):
            return
        self._next = now + _SHOW_EVERY_S
        if _add_metadata(self._id, self._wanted):
            self._shown = dict(self._wanted)


def _submitted() -> dict[str, str] | None:
    """The metadata that a submitted job began with; None where this process is no driver of one."""
    metadata: dict[str, str] = _job_config().get("metadata") or {}
    return metadata if _SUBMISSION_ID in metadata else None


def _job_config() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(os.environ.get(_VARIABLE) or "{}")
    return found


def _add_metadata(job_id: str, metadata: Mapping[str, str]) -> bool:
    """Whether the store took it. Not where Ray was never joined."""
    import ray
    from ray._private import ray_constants
    from ray.dashboard.modules.job.common import JobInfoStorageClient
    from ray.experimental.internal_kv import internal_kv_get_gcs_client

    if not ray.is_initialized():
        return False
    store: Any = internal_kv_get_gcs_client()
    key = JobInfoStorageClient.JOB_DATA_KEY.format(job_id=job_id).encode()
    namespace = ray_constants.KV_NAMESPACE_JOB
    try:
        text = store.internal_kv_get(key, namespace, timeout=_CALL_S)
        if text is None:
            return False
        info = json.loads(text)
        # The dashboard's list has the name in a column of its own; the user's own one stays.
        named = {"job_name": metadata["run"]} if "run" in metadata else {}
        info["metadata"] = named | (info.get("metadata") or {}) | dict(metadata)
        store.internal_kv_put(key, json.dumps(info).encode(), True, namespace, timeout=_CALL_S)
    except Exception as error:  # whatever Ray changes here: a run is not ended by what is shown of it
        logger.debug("the job's metadata were not written: %s", error)
        return False
    return True
