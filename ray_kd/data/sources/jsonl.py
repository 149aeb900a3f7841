"""JSON Lines: one object a line, UTF-8; blank lines are skipped, a line that is not an object is quarantined."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from omegaconf import MISSING

from ray_kd.data.files import Piece, expand, join_pieces, pieces_of, read_lines, scan_lines
from ray_kd.data.records import BadRecord, Record, excerpt


@dataclass
class Config:
    paths: list[str] = MISSING
    """Files, folders or glob patterns; a folder stands for all its files."""


class Source:
    """Cost: one pass over the bytes for hashes and line offsets, then one read of each shard."""

    def __init__(self, config: Config) -> None:
        self.files = expand(config.paths)
        self.config = replace(config, paths=self.files)

    @cached_property
    def _scanned(self) -> list[tuple[str, list[Piece]]]:
        return [scan_lines(file) for file in self.files]

    def identity(self) -> list[Any]:
        """sha256 of each file's bytes, in order."""
        return [digest for digest, _ in self._scanned]

    def shards(self) -> list[dict[str, Any]]:
        """Byte ranges of about 2,000 lines."""
        return join_pieces(piece for _, pieces in self._scanned for piece in pieces)

    def read(self, shard: dict[str, Any]) -> Iterator[Record | BadRecord]:
        """The objects of a shard in order, and a BadRecord for each line that is none."""
        for piece in pieces_of(shard):
            for number, line in read_lines(piece):
                if line.strip():
                    yield _parse(piece.file, number, line)


def _parse(file: str, number: int, line: bytes) -> Record | BadRecord:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        shown = excerpt(line.decode("utf-8", errors="replace"))
        return BadRecord(file, number, f"not UTF-8: {error.reason} at byte {error.start}", shown)
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        return BadRecord(file, number, f"not JSON: {error.msg} at column {error.colno}", excerpt(text))
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets thousands deep
        return BadRecord(file, number, f"not readable JSON: {type(error).__name__}", excerpt(text))
    if not isinstance(data, dict):
        return BadRecord(file, number, f"not a JSON object but {type(data).__name__}", excerpt(text))
    return Record(data, file, number)
