"""Generalised Jensen-Shannon: D = beta KL(q||m) + (1 - beta) KL(p||m), m = beta q + (1 - beta) p.

Bounded. It goes to 0 at both ends of beta, so it does not interpolate between the two KLs.
Agarwal et al. 2023, "On-Policy Distillation of Language Models", https://arxiv.org/abs/2306.13649
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ray_kd.errors import ConfigError


@dataclass(frozen=True)
class Config:
    """The weight of the teacher in the mixture."""

    beta: float = 0.5
    """Weight of the teacher in the mixture m, strictly between 0 and 1."""

    def __post_init__(self) -> None:
        if not 0 < self.beta < 1:
            raise ConfigError(
                f"jsd: beta={self.beta} is outside (0, 1); the ends are the kinds forward_kl and reverse_kl"
            )


def divergence(log_p: Tensor, log_q: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """Value [n] and dD/d(log p) [n, S] = (1 - beta) p log(p/m); log m by logaddexp, so no log(0)."""
    beta = config.beta
    log_m = torch.logaddexp(math.log(beta) + log_q, math.log1p(-beta) + log_p)
    score = (1 - beta) * log_p.exp() * (log_p - log_m)
    return (beta * log_q.exp() * (log_q - log_m) + score).sum(-1), score
