"""Skewed reverse KL: D = sum p log(p/m), m = (1 - alpha) q + alpha p. Reverse KL with a bounded log-ratio.

Bounded by -log alpha: a token that the teacher finds all but impossible is pushed down with at most
p (log(1 / alpha) - 1 + alpha), where reverse KL pushes with p log(p/q). alpha = 0 is reverse KL.
Ko, Kim, Chen, Yun 2024, "DistiLLM", https://arxiv.org/abs/2402.03898
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ray_kd.errors import ConfigError


@dataclass(frozen=True)
class Config:
    """The weight of the student in the mixture."""

    alpha: float = 0.1
    """Weight of the student in the mixture m, from 0 (reverse KL) to below 1."""

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < 1:
            raise ConfigError(
                f"skew_reverse_kl: alpha={self.alpha} is outside [0, 1); at 1 the teacher has no part in m"
            )


def divergence(log_p: Tensor, log_q: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """Value [n] and dD/d(log p) [n, S] = p (log(p/m) + (1 - alpha) (q/m - 1)), up to a term proportional to p.

    q/m is at most 1 / (1 - alpha), so nothing overflows; both terms are small where p and q agree.
    """
    alpha = config.alpha
    log_m = torch.logaddexp(math.log1p(-alpha) + log_q, (math.log(alpha) if alpha else -math.inf) + log_p)
    p, log_ratio = log_p.exp(), log_p - log_m
    return (p * log_ratio).sum(-1), p * (log_ratio + (1 - alpha) * torch.expm1(log_q - log_m))
