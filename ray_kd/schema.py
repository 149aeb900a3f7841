"""The columns of a row and the alignment rule: who knows these can open any stage alone.

A row is packed before the teacher sees it and has a fixed length T = `data.sequence_length`.
Costs: 12 bytes a token for the prepared columns; the payload adds its own (`payloads/`).
"""

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

SCHEMA_VERSION = 2
"""Part of the prepared data's fingerprint: a change here prepares everything again. 2: rows have a route."""

IGNORED_LABEL = -100

# Prepared columns
ROW_ID = "row_id"  # int64: the row's index in the prepared data, stable and unique
INPUT_IDS = "input_ids"  # int32 [T]
LABELS = "labels"  # int32 [T], unshifted: labels[t] is input_ids[t] or -100
POSITION_IDS = "position_ids"  # int32 [T], restarts at 0 with each packed document; padding is a document of its own
PREPARED_COLUMNS = (ROW_ID, INPUT_IDS, LABELS, POSITION_IDS)
"""What an engine gets; the rows on disk and in the stream have ROUTE besides, which decides whose engine that is."""
ROUTE = "route"  # int32: index of the row's value of data.route_by in the manifest's `routes`; 0 without route_by

# Added by the ordered stream
SLOT = "slot"  # int64: the row's place in the run
WEIGHT = "weight"  # float32: 0 = a dummy slot or a row whose teacher answer was refused

# Added by the teacher stage
TEACHER_PAYLOAD = "teacher_payload"  # binary: one encoded payload, one entry per target position
TEACHER_BUSY_S = "teacher_busy_s"  # float32: this row's share of the seconds the engine took for its batch
TEACHER_ERROR = "teacher_error"  # string: why the answer was refused, "" when it was not


def target_positions(labels: NDArray[np.integer], position_ids: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Which positions are trained: t such that token t+1 is in the same document and has a label.

    labels, position_ids: [..., T]. Returns a mask [..., T]; the last position is never a target.
    Position t describes token t+1, everywhere: teacher payloads hold one entry per True, in row-major order.
    """
    mask = np.zeros(labels.shape, dtype=np.bool_)
    same_document = position_ids[..., 1:] == position_ids[..., :-1] + 1
    mask[..., :-1] = same_document & (labels[..., 1:] != IGNORED_LABEL)
    return mask


def real_positions(labels: NDArray[np.integer], position_ids: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Which positions are not padding, which is the last document of a row and the only one without a label.

    labels, position_ids: [..., T], of prepared rows. Returns a mask [..., T].
    """
    document = (position_ids == 0).cumsum(axis=-1)
    in_last = document == document[..., -1:]
    is_padded = ~(in_last & (labels != IGNORED_LABEL)).any(axis=-1, keepdims=True)
    return ~(in_last & is_padded)


def causal_pairs(
    is_chosen: NDArray[np.bool_], position_ids: NDArray[np.integer]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """What attends to what in one packed row: (query, key) positions, each [P].

    is_chosen, position_ids: [T]. Both of a pair are chosen and of one document, the key is not after its query, and
    pairs are in the order of their queries, then of their keys. n chosen positions of a document make n (n + 1) / 2.
    """
    document = (position_ids == 0).cumsum()
    chosen = np.flatnonzero(is_chosen)
    queries, keys = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for own in np.split(chosen, np.flatnonzero(np.diff(document[chosen])) + 1):
        query, key = np.tril_indices(len(own))
        queries.append(own[query])
        keys.append(own[key])
    return np.concatenate(queries), np.concatenate(keys)


def next_labels(labels: NDArray[np.integer]) -> NDArray[np.integer]:
    """labels [..., T] shifted so that entry t is the token that position t predicts; the last is -100."""
    shifted = np.full_like(labels, IGNORED_LABEL)
    shifted[..., :-1] = labels[..., 1:]
    return shifted


def to_numpy(table: pa.Table) -> dict[str, NDArray[Any]]:
    """Columns of a table of rows as arrays: lists of fixed size [n, T], numbers [n]; no binary, no strings."""
    arrays = {}
    for name in table.column_names:
        column = table.column(name).combine_chunks()
        if pa.types.is_fixed_size_list(column.type):
            arrays[name] = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), column.type.list_size)
        elif not (pa.types.is_binary(column.type) or pa.types.is_string(column.type)):
            arrays[name] = column.to_numpy(zero_copy_only=False)
    return arrays
