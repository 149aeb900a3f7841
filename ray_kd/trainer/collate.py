"""From rows of the stream to micro-batches: decode the payloads, find the targets, make tensors.

Comes in: a pyarrow table of rows with teacher answers. Goes out: MicroBatch records on the CPU. Runs in the feed's
thread, so decoding (about 1 us a token) never holds the training thread.

Legend: B rows, T tokens a row, M target positions of the micro-batch, K top-k, D width of the teacher.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from ray_kd import schema
from ray_kd.losses.feature_batch import FeatureBatch
from ray_kd.payloads import HIDDEN_STATES, TOPK_LOGPROBS, Features, HiddenStates, TopKLogprobs

if TYPE_CHECKING:
    from ray_kd.trainer.feed import Expected


@dataclass(frozen=True)
class MicroBatch:
    """Rows for one forward and backward, with what is counted about them."""

    input_ids: torch.Tensor  # int64 [B, T]
    position_ids: torch.Tensor  # int64 [B, T]
    targets: torch.Tensor  # int64 [M], indices into the flattened [B * T] positions
    labels: torch.Tensor  # int64 [M], the token each target position predicts
    teacher: dict[str, torch.Tensor]  # what the teacher said, by the names of the fused loss's arguments
    features: FeatureBatch | None  # what it sent for feature terms
    slots: NDArray[np.int64]  # [B]
    row_ids: NDArray[np.int64]  # [B], -1 for dummies
    errors: list[str]  # [B], why the teacher's answer was refused, "" when it was not
    num_tokens: int  # non-padding inputs of rows that are trained
    payload_nbytes: int
    teacher_busy_s: float


def collate(rows: pa.Table, expected: "Expected") -> MicroBatch:
    """Build one micro-batch.

    Raises ValueError for a payload that is not what the loss expects, or unreadable (see its decode).

    Rows of weight 0 (dummies, refused answers) go through the decoder but have no target position.
    """
    columns = schema.to_numpy(rows)
    input_ids, position_ids, weight = (columns[n] for n in (schema.INPUT_IDS, schema.POSITION_IDS, schema.WEIGHT))
    labels = np.where(weight[:, None] > 0, columns[schema.LABELS], schema.IGNORED_LABEL)
    is_target = schema.target_positions(labels, position_ids)

    payloads = rows.column(schema.TEACHER_PAYLOAD).to_pylist()
    used = np.flatnonzero(weight > 0)
    blobs, counts = [payloads[place] for place in used], is_target[used].sum(axis=1).tolist()
    features = None
    if expected.features is None:
        teacher = _TEACHER[expected.payload](blobs, counts, expected)
    else:
        decoded = [Features.decode(blob) for blob in blobs]
        teacher = _topk([payload.topk for payload in decoded], counts, expected)
        features = FeatureBatch.of(
            expected.features.spec, decoded, labels, position_ids, used,
            width=expected.features.width, num_heads=expected.features.num_heads,
        )  # fmt: skip

    targets = np.flatnonzero(is_target.reshape(-1))
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids.astype(np.int64)),
        position_ids=torch.from_numpy(position_ids.astype(np.int64)),
        targets=torch.from_numpy(targets),
        labels=torch.from_numpy(schema.next_labels(labels).reshape(-1)[targets].astype(np.int64)),
        teacher=teacher,
        features=features,
        slots=columns[schema.SLOT],
        row_ids=columns[schema.ROW_ID],
        errors=rows.column(schema.TEACHER_ERROR).to_pylist(),
        num_tokens=int(schema.real_positions(labels, position_ids)[used].sum()),
        payload_nbytes=sum(len(payloads[place]) for place in used),
        teacher_busy_s=float(columns[schema.TEACHER_BUSY_S].sum()),
    )


def _decoded_topk(blobs: list[bytes], counts: list[int], expected: "Expected") -> dict[str, torch.Tensor]:
    return _topk([TopKLogprobs.decode(blob) for blob in blobs], counts, expected)


def _topk(payloads: list[TopKLogprobs], counts: list[int], expected: "Expected") -> dict[str, torch.Tensor]:
    """teacher_ids int64 [M, K], and teacher_logprobs float32 [M, K]: full vocabulary, at the expected temperature."""
    ids, logprobs = [np.empty((0, expected.width), np.int64)], [np.empty((0, expected.width), np.float32)]
    for payload, count in zip(payloads, counts, strict=True):
        if payload.temperature != expected.temperature:
            raise ValueError(f"payload at temperature {payload.temperature}, the loss is at {expected.temperature}")
        _check_shape(payload.ids.shape, count, expected)
        ids.append(payload.ids.astype(np.int64))
        logprobs.append(payload.logprobs)
    return {
        "teacher_ids": torch.from_numpy(np.concatenate(ids)),
        "teacher_logprobs": torch.from_numpy(np.concatenate(logprobs)),
    }


def _hidden(blobs: list[bytes], counts: list[int], expected: "Expected") -> dict[str, torch.Tensor]:
    """teacher_hidden bfloat16 [M, D]."""
    bits = [np.empty((0, expected.width), np.uint16)]
    for blob, count in zip(blobs, counts, strict=True):
        payload = HiddenStates.decode(blob)
        _check_shape(payload.bits.shape, count, expected)
        bits.append(payload.bits)
    return {"teacher_hidden": torch.from_numpy(np.concatenate(bits)).view(torch.bfloat16)}


_TEACHER: dict[str, Callable[[list[bytes], list[int], "Expected"], dict[str, torch.Tensor]]] = {
    TOPK_LOGPROBS: _decoded_topk,
    HIDDEN_STATES: _hidden,
}
"""Payload kind -> decoded payloads of some rows, one behind the other, given how many targets each row has."""


def _check_shape(shape: tuple[int, ...], count: int, expected: "Expected") -> None:
    assert shape == (count, expected.width), f"payload {shape} for {(count, expected.width)}: alignment is broken"
