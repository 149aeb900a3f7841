"""One shard: records -> segments -> tokens -> packed rows in a file of its own. What a preparation task runs.

Knows no Ray. A shard's rows depend on the shard alone, so they are the same on any number of CPUs. The documents of
each route are packed for themselves, which leaves the last rows of each route of each shard partly empty.
Costs: the shard's texts and tokens in memory; 12 bytes a token on disk until the rows are shuffled.
"""

import functools
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_kd import plugins, storage
from ray_kd.config import route_of
from ray_kd.data import tokenizer as tokenizing
from ray_kd.data.packing import cut, has_target, pack
from ray_kd.data.records import BadRecord, Document, Record, Segment, excerpt
from ray_kd.errors import RayKDError

SIDES = ("train", "eval")

BATCH_RECORDS = 256
"""Records tokenised in one call: bounds the memory of the offsets."""


@dataclass(frozen=True)
class Task:
    """What the tasks of one preparation share; small and picklable."""

    source: dict[str, Any]
    """{kind, ...}, with absolute paths."""
    eval_source: dict[str, Any] | None
    format: dict[str, Any]
    route_by: str | None
    tokenizer_path: str
    revision: str | None
    sequence_length: int
    seed: int
    eval_fraction: float


@dataclass
class _Side:
    """The documents of a shard that are trained on, or held out."""

    documents: dict[str, list[Document]] = field(default_factory=dict)
    """By route, which is "" where nothing is routed."""
    hashes: list[int] = field(default_factory=list)
    sketches: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class ShardResult:
    """Counts of one shard; rows, tokens and documents under "train" and "eval", what is of both beside them."""

    counts: Counter[str]
    route_rows: dict[str, dict[str, int]]
    """By side, route -> its rows, in the order they stand in the part; all are of the route "" without route_by."""
    hashes: dict[str, NDArray[np.uint64]]
    """By side, [documents]: `text_hash` of each document."""
    sketches: dict[str, NDArray[np.uint64]]
    """By side, [documents]: `sketch` of each document."""


def prepare_shard(index: int, is_eval: bool, shard: dict[str, Any], task: Task, folder: str) -> ShardResult:
    """Write the shard's packed rows and its quarantined records as parts in `folder`. Done again, it replaces them.

    index: the shard's number over source and eval_source; is_eval: it is one of eval_source;
    folder: where every node can write, a path or a URI.
    """
    # Shards are the parallelism; threads of the tokenizer on top of it would fight over the cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = tokenizing.load_tokenizer(task.tokenizer_path, task.revision)
    source, form = source_and_format(task, is_eval)
    sides = {name: _Side() for name in SIDES}
    bad: list[BadRecord] = []
    counts: Counter[str] = Counter()
    records = source.read(shard)
    while batch := list(islice(records, BATCH_RECORDS)):
        counts["records_read"] += len(batch)
        for found in usable(batch, task.route_by, form, tokenizer):
            if isinstance(found, BadRecord):
                bad.append(found)
                continue
            route, document, text = found
            text_hash = hash_text(text)
            held_out = is_eval or is_held_out(text_hash, task.seed, task.eval_fraction)
            side = sides["eval" if held_out else "train"]
            side.documents.setdefault(route, []).append(document)
            side.hashes.append(text_hash)
            side.sketches.append(sketch(document))
    pad_id = tokenizing.pad_id(tokenizer)
    route_rows = {
        name: _write_rows(part_path(folder, name, index), name, side, task, pad_id, counts)
        for name, side in sides.items()
    }
    _write_bad(bad_path(folder, index), bad)
    counts["quarantined"] = len(bad)
    return ShardResult(
        counts,
        route_rows,
        {name: np.array(side.hashes, dtype=np.uint64) for name, side in sides.items()},
        {name: np.array(side.sketches, dtype=np.uint64) for name, side in sides.items()},
    )


def source_and_format(task: Task, is_eval: bool) -> tuple[Any, Any]:
    """The Source and the Format of a task, each made once per process."""
    source = _build("data.sources", "Source", json.dumps(task.eval_source if is_eval else task.source))
    return source, _build("data.formats", "Format", json.dumps(task.format))


def parts_folder(folder: str | Path) -> Path:
    """Where the parts of the shards stand until the files are written."""
    return storage.path(folder) / "parts"


def part_path(folder: str | Path, side: str, index: int) -> Path:
    """The packed rows of one shard: int32 [rows, 3 T + 1], input_ids | labels | position_ids | num_target_bytes."""
    return parts_folder(folder) / f"{side}-{index:06d}.int32"


def bad_path(folder: str | Path, index: int) -> Path:
    """The quarantined records of one shard, a JSON object a line."""
    return parts_folder(folder) / f"bad-{index:06d}.jsonl"


def is_held_out(text_hash: int, seed: int, fraction: float) -> bool:
    """Whether a document belongs to the eval side: by its hash, so that all its copies do."""
    if not fraction:
        return False
    digest = hashlib.blake2b(f"{seed}:{text_hash}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


def hash_text(text: str) -> int:
    """64 bits of a document's text; case, punctuation and spacing do not count unless there is nothing else."""
    words = " ".join(re.findall(r"\w+", text.casefold())) or text
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "little")


_WINDOW = 8
_ROLL = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.array([0xBF58476D1CE4E5B9, 0x94D049BB133111EB], dtype=np.uint64)
_SALTS = np.arange(1, 9, dtype=np.uint64) * _ROLL


