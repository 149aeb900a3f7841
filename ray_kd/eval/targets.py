"""What the teacher says about held-out rows, computed once and compared with a student any number of times.

N target tokens, V vocabulary, D width, K top-k. Temperature 1 throughout. Logits exist for a chunk of tokens at a time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ray_kd import schema
from ray_kd.head import Head
from ray_kd.models import check_architecture, decoder_hidden, head_of, load_causal_lm
from ray_kd.payloads.topk_logprobs import TopKLogprobs

_LOG_TINY = float(np.log(1e-7))  # smallest tail mass told apart from rounding, as in the loss

Rows = Mapping[str, NDArray[Any]]
"""input_ids, labels, position_ids: int32 [n, T]; for the Evaluator perhaps num_target_bytes: [n]."""

_MAX_RANK = 1024
"""The most likely ids of a whole vocabulary that are looked at one by one: beyond it no top k is sent."""


@dataclass(frozen=True)
class Compared:
    """What the teacher says of n tokens, and how far the student is from it."""

    divergence: Tensor
    """[n] float32, nats."""
    teacher_top1: Tensor
    """[n] int64: the teacher's most likely ids."""
    outcomes: Tensor
    """[n, M] float32 log-probabilities of all that the teacher tells apart: its vocabulary, or its top k and a bucket.
    Those of empty slots are -inf."""
    num_ids: int
    """The first so many outcomes are ids; one that is left is the bucket."""


class TeacherTargets(Protocol):
    """The teacher's distributions at the target positions of some rows, in row-major order."""

    metric: str
    """Name of the divergence that `compare` measures."""

    @property
    def max_rank(self) -> int:
        """How many of its most likely ids are known of every token, and worth a look."""
        ...

    def is_usable(self, row: int) -> bool:
        """Whether the teacher has an answer for this row; the others are left out of every metric."""
        ...

    def on(self, device: torch.device) -> "TeacherTargets":
        """The same, ready to compare on `device`."""
        ...

    def compare(self, rows: Sequence[int], tokens: slice, student_logprobs: Tensor) -> Compared:
        """For some tokens of some rows.

        tokens: which of the rows' concatenated target tokens; student_logprobs: [n, V] float32 log-softmax there.
        """
        ...


class DenseTargets:
    """Exact KL over the whole vocabulary: the teacher's hidden states and its head; no teacher forward afterwards.

    Host memory: D values of the teacher's dtype per target token, and the head [V, D].
    """

    metric = "kl"

    def __init__(self, hidden: Sequence[Tensor], head: Head) -> None:
        """hidden: [m, D] per row, m its target positions."""
        self._hidden = hidden
        self._head = head

    @property
    def max_rank(self) -> int:
        """The vocabulary, or as much of it as a top k could send."""
        return min(_MAX_RANK, self._head.vocab_size)

    @classmethod
    @torch.no_grad()
    def compute(
        cls,
        rows: Rows,
        *,
        model: str,
        revision: str | None = None,
        dtype: str = "auto",
        device: torch.device | str = "cpu",
        batch_size: int = 4,
        vocab_size: int | None = None,
    ) -> "DenseTargets":
        """Load the teacher, run it once over the rows, keep hidden states and head on the host, free the body.

        vocab_size: the teacher's distributions are those over the ids below, None: over all of its head's.

        Raises ConfigError when the model cannot be loaded or used on packed rows. Leaves the random state as it was.
        """
        with torch.random.fork_rng():
            teacher = load_causal_lm(model, revision, dtype, device)
            check_architecture(teacher)
        hidden: list[Tensor] = []
        for start in range(0, len(rows[schema.INPUT_IDS]), batch_size):
            end = start + batch_size
            batch = {name: np.ascontiguousarray(rows[name][start:end]) for name in schema.PREPARED_COLUMNS[1:]}
            targets = schema.target_positions(batch[schema.LABELS], batch[schema.POSITION_IDS])
            out = decoder_hidden(
                teacher,
                torch.from_numpy(batch[schema.INPUT_IDS]).to(device),
                torch.from_numpy(batch[schema.POSITION_IDS]).to(device),
            )
            mask = torch.from_numpy(targets).to(device)
            hidden.extend(out[row][mask[row]].cpu() for row in range(len(targets)))
        return cls(hidden, head_of(teacher).over(vocab_size).to("cpu"))

    def is_usable(self, row: int) -> bool:
        """False when the teacher's forward was not finite."""
        return bool(torch.isfinite(self._hidden[row]).all())

    def on(self, device: torch.device) -> "DenseTargets":
        """With the head on `device`; hidden states follow chunk by chunk."""
        return DenseTargets(self._hidden, self._head.to(device))

    def compare(self, rows: Sequence[int], tokens: slice, student_logprobs: Tensor) -> Compared:
        """KL(teacher || student) = sum_v q_v (log q_v - log p_v); student ids beyond the teacher's have q = 0."""
        hidden = torch.cat([self._hidden[row] for row in rows])[tokens].to(student_logprobs.device)
        teacher = self._head.logits(hidden).log_softmax(dim=-1)
        num_ids = teacher.shape[1]
        divergence = _expected_difference(teacher, student_logprobs[:, :num_ids])
        return Compared(divergence, teacher.argmax(dim=-1), teacher, num_ids)


