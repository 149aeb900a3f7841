"""The products of a head with the whole vocabulary, chunk by chunk, around what a loss makes of a block of logits.

Cost: logits, d hidden and d weight, into one reused buffer [chunk, V] in the head's dtype.

C rows of a chunk, R rows of a block or slice of it, V vocab, H width.
"""

from typing import Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from ray_kd.head import Head
from ray_kd.losses.objective import Objective
from ray_kd.losses.targets import HeadGradients

_CPU_SLICE = 2**18
"""Logits of one pass on CPU: with their float32 copy they stay in the L2 cache."""


class _Rows(Protocol):
    @property
    def labels(self) -> Tensor: ...

    def rows(self, index: slice | Tensor) -> Self: ...

    def is_valid(self) -> Tensor: ...


AnyTargets = TypeVar("AnyTargets", bound=_Rows)


class ChunkedHead(Generic[AnyTargets]):
    """The head and the reused buffers of one call. Calling it takes a chunk, adds to the head's gradients."""

    overwrites_weight_grad = True
    """Whether the first chunk overwrites the gradient of the weight, which may start uninitialised."""
    max_rows: int | None = None
    """Of a chunk; None: any number."""

    takes_factor_out = False
    """Whether `block` leaves a factor of each row of the gradient to the products."""
    block_rows: int | None = None
    """Rows finished together; None: all of a chunk."""

    device_slice = 2**25
    """Logits of one pass elsewhere than on CPU: it bounds a float32 copy of them at 128 MB."""

    def __init__(
        self, objective: Objective, weight: Tensor, bias: Tensor | None, scale: float | Tensor, dtype: torch.dtype
    ) -> None:
        """dtype: of everything but the products. scale: 1 / n, with which every gradient is multiplied."""
        self.weight, self.bias, self.objective, self.scale, self.dtype = weight, bias, objective, scale, dtype
        size = _CPU_SLICE if weight.device.type == "cpu" else self.device_slice
        self.slice_rows = max(1, size // weight.shape[0])
        self.buffers: dict[str, Tensor] = {}
        self.is_first = True

    def block(self, logits: Tensor, targets: AnyTargets, wants_grad: bool) -> tuple[Tensor, Tensor | None]:
        """Sums [4] of a block: T^2 D, CE, teacher mass, agreement.

        With wants_grad its logits [R, V] become d loss / d logits, apart from a factor [R, 1] where factors are taken
        out.
        """
        raise NotImplementedError

    def __call__(
        self, hidden: Tensor, targets: AnyTargets, gradients: HeadGradients | None, wants_hidden: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Sums [4] over the chunk (T^2 D, CE, teacher mass, agreement) and d hidden [C, H] when wanted.

        hidden [C, H]. gradients None: no gradient at all is computed.
        """
        num_rows = hidden.shape[0]
        logits = self.buffer("logits", num_rows, self.weight.dtype)
        Head(self.weight, self.bias).product(hidden, out=logits)
        sums = logits.new_zeros(4, dtype=self.dtype)
        factors = []
        for start in range(0, num_rows, self.block_rows or num_rows):
            block = slice(start, start + (self.block_rows or num_rows))
            block_sums, factor = self.block(logits[block], targets.rows(block), wants_grad=gradients is not None)
            sums += block_sums
            factors.append(factor)
        if gradients is None:
            return sums, None
        factor = torch.cat([f for f in factors if f is not None]) if self.takes_factor_out else None
        if gradients.weight is not None:
            scaled = hidden if factor is None else (hidden * factor).to(hidden.dtype)
            # beta 0 on the first chunk overwrites: no pass to zero a gradient as large as the head.
            if gradients.weight.dtype == hidden.dtype:
                gradients.weight.addmm_(logits.t(), scaled, beta=0 if self.is_first else 1)
            elif self.is_first:
                gradients.weight.copy_(logits.t() @ scaled)
            else:
                gradients.weight.add_(logits.t() @ scaled)
        if gradients.bias is not None:
            gradients.bias.add_(logits.sum(0, dtype=self.dtype))
        self.is_first = False
        if not wants_hidden:
            return sums, None
        grad = logits @ self.weight
        return sums, grad if factor is None else (grad * factor).to(grad.dtype)

    def buffer(self, name: str, num_rows: int, dtype: torch.dtype, width: int | None = None) -> Tensor:
        """The first rows of a buffer [rows, V or width] living as long as the call; the first use is the largest."""
        if name not in self.buffers:
            self.buffers[name] = self.weight.new_empty(num_rows, width or self.weight.shape[0], dtype=dtype)
        return self.buffers[name][:num_rows]

    def float_slice(self, part: Tensor) -> Tensor:
        """A slice of the logits in the dtype of the loss: itself, or a copy in a buffer that is reused."""
        if part.dtype == self.dtype:
            return part
        return self.buffer("slice", min(self.slice_rows, part.shape[0]), self.dtype)[: part.shape[0]].copy_(part)
