"""A Hugging Face dataset: a hub name, a folder that `load_dataset` reads, or one written by `save_to_disk`.

Needs the `datasets` package (`pip install '.[hub]'`).
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from ray_kd.data.files import SHARD_RECORDS
from ray_kd.data.prepared import sha256_of
from ray_kd.data.records import BadRecord, Record
from ray_kd.errors import ConfigError


@dataclass
class Config:
    path: str = MISSING
    """Hub name of the dataset, or a local folder."""
    name: str | None = None
    """Configuration (subset) of the dataset."""
    split: str = "train"
    """Split of the dataset, slices as in train[:10%] included."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""


class Source:
    """Cost: what `datasets` downloads and converts once into its own cache; a local folder is hashed besides."""

    def __init__(self, config: Config) -> None:
        self.folder = Path(config.path).expanduser().absolute()
        is_local = self.folder.is_dir()
        if not is_local and (config.path.startswith(("/", ".", "~")) or config.path.count("/") > 1):
            raise ConfigError(f"data path '{config.path}' does not exist (looked at '{self.folder}')")
        self.config = replace(config, path=str(self.folder)) if is_local else config
        self.is_local = is_local
        self._dataset = _load(self.config.path, config.name, config.split, config.revision)

    def identity(self) -> list[Any]:
        """A local folder: name, split and sha256 of its files. A hub dataset: names, revision and fingerprint."""
        chosen = [self.config.name, self.config.split]
        if not self.is_local:
            return [self.config.path, *chosen, self.config.revision, self._dataset._fingerprint]
        files = sorted(path for path in self.folder.rglob("*") if path.is_file() and not _is_cache(path))
        return [*chosen, *([str(path.relative_to(self.folder)), sha256_of(path)] for path in files)]

    def shards(self) -> list[dict[str, Any]]:
        """Ranges of 2,000 rows."""
        num_rows = len(self._dataset)
        return [
            {"start": start, "stop": min(start + SHARD_RECORDS, num_rows)}
            for start in range(0, num_rows, SHARD_RECORDS)
        ]

    def read(self, shard: dict[str, Any]) -> Iterator[Record | BadRecord]:
        """The rows of a shard in order; `line` is the row's number in the split, from 1."""
        rows = self._dataset.select(range(shard["start"], shard["stop"]))
        for number, data in enumerate(rows, start=shard["start"] + 1):
            yield Record(data, self.config.path, number)


@functools.lru_cache(maxsize=2)
def _load(path: str, name: str | None, split: str, revision: str | None) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError("source 'huggingface' needs the package datasets: pip install '.[hub]'") from error
    try:
        if Path(path, "dataset_info.json").is_file() or Path(path, "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(path)
            return loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        return datasets.load_dataset(path, name, split=split, revision=revision)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"dataset '{path}' (name {name}, split {split}) cannot be loaded: {reason}") from error


def _is_cache(path: Path) -> bool:
    """Files that `datasets` writes beside the data when it transforms them."""
    return path.name.startswith(("cache-", "tmp")) or path.suffix == ".lock"
