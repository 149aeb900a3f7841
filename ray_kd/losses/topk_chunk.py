"""One chunk of tokens through the whole vocabulary: logits, loss, and the gradient written over the logits.

The teacher's tokens and the label are the "slots" of a row. They are taken out of the logits first (-inf in their
place), so that the logsumexp of the rest is exact however small the tail is, and their gradients are written in closed
form in the loss's dtype: a correction added to a dense term already rounded to bf16 loses half of a small entry.

What is left is one exponential of each logit, and the gradient there is that exponential times a number of the row.
On CPU that number never touches the logits: it multiplies the rows of the products' other factor and of their result
(`hidden` for d weight, d hidden itself), so a slice of the logits is read, exponentiated and written while it is in
the L2 cache, in one pass. Cross-entropy beside a temperature needs two exponentials, and a second pass.

On CUDA the same is done by two Triton kernels (`triton_rows.py`, not run on a GPU by this project's tests), or in a few
more passes by torch where Triton cannot run.

C rows of a chunk, R rows of a slice of it, K teacher tokens, V vocab, H width. z = logits, T = temperature, u = z / T.
"""

import math
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from ray_kd.losses.chunked_head import ChunkedHead
from ray_kd.losses.objective import Objective
from ray_kd.losses.tail import logit_gradient, student_support, teacher_support
from ray_kd.losses.targets import Targets

_CPU_BLOCK = 2**21
"""Logits on CPU of which both exponentials are kept, in the L3 cache: for cross-entropy beside a temperature."""

_POWERS = (2, 3, 4)
"""Temperatures at which products are cheaper than a second exponential."""

_MIN_FACTOR = 1e-6
"""A row's number is taken out of its gradient where it is at least this, relative to the row's largest slot."""


@dataclass(frozen=True)
class _Slots:
    """The teacher's tokens and the label of each row, taken out of the logits."""

    ids: Tensor
    """int64 [R, K], the label's where a slot is empty."""
    is_filled: Tensor
    logprobs: Tensor
    labels: Tensor
    """int64 [R, 1]; 0 for ignored rows."""
    is_valid: Tensor
    """[R, 1]"""
    is_label: Tensor
    """[R, K]: the slot that is the label."""
    label_is_apart: Tensor
    """[R, 1]: the label is none of the teacher's tokens."""
    z_ids: Tensor
    """[R, K], -inf where a slot is empty."""
    z_label: Tensor
    """[R, 1]"""
    places: Tensor
    """int64 [R (K + 1)]: the slots and the label in the flattened logits, in this order."""

    @classmethod
    def taken_from(cls, logits: Tensor, targets: Targets, dtype: torch.dtype) -> "_Slots":
        """Read them, and leave -inf in their places."""
        is_valid = targets.is_valid()[:, None]
        labels = torch.where(is_valid, targets.labels[:, None], 0).long()
        ids, is_filled, logprobs = targets.slots(dtype)
        is_label = (ids == labels) & is_filled
        # An empty slot stands for the label, which is a slot itself: it may be written twice, with one value.
        ids = torch.where(is_filled, ids, labels)
        first = torch.arange(logits.shape[0], device=logits.device)[:, None] * logits.shape[1]
        places = (first + torch.cat([ids, labels], -1)).flatten()
        z = logits.view(-1)[places].to(dtype).view(logits.shape[0], -1)
        logits.view(-1).index_fill_(0, places, -math.inf)
        return cls(
            ids, is_filled, logprobs, labels, is_valid, is_label, ~is_label.any(-1, keepdim=True),
            torch.where(is_filled, z[:, :-1], -math.inf), z[:, -1:], places,
        )  # fmt: skip

    def put(self, logits: Tensor, grad_ids: Tensor, grad_label: Tensor) -> None:
        """Write the gradients of the slots [R, K] and of the label [R, 1] to their places."""
        grad_label = torch.where(self.label_is_apart, grad_label, (grad_ids * self.is_label).sum(-1, keepdim=True))
        grads = torch.cat([torch.where(self.is_filled, grad_ids, grad_label), grad_label], -1)
        # Not scatter_, which takes a thousand times as long in bf16 on CPU.
        logits.view(-1).index_put_((self.places,), grads.to(logits.dtype).flatten())


def _kernels(weight: Tensor) -> ModuleType | None:
    """The Triton kernels where they can run; torch's own operations do the same in more passes."""
    if not weight.is_cuda:
        return None
    try:
        from ray_kd.losses import triton_rows
    except ImportError:
        return None
    return triton_rows if triton_rows.is_usable(weight) else None


