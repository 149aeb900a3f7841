"""The distillation loss fused with the student's head: logits exist for one chunk of tokens at a time.

In: student hidden states, the head, what the teacher said. Out: the loss, differentiable in hidden states and head.
The gradient is computed in forward, in the buffer that held the logits, so backward only scales it.
Cost: the three products of a plain head (logits, d hidden, d weight) and a few passes over the logits of a chunk;
beyond inputs and gradients one [chunk_size, V] buffer in the head's dtype. Divergences on the teacher's tokens alone
(tail renormalize, no cross-entropy) make no product over the vocabulary at all.

N tokens, n of them valid in the whole step, K teacher tokens, V vocab, H width.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ray_kd.losses.dense_chunk import DenseHead
from ray_kd.losses.objective import Objective, make_objective
from ray_kd.losses.sparse_chunk import MAX_ROWS, SparseHead
from ray_kd.losses.targets import IGNORED, HeadGradients, Targets


@dataclass(frozen=True)
class LossOutput:
    """The loss and its parts. Metrics are detached 0-d tensors: reading one is when the host waits for the device."""

    loss: Tensor
    """Scalar, float32 (float64 for float64 hidden states), differentiable in hidden, lm_head_weight, lm_head_bias."""
    metrics: dict[str, Tensor]
    """kd_loss (T^2 included) and ce_loss, both unweighted, teacher_topk_mass, top1_agreement: sums over the valid
    tokens of this call divided by n, so that micro-batches add up; num_valid_tokens: the valid tokens of this call."""


def fused_linear_kd_loss(
    hidden: Tensor,
    lm_head_weight: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    labels: Tensor,
    divergence: str | Mapping[str, Any] | Any = "forward_kl",
    tail: str = "bucket",
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    beta: float = 0.5,
    lm_head_bias: Tensor | None = None,
    num_valid_tokens: int | Tensor | None = None,
    chunk_size: int = 256,
    payload_temperature: float | None = None,
    validate: bool = False,
) -> LossOutput:
    """(1/n) * sum over valid tokens of ce_weight CE(z, label) + kd_weight T^2 D(teacher, softmax(z / T)).

    z = hidden @ lm_head_weight.T + lm_head_bias.

    hidden [N, H], lm_head_weight [V, H], lm_head_bias [V]: of one floating dtype.
    teacher_ids [N, K]: int, distinct in a row, negative = empty slot.
    teacher_logprobs [N, K]: full-vocabulary log-probabilities at payload_temperature (default: temperature), in nats;
    -inf = empty slot.
    labels [N]: the token each position predicts (already shifted), -100 = ignored.
    divergence: a kind of `losses/divergences/`, {kind: ..., options}, or its Config. beta is for kinds that have it.
    tail: bucket, renormalize or drop, see `tail.py`.
    num_valid_tokens: n of the whole step (all ranks and micro-batches); default: of this call.
    chunk_size: the most rows of logits at a time.

    Ignored rows are dropped before any product, except on CUDA with num_valid_tokens given: nothing waits for the
    device there, the caller passes target rows, and an ignored row costs time but counts nothing.
    ce_loss and top1_agreement are NaN with tail renormalize, ce_weight 0 and K < V: that path sees no other token.
    top1_agreement counts a student whose largest logit is at the teacher's top token, ties included.

    Raises ValueError for options, shapes and dtypes that do not fit, and on CPU or with validate=True for ids, labels
    and log-probabilities that do not (validate=True also looks for repeated ids). Not twice differentiable.
    """
    objective = make_objective(divergence, tail, temperature, kd_weight, ce_weight, beta, payload_temperature)
    targets = Targets(teacher_ids, teacher_logprobs, labels)
    _check_shapes(hidden, lm_head_weight, lm_head_bias, targets, chunk_size)
    kept_rows: Tensor | None = None
    if hidden.is_cuda and num_valid_tokens is not None:
        num_here = targets.is_valid().sum()
    else:
        kept = targets.is_valid().nonzero().squeeze(1)
        num_here = torch.tensor(kept.numel())
        if kept.numel() < labels.numel():
            kept_rows, targets = kept, targets.rows(kept)
    if validate or hidden.device.type == "cpu":
        _check_values(targets, lm_head_weight.shape[0], look_for_repeats=validate)

    scale, scales_late = _scale(num_here, num_valid_tokens), hidden.dtype == torch.float16
    plan = _Plan(objective, targets, kept_rows, scale, scales_late, chunk_size)
    head = (hidden, lm_head_weight, lm_head_bias)
    with torch.autocast(hidden.device.type, enabled=False):
        if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in head):
            loss, sums = _FusedLinearKD.apply(*head, plan)
        else:
            loss, sums, _ = plan.run(*head, needs=(False, False, False))
    names = ("kd_loss", "ce_loss", "teacher_topk_mass", "top1_agreement")
    return LossOutput(loss, dict(zip(names, sums.unbind(), strict=True)) | {"num_valid_tokens": num_here})


@dataclass(frozen=True)
class _Plan:
    """One call of the loss, without the tensors that autograd differentiates in."""

    objective: Objective
    targets: Targets
    kept_rows: Tensor | None
    """The rows of hidden that the targets belong to; None: all of them."""
    scale: float | Tensor
    """1 / n."""
    scales_late: bool
    """Whether 1 / n is applied in backward, together with its factor, and not before the gradients are rounded: in
    float16 most of them would be zero by then, and no loss scale could bring them back."""
    chunk_size: int

    def run(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
        """The loss, the four sums over n, and the gradients by hidden, weight and bias that are needed, else None."""
        objective, targets = self.objective, self.targets
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        num_rows, vocab_size = targets.labels.shape[0], weight.shape[0]
        grad_hidden = hidden.new_zeros(hidden.shape) if needs[0] else None
        is_sparse = objective.ignores_rest and objective.ce_weight == 0 and targets.teacher_ids.shape[1] < vocab_size
        new_weight_grad = weight.new_zeros if is_sparse or num_rows == 0 else weight.new_empty
        # A float16 sum over many tokens that waits for its 1 / n could overflow.
        weight_grad_dtype = dtype if self.scales_late else weight.dtype
        gradients = HeadGradients(
            weight=new_weight_grad(weight.shape, dtype=weight_grad_dtype) if needs[1] else None,
            bias=weight.new_zeros(vocab_size, dtype=dtype) if needs[2] else None,
        )
        scale = 1.0 if self.scales_late else self.scale
        head = (SparseHead if is_sparse else DenseHead)(weight, bias, objective, scale, dtype)
        chunk_size = min(self.chunk_size, MAX_ROWS) if is_sparse else self.chunk_size

        sums = hidden.new_zeros(4, dtype=dtype)
        for start in range(0, num_rows, chunk_size):
            chunk = slice(start, start + chunk_size)
            rows = chunk if self.kept_rows is None else self.kept_rows[chunk]
            chunk_sums, grad = head(hidden[rows], targets.rows(chunk), gradients if any(needs) else None, needs[0])
            sums += chunk_sums
            if grad_hidden is not None and grad is not None:
                grad_hidden[rows] = grad
        sums *= self.scale
        loss = objective.kd_weight * sums[0]
        if objective.ce_weight:
            loss = loss + objective.ce_weight * sums[1]
        grad_bias = gradients.bias
        if grad_bias is not None and not self.scales_late:
            grad_bias = grad_bias.to(weight.dtype)
        return loss, sums, (grad_hidden, gradients.weight, grad_bias)


class _FusedLinearKD(torch.autograd.Function):
    """Computes the gradients along with the loss; backward multiplies them by the factor it is given."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, plan: _Plan) -> tuple[Tensor, Tensor]:
        loss, sums, grads = plan.run(hidden, weight, bias, needs=ctx.needs_input_grad[:3])
        # Saved rather than kept as attributes: autograd lets go of them before the gradients are stored, which then
        # move into .grad without a copy.
        ctx.save_for_backward(*grads)
        ctx.factor = None
        ctx.late_scale = plan.scale if plan.scales_late else None
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
        if grad_loss.is_cuda or grad_loss.item() != 1:
            for grad in grads:
                if grad is not None:
                    _multiply_(grad, grad_loss)
        return *grads, None


