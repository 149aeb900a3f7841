"""How much each neuron, head and channel of a teacher does, from forwards alone (Minitron, arXiv 2407.14679, 2.2).

neuron i    |x_i|, x the input of down_proj: what the gated MLP hands on
head i      ||a_i||_2, a_i its part of the input of o_proj: softmax(q k^T) v, before the heads are mixed
channel i   |n_i|, n the output of a norm on the residual stream

each averaged over the tokens of a row, then the L2 norm over rows: sqrt(sum_b mean_t(.)^2), of the aggregations in the
paper the one it goes on with (batch L2, sequence mean). In: packed rows. Cost: one forward over them, and the
activations of one block at a time; what is kept is one number per neuron, head and channel.

B rows of a batch, T tokens, L layers, I intermediate size, Q query heads, H hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ray_kd.models.decoder import base_causal_lm, decoder_hidden, decoder_of
from ray_kd.models.rows import real_tokens


@dataclass(frozen=True, eq=False)
class Importance:
    """Scores, float64; higher matters more. They compare within a row of each array only."""

    neurons: NDArray[np.float64]
    """[L, I]."""
    heads: NDArray[np.float64]
    """[L, Q]."""
    channels: NDArray[np.float64]
    """[L + 1, H]: the sum of the two norms of each layer, and last the final norm."""


@torch.no_grad()
def width_importance(
    model: nn.Module, input_ids: NDArray[np.integer], position_ids: NDArray[np.integer], batch_size: int = 4
) -> Importance:
    """The scores on packed rows (input_ids, position_ids [n, T]) of a model that `widths.ARCHITECTURES` names.

    Padding does not count, as in `block_influence`. The same rows in the same batches give the same scores.
    """
    decoder: Any = decoder_of(model)
    device = base_causal_lm(model).device
    num_heads = base_causal_lm(model).config.num_attention_heads
    squares: dict[tuple[str, int], Tensor] = {}
    weights = torch.empty(0)  # [B, T]: 1 / (tokens of the row), 0 for padding

    def add(kind: str, layer: int, size_BTX: Tensor) -> None:
        wide = size_BTX.to(torch.promote_types(size_BTX.dtype, torch.float32))
        means_BX = torch.einsum("btx,bt->bx", wide, weights.to(wide.dtype)).double()
        squares[kind, layer] = squares.get((kind, layer), 0.0) + means_BX.square().sum(0).cpu()

    def on_input(kind: str, layer: int, size: Callable[[Tensor], Tensor]) -> Any:
        return lambda module, args: add(kind, layer, size(args[0]))

    def on_output(kind: str, layer: int) -> Any:
        return lambda module, args, output: add(kind, layer, output.abs())

    def norm_of_heads(mixed: Tensor) -> Tensor:
        wide = mixed.to(torch.promote_types(mixed.dtype, torch.float32))
        return torch.linalg.vector_norm(wide.unflatten(-1, (num_heads, -1)), dim=-1)

    num_layers = len(decoder.layers)
    handles = [decoder.norm.register_forward_hook(on_output("final", num_layers))]
    for index, layer in enumerate(decoder.layers):
        handles += [
            layer.mlp.down_proj.register_forward_pre_hook(on_input("neurons", index, torch.abs)),
            layer.self_attn.o_proj.register_forward_pre_hook(on_input("heads", index, norm_of_heads)),
            layer.input_layernorm.register_forward_hook(on_output("before attention", index)),
            layer.post_attention_layernorm.register_forward_hook(on_output("before mlp", index)),
        ]
    real = real_tokens(input_ids, position_ids)
    try:
        for start in range(0, len(input_ids), batch_size):
            rows = slice(start, start + batch_size)
            counts = real[rows].sum(axis=1, keepdims=True).clip(min=1)
            weights = torch.from_numpy(real[rows] / counts).to(device)
            ids, positions = (torch.from_numpy(column[rows]).to(device) for column in (input_ids, position_ids))
            decoder_hidden(model, ids, positions)
    finally:
        for handle in handles:
            handle.remove()
    scores = {key: total.sqrt().numpy() for key, total in squares.items()}
    each = range(num_layers)
    channels = [scores["before attention", i] + scores["before mlp", i] for i in each]
    return Importance(
        neurons=np.stack([scores["neurons", i] for i in each]),
        heads=np.stack([scores["heads", i] for i in each]),
        channels=np.stack([*channels, scores["final", num_layers]]),
    )