class TopKHead(ChunkedHead[Targets]):
    """A teacher that sent its likeliest tokens; whatever it did not send is one outcome, or none."""

    def __init__(
        self, objective: Objective, weight: Tensor, bias: Tensor | None, scale: float | Tensor, dtype: torch.dtype
    ) -> None:
        super().__init__(objective, weight, bias, scale, dtype)
        on_cpu = weight.device.type == "cpu"
        # A small exponential divided by a small number of its row has no float16; d bias is a sum over the rows.
        self.takes_factor_out = on_cpu and weight.dtype != torch.float16 and bias is None
        # Which exponentials the gradient is made of: of z, of u = z / T, or of both.
        self.heats = not objective.ignores_rest and objective.temperature != 1
        self.has_heated_grad = self.heats and objective.kd_weight > 0
        self.has_plain_grad = not self.has_heated_grad or objective.ce_weight > 0
        self.keeps_both = self.has_heated_grad and self.has_plain_grad
        self.kernels = _kernels(weight)
        # exp(z - top) is a power of exp((z - top) / T) for a whole T: one exponential serves both.
        is_power = self.keeps_both and self.kernels is None and objective.temperature in _POWERS
        self.power = int(objective.temperature) if is_power else 0
        if self.keeps_both and self.kernels is None and not self.power:
            self.block_rows = max(1, _CPU_BLOCK // weight.shape[0]) if on_cpu else self.slice_rows

    def block(self, logits: Tensor, targets: Targets, wants_grad: bool) -> tuple[Tensor, Tensor | None]:
        objective = self.objective
        temperature, tail = objective.temperature, objective.tail
        assert tail is not None
        slots = _Slots.taken_from(logits, targets, self.dtype)
        heated = None
        if self.kernels is not None:
            top, log_rest, log_rest_heated = self.kernels.row_stats(logits, temperature, self.heats)
        else:
            if wants_grad and self.keeps_both and not self.power:
                heated = self.buffer("heated", logits.shape[0], self.dtype)
            top, log_rest, log_rest_heated = self._exponentials(logits, heated, wants_grad)

        # Cross-entropy, at temperature 1.
        z_slots = torch.cat([slots.z_ids, torch.where(slots.label_is_apart, slots.z_label, -math.inf)], -1)
        log_total = torch.logaddexp(log_rest, torch.logsumexp(z_slots, -1, keepdim=True))
        cross_entropy = log_total - slots.z_label

        # The divergence, at the loss's temperature; to it the label is a token of the rest like any other.
        u_ids, u_label = slots.z_ids / temperature, slots.z_label / temperature
        log_outside = None
        if not objective.ignores_rest:
            log_outside = torch.logaddexp(log_rest_heated, torch.where(slots.label_is_apart, u_label, -math.inf))
        rescale = objective.payload_temperature / temperature
        log_q, in_support = teacher_support(slots.logprobs, slots.is_filled, tail, logits.shape[1], rescale)
        log_p, log_total_heated = student_support(u_ids, log_outside, in_support, tail)
        value, score = objective.divergence(log_p, log_q, objective.config)

        teacher_logprobs = torch.where(slots.is_filled, slots.logprobs, -math.inf)
        best = slots.z_ids.gather(1, teacher_logprobs.argmax(-1, keepdim=True))
        agrees = (best >= torch.maximum(top, z_slots.amax(-1, keepdim=True))) & slots.is_filled.any(-1, keepdim=True)
        mass = teacher_logprobs.exp().sum(-1, keepdim=True)
        per_token = torch.cat([value[:, None] * temperature**2, cross_entropy, mass, agrees], -1)
        sums = torch.where(slots.is_valid, per_token, 0.0).sum(0)
        if not wants_grad:
            return sums, None

        row_scale = slots.is_valid.to(self.dtype) * self.scale
        ce_scale = objective.ce_weight * row_scale
        kd_scale = objective.kd_weight * temperature * row_scale
        grad_ids, rest_factor = logit_gradient(score, log_p, in_support, tail)
        grad_ids = kd_scale * grad_ids + ce_scale * (torch.exp(slots.z_ids - log_total) - slots.is_label.to(self.dtype))
        grad_label = ce_scale * torch.expm1(slots.z_label - log_total)
        plain = ce_scale * torch.exp(top - log_total)
        hot = torch.zeros_like(plain)
        if not objective.ignores_rest:
            kd_rest = kd_scale * rest_factor
            grad_label = grad_label + kd_rest * torch.exp(u_label - log_total_heated)
            hot = kd_rest * torch.exp(top / temperature - log_total_heated)
            if not self.heats:
                plain, hot = plain + hot, torch.zeros_like(hot)
        largest_slot = torch.maximum(grad_ids.abs().amax(-1, keepdim=True), grad_label.abs())
        if self.takes_factor_out:
            factor = self._weigh_rows(logits, heated, plain, hot, largest_slot)
            slots.put(logits, grad_ids / factor, grad_label / factor)
            return sums, factor
        if self.kernels is not None:
            self.kernels.weigh_(logits, top, plain, hot, temperature, self.heats)
        elif self.power:
            self._weigh_powers(logits, plain, hot)
        else:
            self._weigh(logits, heated, plain, hot)
        slots.put(logits, grad_ids, grad_label)
        return sums, None

    def _weigh_rows(
        self, logits: Tensor, heated: Tensor | None, plain: Tensor, hot: Tensor, largest_slot: Tensor
    ) -> Tensor:
        """logits become (plain * exp(z - top) + hot * exp((z - top) / T)) / factor [R, 1], which is returned.

        The factor is the number of the exponential that the logits (without heated) or heated hold, so that nothing is
        left to multiply; in a row where that one is tiny beside what else is divided by it, the largest of those.
        """
        main, other = (hot, plain) if self.has_heated_grad and not self.power else (plain, hot)
        largest = torch.maximum(largest_slot, other.abs()) if self.keeps_both else largest_slot
        is_tiny = main.abs() <= _MIN_FACTOR * largest
        factor = torch.where(is_tiny, largest.clamp(min=torch.finfo(self.dtype).tiny), main)
        left = main / factor
        rows = is_tiny[:, 0].nonzero()[:, 0]
        if self.power:
            self._weigh_powers(logits, left if len(rows) else None, hot / factor)
            return factor
        if len(rows):
            held = logits if heated is None else heated
            held[rows] = (held[rows] * left[rows]).to(held.dtype)
        if heated is not None:
            self._weigh(logits, heated, plain / factor, None)
        return factor

    def _weigh(self, logits: Tensor, heated: Tensor | None, plain: Tensor, hot: Tensor | None) -> None:
        """logits become plain * exp(z - top) + hot * exp((z - top) / T), a slice at a time; hot None: 1.

        Without heated the logits hold the one exponential that counts.
        """
        for start in range(0, logits.shape[0], self.slice_rows):
            rows = slice(start, start + self.slice_rows)
            source = logits[rows]
            part = self.float_slice(source)
            if heated is None:
                part.mul_((hot if self.has_heated_grad and hot is not None else plain)[rows])
            else:
                hot_part = heated[rows] if hot is None else heated[rows].mul_(hot[rows])
                part = hot_part.addcmul_(part, plain[rows])
            if part is not source:
                source.copy_(part)

    def _weigh_powers(self, logits: Tensor, plain: Tensor | None, hot: Tensor) -> None:
        """logits become h (plain h^(T - 1) + hot) of the h = exp((z - top) / T) they hold, by slices; plain None: 1."""
        for start in range(0, logits.shape[0], self.slice_rows):
            rows = slice(start, start + self.slice_rows)
            source = logits[rows]
            part = self.float_slice(source)
            weight = self._one_power_less(part)
            sized = self._scratch(part)
            if plain is None:
                weight = torch.add(weight, hot[rows], out=sized)
            else:
                weight = torch.mul(weight, plain[rows], out=sized).add_(hot[rows])
            part.mul_(weight)
            if part is not source:
                source.copy_(part)

    def _power_sum(self, heated: Tensor) -> Tensor:
        """[R, 1], the sum of h^T. A norm squares and sums in one pass."""
        if self.power == 3:
            return torch.mul(self._one_power_less(heated), heated, out=self._scratch(heated)).sum(-1, keepdim=True)
        root = heated if self.power == 2 else torch.mul(heated, heated, out=self._scratch(heated))
        return torch.linalg.vector_norm(root, dim=-1, keepdim=True).square()

    def _one_power_less(self, heated: Tensor) -> Tensor:
        """h^(T - 1) of h: itself, or in a buffer that is reused."""
        if self.power == 2:
            return heated
        raised = torch.mul(heated, heated, out=self._scratch(heated))
        return raised if self.power == 3 else raised.mul_(heated)

    def _scratch(self, part: Tensor) -> Tensor:
        return self.buffer("scratch", len(part), self.dtype)

    def _exponentials(self, logits: Tensor, heated: Tensor | None, wants_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
        """top (the largest z of a row), the logsumexp of z and the logsumexp of u, each [R, 1] in the loss's dtype.

        With wants_grad the logits [R, V] become exp(z - top), and heated exp((z - top) / T); without heated the logits
        become the one of the two that the gradient is made of, the second where it is made of both.
        """
        temperature = self.objective.temperature
        tops, sums, heated_sums = [], [], []
        for start in range(0, logits.shape[0], self.slice_rows):
            rows = slice(start, start + self.slice_rows)
            source = logits[rows]
            part = self.float_slice(source)
            # Finite also where the slots are the whole vocabulary and nothing is left.
            top = part.amax(-1, keepdim=True).clamp_(min=-1e30)
            tops.append(top)
            if self.power:
                torch.add(top / -temperature, part, alpha=1 / temperature, out=part).exp_()
                heated_sums.append(part.sum(-1, keepdim=True))
                sums.append(self._power_sum(part))
                if wants_grad and part is not source:
                    source.copy_(part)
                continue
            part.sub_(top)
            hot = None
            if self.heats:
                hot = (
                    heated[rows]
                    if heated is not None
                    else self.buffer("hot slice", self.slice_rows, self.dtype)[: len(part)]
                )
                torch.mul(part, 1 / temperature, out=hot).exp_()
                heated_sums.append(hot.sum(-1, keepdim=True))
            sums.append(part.exp_().sum(-1, keepdim=True))
            kept = hot if hot is not None and heated is None and self.has_heated_grad else part
            if wants_grad and kept is not source:
                source.copy_(kept)
        top = torch.cat(tops)
        log_rest = torch.cat(sums).log() + top
        if not self.heats:
            return top, log_rest, log_rest
        return top, log_rest, torch.cat(heated_sums).log() + top / temperature
