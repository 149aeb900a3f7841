"""A causal LM in two halves: the decoder without its head, and the head.

In: packed rows, input_ids and position_ids [B, T]. Out: final-normed hidden states [B, T, D]; logits [N, V] only for
the positions asked for, so the vocabulary-sized product is never paid for prompt and padding tokens.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ray_kd.errors import ConfigError
from ray_kd.head import Head

if TYPE_CHECKING:  # three seconds to import, which the driver can do without
    from transformers import PreTrainedModel


def base_causal_lm(model: nn.Module) -> "PreTrainedModel":
    """The transformers model itself, out of a peft wrapper if it is in one."""
    wrapped: Any = model
    inner = wrapped.get_base_model() if hasattr(model, "get_base_model") else model
    from transformers import PreTrainedModel

    assert isinstance(inner, PreTrainedModel)
    return inner


def decoder_of(model: nn.Module) -> nn.Module:
    """The decoder of a causal LM: embeddings, layers and final norm, no head."""
    base: Any = base_causal_lm(model)  # torch types every attribute of a module as Tensor | Module
    decoder = base.get_decoder()
    assert isinstance(decoder, nn.Module)
    return decoder


def decoder_hidden(model: nn.Module, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """Final-normed hidden states [B, T, D] of packed rows; documents do not see each other.

    input_ids, position_ids: integer [B, T]; position_ids restart at 0 with each document.
    Without an attention mask and a cache transformers reads the documents out of position_ids; with an all-ones mask
    or the default cache they would silently attend to each other (`check_architecture` measures it).
    """
    output = decoder_of(model)(
        input_ids=input_ids.long(), position_ids=position_ids.long(), attention_mask=None, use_cache=False
    )
    hidden: Tensor = output.last_hidden_state
    return hidden


def head_of(model: nn.Module) -> Head:
    """The head of a loaded model; weight and bias are the model's own tensors, not copies.

    Raises ConfigError for a model without an output projection. What cannot be seen from the config
    (a multiplier with a name of its own) is caught by `check_architecture`.
    """
    base = base_causal_lm(model)
    projection = base.get_output_embeddings()
    if projection is None:
        raise ConfigError(f"{type(base).__name__} has no output projection (lm_head)")
    softcap, scale = _transform(base.config)
    return Head(
        weight=projection.weight.detach(),
        bias=None if getattr(projection, "bias", None) is None else projection.bias.detach(),
        softcap=softcap,
        scale=scale,
    )


def require_plain_head(config: PreTrainedConfig) -> None:
    """Refuse a student whose head is not a bare matmul: the fused loss works on lm_head.weight and bias alone."""
    softcap, scale = _transform(config)
    if softcap is not None or scale != 1.0:
        what = f"caps its logits at {softcap}" if softcap is not None else f"scales its logits by {scale}"
        raise ConfigError(
            f"student: model_type {config.model_type} {what}; a student needs a plain lm_head (it is fine as a teacher)"
        )


def _transform(config: PreTrainedConfig) -> tuple[float | None, float]:
    """(softcap, scale) of the head, as far as the config says it."""
    text = config.get_text_config()
    scale = 1.0
    for name, power in (("logit_scale", 1), ("lm_head_multiplier", 1), ("logits_scaling", -1)):
        value = getattr(text, name, None)
        if value is not None:
            scale *= float(value) ** power
    return getattr(text, "final_logit_softcapping", None), scale


@torch.no_grad()
def check_architecture(model: nn.Module) -> None:
    """Measure on a few tokens that packed documents are independent and that `Head` gives the model's logits.

    Architectures that ignore position_ids (learned positions from a mask, state-space layers) would train on documents
    that see each other, and heads with a multiplier of their own would give wrong targets; neither fails by itself.
    Raises ConfigError naming the architecture. Costs three forwards of at most 2 x 12 tokens. Not under ZeRO-3.
    """
    base: Any = base_causal_lm(model)
    name, device, dtype = type(base).__name__, base.device, next(base.parameters()).dtype
    vocab = base.get_input_embeddings().num_embeddings
    was_training = model.training
    model.eval()
    # Two rows with different first documents and the same second one.
    spread = (torch.arange(24, device=device) * 7919 + 11) % vocab
    first, second = spread[:16].view(2, 8), spread[16:20].expand(2, 4)
    positions = torch.cat([torch.arange(8), torch.arange(4)]).expand(2, 12).to(device)
    packed = decoder_hidden(model, torch.cat([first, second], dim=1), positions)[:, 8:].float()
    alone = decoder_hidden(model, second[:1], positions[:1, 8:]).float()
    head = head_of(model)
    # A model on several devices may have its head on another one than its last layer.
    logits = base(input_ids=second[:1], use_cache=False).logits[0].float().to(head.weight.device)
    model.train(was_training)

    tolerance = 1e-3 if dtype in (torch.float32, torch.float64) else 5e-2
    size = alone.norm()
    if (packed[0] - packed[1]).norm() > tolerance * size or (packed[0] - alone[0]).norm() > 2 * tolerance * size:
        raise ConfigError(f"{name} lets packed documents see each other (it ignores position_ids); it cannot be used")
    ours = head.logits(alone[0].to(head.weight.device))
    if ours.shape != logits.shape or (ours - logits).norm() > tolerance * logits.norm():
        raise ConfigError(f"{name} does not compute its logits as lm_head(hidden) with a known cap or scale")
