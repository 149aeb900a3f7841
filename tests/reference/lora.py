"""Slow twin of LoRA and DoRA: the adapted weight, written out."""

import torch
from torch import Tensor


def adapted_weight(weight: Tensor, a: Tensor, b: Tensor, scale: float, magnitude: Tensor | None = None) -> Tensor:
    """weight [out, in], a [r, in], b [out, r], magnitude [out] for DoRA, whose norm has no gradient (section 4.3)."""
    rows = []
    for i in range(weight.shape[0]):
        row = weight[i] + scale * torch.stack([b[i, k] * a[k] for k in range(len(a))]).sum(0)
        rows.append(row if magnitude is None else magnitude[i] * row / row.detach().pow(2).sum().pow(0.5))
    return torch.stack(rows)
