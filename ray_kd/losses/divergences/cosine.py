"""Cosine distance of the logits: D = 1 - cos(u, v), without T or T^2. Only for a teacher that sent its hidden states.

Compares directions of whole logit vectors, before any softmax: blind to the scale of either, so it says nothing about
how sure a student is (pair it with a term `ce`). A temperature has no part in it, nor has T^2. Shifting all logits
of one side by a constant changes it, unlike a divergence of probabilities.
The same quantity as `LigerFusedLinearCosineSimilarityLoss` of liger-kernel; Hsu et al. 2024, "Liger Kernel: Efficient
Triton Kernels for LLM Training", https://arxiv.org/abs/2410.10989
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_MIN_NORM = 1e-12


@dataclass(frozen=True)
class Config:
    """No options."""

    tails = ()
    compares_logits = True


def divergence(u: Tensor, v: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """Value [n] and dD/du [n, V] = (cos(u, v) u / |u| - v / |v|) / |u|; u and v are logits [n, V]."""
    u_norm = torch.linalg.vector_norm(u, dim=-1, keepdim=True).clamp(min=_MIN_NORM)
    v_norm = torch.linalg.vector_norm(v, dim=-1, keepdim=True).clamp(min=_MIN_NORM)
    cosine = (u * v).sum(-1, keepdim=True) / (u_norm * v_norm)
    return 1 - cosine[:, 0], (cosine * u / u_norm - v / v_norm) / u_norm
