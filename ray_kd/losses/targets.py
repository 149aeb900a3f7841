"""What the loss knows of each token besides its hidden state, and the gradients of the head that chunks add to.

N tokens, K teacher tokens, V vocab, H width.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100
"""The label of a token that counts nothing."""


@dataclass(frozen=True)
class Targets:
    """teacher_ids and teacher_logprobs [N, K], labels [N]; negative ids and -inf log-probabilities are empty slots."""

    teacher_ids: Tensor
    teacher_logprobs: Tensor
    labels: Tensor

    def rows(self, index: slice | Tensor) -> "Targets":
        """The same for some of the tokens."""
        return Targets(self.teacher_ids[index], self.teacher_logprobs[index], self.labels[index])

    def is_valid(self) -> Tensor:
        """bool [N]: the tokens that count."""
        return self.labels != IGNORED

    def slots(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """ids int64 [N, K], 0 at empty slots; which slots are filled, none for ignored tokens; log-probabilities."""
        is_filled = (self.teacher_ids >= 0) & (self.teacher_logprobs != -math.inf) & self.is_valid()[:, None]
        return torch.where(is_filled, self.teacher_ids, 0).long(), is_filled, self.teacher_logprobs.to(dtype)


@dataclass(frozen=True)
class DenseTargets:
    """The teacher's final hidden states [N, D], D its width, and the labels [N]."""

    hidden: Tensor
    labels: Tensor

    def rows(self, index: slice | Tensor) -> "DenseTargets":
        """The same for some of the tokens."""
        return DenseTargets(self.hidden[index], self.labels[index])

    def is_valid(self) -> Tensor:
        """bool [N]: the tokens that count."""
        return self.labels != IGNORED


@dataclass(frozen=True)
class HeadGradients:
    """Sums over chunks; None: not needed.

    weight [V, H] in the head's dtype (float32 for a float16 head), bias [V] in the dtype of the loss.
    weight_rows: instead of weight, the rows of the head that a chunk touches, [U] ids and [U, H], a pair a chunk.
    """

    weight: Tensor | None
    bias: Tensor | None
    weight_rows: list[tuple[Tensor, Tensor]] | None = None
