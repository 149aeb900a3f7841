"""One call of a fused loss: chunk after chunk through the head, and its place in autograd.

N tokens, n of them valid in the whole step, V vocab, H width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ray_kd.losses.objective import Objective
from ray_kd.losses.targets import HeadGradients


@dataclass(frozen=True)
class Plan:
    """One call of the loss, without the tensors that autograd differentiates in."""

    make_head: Callable[..., Any]
    """(weight, bias, scale, dtype) -> what takes a chunk: SparseHead or a ChunkedHead."""
    objective: Objective
    targets: Any
    """Targets or DenseTargets."""
    kept_rows: Tensor | None
    """The rows of hidden that the targets belong to; None: all of them."""
    scale: float | Tensor
    """1 / n."""
    chunk_size: int
    sparse_weight_grad: bool = False
    """Whether the gradient of the weight is a sparse COO tensor; SparseHead alone can make one."""

    def apply(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """The loss, differentiable where something is to be differentiated, and the four sums over n."""
        head = (hidden, weight, bias)
        with torch.autocast(hidden.device.type, enabled=False):
            if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in head):
                return _FusedLinearKD.apply(*head, self)
            return self.run(*head, needs=(False, False, False))[:2]

    def run(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
        """The loss, the four sums over n, and the gradients by hidden, weight and bias that are needed, else None."""
        scales_late = _scales_late(hidden)
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        num_rows = self.targets.labels.shape[0]
        head = self.make_head(weight, bias, 1.0 if scales_late else self.scale, dtype)
        chunk_size = min(self.chunk_size, head.max_rows or self.chunk_size)
        grad_hidden = hidden.new_zeros(hidden.shape) if needs[0] else None
        makes_rows = needs[1] and self.sparse_weight_grad
        new_weight_grad = weight.new_empty if head.overwrites_weight_grad and num_rows else weight.new_zeros
        # A float16 sum over many tokens that waits for its 1 / n could overflow.
        weight_grad_dtype = dtype if scales_late else weight.dtype
        gradients = HeadGradients(
            weight=new_weight_grad(weight.shape, dtype=weight_grad_dtype) if needs[1] and not makes_rows else None,
            bias=weight.new_zeros(weight.shape[0], dtype=dtype) if needs[2] else None,
            weight_rows=[] if makes_rows else None,
        )

        sums = hidden.new_zeros(4, dtype=dtype)
        for start in range(0, num_rows, chunk_size):
            chunk = slice(start, start + chunk_size)
            rows = chunk if self.kept_rows is None else self.kept_rows[chunk]
            chunk_sums, grad = head(hidden[rows], self.targets.rows(chunk), gradients if any(needs) else None, needs[0])
            sums += chunk_sums
            if grad_hidden is not None and grad is not None:
                grad_hidden[rows] = grad
        sums *= self.scale
        loss = self.objective.kd_weight * sums[0]
        if self.objective.ce_weight:
            loss = loss + self.objective.ce_weight * sums[1]
        grad_bias = gradients.bias
        if grad_bias is not None and not scales_late:
            grad_bias = grad_bias.to(weight.dtype)
        grad_weight = gradients.weight
        if gradients.weight_rows is not None:
            grad_weight = _sparse(gradients.weight_rows, weight, weight_grad_dtype)
        return loss, sums, (grad_hidden, grad_weight, grad_bias)


def _sparse(rows: list[tuple[Tensor, Tensor]], weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A sparse COO tensor like weight, not coalesced: a row that several chunks touch is there several times."""
    ids = torch.cat([ids for ids, _ in rows] or [weight.new_empty(0, dtype=torch.int64)])
    values = torch.cat([values for _, values in rows] or [weight[:0]]).to(dtype)
    return torch.sparse_coo_tensor(ids[None], values, weight.shape, check_invariants=False)


def _scales_late(hidden: Tensor) -> bool:
    """Whether 1 / n is applied in backward, together with its factor, and not before the gradients are rounded: in
    float16 most of them would be zero by then, and no loss scale could bring them back."""
    return hidden.dtype == torch.float16


class _FusedLinearKD(torch.autograd.Function):
    """Computes the gradients along with the loss; backward multiplies them by the factor it is given."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan) -> tuple[Tensor, Tensor]:
        loss, sums, grads = plan.run(hidden, weight, bias, needs=ctx.needs_input_grad[:3])
        # Saved rather than kept as attributes: autograd lets go of them before the gradients are stored, which then
        # move into .grad without a copy.
        ctx.save_for_backward(*grads)
        ctx.factor = None
        ctx.late_scale = plan.scale if _scales_late(hidden) else None
        ctx.mark_non_differentiable(sums)
        return loss, sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grads = ctx.saved_tensors
        if ctx.late_scale is not None:
            factor = grad_loss * ctx.late_scale
            return *(None if grad is None else (grad * factor).to(torch.float16) for grad in grads), None
        if ctx.factor is not None:
            # The first backward scaled the saved gradients in place and may have handed them out: leave them alone.
            return *(None if grad is None else grad * (grad_loss / ctx.factor) for grad in grads), None
        ctx.factor = grad_loss.clone()
        if grad_loss.device.type != "cpu" or grad_loss.item() != 1:
            for grad in grads:
                if grad is not None:
                    _multiply_(grad, grad_loss)
        return *grads, None


def _multiply_(grad: Tensor, factor: Tensor) -> None:
    """In place, to save a second gradient of the head, with the factor in its own precision.

    Past the version counter: it would forbid the next backward of a retained graph, and is still needed to catch a
    caller who changes the gradients before that.
    """
    if grad.is_sparse:
        grad = grad._values()
    if grad.dtype == factor.dtype:
        grad.data.mul_(factor)
    else:
        for rows in grad.data.split(8192):
            rows.copy_(rows.to(factor.dtype) * factor)
