"""What would be prepared, and its fingerprint: everything read from the config and the sources, before any Ray work.

Cost: one pass over the bytes of the sources, and the tokenizer's files.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_kd import config as configuration
from ray_kd import plugins, schema
from ray_kd.data.files import SHARD_BYTES, SHARD_RECORDS
from ray_kd.data.prepared import ROWS_PER_FILE, ROWS_PER_GROUP
from ray_kd.data.shard import Task
from ray_kd.data.tokenizer import tokenizer_identity
from ray_kd.errors import ConfigError

PREPARE_VERSION = 1
"""Part of the fingerprint: raise it when the same sources come out as other rows."""


@dataclass(frozen=True)
class Plan:
    """One preparation."""

    fingerprint: str
    """sha256, hex, over everything that determines the rows."""
    task: Task
    shards: list[tuple[bool, dict[str, Any]]]
    """(is of eval_source, shard), those of source first."""

    @property
    def folder_name(self) -> str:
        return self.fingerprint[:16]


def plan_preparation(config: configuration.Data, tokenizer_path: str, revision: str | None, seed: int) -> Plan:
    """Check the settings, scan the sources and fingerprint it all.

    Raises ConfigError for a setting, a path, a plug-in option or a tokenizer that the user can fix.
    """
    if config.eval_source is not None and config.eval_fraction:
        raise ConfigError("data.eval_source and data.eval_fraction are both set: allowed is at most one")
    if not 0 <= config.eval_fraction < 1:
        raise ConfigError(f"data.eval_fraction is {config.eval_fraction}: allowed is 0 up to below 1")
    if config.sequence_length < 2:
        raise ConfigError(f"data.sequence_length is {config.sequence_length}: allowed is 2 or more")
    source, identity, shards = _scan(config.source, "data.source")
    eval_source: dict[str, Any] | None = None
    eval_identity: list[Any] | None = None
    eval_shards: list[dict[str, Any]] = []
    if config.eval_source is not None:
        eval_source, eval_identity, eval_shards = _scan(config.eval_source, "data.eval_source")
    _, format_options = plugins.options("data.formats", config.format, "data.format")
    form = {"kind": plugins.kind_of(config.format), **dataclasses.asdict(format_options)}
    determines = {
        "versions": [PREPARE_VERSION, schema.SCHEMA_VERSION, SHARD_RECORDS, SHARD_BYTES, ROWS_PER_GROUP, ROWS_PER_FILE],
        "source": [source["kind"], identity],
        "eval_source": eval_source and [eval_source["kind"], eval_identity],
        "eval_fraction": config.eval_fraction,
        "format": form,
        "route_by": config.route_by,
        "tokenizer": tokenizer_identity(tokenizer_path, revision),
        "sequence_length": config.sequence_length,
        "seed": seed,
    }
    task = Task(
        source=source,
        eval_source=eval_source,
        format=form,
        route_by=config.route_by,
        tokenizer_path=str(Path(tokenizer_path).absolute()) if Path(tokenizer_path).is_dir() else tokenizer_path,
        revision=revision,
        sequence_length=config.sequence_length,
        seed=seed,
        eval_fraction=config.eval_fraction,
    )
    fingerprint = hashlib.sha256(json.dumps(determines, sort_keys=True).encode()).hexdigest()
    return Plan(fingerprint, task, [(False, shard) for shard in shards] + [(True, shard) for shard in eval_shards])


def _scan(value: str | Mapping[str, Any], key: str) -> tuple[dict[str, Any], list[Any], list[dict[str, Any]]]:
    """({kind, options with absolute paths}, identity, shards) of a configured source."""
    module, options = plugins.options("data.sources", value, key)
    source = module.Source(options)
    described = {"kind": plugins.kind_of(value), **dataclasses.asdict(source.config)}
    return described, source.identity(), source.shards()