def sketch(document: Document) -> int:
    """64 bits that two documents share with probability J^8, J the overlap (Jaccard) of their trained 8-token windows.

    Eight min-hashes in one: 0.66 at J = 0.95, 0.004 at J = 0.5, so that a large training set does not match everything.
    Answers shorter than two windows say too little: there the whole document has to be the same.
    https://en.wikipedia.org/wiki/MinHash
    """
    ids = document.input_ids[document.is_trained].astype(np.uint64)
    if len(ids) < 2 * _WINDOW:
        return int.from_bytes(hashlib.blake2b(document.input_ids.tobytes(), digest_size=8).digest(), "little")
    ids = mix(ids)
    count = len(ids) - _WINDOW + 1
    windows = ids[:count]
    for offset in range(1, _WINDOW):  # arithmetic modulo 2^64
        windows = windows * _ROLL + ids[offset : offset + count]
    lowest = mix(windows[None, :] ^ _SALTS[:, None]).min(axis=1)
    return int.from_bytes(hashlib.blake2b(lowest.tobytes(), digest_size=8).digest(), "little")


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijection of 64 bits that looks random (the finaliser of splitmix64, https://prng.di.unimi.it/splitmix64.c)."""
    values = values + _ROLL
    values = (values ^ (values >> np.uint64(30))) * _MIX[0]
    values = (values ^ (values >> np.uint64(27))) * _MIX[1]
    return values ^ (values >> np.uint64(31))


def usable(
    batch: Sequence[Record | BadRecord], route_by: str | None, form: Any, tokenizer: Any
) -> Iterator[tuple[str, Document, str] | BadRecord]:
    """Per record, in order, its route, document and text, or why it is quarantined."""
    segmented = [
        record if isinstance(record, BadRecord) else _segment(record, route_by, form, tokenizer) for record in batch
    ]
    encoded = iter(tokenizing.encode([item[1] for item in segmented if not isinstance(item, BadRecord)], tokenizer))
    for record, item in zip(batch, segmented, strict=True):
        if isinstance(item, BadRecord):
            yield item
            continue
        assert isinstance(record, Record)
        route, segments = item
        document = next(encoded)
        if has_target(document):
            yield route, document, "".join(segment.text for segment in segments)
        else:
            yield _refuse(record, "nothing to train on: no token is a target")


def _segment(record: Record, route_by: str | None, form: Any, tokenizer: Any) -> tuple[str, list[Segment]] | BadRecord:
    """A record's route and its document in segments."""
    try:
        route = "" if route_by is None else _route(record.data.get(route_by), route_by)
        segments = list(form.segments(record.data, tokenizer))
        tokenizing.check_unicode([*segments, Segment(route, is_trained=False)])
    except RayKDError:
        raise  # a ConfigError is a ValueError too, but it is not about this record
    except ValueError as error:
        return _refuse(record, str(error))
    return route, segments


def _route(value: Any, column: str) -> str:
    if value is None:
        raise ValueError(f"column '{column}' of data.route_by is missing or null")
    try:
        return route_of(value)
    except ValueError as error:
        raise ValueError(f"column '{column}' of data.route_by {error}") from error


def _refuse(record: Record, reason: str) -> BadRecord:
    shown = json.dumps(record.data, ensure_ascii=False, default=str)
    return BadRecord(record.file, record.line, excerpt(reason), excerpt(shown))


def _write_rows(path: Path, name: str, side: _Side, task: Task, pad_id: int, counts: Counter[str]) -> dict[str, int]:
    """Write a side's rows, one route after the other. Returns the rows of each, in that order."""
    route_rows: dict[str, int] = {}
    chunks = []
    for route, documents in sorted(side.documents.items()):
        pieces = cut(documents, task.sequence_length)
        rows = pack(pieces.pieces, task.sequence_length, pad_id)
        route_rows[route] = len(rows.input_ids)
        counts[f"{name}_documents"] += len(documents)
        counts[f"{name}_rows"] += len(rows.input_ids)
        counts[f"{name}_tokens"] += sum(len(piece.input_ids) for piece in pieces.pieces)
        counts["split_documents"] += pieces.split_documents
        counts["repeated_tokens"] += pieces.repeated_tokens
        counts["dropped_tokens"] += pieces.dropped_tokens
        columns = [rows.input_ids, rows.labels, rows.position_ids, rows.num_target_bytes[:, None]]
        chunks.append(np.concatenate(columns, axis=1).tobytes())
    _replace(path, chunks)
    return route_rows


def _write_bad(path: Path, bad: Iterable[BadRecord]) -> None:
    # Lone surrogates of a bad record are kept readable: ASCII escapes what UTF-8 cannot hold.
    _replace(path, ((json.dumps(asdict(record)) + "\n").encode() for record in bad))


def _replace(path: Path, chunks: Iterable[bytes]) -> None:
    if storage.is_remote(path):  # a put is whole
        with path.open("wb") as file:
            file.writelines(chunks)
        return
    # A task that Ray runs twice may write twice at once: each to a name of its own, then in place at a stroke.
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    with partial.open("wb") as file:
        file.writelines(chunks)
    os.replace(partial, path)


@functools.lru_cache(maxsize=8)
def _build(group: str, name: str, described: str) -> Any:
    """The Source or Format of a JSON {kind, ...}, once per process."""
    module, options = plugins.options(group, json.loads(described), key=group)
    return getattr(module, name)(options)
