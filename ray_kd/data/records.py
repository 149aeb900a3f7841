"""The small records that pass between source, format and packing."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_EXCERPT = 200


@dataclass(frozen=True)
class Record:
    """One record of a source: its fields and where it stands (line counts from 1; a row number in tables)."""

    data: dict[str, Any]
    file: str
    line: int


@dataclass(frozen=True)
class BadRecord:
    """One record that is not trained: where it stands, why in one short line, and its beginning (<= 200 characters)."""

    file: str
    line: int
    reason: str
    excerpt: str


@dataclass(frozen=True)
class Segment:
    """A stretch of a document's text; the tokens of trained segments are the labels."""

    text: str
    is_trained: bool


@dataclass(frozen=True)
class Document:
    """One tokenised document of L tokens; a piece of a split document has the same form."""

    input_ids: NDArray[np.int32]
    """[L]"""
    is_trained: NDArray[np.bool_]
    """[L]: the token is a label."""
    nbytes: NDArray[np.int32]
    """[L]: UTF-8 bytes of the text that each token adds; special tokens add none."""


def excerpt(text: str) -> str:
    """The beginning of a text on one line, for quarantine.jsonl."""
    return " ".join(text[: 2 * MAX_EXCERPT].split())[:MAX_EXCERPT]
