"""Prepared data of random documents, written in milliseconds without Ray: for tests of what comes after it."""

import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ray_kd import schema
from ray_kd.data.manifest import MANIFEST_NAME, Manifest, PreparedFile
from ray_kd.data.prepared import NUM_TARGET_BYTES, ROWS_PER_GROUP, arrow_schema, sha256_of


def random_rows(num_rows: int, length: int, vocab: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Two or three documents and some padding a row; the first tokens of each document are not trained."""
    rng = np.random.default_rng(seed)
    input_ids = rng.integers(3, vocab, (num_rows, length)).astype(np.int32)
    position_ids = np.zeros((num_rows, length), np.int32)
    labels = input_ids.copy()
    for row in range(num_rows):
        cuts = [0, *sorted(rng.choice(np.arange(3, length - 2), size=2, replace=False).tolist()), length]
        for start, stop in itertools.pairwise(cuts):
            position_ids[row, start:stop] = np.arange(stop - start)
            labels[row, start : start + 2] = schema.IGNORED_LABEL
        if row % 2:  # padding: the last document
            labels[row, cuts[-2] :] = schema.IGNORED_LABEL
            input_ids[row, cuts[-2] :] = 2
    return {schema.INPUT_IDS: input_ids, schema.LABELS: labels, schema.POSITION_IDS: position_ids}


def write_prepared(folder: Path, num_rows: int, length: int = 16, vocab: int = 259, eval_rows: int = 0) -> Path:
    """A folder that `PreparedData` reads: rows `random_rows` made, numbered from 0."""
    folder.mkdir(parents=True)
    files = {
        name: _write(folder / f"{name}-00000.parquet", count, length, vocab, seed)
        for seed, (name, count) in enumerate([("train", num_rows), ("eval", eval_rows)])
        if count
    }
    counts = dict.fromkeys(
        [f.name for f in Manifest.__dataclass_fields__.values() if f.type in (int, "int", float, "float")], 0
    )
    manifest = Manifest(
        **counts
        | {
            "fingerprint": f"fake-{num_rows}-{length}",
            "schema_version": schema.SCHEMA_VERSION,
            "sequence_length": length,
            "num_rows": num_rows,
            "eval_rows": eval_rows,
            "files": [files["train"]],
            "eval_files": [files["eval"]] if eval_rows else [],
            "routes": [],
            "route_rows": [],
            "max_targets_per_row": length - 1,
        }
    )
    (folder / MANIFEST_NAME).write_text(manifest.to_json())
    return folder


def _write(path: Path, num_rows: int, length: int, vocab: int, seed: int) -> PreparedFile:
    columns = random_rows(num_rows, length, vocab, seed)
    arrays = [pa.array(np.arange(num_rows))]
    for name in (schema.INPUT_IDS, schema.LABELS, schema.POSITION_IDS):
        arrays.append(pa.FixedSizeListArray.from_arrays(pa.array(columns[name].reshape(-1)), length))
    arrays.append(pa.array(np.zeros(num_rows, np.int32)))
    arrays.append(pa.array(np.full(num_rows, length, np.int32)))
    target = arrow_schema(length)
    table = pa.table({field.name: array.cast(field.type) for field, array in zip(target, arrays, strict=True)})
    assert table.column_names[-2:] == [schema.ROUTE, NUM_TARGET_BYTES]
    pq.write_table(table.cast(target), path, row_group_size=ROWS_PER_GROUP)
    return PreparedFile(path.name, num_rows, path.stat().st_size, sha256_of(path))
