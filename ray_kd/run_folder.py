"""The run folder: where a run writes, what identifies it, and when it is finished.

config.yaml      the resolved config, secrets masked
run.json         the identity: what must not change between attempts
attempts.jsonl   one line per start of the worker group (start slot)
teacher/         journal of the teacher actors, one file each
teacher_deaths/  what was asked of those that died
teacher_head/    the head of a teacher that sends hidden states
tensorboard/, mlflow/, wandb/, mlflow_run_id, wandb_run_id   of `run.trackers`
metrics.jsonl, quarantine.jsonl, eval_before.json, checkpoints/, final/, summary.json, report.html, driver.log
"""

import json
import secrets
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ray_kd import config as configuration
from ray_kd import redact, storage
from ray_kd.config import STRICT, OneOfTeachers, RunConfig, StudentInit, each_teacher
from ray_kd.errors import ConfigError
from ray_kd.payloads import HIDDEN_STATES

CONFIG = "config.yaml"
IDENTITY = "run.json"
ATTEMPTS = "attempts.jsonl"
SUMMARY = "summary.json"
REPORT = "report.html"
FINAL = "final"
TEACHER_HEAD = "teacher_head"
SAMPLES = "samples.json"
LOG = "driver.log"

_IDENTITY_KEYS = (
    "run.seed",
    "data.source", "data.format", "data.eval_source", "data.eval_fraction", "data.route_by", "data.sequence_length",
    "teacher.model", "teacher.revision", "teacher.engine", "teacher.payload", "teacher.top_k", "teacher.selection",
    "teacher.vocabulary",
    "teacher.dtype", "teacher.wire", "teachers",
    "eval.max_rows", "eval.kl",
    "student.model", "student.revision", "student.init", "student.lora", "student.freeze", "student.dtype",
    "loss.divergence", "loss.tail", "loss.temperature", "loss.terms",
    "train.global_batch_size", "train.epochs", "train.max_steps", "train.learning_rate", "train.schedule",
    "train.warmup_steps", "train.weight_decay", "train.max_grad_norm",
)  # fmt: skip
"""Data, models, loss, seed, batch and schedule. Workers, ZeRO stage, pools and the *_every keys are free to change."""

_FREE_OPTIONS = {
    "hf": {"device_map"},
    "http": {
        "url", "max_concurrency", "timeout_s", "deadline_s", "max_retries", "backoff_s", "api_key_env", "insecure"
    },
    "vllm": {
        "tensor_parallel_size", "gpu_memory_utilization", "max_model_len", "max_num_batched_tokens", "enforce_eager"
    },
}  # fmt: skip
"""Kind of engine -> options that say where and how it is asked: a server may move while a run stands still."""

_IMPLIED: dict[str, Any] = {
    "loss.terms": "loss.kd_weight and loss.ce_weight",  # it never equals what is wanted
    "data.route_by": None, "teacher.payload": "topk_logprobs", "teacher.selection": "topk", "teacher.wire": "plain",
    "teacher.vocabulary": STRICT, "teachers": None, "student.lora": None, "student.freeze": [],
}  # fmt: skip
"""What runs did before these keys existed: one that did something else is another run."""

_CONTENT_KEYS = {"data.source", "data.eval_source", "teacher.model", "teachers.model", "student.model"}
"""Paths may move; what they hold is compared by its fingerprint (`check_content`)."""


def run_dir(config: RunConfig) -> Path:
    """The run folder: an absolute path, or one in an object store. Raises ConfigError for any other URI."""
    return storage.path(config.run.dir, "run.dir")


def create(folder: Path) -> None:
    """Make the folder and prove it can be written. Raises ConfigError when it cannot."""
    with storage.refused_if_unwritable(folder, "run.dir"):
        storage.make_folder(folder)
    prove_writable(folder)


def prove_writable(folder: Path, key: str = "run.dir") -> None:
    """Put a small file into a folder, read it back and delete it. Raises ConfigError when it cannot be written."""
    with storage.refused_if_unwritable(folder, key):
        probe = folder / f".probe-{secrets.token_hex(8)}"  # a name that nobody can have put a link at
        probe.write_text("probe")
        try:
            if (seen := storage.read_text(probe)) != "probe":
                raise ConfigError(f"{key} '{folder}' gives back {seen[:20]!r} where 'probe' was written")
        finally:
            probe.unlink()


def is_draft(name: str) -> bool:
    """Whether a name in a run folder is of a file or folder that is being written, or was when its writer died."""
    return name.startswith(".") and (name.endswith(".tmp") or ".partial-" in name)


def identity(config: RunConfig) -> dict[str, Any]:
    """Dotted key -> value of the settings that make a run this run."""
    plain = configuration.to_dict(config)
    values: dict[str, Any] = {}
    for key in _IDENTITY_KEYS:
        section, _, name = key.partition(".")
        values[key] = plain[section][name] if name else plain[section]
    if isinstance(config.teacher.engine, dict):
        values["teacher.engine"] = engine_identity(config)
    if config.student.init is not None:
        values["student.init"] = _identity_of_init(config.student.init)
    values["teachers"], values["teachers.model"] = None, None
    if config.teachers:
        values["teachers"] = [_identity_of(one, alone) for one, alone in each_teacher(config)]
        values["teachers.model"] = [one.model for one in config.teachers]
    if config.teacher.payload == HIDDEN_STATES:  # which leaves these without effect
        values["loss.tail"] = None
        if config.eval.kl == "exact":
            values["teacher.top_k"] = None
    return values


