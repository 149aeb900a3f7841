"""The head of a causal LM as tensors: what turns final hidden states into logits. torch only.

N tokens, D width, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Head:
    """softcap(scale * (hidden @ weight.T + bias)). `ray_kd.models.head_of` finds a model's."""

    weight: Tensor
    """[V, D]."""
    bias: Tensor | None = None
    """[V]."""
    softcap: float | None = None
    """logits = softcap * tanh(logits / softcap), as in Gemma 2 (https://arxiv.org/abs/2408.00118)."""
    scale: float = 1.0
    """Cohere multiplies by logit_scale, Granite divides by logits_scaling."""

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    @property
    def width(self) -> int:
        return self.weight.shape[1]

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [N, D] -> logits [N, V] float32; the product runs in the weight's dtype, as in the model itself."""
        return self.transform_(functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias).float())

    def product(self, hidden: Tensor, out: Tensor) -> None:
        """hidden @ weight.T + bias into out [N, V] of the weight's dtype: `transform_` is what is left to do."""
        if self.bias is None:
            torch.mm(hidden.to(self.weight.dtype), self.weight.t(), out=out)
        else:
            torch.addmm(self.bias, hidden.to(self.weight.dtype), self.weight.t(), out=out)

    def transform_(self, logits: Tensor) -> Tensor:
        """What the head does after the product, element by element and in place; it keeps their order."""
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def detach(self) -> "Head":
        """The same head, out of autograd."""
        return Head(self.weight.detach(), None if self.bias is None else self.bias.detach(), self.softcap, self.scale)

    def over(self, vocab_size: int | None) -> "Head":
        """The head of the first vocab_size ids, a view; None: of all. Raises ValueError when it has fewer."""
        if vocab_size is None:
            return self
        if vocab_size > self.vocab_size:
            raise ValueError(f"the head has {self.vocab_size} rows, less than {vocab_size}")
        bias = None if self.bias is None else self.bias[:vocab_size]
        return Head(self.weight[:vocab_size], bias, self.softcap, self.scale)

    def to(self, device: torch.device | str) -> "Head":
        """The same head on another device."""
        bias = None if self.bias is None else self.bias.to(device)
        return Head(self.weight.to(device), bias, self.softcap, self.scale)
