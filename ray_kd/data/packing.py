"""Documents -> rows of exactly T tokens.

Best fit, longest document first: each document goes to the row whose free space it fills best. Deterministic, and
rows of short documents come out above 99 % full. Documents longer than T are cut; the last token of a piece opens the
next one, so that it can predict what follows and no target is lost to a cut. Cost: O(n log n) for n documents.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ray_kd.data.records import Document
from ray_kd.schema import IGNORED_LABEL


@dataclass(frozen=True)
class Cut:
    """Documents cut to at most T tokens, and what that cost."""

    pieces: list[Document]
    split_documents: int
    repeated_tokens: int
    """Tokens that stand in two kept pieces."""
    dropped_tokens: int
    """Tokens that stand in no kept piece: pieces without any target are not kept."""


@dataclass(frozen=True)
class Rows:
    """Packed rows."""

    input_ids: NDArray[np.int32]
    """[n, T]"""
    labels: NDArray[np.int32]
    """[n, T], unshifted; -100 where nothing is trained."""
    position_ids: NDArray[np.int32]
    """[n, T], from 0 in each document and in the padding."""
    num_target_bytes: NDArray[np.int32]
    """[n]: UTF-8 bytes of the text of the row's target tokens."""


def has_target(document: Document) -> bool:
    """Whether any token but the first is trained: the first has nothing to be predicted from."""
    return bool(document.is_trained[1:].any())


def cut(documents: Sequence[Document], length: int) -> Cut:
    """Documents as pieces of at most `length` >= 2 tokens; the documents themselves must have a target."""
    pieces: list[Document] = []
    split = repeated = dropped = 0
    for document in documents:
        num_tokens = len(document.input_ids)
        if num_tokens <= length:
            pieces.append(document)
            continue
        split += 1
        was_kept = False
        for start in range(0, num_tokens - 1, length - 1):
            piece = _piece(document, start, min(start + length, num_tokens))
            is_kept = has_target(piece)
            if is_kept:
                pieces.append(piece)
                repeated += was_kept
                # The first token was counted with the piece before, which was not kept: it stands here now.
                dropped -= bool(start) and not was_kept
            else:
                dropped += len(piece.input_ids) - bool(start)
            was_kept = is_kept
    return Cut(pieces, split, repeated, dropped)


def pack(documents: Sequence[Document], length: int, pad_id: int) -> Rows:
    """Documents of 2 to `length` tokens, each with a target, into as few rows of `length` tokens as best fit finds."""
    rows = _assign([len(document.input_ids) for document in documents], length)
    input_ids = np.full((len(rows), length), pad_id, dtype=np.int32)
    labels = np.full((len(rows), length), IGNORED_LABEL, dtype=np.int32)
    position_ids = np.zeros((len(rows), length), dtype=np.int32)
    num_target_bytes = np.zeros(len(rows), dtype=np.int32)
    for row, members in enumerate(rows):
        start = 0
        for document in (documents[index] for index in members):
            stop = start + len(document.input_ids)
            input_ids[row, start:stop] = document.input_ids
            labels[row, start:stop] = np.where(document.is_trained, document.input_ids, IGNORED_LABEL)
            position_ids[row, start:stop] = np.arange(stop - start)
            num_target_bytes[row] += int(document.nbytes[1:][document.is_trained[1:]].sum())
            start = stop
        position_ids[row, start:] = np.arange(length - start)
    return Rows(input_ids, labels, position_ids, num_target_bytes)


def _piece(document: Document, start: int, stop: int) -> Document:
    is_trained = document.is_trained[start:stop].copy()
    if start:
        is_trained[0] = False  # it was the target of the piece before
    return Document(document.input_ids[start:stop], is_trained, document.nbytes[start:stop])


def _assign(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Which documents share a row: best fit in order of decreasing length, ties in the order given."""
    rows: list[list[int]] = []
    rows_with_space: dict[int, list[int]] = {}
    spaces: list[int] = []  # the keys of rows_with_space, sorted
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect.bisect_left(spaces, lengths[index])
        if place == len(spaces):
            row, space = len(rows), capacity
            rows.append([])
        else:
            space = spaces[place]
            row = rows_with_space[space].pop()
            if not rows_with_space[space]:
                del rows_with_space[space], spaces[place]
        rows[row].append(index)
        left = space - lengths[index]
        if left not in rows_with_space:
            bisect.insort(spaces, left)
        rows_with_space.setdefault(left, []).append(row)
    return rows
