"""Files of records: finding them, hashing them, and cutting them into shards.

One streaming pass over a file gives its sha256 and the byte offsets of its pieces, which are then read in parallel.
Pieces of small files are joined into shards of at most SHARD_RECORDS records and about SHARD_BYTES bytes.
"""

import glob
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_kd.errors import ConfigError

SHARD_RECORDS = 2000
"""Small enough for a few thousand records to run in parallel, large enough to pack well."""
SHARD_BYTES = 2 * 2**20
"""About half a million tokens, a few seconds of work: long records make no long tasks."""

BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Piece:
    """Bytes [start, stop) of a file that hold whole records; `line` is the number of its first line, from 1."""

    file: str
    start: int
    stop: int
    line: int
    records: int


def expand(paths: Iterable[str]) -> list[str]:
    """Absolute paths of files; a glob pattern or a folder stands for its files, sorted by name.

    Raises ConfigError naming the path that does not exist or the pattern that matches nothing.
    """
    files: list[str] = []
    for path in paths:
        if "://" in path:
            raise ConfigError(f"data path '{path}' is a URI: allowed is a path that every node sees")
        whole = str(Path(path).expanduser().absolute())
        if Path(whole).is_file():
            files.append(whole)
            continue
        pattern = f"{glob.escape(whole)}/*" if Path(whole).is_dir() else whole
        found = sorted(name for name in glob.glob(pattern, recursive=True) if _is_data(name))
        if not found:
            kind = "folder holds no files" if Path(whole).is_dir() else "does not exist"
            raise ConfigError(f"data path '{path}' {kind}" + (f" (looked at '{whole}')" if whole != path else ""))
        files.extend(found)
    if not files:
        raise ConfigError("data paths are empty: name at least one file")
    return files


def scan_lines(file: str, records_end_at_blank: bool = False) -> tuple[str, list[Piece]]:
    """(sha256, pieces) of a text file in one pass; a piece makes a shard at most. Blank lines are no records.

    records_end_at_blank: cut only after a blank line, and count the paragraphs between them.
    """
    digest = hashlib.sha256()
    pieces: list[Piece] = []
    start = offset = records = 0
    first_line, in_paragraph = 1, False
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1 and line.startswith(b"\x1f\x8b"):
                raise ConfigError(f"data file '{file}' is gzip-compressed: decompress it first (gunzip)")
            digest.update(line)
            is_blank = not line.strip()
            is_full = records >= SHARD_RECORDS or offset - start >= SHARD_BYTES
            if is_full and not (records_end_at_blank and in_paragraph):
                pieces.append(Piece(file, start, offset, first_line, records))
                start, first_line, records = offset, number, 0
            if not is_blank and not (records_end_at_blank and in_paragraph):
                records += 1
            in_paragraph = not is_blank
            offset += len(line)
    if offset > start:
        pieces.append(Piece(file, start, offset, first_line, records))
    return digest.hexdigest(), pieces


def read_lines(piece: Piece) -> Iterator[tuple[int, bytes]]:
    """(line number, bytes without line end) of a piece's lines; a byte order mark at the file's start is dropped."""
    with open(piece.file, "rb") as file:
        file.seek(piece.start)
        remaining = piece.stop - piece.start
        number = piece.line
        while remaining > 0:
            line = file.readline()
            if not line:
                return
            remaining -= len(line)
            if number == 1:
                line = line.removeprefix(BOM)
            yield number, line.rstrip(b"\r\n")
            number += 1


def join_pieces(pieces: Iterable[Piece]) -> list[dict[str, Any]]:
    """Shards {"pieces": [...]} of neighbouring pieces that fit together, pieces without records left out."""
    shards: list[dict[str, Any]] = []
    records, size = SHARD_RECORDS, 0
    for piece in pieces:
        if not piece.records:
            continue
        records += piece.records
        size += piece.stop - piece.start
        if records > SHARD_RECORDS or size > SHARD_BYTES:
            shards.append({"pieces": []})
            records, size = piece.records, piece.stop - piece.start
        shards[-1]["pieces"].append([piece.file, piece.start, piece.stop, piece.line, piece.records])
    return shards


def pieces_of(shard: dict[str, Any]) -> list[Piece]:
    """Inverse of `join_pieces` for one shard."""
    return [Piece(*values) for values in shard["pieces"]]


def _is_data(name: str) -> bool:
    return Path(name).is_file() and not Path(name).name.startswith((".", "_"))
