"""Reverse KL: D = sum p log(p/q). Seeks the teacher's main modes and leaves what the teacher finds unlikely.

Gu, Dong, Wei, Huang 2023, "MiniLLM", https://arxiv.org/abs/2306.08543
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Config:
    """No options."""


def divergence(log_p: Tensor, log_q: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """Value [n] and dD/d(log p) [n, S] = p log(p/q), up to a term proportional to p."""
    terms = log_p.exp() * (log_p - log_q)
    return terms.sum(-1), terms
