"""Parameters and FLOPs of a model, from its config alone: its modules are made on the meta device.

FLOPs are counted as 2 for each multiply and add of a product; the rest (norms, softmax, rotary embedding) is left out,
as everybody does (Kaplan et al. 2020, https://arxiv.org/abs/2001.08361, section 2.1; Chowdhery et al. 2022,
https://arxiv.org/abs/2204.02311, appendix B). For a token of a row of T:

    forward    2 for each weight of a linear layer, and 4 T Q D a layer for its attention (Q heads of width D; all T
               keys: packed rows have a mask, with which sdpa computes what it then leaves out)
    backward   2 for each weight that trains, 2 for each whose input depends on one that does, twice the attention
    recomputed the forward of the layers once more, with gradient checkpointing

So a model that trains whole costs the well-known 6 N a token, and attention on top.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from ray_kd import models
from ray_kd.config import Lora, RunConfig, Student
from ray_kd.errors import ConfigError
from ray_kd.models.widths import head_dim_of

_PLAIN = (nn.Linear, Conv1D, nn.Embedding)


@dataclass(frozen=True)
class Size:
    """A model in numbers."""

    parameters: int
    """Of the model itself."""
    beside: int
    """Of what stands beside it: adapters, and projectors of feature terms."""
    embeddings: int
    """Of the input embeddings, and of the head where it is not tied to them."""
    trained: int
    largest_layer: int
    """Parameters of the largest decoder layer, which ZeRO 3 gathers; of embeddings where these are more."""
    layers: int
    width: int
    intermediate: int
    vocab_size: int
    heads: int
    head_dim: int
    forward: int
    """FLOPs of a token in the decoder's linear layers, without the head."""
    backward: int
    """The same of the backward pass."""
    layers_that_flow: int
    """Layers whose attention has a backward pass."""
    trains_head: bool

    def attention(self, length: int) -> int:
        """FLOPs of a token in one layer's attention, forward."""
        return 4 * length * self.heads * self.head_dim

    @property
    def head(self) -> int:
        """FLOPs of a token in one product with the head."""
        return 2 * self.width * self.vocab_size


def size_of(config: PreTrainedConfig, what: str, lora: Lora | None = None, freeze: Sequence[str] = ()) -> Size:
    """The numbers of a model with this config, of which `student.lora` and `student.freeze` leave a part to train.

    what: "teacher" or "student". Raises ConfigError for a model whose cost is not that of linear layers and attention
    (a mixture of experts, a state-space model), and as `models.choose_trainable` does.
    """
    with models.quiet(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    _refuse_others(model, config, what)
    parameters = sum(p.numel() for p in model.parameters())
    inputs: Any = model.get_input_embeddings().weight
    head: Any = model.get_output_embeddings()
    if head is None:
        raise ConfigError(f"{what}.model: model_type '{config.model_type}' has no output projection (lm_head)")
    embeddings = sum({id(p): p.numel() for p in (inputs, head.weight)}.values())
    largest = _largest_layer(model, inputs.numel())
    with torch.device("meta"):
        chosen = models.choose_trainable(model, lora, freeze)
    text = config.get_text_config()
    forward, backward, flows = _linear_flops(models.decoder_of(chosen), text.num_hidden_layers)
    return Size(
        parameters=parameters,
        beside=sum(p.numel() for p in chosen.parameters()) - parameters,
        embeddings=embeddings,
        trained=sum(p.numel() for p in chosen.parameters() if p.requires_grad),
        largest_layer=largest,
        layers=text.num_hidden_layers,
        width=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        vocab_size=config.vocab_size,
        heads=text.num_attention_heads,
        head_dim=head_dim_of(text),
        forward=forward,
        backward=backward,
        layers_that_flow=flows,
        trains_head=head.weight.requires_grad,
    )


def student_config(student: Student, teacher: PreTrainedConfig, own: PreTrainedConfig | None) -> PreTrainedConfig:
    """The config of the student: its own, or the teacher's with the layers and widths that `student.init` keeps."""
    if own is not None:
        return own
    assert student.init is not None  # validate: exactly one of model and init
    return models.config_of_init(teacher, student.init)


def with_projectors(size: Size, num_parameters: int) -> Size:
    """With what trains beside the student: the projectors of feature terms."""
    return replace(size, trained=size.trained + num_parameters, beside=size.beside + num_parameters)


@dataclass(frozen=True)
class Flops:
    """FLOPs of one position of a row, by what they are for."""

    teacher_decoder: float
    teacher_head: float
    student_forward: float
    student_backward: float
    recomputed: float
    loss: float

    @property
    def teacher(self) -> float:
        return self.teacher_decoder + self.teacher_head

    @property
    def student(self) -> float:
        return self.student_forward + self.student_backward + self.recomputed + self.loss


def flops_of(
    config: RunConfig, teacher: Size, student: Size, *, targets: float, is_dense: bool, is_sparse: bool
) -> Flops:
    """FLOPs of a position. targets: share of the positions whose next token is trained; heads see no others.

    The loss makes the logits, d hidden, and where the head trains d weight: 2 V H each (`losses/fused_linear.py`).
    is_dense: the teacher sends hidden states, of which its head makes logits in the loss and not at the teacher.
    is_sparse: the loss makes the products with the teacher's K tokens alone, at most min(V, 128 K) in a chunk of 128.
    """
    length = config.data.sequence_length
    attention = student.attention(length)
    forward = student.forward + student.layers * attention
    vocabulary = min(student.vocab_size, 128 * config.teacher.top_k) if is_sparse else student.vocab_size
    products = 2 + student.trains_head
    loss = products * 2 * student.width * vocabulary + (teacher.head if is_dense else 0)
    return Flops(
        teacher_decoder=teacher.forward + teacher.layers * teacher.attention(length),
        teacher_head=0 if is_dense else targets * teacher.head,
        student_forward=forward,
        student_backward=student.backward + 2 * student.layers_that_flow * attention,
        recomputed=forward if config.student.gradient_checkpointing else 0,
        loss=targets * loss,
    )


def _refuse_others(model: nn.Module, config: PreTrainedConfig, what: str) -> None:
    for name, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1 and not isinstance(module, _PLAIN):
                raise ConfigError(
                    f"{what}.model: model_type '{config.model_type}' has {name}.{own} {list(parameter.shape)}, which "
                    "is no linear layer: allowed is a dense decoder (no experts, no state space), whose cost is known "
                    "from its config"
                )


def _largest_layer(model: nn.Module, embeddings: int) -> int:
    layers: Any = getattr(models.decoder_of(model), "layers", ())
    return max([embeddings, *(sum(p.numel() for p in layer.parameters()) for layer in layers)])


def _linear_flops(decoder: nn.Module, num_layers: int) -> tuple[int, int, int]:
    """(forward, backward, layers whose input depends on what trains) of the linear layers, in the model's order."""
    forward = backward = 0
    first = num_layers  # the first layer with a parameter that trains, -1 for the embeddings
    flows = False
    for name, module in decoder.named_modules():
        own = [p.requires_grad for p in module.parameters(recurse=False)]
        if isinstance(module, nn.Linear | Conv1D):
            numel, trains = module.weight.numel(), bool(module.weight.requires_grad)
            forward += 2 * numel
            backward += 2 * numel * (trains + flows)
        if any(own) and not flows:
            flows = True
            parts = name.split(".")
            first = int(parts[1]) if parts[0] == "layers" else -1
    return forward, backward, num_layers - max(0, first)
