"""Rows as the documents packed into them, for engines that answer one prompt at a time (vLLM, HTTP servers).

Comes in: packed rows. Goes out: a prompt for each document with something to predict, and, of the answers to these,
one payload a row. A server knows no packing, so each document is a prompt of its own: attention never crosses them.

B rows of T tokens, m targets of a document, K top-k.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ray_kd import schema
from ray_kd.payloads import TopKLogprobs
from ray_kd.teacher.engine import Request, RowError, Rows, not_finite, rows_in


@dataclass(frozen=True, eq=False)
class Document:
    """One prompt and the places in it that are asked for."""

    row: int
    """Its row's place among the rows."""
    prompt: NDArray[np.int32]
    """Token ids from the document's start to the token that its last target predicts: the answer at a position is what
    a server reports for the token after it, so that token has to be there."""
    targets: NDArray[np.int64]
    """[m] ascending positions in the prompt whose next token is predicted."""


@dataclass(frozen=True, eq=False)
class DocumentAnswer:
    """The K likeliest tokens at the targets of one document, most likely first."""

    ids: NDArray[np.int64]
    """[m, K]."""
    logprobs: NDArray[np.float32]
    """[m, K], over the full vocabulary."""


def documents(rows: Rows) -> list[Document]:
    """The documents with at least one target, in order of row and position."""
    return list(_documents(rows))


def payloads(
    rows: Rows,
    asked: Sequence[Document],
    answers: Sequence[DocumentAnswer | RowError],
    request: Request,
    vocab_size: int,
) -> list[TopKLogprobs | RowError]:
    """One payload a row at temperature 1, in order; a row is a RowError when one of its documents is.

    answers: one for each of `asked`, over the model's whole vocabulary of vocab_size ids. NaN, +inf and an id outside
    it make a RowError of the row. Where the request is for the distribution over fewer ids, the others among the K
    become empty slots and their mass goes to all that is left, in proportion; what of it is not among the K is not
    known, and stays in the tail.
    """
    top_k = request.top_k
    parts: list[list[DocumentAnswer]] = [[] for _ in range(rows_in(rows))]
    errors: dict[int, RowError] = {}
    for document, answer in zip(asked, answers, strict=True):
        problem = answer if isinstance(answer, RowError) else _problem(document, answer, top_k, vocab_size)
        if problem is not None:
            errors.setdefault(document.row, problem)
        elif isinstance(answer, DocumentAnswer):
            parts[document.row].append(answer)
    found: list[TopKLogprobs | RowError] = []
    for row, own in enumerate(parts):
        ids = np.concatenate([np.empty((0, top_k), np.int64), *(part.ids for part in own)])
        logprobs = np.concatenate([np.empty((0, top_k), np.float32), *(part.logprobs for part in own)])
        found.append(errors.get(row) or _over(request.vocab_size or vocab_size, ids, logprobs.astype(np.float32)))
    return found


def _over(vocab_size: int, ids: NDArray[np.int64], logprobs: NDArray[np.float32]) -> TopKLogprobs | RowError:
    """The payload over the first ids, given the likeliest [M, K] of all of them; empty slots come last."""
    is_outside = ids >= vocab_size
    if is_outside.any():
        mass = np.exp(logprobs.astype(np.float64))
        named = np.where(is_outside, 0.0, mass).sum(axis=1, keepdims=True)
        if not named.all():
            return RowError(f"the teacher names ids from {vocab_size} on alone, which are of no token")
        # Where the mass outside is nearly all, one minus it is rounding, and less than what is named inside.
        inside = np.maximum(1.0 - np.where(is_outside, mass, 0.0).sum(axis=1, keepdims=True), named)
        wide = np.where(is_outside, -np.inf, logprobs - np.log(inside))
        order = np.argsort(-wide, axis=1, kind="stable")
        ids = np.take_along_axis(np.where(is_outside, -1, ids), order, axis=1)
        logprobs = np.take_along_axis(wide, order, axis=1).astype(np.float32)
    return TopKLogprobs(ids, logprobs, 1.0, vocab_size)


def _documents(rows: Rows) -> Iterator[Document]:
    labels, positions = np.asarray(rows[schema.LABELS]), np.asarray(rows[schema.POSITION_IDS])
    is_target = schema.target_positions(labels, positions)
    for row, ids in enumerate(np.asarray(rows[schema.INPUT_IDS])):
        starts = np.flatnonzero(np.diff(positions[row], prepend=-2) != 1)
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            targets = np.flatnonzero(is_target[row, start:end])
            if len(targets):
                yield Document(row, ids[start : start + targets[-1] + 2], targets)


def _problem(document: Document, answer: DocumentAnswer, top_k: int, vocab_size: int) -> RowError | None:
    """Why the answer to a document cannot be used."""
    shape = (len(document.targets), top_k)
    if answer.ids.shape != shape or answer.logprobs.shape != shape:
        return RowError(f"the teacher answered {answer.ids.shape} ids and {answer.logprobs.shape} values, not {shape}")
    if (broken := not_finite(answer.logprobs)) is not None:
        return broken
    if answer.ids.size and not 0 <= answer.ids.min() <= answer.ids.max() < vocab_size:
        return RowError(f"the teacher answered token {answer.ids.max()}, outside its vocabulary of {vocab_size}")
    return None