def _identity_of_init(init: StudentInit) -> dict[str, Any]:
    """Without what runs did before the keys existed, as they recorded it."""
    values = {item.name: getattr(init, item.name) for item in fields(init)}
    return {
        name: value
        for name, value in values.items()
        if name in ("layers", "select") or value != getattr(StudentInit, name)
    }


def _identity_of(one: OneOfTeachers | None, alone: RunConfig) -> dict[str, Any]:
    assert one is not None
    same = {"engine": engine_identity(alone), "rows": None if one.rows is None else sorted(set(one.rows))}
    return {name: getattr(one, name) for name in ("weight", "revision", "dtype")} | same


def engine_identity(config: RunConfig, with_address: bool = False) -> dict[str, Any]:
    """Kind and options of the engine that its answers depend on. with_address: the server's address as well."""
    engine = config.teacher.engine
    options: dict[str, Any] = {"kind": engine} if isinstance(engine, str) else dict(engine)
    free = _FREE_OPTIONS.get(str(options.get("kind")), set()) - ({"url"} if with_address else set())
    masked: dict[str, Any] = redact.mask(options)
    return {name: value for name, value in masked.items() if name not in free}


def check_identity(folder: Path, config: RunConfig) -> None:
    """Raise ConfigError naming the settings in which the run in this folder differs from the config."""
    known = _recorded(folder)
    if known is None:
        return
    wanted = identity(config)
    for key, value in wanted.items():
        # Other keys that are younger than the run had a value then that nobody wrote down: they are not compared.
        seen = known["settings"].get(key, _IMPLIED.get(key, value))
        if key not in _CONTENT_KEYS and seen != value:
            raise ConfigError(
                f"run.dir '{folder}' holds another run: its {key} is {_short(seen)}, now {_short(value)}; "
                "use the same value or another run.dir"
            )


def has_moved(folder: Path, config: RunConfig) -> bool:
    """Whether the config names data or models by other paths than the run in this folder: `check_content` decides."""
    known, wanted = _recorded(folder), identity(config)
    return known is not None and any(known["settings"].get(key) != wanted[key] for key in _CONTENT_KEYS)


def check_content(folder: Path, content: Mapping[str, str]) -> None:
    """Raise ConfigError naming the data or the models in which the run in this folder differs.

    content: what ("prepared data", "teacher weights", ...) -> fingerprint.
    """
    known = _recorded(folder)
    if known is None:
        return
    for name, fingerprint in content.items():
        if known["content"].get(name) != fingerprint:
            raise ConfigError(
                f"run.dir '{folder}' holds another run: the {name} changed (fingerprint "
                f"{_short(known['content'].get(name))}, now {_short(fingerprint)}); use another run.dir"
            )


def record(folder: Path, config: RunConfig, content: Mapping[str, str]) -> None:
    """Write the config, and on a first start what identifies the run from now on."""
    if not (folder / IDENTITY).exists():
        write_json(folder / IDENTITY, {"settings": identity(config), "content": dict(content)})
    storage.write_text(folder / CONFIG, configuration.to_yaml(config))


def content_of(folder: Path) -> dict[str, str]:
    """The fingerprints `record` wrote. Raises ConfigError when the run never came that far."""
    known = _recorded(folder)
    if known is None:
        raise ConfigError(f"'{folder}' holds no run: it has no {IDENTITY}")
    return known["content"]


def prepared_dir(config: RunConfig) -> Path:
    """Where prepared data lies, one folder per fingerprint."""
    return storage.path(config.data.prepared_dir or run_dir(config).parent / "prepared")


def prepared_of(folder: Path, config: RunConfig) -> Path:
    """The prepared data that the run in this folder was recorded with."""
    return prepared_dir(config) / content_of(folder)["prepared data"][:16]


def finished_summary(folder: Path) -> dict[str, Any] | None:
    """The summary of a run that is done, or None."""
    summary = _read(folder / SUMMARY, {"exit_code"})
    is_done = summary is not None and summary["exit_code"] == 0 and (folder / FINAL / "config.json").exists()
    return summary if is_done else None


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write whole or not at all."""
    storage.write_text(path, json.dumps(document, indent=1, allow_nan=False) + "\n")


def _recorded(folder: Path) -> dict[str, Any] | None:
    """What `record` wrote on the first start."""
    return _read(folder / IDENTITY, {"settings", "content"})


def _read(path: Path, needed: set[str]) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        document = json.loads(storage.read_text(path))
        missing = sorted(needed - document.keys())
        if missing:
            raise ValueError(f"it has no '{missing[0]}'")
    except (ValueError, AttributeError) as error:
        raise ConfigError(
            f"'{path}' is damaged ({error}): restore it (jobs/doctor.py says more), or use another run.dir"
        ) from error
    return dict(document)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
