"""One number for three divergences: beta = 0 is forward KL, beta = 1 reverse KL, else the generalised Jensen-Shannon.

The value jumps at both ends, where the Jensen-Shannon goes to 0 and the KLs do not.
Agarwal et al. 2023, "On-Policy Distillation of Language Models", https://arxiv.org/abs/2306.13649
"""

from dataclasses import dataclass

from torch import Tensor

from ray_kd.errors import ConfigError
from ray_kd.losses.divergences import forward_kl, jsd, reverse_kl


@dataclass(frozen=True)
class Config:
    """The place between forward and reverse KL."""

    beta: float = 0.5
    """0 is forward KL, 1 is reverse KL, between them the Jensen-Shannon with this beta."""

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise ConfigError(f"gkd: beta={self.beta} is outside [0, 1]")

    @property
    def tails(self) -> tuple[str, ...]:
        return ("bucket", "renormalize", "drop") if self.beta == 0 else ("bucket", "renormalize")


def divergence(log_p: Tensor, log_q: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """Value [n] and dD/d(log p) [n, S] of the divergence that beta selects."""
    if config.beta == 0:
        return forward_kl.divergence(log_p, log_q, forward_kl.Config())
    if config.beta == 1:
        return reverse_kl.divergence(log_p, log_q, reverse_kl.Config())
    return jsd.divergence(log_p, log_q, jsd.Config(config.beta))
