"""Plain text files, UTF-8: each line, paragraph or file becomes the field `text` of a record."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from omegaconf import MISSING

from ray_kd.data.files import Piece, expand, join_pieces, pieces_of, read_lines, scan_lines
from ray_kd.data.records import BadRecord, Record, excerpt
from ray_kd.errors import ConfigError

SAMPLES = ("line", "paragraph", "document")


@dataclass
class Config:
    paths: list[str] = MISSING
    """Files, folders or glob patterns; a folder stands for all its files."""
    sample_by: str = "line"
    """What one record is: line | paragraph (blank lines between) | document (a whole file)."""


class Source:
    """Cost: one pass over the bytes for hashes and offsets, then one read of each shard."""

    def __init__(self, config: Config) -> None:
        if config.sample_by not in SAMPLES:
            raise ConfigError(f"sample_by of a text source is '{config.sample_by}': allowed is {' | '.join(SAMPLES)}")
        self.files = expand(config.paths)
        self.config = replace(config, paths=self.files)

    @cached_property
    def _scanned(self) -> list[tuple[str, list[Piece]]]:
        return [self._scan(file) for file in self.files]

    def _scan(self, file: str) -> tuple[str, list[Piece]]:
        digest, pieces = scan_lines(file, records_end_at_blank=self.config.sample_by == "paragraph")
        if self.config.sample_by == "document" and pieces:
            pieces = [Piece(file, 0, pieces[-1].stop, 1, 1)]
        return digest, pieces

    def identity(self) -> list[Any]:
        """What a record is, and the sha256 of each file's bytes, in order."""
        return [self.config.sample_by, *(digest for digest, _ in self._scanned)]

    def shards(self) -> list[dict[str, Any]]:
        """Byte ranges of about 2,000 records."""
        return join_pieces(piece for _, pieces in self._scanned for piece in pieces)

    def read(self, shard: dict[str, Any]) -> Iterator[Record | BadRecord]:
        """The texts of a shard in order, and a BadRecord for each that is not UTF-8."""
        for piece in pieces_of(shard):
            for number, sample in self._samples(piece):
                try:
                    yield Record({"text": sample.decode("utf-8")}, piece.file, number)
                except UnicodeDecodeError as error:
                    reason = f"not UTF-8: {error.reason} at byte {error.start}"
                    shown = excerpt(sample[:1000].decode("utf-8", errors="replace"))
                    yield BadRecord(piece.file, number, reason, shown)

    def _samples(self, piece: Piece) -> Iterator[tuple[int, bytes]]:
        lines = read_lines(piece)
        if self.config.sample_by == "document":
            yield 1, b"\n".join(line for _, line in lines)
            return
        held: list[bytes] = []
        first = piece.line
        for number, line in lines:
            is_blank = not line.strip()
            if held and (is_blank or self.config.sample_by == "line"):
                yield first, b"\n".join(held)
                held = []
            if not is_blank:
                first = first if held else number
                held.append(line)
        if held:
            yield first, b"\n".join(held)
