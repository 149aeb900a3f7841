"""The teacher's answers kept in a folder: Parquet files and a manifest, for later epochs and later runs.

    <teacher.cache.path>/<fingerprint of the prepared data, 16 digits>/
        manifest.json            whose answers these are, to what: `Contents`
        rows-*.parquet           row_id int64, payload binary; a file is put there whole and never changed
        damaged/                 files that could not be read back, set aside

A payload is kept as the bytes that were sent, so a row read from the cache is the row that was computed. Files may
overlap, and several runs may write at once: any file that has a row will do. Who was killed leaves whole files, or a
partial one that nobody looks at. On a disk that all nodes share, not in an object store.

Costs: 8 bytes of memory a prepared row in each process; a look-up reads one row group, of a row or as many as make
64 KB. Checked when read: a CRC-32 of each page (by Parquet) and of each payload (`payloads/_frame.py`).
"""

import hashlib
import io
import json
import logging
import os
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ray_kd import schema, storage
from ray_kd.errors import ConfigError, DataError
from ray_kd.payloads import FEATURES, HIDDEN_STATES, TOPK_LOGPROBS, Features, FeatureSpec, HiddenStates, TopKLogprobs
from ray_kd.teacher.engine import SAMPLE, Request

logger = logging.getLogger(__name__)

DISABLED, READ, WRITE_THROUGH = "disabled", "read", "write_through"
MODES = (DISABLED, WRITE_THROUGH, READ)

VERSION = 1
"""Of the folder. The payloads in it say theirs."""

MANIFEST_NAME = "manifest.json"
_PREFIX = "rows-"
_DAMAGED = "damaged"
_CONTENTS = "ray_kd.contents"
_LEFTOVER_S = 3600.0
_PAYLOAD = "payload"
_SCHEMA = pa.schema([pa.field(schema.ROW_ID, pa.int64(), nullable=False), pa.field(_PAYLOAD, pa.binary(), False)])
_GROUP_NBYTES = 2**16
_FILES_OPEN = 64
_REFRESH_SHARE = 0.05
"""Of the time at most goes to looking for the files of others."""
_MERGED_NBYTES = 64 * 2**20
_PAYLOADS: dict[str, type[TopKLogprobs] | type[HiddenStates] | type[Features]] = {
    TOPK_LOGPROBS: TopKLogprobs,
    HIDDEN_STATES: HiddenStates,
    FEATURES: Features,
}


@dataclass(frozen=True)
class Contents:
    """Whose answers to what a cache holds."""

    data: str
    """Fingerprint of the prepared data, which row_ids are of."""
    num_rows: int
    """Training rows of the prepared data; a cache may have the answers to some of them."""
    tokenizer: str
    model: str
    """The teacher as it was named, for people."""
    revision: str | None
    teacher: str
    """Identity of the teacher's weights."""
    dtype: str
    engine: str
    """What computes the answers, and where: JSON."""
    wire: str
    """How they are encoded."""
    payload: str
    """Kind, as the fields below of a `Request`; those that say nothing of the kind are None."""
    top_k: int | None
    temperature: float | None
    selection: str | None
    seed: int | None
    features: str | None = None
    """Of kind features: which, as `FeatureSpec.to_json` writes them."""
    vocab_size: int | None = None
    """Of the distributions, where it is not the model's."""
    version: int = VERSION

    @classmethod
    def of(
        cls, request: Request, *, data: str, num_rows: int, tokenizer: str, model: str, revision: str | None,
        teacher: str, dtype: str, engine: str, wire: str,
    ) -> "Contents":  # fmt: skip
        """Of the answers to this request."""
        is_topk = request.kind != HIDDEN_STATES
        return cls(
            data, num_rows, tokenizer, model, revision, teacher, dtype, engine, wire, request.kind,
            top_k=request.top_k if is_topk else None,
            temperature=request.temperature if is_topk else None,
            selection=request.selection if is_topk else None,
            seed=request.seed if is_topk and request.selection == SAMPLE else None,
            features=None if request.features is None else request.features.to_json(),
            vocab_size=request.vocab_size if is_topk else None,
        )  # fmt: skip

    @property
    def digest(self) -> str:
        """Stands in every file, so that none is read beside another manifest. The teacher's name is not part of it."""
        named = asdict(self) | {"model": None}
        for younger in ("features", "vocab_size"):  # caches that are older than these stay what they are
            if named[younger] is None:
                del named[younger]
        return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:32]

    @property
    def request(self) -> Request:
        """What the teacher was asked."""
        known: dict[str, Any] = {
            "top_k": self.top_k,
            "temperature": self.temperature,
            "selection": self.selection,
            "seed": self.seed,
            "vocab_size": self.vocab_size,
            "features": None if self.features is None else FeatureSpec.from_json(self.features),
        }
        return Request(self.payload, **{name: value for name, value in known.items() if value is not None})

    def mismatch(self, asked: "Contents", any_temperature: bool) -> str | None:
        """Why answers like these cannot stand for those that are asked for; None when they can.

        A larger K is cut down, but not of draws, nor beside features. any_temperature: whether the loss can use one
        that is not its own.
        """
        if self.version != asked.version:
            return f"it is of version {self.version}, this code reads {asked.version}"
        if self.teacher != asked.teacher:
            return (
                f"its answers are of another teacher: {_named(self.model, self.revision, self.teacher)}, "
                f"not {_named(asked.model, asked.revision, asked.teacher)}"
            )
        for name in (
            "tokenizer",
            "data",
            "num_rows",
            "dtype",
            "engine",
            "wire",
            "payload",
            "selection",
            "seed",
            "features",
            "vocab_size",
        ):
            held, wanted = getattr(self, name), getattr(asked, name)
            if held != wanted:
                return f"its {name} is {held}, not {wanted}"
        if self.temperature != asked.temperature and not any_temperature:
            return (
                f"its temperature is {self.temperature:g} and loss.temperature {asked.temperature:g}, which only "
                "loss.tail=renormalize could use"
            )
        if self.top_k is not None and asked.top_k is not None and self.top_k != asked.top_k:
            if self.selection == SAMPLE:
                return f"its answers are {self.top_k} draws, which cannot be made {asked.top_k}"
            if self.payload == FEATURES:
                return f"its answers have K = {self.top_k} tokens, not teacher.top_k={asked.top_k}"
            if self.top_k < asked.top_k:
                return f"its answers have K = {self.top_k} tokens, less than teacher.top_k={asked.top_k}"
        return None


