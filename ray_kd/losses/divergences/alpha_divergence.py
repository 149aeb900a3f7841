"""Alpha-divergence: D = sum [alpha q + (1 - alpha) p - q^alpha p^(1 - alpha)] / (alpha (1 - alpha)).

Where p and q are normalised this is (1 - sum q^alpha p^(1 - alpha)) / (alpha (1 - alpha)). It tends to forward KL at
alpha = 1 and to reverse KL at alpha = 0; alpha = 0.5 is 2 sum (sqrt q - sqrt p)^2 (Hellinger).
Minka 2005, "Divergence measures and message passing"; in distillation:
Wang, Gong, Li, Liu, Chandra 2021, "AlphaNet", https://arxiv.org/abs/2102.07954
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ray_kd.errors import ConfigError


@dataclass(frozen=True)
class Config:
    """The place between reverse and forward KL."""

    alpha: float = 0.5
    """Power of the teacher, strictly between 0 (towards reverse KL) and 1 (towards forward KL)."""

    tails = ("bucket", "renormalize", "drop")

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise ConfigError(
                f"alpha_divergence: alpha={self.alpha} is outside (0, 1); "
                "the ends are the kinds reverse_kl (0) and forward_kl (1)"
            )


def divergence(log_p: Tensor, log_q: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """Value [n] and dD/d(log p) [n, S] = (p - q^alpha p^(1 - alpha)) / alpha. With `drop` the optimum is p = q.

    The score is the larger of its two terms times expm1 of their log-ratio: no overflow, no cancellation near p = q.
    """
    power = config.alpha * (log_q - log_p)
    score = torch.exp(log_p + power.relu()) * torch.expm1(-power.abs()) * power.sign() / config.alpha
    return (score + log_q.exp() - log_p.exp()).sum(-1) / (1 - config.alpha), score
