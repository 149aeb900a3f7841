"""One chunk of tokens through the teacher's tokens only: no product over the vocabulary.

For divergences on the K tokens alone (tail renormalize, no cross-entropy). The distinct tokens of a chunk share one
product, which sums a frequent token's gradient in fp32 before it is rounded into the head's gradient.
Cost: 3 products [C, U, H] with U the distinct tokens of a chunk, and a copy of U rows of the head.

C rows of a chunk, K teacher tokens, U distinct tokens, V vocab, H width.
"""

import math

import torch
from torch import Tensor

from ray_kd.losses.objective import Objective
from ray_kd.losses.tail import logit_gradient, student_support, teacher_support
from ray_kd.losses.targets import HeadGradients, Targets


class SparseHead:
    """The head of one call. Calling it takes a chunk, adds to the head's gradients."""

    overwrites_weight_grad = False
    max_rows = 128
    """Of a chunk: its distinct tokens grow with its rows, and the product with both, so more rows cost more a token."""

    def __init__(
        self, objective: Objective, weight: Tensor, bias: Tensor | None, scale: float | Tensor, dtype: torch.dtype
    ) -> None:
        """dtype: of everything but the products. scale: 1 / n, with which every gradient is multiplied."""
        self.weight, self.bias, self.objective, self.scale, self.dtype = weight, bias, objective, scale, dtype

    def __call__(
        self, hidden: Tensor, targets: Targets, gradients: HeadGradients | None, wants_hidden: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Sums [4] over the chunk (T^2 D, NaN, teacher mass, NaN) and d hidden [C, H] when wanted.

        hidden [C, H]. gradients None: no gradient at all is computed.
        """
        objective, tail = self.objective, self.objective.tail
        assert tail is not None
        ids, is_filled, logprobs = targets.slots(self.dtype)
        distinct, place = distinct_ids(ids)
        weight = self.weight[distinct]
        logits = hidden @ weight.t() if self.bias is None else torch.addmm(self.bias[distinct], hidden, weight.t())
        u_ids = torch.where(is_filled, logits.gather(1, place).to(self.dtype) / objective.temperature, -math.inf)
        rescale = objective.payload_temperature / objective.temperature
        log_q, in_support = teacher_support(logprobs, is_filled, tail, self.weight.shape[0], rescale)
        log_p, _ = student_support(u_ids, None, in_support, tail)
        value, score = objective.divergence(log_p, log_q, objective.config)

        is_valid = targets.is_valid()
        mass = torch.where(is_filled, logprobs, -math.inf).exp().sum()
        kd_sum = torch.where(is_valid, value, 0.0).sum() * objective.temperature**2
        unknown = torch.full_like(kd_sum, math.nan)
        sums = torch.stack([kd_sum, unknown, mass, unknown])
        if gradients is None:
            return sums, None
        grad_ids, _ = logit_gradient(score, log_p, in_support, tail)
        grad_ids = grad_ids * (objective.kd_weight * objective.temperature * self.scale)
        grad = torch.zeros_like(logits, dtype=self.dtype).scatter_add_(1, place, grad_ids)
        if gradients.bias is not None:
            gradients.bias.index_add_(0, distinct, grad.sum(0))
        grad = grad.to(weight.dtype)
        if gradients.weight_rows is not None:
            gradients.weight_rows.append((distinct, grad.t() @ hidden))
        if gradients.weight is not None:
            gradients.weight.index_add_(0, distinct, (grad.t() @ hidden).to(gradients.weight.dtype))
        return sums, grad @ weight if wants_hidden else None


def distinct_ids(ids: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct values of ids [C, K], and the place of each id among them [C, K].

    On CPU [U] values; elsewhere [C K], the last ones 0 and pointed at by nothing, since a size that depends on the
    values would make the host wait for the device.
    """
    if ids.device.type == "cpu":
        return torch.unique(ids, return_inverse=True)
    return _padded_distinct_ids(ids)


def _padded_distinct_ids(ids: Tensor) -> tuple[Tensor, Tensor]:
    in_order, order = ids.flatten().sort()
    is_new = torch.ones_like(in_order)
    is_new[1:] = in_order[1:] != in_order[:-1]
    rank = is_new.cumsum(0) - 1
    distinct = torch.zeros_like(in_order).scatter_(0, rank, in_order)
    return distinct, torch.empty_like(rank).scatter_(0, order, rank).view_as(ids)
