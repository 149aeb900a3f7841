"""Tokens drawn from a head's distribution.  N tokens, K draws, V vocabulary, D width.

Costs one head product of [N, D] x [D, V] and passes over all of it in fp32 and fp64: two to three times `topk.py`.
"""

import torch
from torch import Tensor

from ray_kd.head import Head

CHUNK_SIZE = 512
CHUNK_NBYTES = 2**24
"""Of the fp64 cumulated probabilities of a chunk, which has at least one row."""


@torch.no_grad()
def sample_tokens(
    hidden: Tensor, head: Head, uniforms: Tensor, temperature: float = 1.0, chunk_size: int = CHUNK_SIZE
) -> Tensor:
    """hidden [N, D] and numbers in [0, 1) [N, K] float64 -> ids [N, K] int64 drawn from softmax(logits / temperature).

    By inverting the cumulated probabilities, summed in float64: one number makes one draw, so the draws depend on
    nothing but the logits and the numbers. A row whose probabilities are not finite is -1 throughout.
    """
    ids = torch.empty_like(uniforms, dtype=torch.int64)
    chunk_size = max(1, min(chunk_size, CHUNK_NBYTES // (8 * head.vocab_size)))
    for start in range(0, len(hidden), chunk_size):
        rows = slice(start, start + chunk_size)
        logits = head.logits(hidden[rows]).div_(temperature)
        cumulated = logits.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
        total = cumulated[:, -1:]
        # The first token whose sum lies above the number: never one of probability zero.
        drawn = torch.searchsorted(cumulated, uniforms[rows] * total, right=True)
        ids[rows] = torch.where(total.isfinite(), drawn.clamp_(max=head.vocab_size - 1), -1)
    return ids
