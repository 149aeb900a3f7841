"""The parts of all shards -> files of rows in one global random order.

The order is a function of the seed and the numbers of rows, so the files are the same bytes on any number of CPUs.
Each file is gathered row by row from the parts (one small read a row) and written a row group at a time:
memory is one row group, 12 x 256 bytes a token of T, whatever the size of the data.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ray_kd import schema, storage
from ray_kd.data.prepared import ROWS_PER_FILE, ROWS_PER_GROUP, arrow_schema, sha256_of
from ray_kd.data.shard import mix, part_path


@dataclass(frozen=True)
class FilePlan:
    """One file to write: its rows in order, as (part, row of the part)."""

    side: str
    number: int
    parts: NDArray[np.int32]
    """[rows]"""
    rows: NDArray[np.int32]
    """[rows]"""
    routes: NDArray[np.int32]
    """[rows]: the index of each row's route."""

    @property
    def name(self) -> str:
        return f"{self.side}-{self.number:05d}.parquet"


@dataclass(frozen=True)
class FileResult:
    """One file written, with what its rows hold."""

    rows: int
    nbytes: int
    sha256: str
    target_tokens: int
    target_bytes: int
    max_targets: int


def plan_files(side: str, parts_rows: Sequence[Mapping[str, int]], routes: Sequence[str], seed: int) -> list[FilePlan]:
    """Files of ROWS_PER_FILE rows (the last has the rest) with all rows of all parts, shuffled. 24 bytes a row.

    parts_rows: per part, route -> its rows, in the order they stand there. routes: all of them, in order of index.
    """
    counts = np.array([sum(rows.values()) for rows in parts_rows], dtype=np.int64)
    starts = np.cumsum(counts) - counts
    index_of = {route: index for index, route in enumerate(routes)}
    stretches = [(index_of[route], count) for rows in parts_rows for route, count in rows.items()]
    indices, lengths = np.array(stretches, dtype=np.int32).reshape(-1, 2).T
    route_of_row = np.repeat(indices, lengths)
    stream = hashlib.blake2b(f"{side}:{seed}".encode(), digest_size=8).digest()
    keys = np.arange(counts.sum(), dtype=np.uint64) + np.frombuffer(stream, dtype="<u8")
    order = np.argsort(mix(keys))  # mix is a bijection: no ties
    plans = []
    for number, first in enumerate(range(0, len(order), ROWS_PER_FILE)):
        wanted = order[first : first + ROWS_PER_FILE]
        parts = np.searchsorted(starts + counts, wanted, side="right")
        rows = (wanted - starts[parts]).astype(np.int32)
        plans.append(FilePlan(side, number, parts.astype(np.int32), rows, route_of_row[wanted]))
    return plans


def write_file(plan: FilePlan, folder: str, length: int) -> FileResult:
    """Write folder/<plan.name> and count its targets. Done again, it writes the same bytes."""
    parts = {part: part_path(folder, plan.side, part) for part in np.unique(plan.parts).tolist()}
    with storage.drafted_file(storage.path(folder) / plan.name) as path:
        return _write(plan, parts, path, length)


def _write(plan: FilePlan, parts: Mapping[int, Path], path: Path, length: int) -> FileResult:
    target_tokens = target_bytes = max_targets = 0
    # Token ids compress as they are: a dictionary page per row group costs time and gains nothing.
    with pq.ParquetWriter(
        path, arrow_schema(length), compression="zstd", use_dictionary=False, write_statistics=[schema.ROW_ID]
    ) as writer:
        for start in range(0, len(plan.rows), ROWS_PER_GROUP):
            chosen = slice(start, start + ROWS_PER_GROUP)
            values = _gather(plan, chosen, parts, 3 * length + 1)
            input_ids, labels, position_ids = (values[:, i * length : (i + 1) * length] for i in range(3))
            num_target_bytes = values[:, -1]
            row_ids = plan.number * ROWS_PER_FILE + start + np.arange(len(values))
            routes = plan.routes[chosen]
            columns: list[NDArray[np.integer]] = [row_ids, input_ids, labels, position_ids, routes, num_target_bytes]
            writer.write_table(_table(columns, length), row_group_size=ROWS_PER_GROUP)
            targets = schema.target_positions(labels, position_ids).sum(axis=1)
            target_tokens += int(targets.sum())
            target_bytes += int(num_target_bytes.sum(dtype=np.int64))
            max_targets = max(max_targets, int(targets.max()))
    return FileResult(len(plan.rows), path.stat().st_size, sha256_of(path), target_tokens, target_bytes, max_targets)


def _gather(plan: FilePlan, chosen: slice, parts: Mapping[int, Path], width: int) -> NDArray[np.int32]:
    values = np.empty((len(plan.rows[chosen]), width), dtype=np.int32)
    wanted = list(zip(plan.parts[chosen].tolist(), plan.rows[chosen].tolist(), strict=True))
    if storage.is_remote(parts[wanted[0][0]]):
        size = width * 4
        ranges = [(parts[part], row * size, (row + 1) * size) for part, row in wanted]
        for place, blob in enumerate(storage.read_ranges(ranges)):
            values[place] = np.frombuffer(blob, np.int32)
        return values
    for place, (part, row) in enumerate(wanted):
        values[place] = np.fromfile(parts[part], np.int32, width, offset=row * width * 4)
    return values


def _table(columns: Sequence[NDArray[np.integer]], length: int) -> pa.Table:
    target = arrow_schema(length)
    arrays = [
        pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).reshape(-1)), type=field.type)
        if values.ndim == 2
        else pa.array(values)
        for field, values in zip(target, columns, strict=True)
    ]
    return pa.table(arrays, schema=target)
