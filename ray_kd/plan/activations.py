"""What a student's forward keeps for its backward, counted on fake tensors of the real shapes: no memory, no weights.

Autograd says what it saves (torch.autograd.graph.saved_tensors_hooks), each storage once; the weights and what is made
again do not count. A model of one layer and one of two are traced, and the others are as the second:

    without checkpointing   A(L) = A(1) + (L - 1) (A(2) - A(1))
    with it                 the same of the checkpointed model, and one layer's share of the other, which is being
                            recomputed (Chen et al. 2016, https://arxiv.org/abs/1604.06174)

Korthikanti et al. 2022 (https://arxiv.org/abs/2205.05198), section 4, count the same by hand for GPT: per layer and
token 34 H + 5 heads T bytes in half precision, the latter gone with sdpa. Here it depends on the architecture
(grouped heads, gated MLPs, norms in float32), which is why it is traced. A packed row has a mask [B, 1, T, T], which
sdpa keeps in the model's type for each layer.
"""

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, PreTrainedConfig

from ray_kd import models
from ray_kd.config import Student


@dataclass(frozen=True)
class Activations:
    """Bytes that one micro-batch keeps between its forward and its backward."""

    nbytes: int
    recomputed: int
    """Of one layer, on top while it is recomputed; 0 without gradient checkpointing."""


def activations_of(config: PreTrainedConfig, student: Student, rows: int, length: int, is_eager: bool) -> Activations:
    """Of a decoder with this config, for micro-batches of rows x length tokens. 0.2 to 2 seconds.

    is_eager: attention as feature terms need it, which keeps its maps. Parts of `student.freeze` count as if they
    trained, since a part that is frozen may still have to pass a gradient on.
    """
    plain = [_saved(config, layers, student, rows, length, is_eager, checkpoints=False) for layers in (1, 2)]
    per_layer, num_layers = plain[1] - plain[0], int(config.get_text_config().num_hidden_layers)
    if not student.gradient_checkpointing:
        return Activations(plain[0] + (num_layers - 1) * per_layer, 0)
    kept = [_saved(config, layers, student, rows, length, is_eager, checkpoints=True) for layers in (1, 2)]
    return Activations(kept[0] + (num_layers - 1) * (kept[1] - kept[0]), per_layer)


def _saved(
    config: PreTrainedConfig, layers: int, student: Student, rows: int, length: int, is_eager: bool, checkpoints: bool
) -> int:
    """Bytes that autograd keeps of a forward of a model with so many of the layers."""
    cut = copy.deepcopy(config) if int(config.num_hidden_layers) <= layers else models.config_of_layers(config, layers)
    saved: dict[int, Any] = {}
    dtype = getattr(torch, student.dtype)
    with models.quiet(), torch.device("meta"):
        base = AutoModelForCausalLM.from_config(cut, attn_implementation="eager" if is_eager else "sdpa", dtype=dtype)
        model = models.choose_trainable(base, student.lora, ()).train()
    # transformers warns of its methods' new names.
    with warnings.catch_warnings(action="ignore", category=FutureWarning), FakeTensorMode():
        if checkpoints:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        _as_if_on_cpu(model, dtype)
        own = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                saved[storage._cdata] = storage  # held, so that no other storage gets its address
            return tensor

        tokens = torch.zeros(rows, length, dtype=torch.long)
        decoder = models.decoder_of(model)
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            output = decoder(
                input_ids=tokens,
                position_ids=tokens,
                attention_mask=_mask(rows, length, is_eager, dtype),
                use_cache=False,
                **({"output_attentions": True} if is_eager else {}),
            )
        for maps in output.attentions or () if is_eager else ():
            keep(maps)  # held for the losses, where checkpointed layers keep none of their own
        return sum(storage.nbytes() for storage in saved.values())


def _as_if_on_cpu(model: nn.Module, dtype: torch.dtype) -> None:
    """Fake tensors of the working type for the weights of a model on the meta device, where sdpa takes other kernels.

    Of adapters too, which peft makes in float32 and DeepSpeed does not leave so.
    """
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    values = torch.empty(parameter.shape, dtype=dtype)
                    made[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _mask(rows: int, length: int, is_eager: bool, dtype: torch.dtype) -> Tensor:
    """As transformers makes it of the position_ids of packed rows."""
    return torch.ones(rows, 1, length, length, dtype=dtype if is_eager else torch.bool)
