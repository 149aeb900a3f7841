"""The distillation loss fused with the student's head: logits exist for one chunk of tokens at a time.

In: student hidden states, the head, what the teacher said: its likeliest tokens, or its hidden states.
Out: the loss, differentiable in hidden states and head.
The gradient is computed in forward, in the buffer that held the logits, so backward only scales it.
Cost: the three products of a plain head (logits, d hidden, d weight) and a few passes over the logits of a chunk;
beyond inputs and gradients one [chunk_size, V] buffer in the head's dtype. Divergences on the teacher's tokens alone
(tail renormalize, no cross-entropy) make no product over the vocabulary at all.

N tokens, n of them valid in the whole step, K teacher tokens, V vocab, H width.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ray_kd.head import Head
from ray_kd.losses.chunked_head import AnyTargets
from ray_kd.losses.full_chunk import FullHead
from ray_kd.losses.objective import make_objective
from ray_kd.losses.plan import Plan
from ray_kd.losses.sparse_chunk import SparseHead
from ray_kd.losses.targets import IGNORED, DenseTargets, Targets
from ray_kd.losses.topk_chunk import TopKHead

MAX_MASS = 1.05
"""The most that a token's teacher probabilities may sum to: log-probabilities that went through bf16 miss 1 by this."""


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
    sparse_weight_grad: bool = False,
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
    sparse_weight_grad: the gradient of lm_head_weight is a sparse COO tensor (not coalesced) of the rows that the
    teacher names, for an optimiser that takes one (torch.optim.SparseAdam, SGD), as `torch.nn.Embedding(sparse=True)`
    gives it. For tail renormalize with ce_weight 0 and K < V, the path that touches no other row.

    Ignored rows are dropped before any product, except on a device with num_valid_tokens given: nothing waits for the
    device then, the caller passes target rows, and an ignored row costs time but counts nothing.
    ce_loss and top1_agreement are NaN with tail renormalize, ce_weight 0 and K < V: that path sees no other token.
    top1_agreement counts a student whose largest logit is at the teacher's top token, ties included.

    Raises ValueError for options, shapes, dtypes and devices that do not fit, and on CPU or with validate=True for ids,
    labels and log-probabilities that do not (validate=True also looks for repeated ids). Not twice differentiable.
    """
    objective = make_objective(divergence, tail, temperature, kd_weight, ce_weight, beta, payload_temperature)
    targets = Targets(teacher_ids, teacher_logprobs, labels)
    _check_head(hidden, lm_head_weight, lm_head_bias, labels, chunk_size)
    _check_topk(hidden, targets, lm_head_weight.shape[0])
    targets, kept_rows, num_here = _kept(hidden, targets, num_valid_tokens)
    if validate or hidden.device.type == "cpu":
        _check_labels(targets, lm_head_weight.shape[0])
        _check_logprobs(targets, lm_head_weight.shape[0], look_for_repeats=validate)

    is_sparse = objective.ignores_rest and ce_weight == 0 and teacher_ids.shape[1] < lm_head_weight.shape[0]
    if sparse_weight_grad and not is_sparse:
        raise ValueError(
            f"sparse_weight_grad=True with tail {tail}, ce_weight={ce_weight} and K = {teacher_ids.shape[1]} of "
            f"{lm_head_weight.shape[0]} tokens: the gradient is dense; allowed: tail renormalize, ce_weight 0 and K < V"
        )
    make_head = partial(SparseHead if is_sparse else TopKHead, objective)
    scale = _scale(num_here, num_valid_tokens)
    plan = Plan(make_head, objective, targets, kept_rows, scale, chunk_size, sparse_weight_grad)
    return _output(*plan.apply(hidden, lm_head_weight, lm_head_bias), num_here)


def fused_linear_dense_kd_loss(
    hidden: Tensor,
    lm_head_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Head,
    labels: Tensor,
    divergence: str | Mapping[str, Any] | Any = "forward_kl",
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    beta: float = 0.5,
    lm_head_bias: Tensor | None = None,
    num_valid_tokens: int | Tensor | None = None,
    chunk_size: int = 256,
    validate: bool = False,
) -> LossOutput:
    """The same loss against the teacher's whole distribution softmax(teacher_head(teacher_hidden) / T): no tail.

    teacher_hidden [N, D]: the teacher's final hidden states, of any floating dtype. teacher_head: [V', D] with V' <= V;
    tokens of the student that the teacher does not have, or excludes, have probability e^-80 there.
    divergence: also the kinds that compare logits (`cosine`), for which T is 1. Everything else
    as in `fused_linear_kd_loss`.

    Cost: one more product, two [chunk_size, V] buffers (in the dtypes of the two heads), some rows of the logits ten
    times over in float32, and about three times the passes over them; never [N, V]. teacher_topk_mass is 1. No gradient
    reaches the teacher.

    Raises ValueError for options, shapes, dtypes and devices that do not fit, and on CPU or with validate=True for
    labels outside the vocabulary and hidden states that are not finite. Not twice differentiable.
    """
    objective = make_objective(divergence, None, temperature, kd_weight, ce_weight, beta)
    targets = DenseTargets(teacher_hidden.detach(), labels)
    _check_head(hidden, lm_head_weight, lm_head_bias, labels, chunk_size)
    _check_dense(hidden, targets, teacher_head, lm_head_weight.shape[0])
    targets, kept_rows, num_here = _kept(hidden, targets, num_valid_tokens)
    if validate or hidden.device.type == "cpu":
        _check_labels(targets, lm_head_weight.shape[0])
        if not bool(torch.isfinite(targets.hidden.sum(dtype=torch.float64))):
            raise ValueError("teacher_hidden contains NaN or an infinite value")

    make_head = partial(FullHead, objective, teacher_head.detach())
    plan = Plan(make_head, objective, targets, kept_rows, _scale(num_here, num_valid_tokens), chunk_size)
    return _output(*plan.apply(hidden, lm_head_weight, lm_head_bias), num_here)


def _output(loss: Tensor, sums: Tensor, num_here: Tensor) -> LossOutput:
    names = ("kd_loss", "ce_loss", "teacher_topk_mass", "top1_agreement")
    return LossOutput(loss, dict(zip(names, sums.unbind(), strict=True)) | {"num_valid_tokens": num_here})


def _kept(
    hidden: Tensor, targets: AnyTargets, num_valid_tokens: int | Tensor | None
) -> tuple[AnyTargets, Tensor | None, Tensor]:
    """The targets that are computed, the rows of hidden they belong to (None: all), and how many of them are valid."""
    if hidden.device.type != "cpu" and num_valid_tokens is not None:
        return targets, None, targets.is_valid().sum()
    kept = targets.is_valid().nonzero().squeeze(1)
    if kept.numel() == targets.labels.numel():
        return targets, None, torch.tensor(kept.numel())
    return targets.rows(kept), kept, torch.tensor(kept.numel())


def _scale(num_here: Tensor, num_valid_tokens: int | Tensor | None) -> float | Tensor:
    """1 / n; a count on the device is not read here."""
    if isinstance(num_valid_tokens, Tensor) and num_valid_tokens.device.type != "cpu":
        return 1.0 / num_valid_tokens
    if num_valid_tokens is None:
        return 1.0 / max(int(num_here), 1)
    count = int(num_valid_tokens)
    if count < 0 or (count == 0 and num_here.device.type == "cpu" and int(num_here) > 0):
        raise ValueError(f"num_valid_tokens={count} with {int(num_here)} valid labels here; allowed: None or >= 1")
    return 1.0 / max(count, 1)


def _check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, chunk_size: int) -> None:
    """Shapes, dtypes and devices of the student's side, which the host knows."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {list(hidden.shape)}, lm_head_weight {list(weight.shape)} must be [N, H] and [V, H]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"lm_head_bias {list(bias.shape)} must be [V] = {list(weight.shape[:1])}")
    dtypes = {str(tensor.dtype) for tensor in (hidden, weight, bias) if tensor is not None}
    if len(dtypes) > 1 or not hidden.is_floating_point():
        raise ValueError(f"hidden and head must be of one floating dtype; they are {', '.join(sorted(dtypes))}")
    if labels.shape != (hidden.shape[0],) or labels.is_floating_point():
        raise ValueError(f"labels {list(labels.shape)} {labels.dtype} must be integers [N] with N = {hidden.shape[0]}")
    _check_devices(hidden, lm_head_weight=weight, lm_head_bias=bias, labels=labels)
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}; allowed: >= 1")


