"""Adaptive KL: D = w KL(q||p) + (1 - w) KL(p||q), w the share of the gap |p - q| that lies in the teacher's head.

Head: the fewest outcomes, likeliest first, whose teacher mass reaches mu; the bucket is an outcome like any other, and
with renormalize mu is a share of the K tokens' mass. Code in circulation counts the one that crosses mu to the tail.
A student that is wrong about the head is pulled by forward KL, one that is wrong about the tail by reverse KL.
w is a constant of the gradient (that code detaches it): the score is the derivative of D at the w of this step, without
the change of w itself, and finite differences of the value show another number. Whatever w, it vanishes at p = q only.
Wu et al. 2024, "Rethinking Kullback-Leibler Divergence in Knowledge Distillation", https://arxiv.org/abs/2404.02657
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ray_kd.errors import ConfigError
from ray_kd.losses.divergences import forward_kl, reverse_kl


@dataclass(frozen=True)
class Config:
    """Where the teacher's head ends."""

    mu: float = 0.5
    """The head ends where the teacher's cumulative mass reaches this, strictly between 0 and 1."""

    def __post_init__(self) -> None:
        if not 0 < self.mu < 1:
            raise ConfigError(
                f"adaptive_kl: mu={self.mu} is outside (0, 1); the ends are the kinds reverse_kl and forward_kl"
            )


def divergence(log_p: Tensor, log_q: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """Value [n] and dD/d(log p) [n, S] = w (-q) + (1 - w) p log(p/q) at fixed w. Costs a sort of each row."""
    forward, forward_score = forward_kl.divergence(log_p, log_q, forward_kl.Config())
    reverse, reverse_score = reverse_kl.divergence(log_p, log_q, reverse_kl.Config())
    w = _head_share(log_p.detach(), log_q, config.mu)
    return w[:, 0] * forward + (1 - w[:, 0]) * reverse, w * forward_score + (1 - w) * reverse_score


def _head_share(log_p: Tensor, log_q: Tensor, mu: float) -> Tensor:
    """w [n, 1]: the gap on the head over the gap on everything."""
    q, order = log_q.exp().sort(dim=-1, descending=True, stable=True)
    gap = (log_p.exp().gather(-1, order) - q).abs()
    is_head = q.cumsum(-1) - q < mu
    head = torch.where(is_head, gap, 0.0).sum(-1, keepdim=True)
    tail = torch.where(is_head, 0.0, gap).sum(-1, keepdim=True)
    # Where p = q there is no gap to share, and nothing that w would weigh.
    return head / (head + tail).clamp(min=torch.finfo(q.dtype).tiny)
