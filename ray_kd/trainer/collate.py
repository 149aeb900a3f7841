"""From rows of the stream to micro-batches: decode the payloads, find the targets, make tensors.

Comes in: a pyarrow table of rows with teacher answers. Goes out: MicroBatch records on the CPU. Runs in the feed's
thread, so decoding (about 1 us a token) never holds the training thread.

Legend: B rows, T tokens a row, M target positions of the micro-batch, K top-k.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from ray_kd import schema
from ray_kd.payloads.topk_logprobs import TopKLogprobs


@dataclass(frozen=True)
class MicroBatch:
    """Rows for one forward and backward, with what is counted about them."""

    input_ids: torch.Tensor  # int64 [B, T]
    position_ids: torch.Tensor  # int64 [B, T]
    targets: torch.Tensor  # int64 [M], indices into the flattened [B * T] positions
    labels: torch.Tensor  # int64 [M], the token each target position predicts
    teacher_ids: torch.Tensor  # int64 [M, K]
    teacher_logprobs: torch.Tensor  # float32 [M, K], full vocabulary, at the payload's temperature
    slots: NDArray[np.int64]  # [B]
    row_ids: NDArray[np.int64]  # [B], -1 for dummies
    errors: list[str]  # [B], why the teacher's answer was refused, "" when it was not
    num_tokens: int  # non-padding inputs of rows that are trained
    payload_nbytes: int
    teacher_busy_s: float


def collate(rows: pa.Table, top_k: int, temperature: float) -> MicroBatch:
    """Build one micro-batch.

    temperature: the loss's, which the payloads must have been taken at. Raises ValueError when one was not, or is
    unreadable (see the payload's decode).

    Rows of weight 0 (dummies, refused answers) go through the decoder but have no target position.
    """
    columns = schema.to_numpy(rows)
    input_ids, position_ids, weight = (columns[n] for n in (schema.INPUT_IDS, schema.POSITION_IDS, schema.WEIGHT))
    labels = np.where(weight[:, None] > 0, columns[schema.LABELS], schema.IGNORED_LABEL)
    is_target = schema.target_positions(labels, position_ids)

    ids, logprobs, nbytes = [np.empty((0, top_k), np.int64)], [np.empty((0, top_k), np.float32)], 0
    for place, encoded in enumerate(rows.column(schema.TEACHER_PAYLOAD).to_pylist()):
        if weight[place] == 0:
            continue
        payload = TopKLogprobs.decode(encoded)
        if payload.temperature != temperature:
            raise ValueError(f"payload at temperature {payload.temperature}, the loss is at {temperature}")
        expected = (int(is_target[place].sum()), top_k)
        assert payload.ids.shape == expected, f"payload {payload.ids.shape} for targets {expected}: alignment is broken"
        ids.append(payload.ids.astype(np.int64))
        logprobs.append(payload.logprobs)
        nbytes += len(encoded)

    targets = np.flatnonzero(is_target.reshape(-1))
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids.astype(np.int64)),
        position_ids=torch.from_numpy(position_ids.astype(np.int64)),
        targets=torch.from_numpy(targets),
        labels=torch.from_numpy(schema.next_labels(labels).reshape(-1)[targets].astype(np.int64)),
        teacher_ids=torch.from_numpy(np.concatenate(ids)),
        teacher_logprobs=torch.from_numpy(np.concatenate(logprobs)),
        slots=columns[schema.SLOT],
        row_ids=columns[schema.ROW_ID],
        errors=rows.column(schema.TEACHER_ERROR).to_pylist(),
        num_tokens=_count_tokens(position_ids, labels, weight),
        payload_nbytes=nbytes,
        teacher_busy_s=float(columns[schema.TEACHER_BUSY_S].sum()),
    )


def _count_tokens(position_ids: np.ndarray, labels: np.ndarray, weight: np.ndarray) -> int:
    """Non-padding tokens of the trained rows: padding is the last document of a row, and the only one unlabelled."""
    num_tokens = 0
    for positions, row_labels, row_weight in zip(position_ids, labels, weight, strict=True):
        if row_weight == 0:
            continue
        last_start = int(np.flatnonzero(positions == 0)[-1])
        is_padded = (row_labels[last_start:] == schema.IGNORED_LABEL).all()
        num_tokens += last_start if is_padded and last_start > 0 else len(positions)
    return num_tokens