def _check_devices(hidden: Tensor, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device} and hidden on {hidden.device}: all must be on one device")


def _check_topk(hidden: Tensor, targets: Targets, vocab_size: int) -> None:
    """Shapes, dtypes and devices of what the teacher sent."""
    ids, logprobs, num_rows = targets.teacher_ids, targets.teacher_logprobs, hidden.shape[0]
    if ids.dim() != 2 or ids.shape != logprobs.shape or ids.shape[0] != num_rows:
        raise ValueError(
            f"teacher_ids {list(ids.shape)}, teacher_logprobs {list(logprobs.shape)} must be [N, K] with N = {num_rows}"
        )
    if num_rows and not 1 <= ids.shape[1] <= vocab_size:
        raise ValueError(f"K = {ids.shape[1]} teacher tokens; allowed: 1 to the vocabulary of {vocab_size}")
    if ids.is_floating_point() or not logprobs.is_floating_point():
        raise ValueError(f"teacher_ids {ids.dtype} must be integers, teacher_logprobs {logprobs.dtype} not")
    _check_devices(hidden, teacher_ids=ids, teacher_logprobs=logprobs)


def _check_dense(hidden: Tensor, targets: DenseTargets, head: Head, vocab_size: int) -> None:
    """Shapes, dtypes and devices of the teacher's hidden states and its head."""
    if not isinstance(head, Head):
        raise ValueError(
            f"teacher_head is a {type(head).__name__}; it must be a ray_kd.losses.Head, such as Head(weight)"
        )
    teacher_hidden, num_rows = targets.hidden, hidden.shape[0]
    if teacher_hidden.shape != (num_rows, head.width) or not teacher_hidden.is_floating_point():
        raise ValueError(
            f"teacher_hidden {list(teacher_hidden.shape)} {teacher_hidden.dtype} must be floating, "
            f"[N, D] = [{num_rows}, {head.width}]"
        )
    if head.bias is not None and (head.bias.shape, head.bias.dtype) != (head.weight.shape[:1], head.weight.dtype):
        raise ValueError(
            f"the bias of teacher_head {list(head.bias.shape)} {head.bias.dtype} must be [V'] = "
            f"{list(head.weight.shape[:1])} of its weight's {head.weight.dtype}"
        )
    if head.vocab_size > vocab_size:
        raise ValueError(
            f"the teacher's vocabulary of {head.vocab_size} is larger than the student's of {vocab_size}: "
            "it names tokens that the student does not have"
        )
    _check_devices(hidden, teacher_hidden=teacher_hidden, teacher_head=head.weight, teacher_head_bias=head.bias)


