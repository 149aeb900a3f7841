"""The teacher's log-probabilities straight from the definition: float64, the whole vocabulary, one token at a time."""

import torch
from torch import Tensor


def full_logprobs(hidden: Tensor, weight: Tensor, bias=None, softcap=None, scale=1.0, temperature=1.0) -> Tensor:
    """[N, V] float64: log of softmax(softcap * tanh(scale * (W h + b) / softcap) / temperature).

    The product is rounded to the weight's dtype, as in the model: that is where half precision rounds.
    """
    rows = []
    for token in hidden:
        logits = weight.double() @ token.double()
        if bias is not None:
            logits = logits + bias.double()
        logits = logits.to(weight.dtype).double() * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        below = (logits - logits.max()) / temperature
        rows.append(below - torch.log(torch.exp(below).sum()))
    return torch.stack(rows)
