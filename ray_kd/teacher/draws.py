"""Unbiased sparse targets: K tokens drawn with replacement from the teacher's distribution q, and how often each came.

Sparse Logit Sampling, Anshumann et al., ACL 2025, https://arxiv.org/abs/2503.16870, with q itself as the proposal.

A token drawn n times has the probability n / K, so E[q_hat] = q for every token of the vocabulary. The gradient of
forward KL by a logit is (sum q_hat) p - q_hat = p - q_hat, linear in q_hat: its mean over draws is the dense gradient
p - q. That takes tail `drop` (p over the whole vocabulary; nothing lies outside the draws, their mass is 1) and
forward KL: `renormalize` and `bucket` make p depend on which tokens were drawn, other divergences are not linear in q.
The loss's value is not unbiased, only its gradient.

M target positions of a row, K draws.
"""

import numpy as np
from numpy.typing import NDArray


def uniforms(seed: int, row_id: int, num_positions: int, num_draws: int) -> NDArray[np.float64]:
    """[M, K] numbers in [0, 1) that depend on nothing but the arguments: not on the batch, the actor or the epoch.

    So a resumed run draws what it would have drawn; a row has the same draws in every epoch. More positions or another
    device change no earlier position.
    """
    return np.random.default_rng([seed, row_id]).random((num_positions, num_draws))


def count(drawn: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Draws [M, K] -> distinct ids [M, K], the most frequent first, and log(count / K); empty slots are -1 and -inf."""
    num_positions, num_draws = drawn.shape
    in_order = np.sort(drawn.astype(np.int64), axis=-1)
    is_new = np.ones(in_order.shape, dtype=np.bool_)
    is_new[:, 1:] = in_order[:, 1:] != in_order[:, :-1]
    place = np.cumsum(is_new, axis=-1) - 1 + num_draws * np.arange(num_positions)[:, None]
    counts = np.bincount(place.ravel(), minlength=drawn.size).reshape(drawn.shape)
    ids = np.full(drawn.size, -1, dtype=np.int64)
    ids[place.ravel()] = in_order.ravel()
    order = np.argsort(-counts, axis=-1, kind="stable")
    ids = np.take_along_axis(ids.reshape(drawn.shape), order, axis=-1)
    counts = np.take_along_axis(counts, order, axis=-1)
    with np.errstate(divide="ignore"):
        return ids, np.log(counts / num_draws).astype(np.float32)
