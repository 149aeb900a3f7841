"""Top-k log-probabilities straight from hidden states.  N tokens, K top-k, V vocabulary, D width.

Costs one head product of [N, D] x [D, V]; the logits exist for `chunk` tokens at a time.
"""

import torch
from torch import Tensor

from ray_kd.models import Head

CHUNK_SIZE = 256


@torch.no_grad()
def topk_logprobs(
    hidden: Tensor, head: Head, top_k: int, temperature: float = 1.0, chunk_size: int = CHUNK_SIZE
) -> tuple[Tensor, Tensor]:
    """The K most likely tokens of each position and their full-vocabulary log-probabilities.

    hidden [N, D] -> ids [N, K] int64 and log_softmax(logits / temperature) [N, K] float32, most likely first.
    The logsumexp runs in float32. K = V gives the whole distribution. Non-finite hidden states give non-finite
    log-probabilities.
    """
    ids = torch.empty(len(hidden), top_k, dtype=torch.int64, device=hidden.device)
    logprobs = torch.empty(len(hidden), top_k, dtype=torch.float32, device=hidden.device)
    for start in range(0, len(hidden), chunk_size):
        logits = head.logits(hidden[start : start + chunk_size])
        if temperature != 1.0:
            logits.div_(temperature)
        values, indices = logits.topk(top_k, dim=-1)
        ids[start : start + chunk_size] = indices
        torch.sub(values, logits.logsumexp(dim=-1, keepdim=True), out=logprobs[start : start + chunk_size])
    return ids, logprobs
