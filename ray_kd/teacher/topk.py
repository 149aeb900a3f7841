"""Top-k log-probabilities straight from hidden states.  N tokens, K top-k, V vocabulary, D width, G group size.

Costs one head product of [N, D] x [D, V] in tiles of the vocabulary, and a few passes over each tile, some rows at a
time so that they stay in cache (`jobs/benchmark_topk.py` measures it). The logits of a chunk exist for one tile at a
time; a few tokens times the whole vocabulary would need as little memory, but that product is up to twice as slow.

Only the K groups of G tokens with the largest maxima can hold a token of the top K: every token of another group is
beaten by K tokens, one in each of these. So each tile adds one maximum a group, and only K G logits a token are kept.
"""

import math

import torch
from torch import Tensor

from ray_kd.head import Head

CHUNK_SIZE = 512
GROUP_SIZE = 32
TILE_NBYTES = 2**24
"""Logits of a tile, in the head's dtype. The kept groups and a block in fp32 come on top, about half as much."""

_CPU_BLOCK = 2**20
"""Logits finished together on CPU, 4 MB in fp32: in cache, and large enough that threads seldom wait for each other."""

_DEVICE_BLOCK = 2**21
"""Elsewhere: enough to hide the launches, 8 MB in fp32."""


@torch.no_grad()
def topk_logprobs(
    hidden: Tensor, head: Head, top_k: int, temperature: float = 1.0, chunk_size: int = CHUNK_SIZE
) -> tuple[Tensor, Tensor]:
    """The K most likely tokens of each position and their full-vocabulary log-probabilities.

    hidden [N, D] -> ids [N, K] int64 and log_softmax(logits / temperature) [N, K] float32, most likely first.
    The logsumexp runs in float32. K = V gives the whole distribution. Non-finite hidden states give non-finite
    log-probabilities; the id beside a -inf is any id. Shapes do not depend on values, so nothing waits for a device.
    chunk_size: the most tokens of a product.
    """
    ids = torch.empty(len(hidden), top_k, dtype=torch.int64, device=hidden.device)
    logprobs = torch.empty(len(hidden), top_k, dtype=torch.float32, device=hidden.device)
    select = _select_by_groups
    if head.vocab_size < 4 * top_k * GROUP_SIZE:
        select, chunk_size = _select_from_all, max(1, min(chunk_size, TILE_NBYTES // (4 * head.vocab_size)))
    for start in range(0, len(hidden), chunk_size):
        rows = slice(start, start + chunk_size)
        values, ids[rows], logsumexp = select(hidden[rows], head, top_k, temperature)
        torch.sub(values, logsumexp, out=logprobs[rows])
    return ids, logprobs


def _select_from_all(hidden: Tensor, head: Head, top_k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """As `_select_by_groups`, where the kept groups would be a large part of the vocabulary."""
    logits = head.logits(hidden).div_(temperature)
    values, ids = logits.topk(top_k, dim=-1)
    return values, ids, logits.logsumexp(dim=-1, keepdim=True)


def _select_by_groups(hidden: Tensor, head: Head, top_k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """The largest logits / temperature [N, K] fp32, in order, their ids, and the logsumexp of all [N, 1]."""
    assert head.scale > 0, "groups are chosen by the product: the head must keep its order"
    num_rows, vocab_size, dtype = len(hidden), head.vocab_size, head.weight.dtype
    hidden = hidden.to(dtype)
    tile_groups = max(1, TILE_NBYTES // (num_rows * GROUP_SIZE * dtype.itemsize))
    tile_groups = min(tile_groups, -(-vocab_size // GROUP_SIZE))
    # Of each row the first K groups are the best so far, the others the tile's. At first nothing is: -inf.
    num_groups, kept = top_k + tile_groups, slice(0, top_k)
    logits = hidden.new_empty(num_rows, num_groups, GROUP_SIZE, dtype=dtype)
    maxima = hidden.new_empty(num_rows, num_groups, dtype=torch.float32)
    first_ids = hidden.new_zeros(num_rows, num_groups, dtype=torch.int64)
    logits[:, kept], maxima[:, kept] = -math.inf, -math.inf
    tile = logits.view(num_rows, -1)[:, top_k * GROUP_SIZE :]
    first_groups = torch.arange(0, num_rows * num_groups, num_groups, device=hidden.device)[:, None]
    logsumexps = []
    for start in range(0, vocab_size, tile_groups * GROUP_SIZE):
        part = slice(start, start + tile_groups * GROUP_SIZE)
        tile_head = Head(head.weight[part], None if head.bias is None else head.bias[part])
        width, tile_groups_here = tile_head.vocab_size, -(-tile_head.vocab_size // GROUP_SIZE)
        tile_head.product(hidden, out=tile[:, :width])
        tile[:, width : tile_groups_here * GROUP_SIZE] = -math.inf
        end = top_k + tile_groups_here
        padded = tile[:, : tile_groups_here * GROUP_SIZE]
        logsumexps.append(_logsumexp(padded, width, maxima[:, top_k:end], head, temperature))

        first_ids[:, top_k:end] = torch.arange(start, start + width, GROUP_SIZE, device=hidden.device)
        maxima[:, kept], best = maxima[:, :end].topk(top_k, dim=-1, sorted=False)
        first_ids[:, kept] = first_ids.gather(1, best)
        best_logits = logits.view(-1, GROUP_SIZE).index_select(0, (first_groups + best).flatten())
        logits[:, kept] = best_logits.view(num_rows, top_k, GROUP_SIZE)
        del best_logits
    values, places = logits[:, kept].reshape(num_rows, -1).topk(top_k, dim=-1)
    ids = first_ids.gather(1, places // GROUP_SIZE) + places % GROUP_SIZE
    # Past the vocabulary there is only the -inf that fills the last group.
    ids.clamp_(max=vocab_size - 1)
    return head.transform_(values.float()).div_(temperature), ids, torch.cat(logsumexps, -1).logsumexp(-1, keepdim=True)


def _logsumexp(logits: Tensor, width: int, maxima: Tensor, head: Head, temperature: float) -> Tensor:
    """Of the first `width` columns of a tile, in fp32 [N, 1]; writes the maximum of every group to maxima."""
    num_rows, num_columns = logits.shape
    block_rows = max(1, (_CPU_BLOCK if logits.device.type == "cpu" else _DEVICE_BLOCK) // num_columns)
    buffer = logits.new_empty(min(block_rows, num_rows), num_columns, dtype=torch.float32)
    logsumexps = []
    for start in range(0, num_rows, block_rows):
        rows = slice(start, start + block_rows)
        work = buffer[: len(logits[rows])].copy_(logits[rows])
        maxima[rows] = work.view(len(work), -1, GROUP_SIZE).amax(-1)
        work = head.transform_(work[:, :width])
        # Finite also where a head masks every token of the tile.
        top = head.transform_(maxima[rows].amax(-1, keepdim=True)).clamp_(min=-1e30)
        work.sub_(top)
        if temperature != 1.0:
            work.div_(temperature)
        logsumexps.append(work.exp_().sum(-1, keepdim=True).log_() + top / temperature)
    return torch.cat(logsumexps)