def _named(model: str, revision: str | None, identity: str) -> str:
    return f"'{model}'{f' at {revision}' if revision else ''} (weights {identity[:12]})"


def open_cache(path: Path, asked: Contents, mode: str, any_temperature: bool) -> "Cache":
    """The cache for these answers below path, made if it is to be written and not there.

    Raises ConfigError naming what differs when the one that is there holds other answers, or, for mode read, when
    there is none.
    """
    folder = path / asked.data[:16]
    manifest = folder / MANIFEST_NAME
    if not manifest.exists():
        if mode == READ:
            raise ConfigError(f"teacher.cache.path '{path}' {_missing(path, asked)}: fill one with cache_teacher")
        folder.mkdir(parents=True, exist_ok=True)
        storage.create_text(manifest, json.dumps(asdict(asked), indent=1) + "\n")  # one of those who start at once
    if mode == WRITE_THROUGH:
        _sweep(folder)
    held = _read(manifest)
    if (problem := held.mismatch(asked, any_temperature)) is not None:
        raise ConfigError(f"teacher.cache '{folder}' does not fit: {problem}; set another teacher.cache.path")
    return Cache(folder, is_written=mode == WRITE_THROUGH)


def _sweep(folder: Path) -> None:
    """Remove what writers that were killed an hour ago or more left half written."""
    for leftover in folder.glob(f".{_PREFIX}*.tmp"):
        with suppress(FileNotFoundError):
            if time.time() - leftover.stat().st_mtime > _LEFTOVER_S:
                leftover.unlink()


def _missing(path: Path, asked: Contents) -> str:
    """What a path holds where there is no cache of this data."""
    others = [child / MANIFEST_NAME for child in storage.children(path) if (child / MANIFEST_NAME).exists()]
    tokenizers = {_read(other).tokenizer for other in others}
    if not others:
        return "holds no cache"
    if asked.tokenizer not in tokenizers:
        return f"holds answers for another tokenizer ({', '.join(sorted(t[:12] for t in tokenizers))})"
    return f"holds answers to other prepared data ({', '.join(other.parent.name for other in others[:3])})"


def _read(manifest: Path) -> Contents:
    try:
        content = json.loads(storage.read_text(manifest))
        return Contents(**content)
    except FileNotFoundError as error:
        raise ConfigError(f"'{manifest}' is not there on {os.uname().nodename}: all nodes need that folder") from error
    except (ValueError, TypeError) as error:
        names = ", ".join(field.name for field in fields(Contents))
        raise ConfigError(f"'{manifest}' is no manifest of a teacher cache ({error}); it needs {names}") from error


