"""One chunk of tokens through the whole vocabulary: logits, loss, and the gradient written over the logits.

The teacher's tokens and the label are the "slots" of a row. They are taken out of the logits first (-inf in their
place), so that the logsumexp of the rest is exact however small the tail is, and their gradients are written in closed
form in the loss's dtype: a correction added to a dense term already rounded to bf16 loses half of a small entry.

C rows of a chunk, R rows of a block of it, K teacher tokens, V vocab, H width. z = logits, T = temperature, u = z / T.
"""

import math

import torch
from torch import Tensor

from ray_kd.losses.objective import Objective
from ray_kd.losses.tail import logit_gradient, student_support, teacher_support
from ray_kd.losses.targets import HeadGradients, Targets

_CPU_BLOCK = 2**22
"""Logits finished together on CPU, 16 MB in fp32: in a server's L3 cache, and enough to hide the small operations."""

_CPU_SLICE = 2**18
"""Logits of one pass around exp on CPU: they stay in the L2 cache."""

_DEVICE_BLOCK = 2**25
"""Logits finished together elsewhere: it bounds the fp32 copy of a bf16 buffer at 128 MB."""


class DenseHead:
    """The head and the reused buffers of one call. Calling it takes a chunk, adds to the head's gradients.

    The first chunk overwrites the gradient of the weight, which may start uninitialised.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, objective: Objective, scale: float | Tensor, dtype: torch.dtype
    ) -> None:
        """dtype: of everything but the products. scale: 1 / n, with which every gradient is multiplied."""
        self.weight, self.bias, self.objective, self.scale, self.dtype = weight, bias, objective, scale, dtype
        self.heats_rest = not objective.ignores_rest and objective.temperature != 1
        vocab_size = weight.shape[0]
        on_cpu = weight.device.type == "cpu"
        self.block_rows = max(1, (_CPU_BLOCK if on_cpu else _DEVICE_BLOCK) // vocab_size)
        self.slice_rows = max(1, _CPU_SLICE // vocab_size) if on_cpu else self.block_rows
        self.buffers: dict[str, Tensor] = {}
        self.is_first = True

    def __call__(
        self, hidden: Tensor, targets: Targets, gradients: HeadGradients | None, wants_hidden: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Sums [4] over the chunk (T^2 D, CE, teacher mass, agreement) and d hidden [C, H] when wanted.

        hidden [C, H]. gradients None: no gradient at all is computed.
        """
        logits = self._buffer("logits", hidden.shape[0], self.weight.dtype)
        if self.bias is None:
            torch.mm(hidden, self.weight.t(), out=logits)
        else:
            torch.addmm(self.bias, hidden, self.weight.t(), out=logits)
        sums = logits.new_zeros(4, dtype=self.dtype)
        for start in range(0, hidden.shape[0], self.block_rows):
            block = slice(start, start + self.block_rows)
            sums += self._block(logits[block], targets.rows(block), wants_grad=gradients is not None)
        if gradients is None:
            return sums, None
        if gradients.weight is not None:
            # beta 0 on the first chunk overwrites: no pass to zero a gradient as large as the head.
            if gradients.weight.dtype == hidden.dtype:
                gradients.weight.addmm_(logits.t(), hidden, beta=0 if self.is_first else 1)
            elif self.is_first:
                gradients.weight.copy_(logits.t() @ hidden)
            else:
                gradients.weight.add_(logits.t() @ hidden)
        if gradients.bias is not None:
            gradients.bias.add_(logits.sum(0, dtype=self.dtype))
        self.is_first = False
        return sums, logits @ self.weight if wants_hidden else None

    def _buffer(self, name: str, num_rows: int, dtype: torch.dtype) -> Tensor:
        """The first rows of a buffer [rows, V] that lives as long as the call; the first use is the largest."""
        if name not in self.buffers:
            self.buffers[name] = self.weight.new_empty(num_rows, self.weight.shape[0], dtype=dtype)
        return self.buffers[name][:num_rows]

    def _block(self, logits: Tensor, targets: Targets, wants_grad: bool) -> Tensor:
        """Sums [4] of a block; with wants_grad its logits [R, V] become d loss / d logits."""
        objective, num_rows = self.objective, logits.shape[0]
        temperature, tail = objective.temperature, objective.tail
        work = logits if logits.dtype == self.dtype else self._buffer("work", num_rows, self.dtype).copy_(logits)
        heated = self._buffer("heated", num_rows, self.dtype) if self.heats_rest else None
        is_valid = targets.is_valid()[:, None]
        labels = torch.where(is_valid, targets.labels[:, None], 0).long()
        ids, is_filled, logprobs = targets.slots(self.dtype)
        is_label = (ids == labels) & is_filled
        label_is_apart = ~is_label.any(-1, keepdim=True)

        z_ids = torch.where(is_filled, work.gather(1, ids), -math.inf)
        z_label = work.gather(1, labels)
        slot_ids = torch.cat([ids, labels], -1)
        is_slot = torch.cat([is_filled, label_is_apart], -1)
        # Adding leaves what an empty slot points at untouched, which a plain scatter would not.
        work.scatter_add_(1, slot_ids, torch.where(is_slot, -math.inf, 0.0).to(self.dtype))
        top, log_rest, log_rest_heated = self._exponentials(work, heated)

        # Cross-entropy, at temperature 1.
        z_slots = torch.cat([z_ids, torch.where(label_is_apart, z_label, -math.inf)], -1)
        log_total = torch.logaddexp(log_rest, torch.logsumexp(z_slots, -1, keepdim=True))
        cross_entropy = log_total - z_label

        # The divergence, at the loss's temperature; to it the label is a token of the rest like any other.
        u_ids, u_label = z_ids / temperature, z_label / temperature
        log_outside = None
        if not objective.ignores_rest:
            log_outside = torch.logaddexp(log_rest_heated, torch.where(label_is_apart, u_label, -math.inf))
        rescale = objective.payload_temperature / temperature
        log_q, in_support = teacher_support(logprobs, is_filled, tail, logits.shape[1], rescale)
        log_p, log_total_heated = student_support(u_ids, log_outside, in_support, tail)
        value, score = objective.divergence(log_p, log_q, objective.config)

        teacher_logprobs = torch.where(is_filled, logprobs, -math.inf)
        best = z_ids.gather(1, teacher_logprobs.argmax(-1, keepdim=True))
        agrees = (best >= torch.maximum(top, z_slots.amax(-1, keepdim=True))) & is_filled.any(-1, keepdim=True)
        mass = teacher_logprobs.exp().sum(-1, keepdim=True)
        per_token = torch.cat([value[:, None] * temperature**2, cross_entropy, mass, agrees], -1)
        sums = torch.where(is_valid, per_token, 0.0).sum(0)
        if not wants_grad:
            return sums

        row_scale = is_valid.to(self.dtype) * self.scale
        ce_scale = objective.ce_weight * row_scale
        kd_scale = objective.kd_weight * temperature * row_scale
        grad_ids, rest_factor = logit_gradient(score, log_p, in_support, tail)
        grad_ids = kd_scale * grad_ids + ce_scale * (torch.exp(z_ids - log_total) - is_label.to(self.dtype))
        grad_label = ce_scale * torch.expm1(z_label - log_total)
        rest_scale = ce_scale * torch.exp(top - log_total)
        if objective.ignores_rest:
            work.mul_(rest_scale)
        else:
            kd_rest = kd_scale * rest_factor
            grad_label = grad_label + kd_rest * torch.exp(u_label - log_total_heated)
            kd_rest = kd_rest * torch.exp(top / temperature - log_total_heated)
            if heated is None:
                work.mul_(rest_scale + kd_rest)
            else:
                work.mul_(rest_scale).addcmul_(heated, kd_rest)
        # exp(-inf) left exact zeros at the slots: the sum is the value itself.
        grad_slots = torch.cat([grad_ids, torch.where(label_is_apart, grad_label, 0.0)], -1)
        work.scatter_add_(1, slot_ids, grad_slots)
        if work is not logits:
            logits.copy_(work)
        return sums

    def _exponentials(self, work: Tensor, heated: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """work [R, V] becomes exp(z - top), heated becomes exp((z - top) / T).

        Returns top (the largest z of a row), the logsumexp of z and the logsumexp of u, each [R, 1].
        """
        temperature = self.objective.temperature
        tops, sums, heated_sums = [], [], []
        for start in range(0, work.shape[0], self.slice_rows):
            part = work[start : start + self.slice_rows]
            # Finite also where the slots are the whole vocabulary and nothing is left.
            top = part.amax(-1, keepdim=True).clamp(min=-1e30)
            part.sub_(top)
            if heated is not None:
                heated_part = torch.mul(part, 1 / temperature, out=heated[start : start + self.slice_rows]).exp_()
                heated_sums.append(heated_part.sum(-1, keepdim=True))
            sums.append(part.exp_().sum(-1, keepdim=True))
            tops.append(top)
        top = torch.cat(tops)
        log_rest = torch.cat(sums).log() + top
        if heated is None:
            return top, log_rest, log_rest
        return top, log_rest, torch.cat(heated_sums).log() + top / temperature
