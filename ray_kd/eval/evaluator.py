"""The metrics of a student on held-out rows, at T = 1, summed in float64 over all ranks.

kl               KL(teacher || student) over the whole vocabulary, nats per target token
topk_bucket_kl   instead of kl where the teacher is only known by its top k
perplexity       exp of the mean negative log-likelihood of the labels
bits_per_byte    the same likelihood in bits, per byte of the target tokens' text: comparable across tokenizers
top1_agreement   fraction of target tokens where teacher and student find the same token most likely
num_tokens       target tokens counted
num_rows         rows counted; rows that the teacher could not answer are in no metric

Cost of an evaluation: the student's forward over the rows, the student's and (dense) the teacher's head at target
positions; two [chunk_size, V] float32 tensors and their exponentials at a time.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ray_kd import schema
from ray_kd.errors import DataError
from ray_kd.eval.breakdown import Breakdown
from ray_kd.eval.targets import Rows, TeacherTargets
from ray_kd.head import Head

CHUNK_SIZE = 256
NUM_TARGET_BYTES = "num_target_bytes"
_MAX_EXPONENT = 700.0  # exp beyond it is infinite, which JSON has no number for

StudentHidden = Callable[[Tensor, Tensor], Tensor]
"""(input_ids, position_ids) [B, T] -> final-normed hidden states [B, T, D]; in eval mode, a collective under ZeRO-3."""
StudentWeight = Callable[[], AbstractContextManager[tuple[Tensor, Tensor | None]]]
"""Context manager that gives lm_head's weight [V, D] and bias [V] or None; gathers them under ZeRO-3."""
AllReduce = Callable[[list[float]], list[float]]
"""Sums of each entry over all ranks."""


def rows_of_rank(rows: Rows, rank: int, world_size: int) -> dict[str, NDArray[Any]]:
    """A rank's share of the held-out rows: every world_size-th, as many on every rank.

    rows: input_ids, labels, position_ids int32 [n, T] and perhaps num_target_bytes [n]. Where the rows do not go
    round, a rank gets the first one again with no labels and no bytes, which counts for nothing.
    """
    num_rows = len(rows[schema.INPUT_IDS])
    if num_rows == 0:
        raise DataError("there are no held-out rows: nothing to evaluate")
    per_rank = math.ceil(num_rows / world_size)
    indices = np.arange(rank, per_rank * world_size, world_size)
    is_dummy = indices >= num_rows
    share = {name: column[np.where(is_dummy, 0, indices)] for name, column in rows.items()}
    share[schema.LABELS][is_dummy] = schema.IGNORED_LABEL
    if NUM_TARGET_BYTES in share:
        share[NUM_TARGET_BYTES][is_dummy] = 0
    return share


class Evaluator:
    """Held once by every rank; each call of `evaluate` is a collective with the same number of forwards everywhere."""

    def __init__(
        self,
        rows: Rows,
        teacher: TeacherTargets,
        *,
        batch_size: int = 4,
        device: torch.device | str = "cpu",
        chunk_size: int = CHUNK_SIZE,
    ) -> None:
        """This rank's rows (see `rows_of_rank`) and what the teacher says about the same rows, in the same order.

        num_target_bytes among the columns is the bytes of text that a row's target tokens stand for; without it there
        is no bits_per_byte.
        """
        self._rows = {name: np.ascontiguousarray(column) for name, column in rows.items()}
        self._targets = schema.target_positions(self._rows[schema.LABELS], self._rows[schema.POSITION_IDS])
        self._teacher = teacher
        self._batch_size = batch_size
        self._device = torch.device(device)
        self._chunk_size = chunk_size

    def new_breakdown(self) -> Breakdown:
        """An empty one of this teacher, for `evaluate` to fill."""
        return Breakdown(self._teacher.metric, self._teacher.max_rank)

    @torch.no_grad()
    def evaluate(
        self,
        student_hidden: StudentHidden,
        student_weight: StudentWeight,
        all_reduce: AllReduce = lambda sums: sums,
        breakdown: Breakdown | None = None,
    ) -> dict[str, float]:
        """The metrics over all ranks, the same on each. Uses no random numbers.

        breakdown: gets every token of this rank as well, in the same pass.

        Raises DataError when no rank has a target token.
        """
        teacher = self._teacher.on(self._device)
        sums = np.zeros(len(_SUMS), dtype=np.float64)
        for start in range(0, len(self._targets), self._batch_size):
            batch = np.arange(start, min(start + self._batch_size, len(self._targets)))
            sums += self._batch_sums(batch, teacher, student_hidden, student_weight, breakdown)
        totals = dict(zip(_SUMS, all_reduce(sums.tolist()), strict=True))
        tokens = totals["tokens"]
        if tokens == 0:
            raise DataError("the held-out rows have no target tokens: nothing to evaluate")
        metrics = {
            self._teacher.metric: totals["divergence"] / tokens,
            "perplexity": math.exp(min(totals["nll"] / tokens, _MAX_EXPONENT)),
            "top1_agreement": totals["agreements"] / tokens,
            "num_tokens": tokens,
            "num_rows": totals["rows"],
        }
        if totals["bytes"] > 0:
            metrics["bits_per_byte"] = totals["nll"] / math.log(2) / totals["bytes"]
        return metrics

    def _batch_sums(
        self,
        batch: NDArray[np.int64],
        teacher: TeacherTargets,
        student_hidden: StudentHidden,
        student_weight: StudentWeight,
        breakdown: Breakdown | None,
    ) -> NDArray[np.float64]:
        """Every rank runs the forward and enters the head's context, also where no row of the batch counts."""
        input_ids, position_ids = (
            torch.from_numpy(self._rows[name][batch]).to(self._device)
            for name in (schema.INPUT_IDS, schema.POSITION_IDS)
        )
        is_used = np.array([self._targets[row].any() and self._teacher.is_usable(row) for row in batch])
        used = batch[is_used]
        hidden = student_hidden(input_ids, position_ids)
        hidden_ND = hidden[torch.from_numpy(self._targets[batch] & is_used[:, None]).to(self._device)]
        next_labels = schema.next_labels(self._rows[schema.LABELS][used])[self._targets[used]]
        labels = torch.from_numpy(next_labels).to(self._device).long()
        positions = self._rows[schema.POSITION_IDS][used][self._targets[used]]

        divergence = nll = agreements = 0.0
        with student_weight() as (weight, bias):
            head = Head(weight, bias)
            for start in range(0, len(labels), self._chunk_size):
                tokens = slice(start, start + self._chunk_size)
                logprobs = head.logits(hidden_ND[tokens]).log_softmax(dim=-1)
                compared = teacher.compare(used.tolist(), tokens, logprobs)
                divergence += float(compared.divergence.sum(dtype=torch.float64))
                nll -= float(logprobs.gather(1, labels[tokens, None]).sum(dtype=torch.float64))
                agreements += float((logprobs.argmax(dim=-1) == compared.teacher_top1).sum())
                if breakdown is not None:
                    breakdown.add(compared, logprobs, labels[tokens], torch.from_numpy(positions[tokens]).long() + 1)
                del compared, logprobs  # [chunk, V] each, while those of the next chunk are made
        nbytes = float(self._rows[NUM_TARGET_BYTES][used].sum()) if NUM_TARGET_BYTES in self._rows else 0.0
        return np.array([divergence, nll, agreements, len(labels), nbytes, len(used)])


_SUMS = ("divergence", "nll", "agreements", "tokens", "bytes", "rows")
