"""What a folder of prepared data holds: the manifest, written last, and its summary in words."""

import dataclasses
import json
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_kd import storage
from ray_kd.errors import DataError

MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True)
class PreparedFile:
    """One Parquet file of the prepared data."""

    name: str
    rows: int
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Counts and files of the prepared data. Token and byte counts are of the rows on disk, padding excluded."""

    fingerprint: str
    """sha256 over everything that determines the data."""
    schema_version: int
    sequence_length: int
    """T, tokens in a row."""
    num_rows: int
    """Training rows, row_id 0 .. num_rows - 1."""
    eval_rows: int
    """Held-out rows, numbered from 0 on their own."""
    files: list[PreparedFile]
    """Training files in row order."""
    eval_files: list[PreparedFile]
    routes: list[str]
    """Values of data.route_by in the rows, train or eval, sorted: a row's `route` is an index. Empty without it."""
    route_rows: list[int]
    """Training rows of each route: 0 where only eval rows have it."""
    num_tokens: int
    """Non-padding input tokens of the training rows, the repeated ones of split documents included."""
    target_tokens: int
    """Target positions of the training rows."""
    target_bytes: int
    """UTF-8 bytes of the text of the training targets; special tokens count none."""
    eval_tokens: int
    eval_target_tokens: int
    eval_bytes: int
    """UTF-8 bytes of the text of the eval targets: the sum of the rows' num_target_bytes."""
    max_targets_per_row: int
    """Most target positions in any row, train or eval: bounds a row's payload."""
    packing_efficiency: float
    """num_tokens / (num_rows x T)."""
    records_read: int
    """Records of source and eval_source, the quarantined ones included, blank lines not."""
    quarantined: int
    bad_fraction: float
    """quarantined / records_read."""
    documents: int
    """Documents trained on."""
    eval_documents: int
    split_documents: int
    """Documents longer than T, cut into pieces."""
    repeated_tokens: int
    """Tokens that stand in two pieces: the last of one opens the next, so that no target is lost to a cut."""
    dropped_tokens: int
    """Tokens of pieces without any target, which are not kept."""
    duplicates: int
    """Documents whose text (case, punctuation and spacing aside) occurred before; they are kept."""
    near_duplicates_train_eval: int
    """Eval documents whose trained text is about that of a training document (found by min-hash, so not every one)."""

    def to_json(self) -> str:
        """The manifest as an indented JSON object."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Inverse of `to_json`. Raises ValueError for text that is not a manifest of this version."""
        try:
            content: dict[str, Any] = json.loads(text)
            for key in ("files", "eval_files"):
                content[key] = [PreparedFile(**entry) for entry in content[key]]
                for file in content[key]:
                    if not storage.is_inside(file.name) or "/" in file.name:
                        raise ValueError(f"{file.name!a} is no name of a file in its folder")
            return cls(**content)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not a manifest of prepared data: {error}") from error

    @classmethod
    def read(cls, folder: str | Path) -> "Manifest":
        """The manifest of a folder. Raises DataError when there is none or it cannot be read."""
        path = storage.path(folder) / MANIFEST_NAME
        try:
            return cls.from_json(storage.read_text(path))
        except (OSError, ValueError) as error:
            if storage.is_remote(path) and isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
                raise  # the store failed, which says nothing about the data
            raise DataError(f"prepared data '{folder}' has no readable {MANIFEST_NAME}: {error}") from error


def is_intact(folder: str | Path, fingerprint: str) -> bool:
    """Whether a folder holds complete prepared data of this fingerprint: manifest there, every file of its size.

    Reads no data, so a run starts at once; `PreparedData.verify` reads every byte.
    """
    try:
        manifest = Manifest.read(folder)
    except DataError:
        return False
    wanted = {file.name: file.nbytes for file in [*manifest.files, *manifest.eval_files]}
    root = storage.path(folder)
    if storage.is_remote(root):
        present = storage.sizes(root)
    else:
        present = {name: (root / name).stat().st_size for name in wanted if _is_plain(root / name)}
    return manifest.fingerprint == fingerprint and all(present.get(name) == nbytes for name, nbytes in wanted.items())


def _is_plain(path: Path) -> bool:
    """A link is none: its bytes would lie elsewhere."""
    return path.is_file() and not path.is_symlink()


def report(manifest: Manifest) -> str:
    """Two to five lines for people: rows and tokens, what happened to documents, what to look at."""
    m = manifest
    lines = [
        f"prepared data {m.fingerprint[:16]}: {m.num_rows:,} rows of {m.sequence_length} tokens, "
        f"{m.num_tokens:,} tokens, {m.target_tokens:,} targets, packing efficiency {m.packing_efficiency:.1%}",
        f"documents: {m.documents:,} train, {m.split_documents:,} split, {m.dropped_tokens:,} tokens dropped; "
        f"{m.quarantined:,} of {m.records_read:,} records quarantined ({m.bad_fraction:.2%})",
    ]
    if m.routes:
        rows = ", ".join(f"{route} {count:,} rows" for route, count in zip(m.routes, m.route_rows, strict=True))
        # One line whatever the values are: a column that was taken by mistake may have thousands, or long texts.
        lines.append(textwrap.shorten(f"routes: {rows}", 300, placeholder=" ..."))
    if m.eval_rows:
        lines.append(f"eval: {m.eval_documents:,} documents, {m.eval_rows:,} rows, {m.eval_target_tokens:,} targets")
    if m.duplicates or m.near_duplicates_train_eval:
        lines.append(
            f"duplicates: {m.duplicates:,} documents repeat an earlier one (kept), "
            f"{m.near_duplicates_train_eval:,} eval documents resemble a training document"
        )
    return "\n".join(lines)
