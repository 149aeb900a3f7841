"""One chunk of tokens against a teacher known over the whole vocabulary: by its hidden states and its head.

The teacher's logits are made here, chunk by chunk like the student's, in a second [chunk, V] buffer. What follows the
two products takes ten or so float32 tensors of a few rows at a time: of 1 MB each on CPU, in the L2 cache, and of 16 MB
on a device.

C rows of a chunk, R rows of a slice of it, V vocab, D width of the teacher.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from ray_kd.head import Head
from ray_kd.losses.chunked_head import ChunkedHead
from ray_kd.losses.objective import Objective
from ray_kd.losses.tail import EMPTY_LOGPROB
from ray_kd.losses.targets import DenseTargets


class FullHead(ChunkedHead[DenseTargets]):
    """A teacher that sent its final hidden states. Not run on a GPU by this project's tests."""

    device_slice = 2**22

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
        # Logits are compared as they are: a temperature has no part in it, nor has its square.
        self.temperature = 1.0 if objective.compares_logits else objective.temperature

    def block(self, logits: Tensor, targets: DenseTargets, wants_grad: bool) -> tuple[Tensor, Tensor | None]:
        teacher_logits = self.buffer("teacher", len(logits), self.teacher.weight.dtype, self.teacher.vocab_size)
        self.teacher.product(targets.hidden, out=teacher_logits)
        sums = logits.new_zeros(4, dtype=self.dtype)
        for start in range(0, len(logits), self.slice_rows):
            rows = slice(start, start + self.slice_rows)
            sums += self._slice(logits[rows], teacher_logits[rows], targets.rows(rows), wants_grad)
        return sums, None

    def _slice(self, logits: Tensor, teacher_logits: Tensor, targets: DenseTargets, wants_grad: bool) -> Tensor:
        """Sums [4] of a slice [R, V], whose logits become d loss / d logits with wants_grad."""
        objective, temperature = self.objective, self.temperature
        is_valid = targets.is_valid()[:, None]
        labels = torch.where(is_valid, targets.labels[:, None], 0).long()
        z = self.float_slice(logits)
        u = z if temperature == 1 else z / temperature
        v = self.teacher.transform_(teacher_logits.to(self.dtype))
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
        """D [R] and dD/du [R, V] of the student's u [R, V] and the teacher's v, of no more tokens.

        A token that a head excludes (-inf) or the teacher does not have is finite here: to a divergence of
        probabilities as good as impossible, e^-80 adding nothing; to one of logits not there, on both sides.
        """
        objective, extra = self.objective, u.shape[1] - v.shape[1]
        if objective.compares_logits:
            u = u[:, : v.shape[1]]
            is_excluded = torch.isneginf(u) | torch.isneginf(v)
            u, v = u.masked_fill(is_excluded, 0.0), v.masked_fill(is_excluded, 0.0)
            value, score = objective.divergence(u, v, objective.config)
            return value, functional.pad(score.masked_fill(is_excluded, 0.0), (0, extra))
        log_p, log_q = _finite(torch.log_softmax(u, -1)), _finite(torch.log_softmax(v, -1))
        log_q = functional.pad(log_q, (0, extra), value=EMPTY_LOGPROB)
        value, score = objective.divergence(log_p, log_q, objective.config)
        total = score.sum(-1, keepdim=True)
        return value, score - log_p.exp_().mul_(total)


def _finite(logprobs: Tensor) -> Tensor:
    """In place; NaN stays what it is."""
    return logprobs.nan_to_num_(nan=math.nan, posinf=math.inf, neginf=EMPTY_LOGPROB)