def _check_labels(targets: Targets | DenseTargets, vocab_size: int) -> None:
    """Values of the valid labels, which the host has to wait for when they are on a device."""
    labels = targets.labels[targets.is_valid()]
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < vocab_size:
        raise ValueError(
            f"labels from {int(labels.min())} to {int(labels.max())}; allowed: 0 to {vocab_size - 1}, or {IGNORED}"
        )


def _check_logprobs(targets: Targets, vocab_size: int, look_for_repeats: bool) -> None:
    """Values of what the teacher sent, which the host has to wait for when they are on a device."""
    if targets.labels.numel() == 0:
        return
    largest = int(targets.teacher_ids.max())
    if largest >= vocab_size:
        raise ValueError(f"teacher id {largest} is outside the student's vocabulary of {vocab_size}")
    ids, is_filled, logprobs = targets.slots(torch.float32)
    # In float32, whose largest exponential is infinite: NaN and +inf show in the mass, which must be near one at most.
    mass = torch.where(is_filled, logprobs, -math.inf).exp().sum(-1)
    if not bool((mass <= MAX_MASS).all()):
        if bool(targets.teacher_logprobs.isnan().any()):
            raise ValueError("teacher_logprobs contain NaN; an empty slot is a negative id or -inf")
        raise ValueError(
            f"teacher_logprobs of a token have a mass of {float(mass.max()):.4g}; allowed: up to {MAX_MASS}, for "
            "rounding. They are log-probabilities over the full vocabulary, not logits"
        )
    if look_for_repeats:
        ids = torch.where(is_filled, ids, -1).sort(-1).values
        if bool(((ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] >= 0)).any()):
            raise ValueError("teacher_ids repeat a token within a row; allowed: distinct ids, negative = empty slot")
