"""Skewed forward KL: D = sum q log(q/m), m = alpha q + (1 - alpha) p. Forward KL that gives up on hopeless tokens.

Bounded by -log alpha: a token with p far below alpha q pulls with (1 - alpha) p / alpha, forward KL with q.
alpha = 0 is forward KL. With `drop` the optimum is that of forward KL, p = q / sum q on the K tokens.
Ko, Kim, Chen, Yun 2024, "DistiLLM", https://arxiv.org/abs/2402.03898
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ray_kd.errors import ConfigError


@dataclass(frozen=True)
class Config:
    """The weight of the teacher in the mixture."""

    alpha: float = 0.1
    """Weight of the teacher in the mixture m, from 0 (forward KL) to below 1."""

    tails = ("bucket", "renormalize", "drop")

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < 1:
            raise ConfigError(
                f"skew_forward_kl: alpha={self.alpha} is outside [0, 1); at 1 the student has no part in m"
            )


def divergence(log_p: Tensor, log_q: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """Value [n] and dD/d(log p) [n, S] = -(1 - alpha) p q / m; log m by logaddexp, so no log(0)."""
    alpha = config.alpha
    log_student = math.log1p(-alpha) + log_p
    log_m = torch.logaddexp((math.log(alpha) if alpha else -math.inf) + log_q, log_student)
    q = log_q.exp()
    return (q * (log_q - log_m)).sum(-1), -q * torch.exp(log_student - log_m)
