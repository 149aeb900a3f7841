"""Parquet files: one record a row, its columns as they are."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from omegaconf import MISSING

from ray_kd.data.files import SHARD_RECORDS, Piece, expand, join_pieces, pieces_of
from ray_kd.data.prepared import sha256_of
from ray_kd.data.records import BadRecord, Record
from ray_kd.errors import ConfigError

PIECES_PER_GROUP = 16
"""A row group is decoded from its start up to each piece: few pieces bound that to 8 readings of the group."""


@dataclass
class Config:
    paths: list[str] = MISSING
    """Files, folders or glob patterns; a folder stands for all its files."""
    columns: list[str] | None = None
    """Columns to read. Default: all."""


class Source:
    """Cost: one pass over the bytes for hashes; the footers give the shards."""

    def __init__(self, config: Config) -> None:
        self.files = expand(config.paths)
        self.config = replace(config, paths=self.files)

    def identity(self) -> list[Any]:
        """The columns read and the sha256 of each file's bytes, in order."""
        return [self.config.columns, *(sha256_of(Path(file)) for file in self.files)]

    def shards(self) -> list[dict[str, Any]]:
        """Row groups or stretches of them, of about 2,000 rows where the groups allow it."""
        return join_pieces(piece for file in self.files for piece in _pieces(file, self.config.columns))

    def read(self, shard: dict[str, Any]) -> Iterator[Record | BadRecord]:
        """The rows of a shard in order; `line` is the row's number in its file, from 1."""
        for piece in pieces_of(shard):
            # A piece's start and stop are rows of its row group, and its line is the row in the file.
            with pq.ParquetFile(piece.file) as file:
                group, before = _group_at(file, piece.line - 1)
                seen = before
                for batch in file.iter_batches(SHARD_RECORDS, row_groups=[group], columns=self.config.columns):
                    first = max(piece.line - 1 - seen, 0)
                    count = min(batch.num_rows, piece.line - 1 + piece.records - seen) - first
                    if count > 0:
                        for index, data in enumerate(batch.slice(first, count).to_pylist()):
                            yield Record(data, piece.file, seen + first + index + 1)
                    seen += batch.num_rows
                    if seen >= piece.line - 1 + piece.records:
                        break


def _pieces(name: str, columns: list[str] | None) -> Iterator[Piece]:
    try:
        with pq.ParquetFile(name) as file:
            metadata, present = file.metadata, file.schema_arrow.names
    except (pa.ArrowInvalid, OSError) as error:
        raise ConfigError(f"data file '{name}' is not a Parquet file: {str(error).splitlines()[0]}") from error
    missing = [column for column in columns or [] if column not in present]
    if missing:
        raise ConfigError(f"data file '{name}' has no column '{missing[0]}'; it has {', '.join(present)}")
    row = 0
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        size = max(SHARD_RECORDS, -(-rows // PIECES_PER_GROUP))
        for start in range(0, rows, size):
            stop = min(start + size, rows)
            yield Piece(name, start, stop, row + start + 1, stop - start)
        row += rows


def _group_at(file: pq.ParquetFile, row: int) -> tuple[int, int]:
    """(row group that holds a row of the file, rows before the group)."""
    before = 0
    for group in range(file.metadata.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if row < before + rows:
            return group, before
        before += rows
    raise ConfigError(f"data file has {before} rows, row {row + 1} was asked: it changed while it was read")
