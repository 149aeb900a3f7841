"""Total variation: D = 1/2 sum |p - q|. Bounded by 1, symmetric, and indifferent to ratios of small probabilities.

Its gradient does not fade near the optimum: |p - q| has a kink at 0, where the derivative jumps by p and the score is
taken as 0. A student that is almost right keeps oscillating by the learning rate, and rounding decides a sign where
p and q agree to the precision of the logits.
Wen, Li, Du, Mou 2023, "f-Divergence Minimization for Sequence-Level Knowledge Distillation",
https://arxiv.org/abs/2307.15190
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Config:
    """No options."""

    tails = ("bucket", "renormalize", "drop")


def divergence(log_p: Tensor, log_q: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """Value [n] and dD/d(log p) [n, S] = 1/2 p sign(p - q). With `drop` the optimum is p = q on the K tokens."""
    p = log_p.exp()
    return (p - log_q.exp()).abs().sum(-1) / 2, p * (log_p - log_q).sign() / 2
