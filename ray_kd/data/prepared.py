"""Reading prepared data: rows by index from Parquet, in the order asked.

In: a folder written by `prepare`. Out: Arrow tables (`schema.to_numpy` makes arrays of them).
Costs: a row is read with its row group (ROWS_PER_GROUP rows, 12 bytes a token); the last few groups stay in memory,
so contiguous or window-shuffled reads touch each group about once.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ray_kd import schema, storage
from ray_kd.data.manifest import Manifest, PreparedFile
from ray_kd.errors import DataError, RetryableError

ROWS_PER_GROUP = 256
GROUPS_PER_FILE = 64
ROWS_PER_FILE = ROWS_PER_GROUP * GROUPS_PER_FILE
GROUPS_KEPT = 4

NUM_TARGET_BYTES = "num_target_bytes"  # int32: UTF-8 bytes of the row's target tokens, for bits per byte

Split = Literal["train", "eval"]

K = TypeVar("K")
V = TypeVar("V")


def arrow_schema(sequence_length: int) -> pa.Schema:
    """Columns of a prepared file: row_id int64, three int32 [T] lists of fixed size, two int32 numbers."""
    tokens = pa.list_(pa.field("element", pa.int32(), nullable=False), sequence_length)
    return pa.schema(
        [
            pa.field(schema.ROW_ID, pa.int64(), nullable=False),
            pa.field(schema.INPUT_IDS, tokens, nullable=False),
            pa.field(schema.LABELS, tokens, nullable=False),
            pa.field(schema.POSITION_IDS, tokens, nullable=False),
            pa.field(schema.ROUTE, pa.int32(), nullable=False),
            pa.field(NUM_TARGET_BYTES, pa.int32(), nullable=False),
        ]
    )


class PreparedData:
    """A folder of prepared data, open for reading. Pickles as its path; raises DataError without a manifest.

    Of a folder in an object store, each file is copied to this node when a row of it is first asked for.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = storage.path(folder)
        self.manifest = Manifest.read(self.folder)
        self._files: OrderedDict[str, pq.ParquetFile] = OrderedDict()
        self._groups: OrderedDict[tuple[str, int], pa.Table] = OrderedDict()

    def __reduce__(self) -> tuple[type["PreparedData"], tuple[str]]:
        return PreparedData, (str(self.folder),)

    @property
    def num_rows(self) -> int:
        """Training rows."""
        return self.manifest.num_rows

    def read_rows(self, row_ids: NDArray[np.integer], split: Split = "train") -> pa.Table:
        """The rows with these ids, in this order (repeats allowed), as a table of `arrow_schema(T)`.

        row_ids: int [n], each in [0, rows of the split). Raises IndexError outside.
        """
        ids = np.asarray(row_ids, dtype=np.int64)
        files = self._split_files(split)
        ends = np.cumsum([file.rows for file in files], dtype=np.int64)
        num_rows = int(ends[-1]) if files else 0
        if ids.size and (ids.min() < 0 or ids.max() >= num_rows):
            raise IndexError(f"row ids {ids.min()}..{ids.max()} asked of {num_rows} {split} rows")
        if not ids.size:
            return arrow_schema(self.manifest.sequence_length).empty_table()
        file_of = np.searchsorted(ends, ids, side="right")
        in_file = ids - (ends - [file.rows for file in files])[file_of]
        group_of = in_file // ROWS_PER_GROUP
        by_group = np.lexsort((group_of, file_of))
        starts = np.flatnonzero(np.diff(file_of[by_group], prepend=-1) | np.diff(group_of[by_group], prepend=-1))
        pieces = []
        for members in np.split(by_group, starts[1:]):
            group = self._group(files[file_of[members[0]]].name, int(group_of[members[0]]))
            pieces.append(group.take(pa.array(in_file[members] % ROWS_PER_GROUP)))
        if np.array_equal(by_group, np.arange(ids.size)):
            return pa.concat_tables(pieces)
        return pa.concat_tables(pieces).take(pa.array(np.argsort(by_group)))

    def routes(self) -> NDArray[np.int32]:
        """[training rows]: the route of each, by row_id."""
        if not self.manifest.routes:
            return np.zeros(self.num_rows, np.int32)
        columns = [pq.read_table(self._local(file.name), columns=[schema.ROUTE]) for file in self.manifest.files]
        return schema.to_numpy(pa.concat_tables(columns))[schema.ROUTE]

    def read_eval(self, max_rows: int = 0) -> dict[str, NDArray[np.integer]]:
        """The first max_rows eval rows (0: all) as arrays: int32 [n, T], numbers [n]; n = 0 without eval data.

        They are shuffled, so any prefix is a random sample.
        """
        num_rows = self.manifest.eval_rows
        if not num_rows:
            return {name: values[:0] for name, values in schema.to_numpy(self.read_rows(np.zeros(1, int))).items()}
        wanted = min(max_rows, num_rows) if max_rows else num_rows
        return schema.to_numpy(self.read_rows(np.arange(wanted), split="eval"))

    def verify(self) -> None:
        """Read every file and compare its sha256 with the manifest. Raises DataError naming the file."""
        for file in [*self.manifest.files, *self.manifest.eval_files]:
            path = self.folder / file.name
            if not path.exists() or path.is_symlink() or sha256_of(path) != file.sha256:
                raise DataError(f"prepared file '{path}' is not what its manifest says: remove '{self.folder}'")

    def _split_files(self, split: Split) -> list[PreparedFile]:
        if split not in ("train", "eval"):
            raise ValueError(f"split '{split}' is not train or eval")
        return self.manifest.files if split == "train" else self.manifest.eval_files

    def _group(self, name: str, index: int) -> pa.Table:
        def read() -> pa.Table:
            try:
                opened = _remember(self._files, name, lambda: pq.ParquetFile(self._local(name)))
                return opened.read_row_group(index)
            except pa.ArrowException as error:
                reason = " ".join(str(error).split())[:200]
                raise DataError(
                    f"prepared file '{self.folder / name}' cannot be read ({reason}): remove '{self.folder}'"
                ) from error

        return _remember(self._groups, (name, index), read)

    def _local(self, name: str) -> Path:
        """A file where it can be mapped; what comes from a store is compared with the manifest."""
        if not storage.is_remote(self.folder):
            if (self.folder / name).is_symlink():
                raise DataError(f"prepared file '{self.folder / name}' is a link: remove '{self.folder}'")
            return self.folder / name
        (file,) = (file for file in [*self.manifest.files, *self.manifest.eval_files] if file.name == name)

        def check(copy: Path) -> None:
            if sha256_of(copy) != file.sha256:
                raise RetryableError(f"prepared file '{self.folder / name}' did not arrive as its manifest says")

        return storage.fetch(self.folder / name, version=file.sha256, check=check)


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remember(kept: "OrderedDict[K, V]", key: K, make: Callable[[], V]) -> V:
    if key in kept:
        kept.move_to_end(key)
        return kept[key]
    kept[key] = make()
    if len(kept) > GROUPS_KEPT:
        kept.popitem(last=False)
    return kept[key]