def _multiply_(grad: Tensor, factor: Tensor) -> None:
    """In place, to save a second gradient of the head, with the factor in its own precision.

    Past the version counter: it would forbid the next backward of a retained graph, and is still needed to catch a
    caller who changes the gradients before that.
    """
    if grad.dtype == factor.dtype:
        grad.data.mul_(factor)
    else:
        for rows in grad.data.split(8192):
            rows.copy_(rows.to(factor.dtype) * factor)


def _scale(num_here: Tensor, num_valid_tokens: int | Tensor | None) -> float | Tensor:
    """1 / n; a count on the device is not read here."""
    if isinstance(num_valid_tokens, Tensor) and num_valid_tokens.is_cuda:
        return 1.0 / num_valid_tokens
    if num_valid_tokens is None:
        return 1.0 / max(int(num_here), 1)
    count = int(num_valid_tokens)
    if count < 0 or (count == 0 and not num_here.is_cuda and int(num_here) > 0):
        raise ValueError(f"num_valid_tokens={count} with {int(num_here)} valid labels here; allowed: None or >= 1")
    return 1.0 / max(count, 1)


def _check_shapes(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Targets, chunk_size: int) -> None:
    """Shapes and dtypes, which the host knows."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {list(hidden.shape)}, lm_head_weight {list(weight.shape)} must be [N, H] and [V, H]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"lm_head_bias {list(bias.shape)} must be [V] = {list(weight.shape[:1])}")
    dtypes = {str(tensor.dtype) for tensor in (hidden, weight, bias) if tensor is not None}
    if len(dtypes) > 1 or not hidden.is_floating_point():
        raise ValueError(f"hidden and head must be of one floating dtype; they are {', '.join(sorted(dtypes))}")
    ids, logprobs, labels = targets.teacher_ids, targets.teacher_logprobs, targets.labels
    num_rows = hidden.shape[0]
    if ids.dim() != 2 or ids.shape != logprobs.shape or ids.shape[0] != num_rows or labels.shape != (num_rows,):
        raise ValueError(
            f"teacher_ids {list(ids.shape)}, teacher_logprobs {list(logprobs.shape)}, labels {list(labels.shape)} "
            f"must be [N, K], [N, K], [N] with N = {num_rows}"
        )
    if num_rows and not 1 <= ids.shape[1] <= weight.shape[0]:
        raise ValueError(f"K = {ids.shape[1]} teacher tokens; allowed: 1 to the vocabulary of {weight.shape[0]}")
    if ids.is_floating_point() or labels.is_floating_point() or not logprobs.is_floating_point():
        raise ValueError(
            f"teacher_ids {ids.dtype} and labels {labels.dtype} must be integers, teacher_logprobs {logprobs.dtype} not"
        )
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}; allowed: >= 1")


def _check_values(targets: Targets, vocab_size: int, look_for_repeats: bool) -> None:
    """Values of the valid tokens, which the host has to wait for when they are on a device."""
    if targets.labels.numel() == 0:
        return
    largest = int(targets.teacher_ids.max())
    if largest >= vocab_size:
        raise ValueError(f"teacher id {largest} is outside the student's vocabulary of {vocab_size}")
    labels = targets.labels[targets.is_valid()]
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < vocab_size:
        raise ValueError(
            f"labels from {int(labels.min())} to {int(labels.max())}; allowed: 0 to {vocab_size - 1}, or {IGNORED}"
        )
    # NaN makes any sum NaN, and a sum is the cheapest look at every value.
    if math.isnan(targets.teacher_logprobs.sum()) and bool(targets.teacher_logprobs.isnan().any()):
        raise ValueError("teacher_logprobs contain NaN; an empty slot is a negative id or -inf")
    if look_for_repeats:
        ids, is_filled, _ = targets.slots(torch.float32)
        ids = torch.where(is_filled, ids, -1).sort(-1).values
        if bool(((ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] >= 0)).any()):
            raise ValueError("teacher_ids repeat a token within a row; allowed: distinct ids, negative = empty slot")
