"""What a teacher says of one packed row, from the definition: the whole row alone, its documents kept apart by a mask
that is written down, one target at a time."""

import torch
from torch import Tensor, nn

from tests.reference.topk import full_logprobs


@torch.no_grad()
def row_logprobs(model: nn.Module, ids: Tensor, labels: Tensor, positions: Tensor) -> Tensor:
    """[M, V] float64 after each target of a row [T]: the next token is of the same document and has a label."""
    num_tokens = len(ids)
    document = (positions == 0).cumsum(0)
    hidden_from = torch.full((num_tokens, num_tokens), -torch.inf, dtype=model.dtype)
    for reader in range(num_tokens):
        for read in range(reader + 1):
            if document[reader] == document[read]:
                hidden_from[reader, read] = 0
    hidden = model.model(
        input_ids=ids[None], position_ids=positions[None], attention_mask=hidden_from[None, None], use_cache=False
    ).last_hidden_state[0]
    targets = [t for t in range(num_tokens - 1) if document[t] == document[t + 1] and labels[t + 1] != -100]
    if not targets:
        return torch.empty(0, model.config.vocab_size, dtype=torch.float64)
    return full_logprobs(hidden[targets], model.lm_head.weight)