class TopKTargets:
    """For engines without a local model: KL on the K ids sent plus one bucket holding the rest.

    A lower bound of the exact KL (data processing inequality); reported under its own name.
    """

    metric = "topk_bucket_kl"

    def __init__(self, payloads: Sequence[TopKLogprobs | None]) -> None:
        """payloads: one per row at temperature 1, None for a row that the teacher refused. ValueError otherwise."""
        other = sorted({payload.temperature for payload in payloads if payload is not None} - {1.0})
        if other:
            raise ValueError(f"evaluation needs payloads at temperature 1, not {other[0]}")
        if any(payload is not None and payload.num_draws for payload in payloads):
            raise ValueError("evaluation needs the likeliest tokens, not draws: their mass is an estimate")
        self._payloads = payloads

    @property
    def max_rank(self) -> int:
        """K."""
        return next((payload.ids.shape[1] for payload in self._payloads if payload is not None), 1)

    def is_usable(self, row: int) -> bool:
        """False where there is no payload."""
        return self._payloads[row] is not None

    def on(self, device: torch.device) -> "TopKTargets":
        """The same object: payloads follow chunk by chunk."""
        return self

    def compare(self, rows: Sequence[int], tokens: slice, student_logprobs: Tensor) -> Compared:
        """KL over the K ids and the bucket; with K = V over the K ids, renormalised, as in the loss."""
        payloads = [payload for row in rows if (payload := self._payloads[row]) is not None]
        device = student_logprobs.device
        ids = torch.from_numpy(np.concatenate([p.ids for p in payloads])[tokens].astype(np.int64)).to(device)
        teacher = torch.from_numpy(np.concatenate([p.logprobs for p in payloads])[tokens]).float().to(device)
        is_empty = (ids < 0) | torch.isneginf(teacher)
        teacher = teacher.masked_fill(is_empty, -torch.inf)
        top1 = ids.gather(1, teacher.argmax(dim=-1, keepdim=True)).squeeze(1)
        student = student_logprobs.gather(1, ids.clamp_min(0)).masked_fill(is_empty, -torch.inf)
        num_ids = ids.shape[1]
        if num_ids >= payloads[0].vocab_size:
            outcomes = teacher.log_softmax(dim=-1)
            return Compared(_expected_difference(outcomes, student.log_softmax(dim=-1)), top1, outcomes, num_ids)
        # The student's tail is summed over the other ids, not taken as 1 - sum: that would cancel.
        # Empty slots point at an extra column, so that they remove no id from the tail.
        extra = student_logprobs.shape[1]
        rest = torch.nn.functional.pad(student_logprobs, (0, 1), value=-torch.inf)
        rest.scatter_(1, ids.masked_fill(is_empty, extra), -torch.inf)
        student_tail = rest.logsumexp(dim=-1, keepdim=True).clamp_min(_LOG_TINY)
        teacher_tail = (1.0 - teacher.double().exp().sum(dim=-1, keepdim=True)).clamp_min(1e-7).log().float()
        outcomes = torch.cat([teacher, teacher_tail], dim=1)
        return Compared(
            _expected_difference(outcomes, torch.cat([student, student_tail], dim=1)), top1, outcomes, num_ids
        )


def _expected_difference(teacher: Tensor, student: Tensor) -> Tensor:
    """sum_v q_v (log q_v - log p_v) over the last dimension, with 0 log 0 = 0."""
    return torch.where(torch.isneginf(teacher), 0.0, teacher.exp() * (teacher - student)).sum(dim=-1)
