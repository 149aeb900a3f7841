"""What the layers of a causal LM compute besides its final hidden states: their outputs and their attention.

In: packed rows, input_ids and position_ids [B, T]. Out: hidden states [B, T, D] and attention probabilities
[B, h, T, T] of chosen layers. Attention costs: it exists with transformers' eager attention alone, and that makes the
maps of all layers, `attention_nbytes`, where sdpa makes none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ray_kd.errors import ConfigError
from ray_kd.models.decoder import base_causal_lm, decoder_of

EAGER = "eager"
_WITH_MAPS = {"full_attention", "sliding_attention", "chunked_attention"}
"""Kinds of layers in a config's `layer_types` that compute attention probabilities."""


@dataclass(frozen=True)
class DecoderOutputs:
    """One forward of the decoder."""

    last: Tensor
    """Final-normed hidden states [B, T, D], as of `decoder_hidden`."""
    hidden: list[Tensor]
    """[B, T, D] of each layer that was asked for, in that order."""
    attentions: list[Tensor]
    """[B, h, T, T] of each layer that was asked for, in that order; 0 where a token does not see another."""


def decoder_outputs(
    model: nn.Module,
    input_ids: Tensor,
    position_ids: Tensor,
    hidden_layers: Sequence[int] = (),
    attention_layers: Sequence[int] = (),
) -> DecoderOutputs:
    """`decoder_hidden`, with what chosen layers computed on the way. Documents do not see each other.

    hidden_layers: 0 is the embeddings' output, i the output of the i-th layer, the number of layers L the final-normed
    one. attention_layers: 0 to L - 1. Raises ConfigError when the model gives no map for each of its layers, as it does
    with any attention but eager.
    """
    chosen: dict[str, Any] = {"output_hidden_states": list(hidden_layers)} if hidden_layers else {}
    if attention_layers:
        chosen["output_attentions"] = True
    output = decoder_of(model)(
        input_ids=input_ids.long(), position_ids=position_ids.long(), attention_mask=None, use_cache=False, **chosen
    )
    attentions = list(output.attentions or ()) if attention_layers else []
    if attention_layers and (len(attentions) != _num_layers(model) or any(maps is None for maps in attentions)):
        base: Any = base_causal_lm(model)
        raise ConfigError(
            f"{type(base).__name__} with {base.config._attn_implementation} attention gives maps of {len(attentions)} "
            f"of its {_num_layers(model)} layers: allowed for attention losses is a model whose layers all give one, "
            f"loaded with attn_implementation={EAGER}"
        )
    return DecoderOutputs(
        output.last_hidden_state,
        [output.hidden_states[layer] for layer in hidden_layers],
        [attentions[layer] for layer in attention_layers],
    )


@torch.no_grad()
def check_attentions(model: nn.Module) -> None:
    """Measure on two documents of two tokens that each layer gives a map, and none that crosses them.

    Raises ConfigError naming the architecture. One forward of four tokens. Not under ZeRO-3.
    """
    base: Any = base_causal_lm(model)
    device = base.get_input_embeddings().weight.device
    tokens = torch.arange(4, device=device)[None]
    layers = range(_num_layers(model))
    maps = decoder_outputs(model, tokens, torch.tensor([[0, 1, 0, 1]], device=device), (), layers).attentions
    for layer, found in enumerate(maps):
        is_map = found.ndim == 4 and found.shape[-2:] == (4, 4) and bool((found[..., :2, 2:] == 0).all())
        if not is_map or bool((found[..., 2:, :2] != 0).any()):
            raise ConfigError(
                f"{type(base).__name__}: what layer {layer} gives as attention, {list(found.shape)}, is no map of "
                "documents that are apart; it cannot be used for attention losses"
            )


def check_attention_support(config: PreTrainedConfig, key: str) -> None:
    """Refuse by its config a model that does not give the attention of each of its layers. Loads no weights.

    key: who asks, for the message. Raises ConfigError for an architecture without attention, or with it in some layers.
    """
    text: Any = config.get_text_config()
    types = list(getattr(text, "layer_types", None) or [])
    others = sorted(set(types) - _WITH_MAPS)
    architecture: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    recorded = getattr(architecture, "_can_record_outputs", None)
    # Older architectures of transformers do not say what they record: `check_attentions` measures those.
    gives_none = recorded is not None and "attentions" not in recorded
    if others or gives_none or getattr(text, "num_attention_heads", None) is None:
        what = f"has layers of {', '.join(others)}" if others else "gives no attention maps"
        raise ConfigError(
            f"{key}: model_type {config.model_type} {what}: allowed is a model with attention in all layers"
        )


def attention_nbytes(config: PreTrainedConfig, num_rows: int, length: int, itemsize: int) -> int:
    """Bytes of the maps of all layers that one eager forward of num_rows x length tokens makes."""
    text: Any = config.get_text_config()
    return int(text.num_hidden_layers * text.num_attention_heads * num_rows * length**2 * itemsize)


def _num_layers(model: nn.Module) -> int:
    base: Any = base_causal_lm(model)
    return int(base.config.get_text_config().num_hidden_layers)
