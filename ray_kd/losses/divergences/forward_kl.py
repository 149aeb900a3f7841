"""Forward KL: D = sum q log(q/p). Covers every mode of the teacher.

Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network", https://arxiv.org/abs/1503.02531
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Config:
    """No options."""

    tails = ("bucket", "renormalize", "drop")


def divergence(log_p: Tensor, log_q: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """Value [n] and dD/d(log p) [n, S] = -q. With `drop` the optimum is p = q / sum q on the K tokens."""
    q = log_q.exp()
    return (q * (log_q - log_p)).sum(-1), -q