class Cache:
    """An open cache. Pickles as its folder, and a process that unpickles it several times has it once.

    Raises ConfigError when the manifest cannot be read.
    """

    def __init__(self, folder: Path, is_written: bool) -> None:
        self.folder, self.is_written = folder, is_written
        self.contents = _read(folder / MANIFEST_NAME)
        self._numbers: dict[str, int] = {}
        self._names: list[str] = []
        self._file_of = np.full(self.contents.num_rows, -1, dtype=np.int32)
        self._place_of = np.zeros(self.contents.num_rows, dtype=np.int32)
        self._unusable: set[str] = set()
        self._open: OrderedDict[str, pq.ParquetFile] = OrderedDict()
        self._next_refresh = 0.0
        self._is_stale = False
        self._schema = _SCHEMA.with_metadata({_CONTENTS: self.contents.digest})
        self.refresh()

    def __reduce__(self) -> tuple[Callable[[Path, bool], "Cache"], tuple[Path, bool]]:
        return _of_this_process, (self.folder, self.is_written)

    @property
    def is_empty(self) -> bool:
        """Whether it has the answer to no row, as far as was looked."""
        return not self._numbers

    def has(self, row_ids: NDArray[np.integer]) -> NDArray[np.bool_]:
        """bool [n]: the rows whose answers are there, as far as was looked."""
        return self._file_of[row_ids] >= 0

    def read(self, row_ids: Sequence[int]) -> list[bytes | None]:
        """The payload of each row, in order; None where there is none that can be read."""
        payloads = [self._read_row(row_id) for row_id in row_ids]
        if None in payloads and (self._is_stale or time.monotonic() >= self._next_refresh):
            self.refresh()
            payloads = [p or self._read_row(row_id) for p, row_id in zip(payloads, row_ids, strict=True)]
        return payloads

    def add(self, row_ids: Sequence[int], payloads: Sequence[bytes], name: str | None = None) -> None:
        """Keep the answers to some rows. name: of the file, for one who writes the same rows again after a kill."""
        table = pa.table([pa.array(row_ids, pa.int64()), pa.array(payloads, pa.binary())], schema=self._schema)
        self._write(name or uuid.uuid4().hex, table)

    def refresh(self) -> None:
        """Look for files that others have written or removed."""
        start = time.monotonic()
        self._is_stale = True
        while self._is_stale:  # again when files went meanwhile: another's merge, whose new file was not listed yet
            self._is_stale = False
            present = {child.name for child in self.folder.iterdir() if child.name.startswith(_PREFIX)}
            self._forget(self._numbers.keys() - present)
            for name in sorted(present - self._numbers.keys() - self._unusable):
                with self._setting_aside(name):
                    self._index(name, self._row_ids(name))
        now = time.monotonic()
        self._next_refresh = now + (now - start) / _REFRESH_SHARE

    def merge(self) -> None:
        """Make few large files of many small ones, for whoever reads next; others may go on reading and writing."""
        self.refresh()
        batch: list[str] = []
        size = 0
        for name in sorted(self._numbers):
            try:
                nbytes = (self.folder / name).stat().st_size
            except FileNotFoundError:  # another merges too
                continue
            if nbytes >= _MERGED_NBYTES / 2:
                continue
            batch.append(name)
            size += nbytes
            if size >= _MERGED_NBYTES:
                self._merge(batch)
                batch, size = [], 0
        if len(batch) > 1:
            self._merge(batch)

    def _merge(self, names: list[str]) -> None:
        tables = []
        for name in names:
            with self._setting_aside(name):
                tables.append(self._opened(name).read())
        if not tables:
            return
        table = pa.concat_tables(tables).sort_by(schema.ROW_ID)
        is_first = np.diff(table.column(schema.ROW_ID).to_numpy(), prepend=-1) != 0
        self._write(uuid.uuid4().hex, table.filter(pa.array(is_first)))
        self._forget(names)
        for name in names:
            (self.folder / name).unlink(missing_ok=True)

    def _row_ids(self, name: str) -> NDArray[np.int64]:
        row_ids: NDArray[np.int64] = self._opened(name).read([schema.ROW_ID]).column(0).to_numpy()
        if row_ids.size and not 0 <= row_ids.min() <= row_ids.max() < len(self._file_of):
            raise DataError(f"it has rows {row_ids.min()} to {row_ids.max()} of {len(self._file_of)}")
        return row_ids

    def _read_row(self, row_id: int) -> bytes | None:
        while (number := self._file_of[row_id]) >= 0:
            name = self._names[number]
            with self._setting_aside(name):
                file, place = self._opened(name), int(self._place_of[row_id])
                group, place = divmod(place, file.metadata.row_group(0).num_rows)
                row = file.read_row_group(group).slice(place, 1).to_pylist()
                if [found[schema.ROW_ID] for found in row] != [row_id]:
                    raise DataError(f"row {row_id} is not where it was")
                _PAYLOADS[self.contents.payload].decode(row[0][_PAYLOAD])
                return bytes(row[0][_PAYLOAD])
        return None

    @contextmanager
    def _setting_aside(self, name: str) -> Iterator[None]:
        """A file that is not what was written is out of the index afterwards: merged by another, or damaged.

        A damaged one is moved out of the way by those who may write here. What the machine lacks (memory, file
        descriptors, rights) is no damage and raises.
        """
        try:
            yield
        except FileNotFoundError:
            self._forget([name])
            self._is_stale = True
        except (pa.ArrowException, OSError, LookupError, ValueError, DataError) as error:
            # Parquet's own complaints are OSErrors too, but carry no number.
            if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None):
                raise
            self._forget([name])
            self._unusable.add(name)
            reason = " ".join(str(error).split())[:200]
            logger.warning("teacher cache: '%s' is damaged and left out: %s", self.folder / name, reason)
            if self.is_written:
                (self.folder / _DAMAGED).mkdir(exist_ok=True)
                with suppress(FileNotFoundError):  # another has moved it
                    (self.folder / name).replace(self.folder / _DAMAGED / name)

    def _write(self, name: str, table: pa.Table) -> None:
        """Put a file and know its rows."""
        buffer = io.BytesIO()
        rows_per_group = max(1, _GROUP_NBYTES * len(table) // max(1, table.nbytes))
        pq.write_table(
            table, buffer, compression="none", use_dictionary=False, write_statistics=False, write_page_checksum=True,
            row_group_size=rows_per_group,
        )  # fmt: skip
        name = f"{_PREFIX}{name}.parquet"
        storage.write_bytes(self.folder / name, buffer.getbuffer())
        self._unusable.discard(name)  # where one of that name was damaged
        self._index(name, table.column(schema.ROW_ID).to_numpy())

    def _opened(self, name: str) -> pq.ParquetFile:
        if name not in self._open:
            if (self.folder / name).is_symlink():
                raise DataError("it is a link")
            file = pq.ParquetFile(self.folder / name, page_checksum_verification=True, pre_buffer=False)
            if not file.schema_arrow.equals(self._schema, check_metadata=True):
                raise DataError("its columns, or whose answers it says it has, are not those of this cache")
            self._open[name] = file
            if len(self._open) > _FILES_OPEN:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(name)
        return self._open[name]

    def _index(self, name: str, row_ids: NDArray[np.integer]) -> None:
        self._numbers[name] = len(self._names)
        self._file_of[row_ids] = len(self._names)
        self._place_of[row_ids] = np.arange(len(row_ids))
        self._names.append(name)

    def _forget(self, names: Iterable[str]) -> None:
        numbers = []
        for name in list(names):
            if (opened := self._open.pop(name, None)) is not None:
                opened.close()
            if (number := self._numbers.pop(name, None)) is not None:
                numbers.append(number)
        if numbers:
            self._file_of[np.isin(self._file_of, numbers)] = -1


@lru_cache(maxsize=8)
def _opened_here(folder: Path, is_written: bool) -> Cache:
    return Cache(folder, is_written)


def _of_this_process(folder: Path, is_written: bool) -> Cache:
    cache = _opened_here(folder, is_written)
    cache.refresh()
    return cache


def cut(payload: bytes, top_k: int, wire: str) -> bytes:
    """The payload of top-k log-probabilities with its most likely top_k alone; as it is when it has no more."""
    whole = TopKLogprobs.decode(payload)
    if whole.ids.shape[1] <= top_k:
        return payload
    order = np.argsort(-whole.logprobs, axis=-1, kind="stable")[:, :top_k]
    ids, logprobs = (np.take_along_axis(values, order, axis=-1) for values in (whole.ids, whole.logprobs))
    return TopKLogprobs(ids, logprobs, whole.temperature, whole.vocab_size).encode(wire)
