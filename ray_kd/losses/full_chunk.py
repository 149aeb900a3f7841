"""One chunk of tokens against a teacher known over the whole vocabulary: by its hidden states and its head.

The teacher's logits are made here, chunk by chunk like the student's, so that a second [chunk, V] buffer is all that an
exact divergence costs in memory. What follows the two products runs over a few rows at a time, in the L2 cache on CPU.

C rows of a chunk, R rows of a slice of it, V vocab, D width of the teacher.
"""

import torch
from torch import Tensor

from ray_kd.head import Head
from ray_kd.losses.chunked_head import ChunkedHead
from ray_kd.losses.objective import Objective
from ray_kd.losses.tail import EMPTY_LOGPROB
from ray_kd.losses.targets import DenseTargets


class FullHead(ChunkedHead[DenseTargets]):
    """A teacher that sent its final hidden states. Not run on a GPU by this project's tests."""

    def __init__(
        self,
        objective: Objective,
        teacher: Head,
        weight: Tensor,
        bias: Tensor | None,
        scale: float | Tensor,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(objective, weight, bias, scale, dtype)
        self.teacher = teacher

    def block(self, logits: Tensor, targets: DenseTargets, wants_grad: bool) -> tuple[Tensor, Tensor | None]:
        said = self.buffer("teacher", len(logits), self.teacher.weight.dtype, self.teacher.vocab_size)
        self.teacher.product(targets.hidden, out=said)
        sums = logits.new_zeros(4, dtype=self.dtype)
        for start in range(0, len(logits), self.slice_rows):
            rows = slice(start, start + self.slice_rows)
            sums += self._slice(logits[rows], said[rows], targets.rows(rows), wants_grad)
        return sums, None

    def _slice(self, logits: Tensor, said: Tensor, targets: DenseTargets, wants_grad: bool) -> Tensor:
        """Sums [4] of a slice [R, V], whose logits become d loss / d logits with wants_grad."""
        objective, temperature = self.objective, self.objective.temperature
        is_valid = targets.is_valid()[:, None]
        labels = torch.where(is_valid, targets.labels[:, None], 0).long()
        z = self.float_slice(logits)
        u = z if temperature == 1 else z / temperature
        v = self.teacher.transform_(said.to(self.dtype))
        if temperature != 1:
            v.div_(temperature)
        value, grad = self._compare(u, v)

        best = z.gather(1, v.argmax(-1, keepdim=True))
        cross_entropy = torch.logsumexp(z, -1, keepdim=True) - z.gather(1, labels)
        per_token = torch.cat(
            [
                value[:, None] * temperature**2,
                cross_entropy,
                torch.ones_like(best),  # the teacher's mass: all of it was seen
                best >= z.amax(-1, keepdim=True),
            ],
            dim=-1,
        )
        sums = torch.where(is_valid, per_token, 0.0).sum(0)
        if not wants_grad:
            return sums
        grad.mul_(objective.kd_weight * temperature * self.scale)
        if objective.ce_weight:
            ce_scale = objective.ce_weight * self.scale
            grad.add_(torch.softmax(z, -1).mul_(ce_scale))
            grad.scatter_add_(1, labels, -torch.ones_like(best) * ce_scale)
        logits.copy_(torch.where(is_valid, grad, 0.0))
        return sums

    def _compare(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """D [R] and dD/du [R, V] of the student's u [R, V] and the teacher's v, of no more tokens, at temperature T."""
        objective, num_tokens = self.objective, v.shape[1]
        if objective.compares_logits:
            value, score = objective.divergence(u[:, :num_tokens], v, objective.config)
            return value, torch.nn.functional.pad(score, (0, u.shape[1] - num_tokens))
        log_p = torch.log_softmax(u, -1)
        # A token the teacher excludes, or does not have, is as good as impossible: finite, and e^-80 adds nothing.
        log_q = torch.log_softmax(v, -1).clamp_(min=EMPTY_LOGPROB)
        log_q = torch.nn.functional.pad(log_q, (0, u.shape[1] - num_tokens), value=EMPTY_LOGPROB)
        value, score = objective.divergence(log_p, log_q, objective.config)
        total = score.sum(-1, keepdim=True)
        return value, score - log_p.exp_().mul_(total)
