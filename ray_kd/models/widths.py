"""A student narrower than its teacher: which sizes it may have, what it keeps, and the cut of each weight.

Structured pruning of the width as in Minitron (https://arxiv.org/abs/2407.14679): MLP neurons and attention heads are
chosen in each layer by themselves, channels of the residual stream once for the whole model, by the scores of
`importance.py`. What is kept stays in the teacher's order, and so does head_dim. A KV head and its query heads are a
group: groups are kept or left out as wholes, and of each that is kept the same number of query heads stays.

L layers, H hidden size, I intermediate size, Q query heads, G KV heads, D head_dim.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedConfig

from ray_kd.config import StudentInit
from ray_kd.errors import ConfigError
from ray_kd.models.importance import Importance

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
"""model_type of decoders with RMSNorm before each block, a gated MLP and four separate projections of attention."""

_AXES: dict[str, tuple[str, ...]] = {
    "embed_tokens": ("", "channels"), "lm_head": ("", "channels"),
    "q_proj": ("heads", "channels"), "k_proj": ("groups", "channels"), "v_proj": ("groups", "channels"),
    "o_proj": ("channels", "heads"),
    "gate_proj": ("neurons", "channels"), "up_proj": ("neurons", "channels"), "down_proj": ("channels", "neurons"),
    "input_layernorm": ("channels",), "post_attention_layernorm": ("channels",), "norm": ("channels",),
    "q_norm": ("",), "k_norm": ("",),
}  # fmt: skip
"""Module -> what each dimension of its weight is made of ("": nothing that is cut); a bias has the first alone."""

_NORMS = ("input_layernorm", "post_attention_layernorm", "norm")


@dataclass(frozen=True)
class Widths:
    """The sizes of a model, by their names in config.json."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int

    @property
    def heads_per_group(self) -> int:
        return self.num_attention_heads // self.num_key_value_heads


WIDTHS = tuple(Widths.__dataclass_fields__)


def asked_widths(init: StudentInit) -> dict[str, int]:
    """The sizes that a config asks for; none where a student keeps the teacher's."""
    return {name: size for name in WIDTHS if (size := getattr(init, name)) is not None}


def head_dim_of(config: PreTrainedConfig) -> int:
    """The width of a head, which an older config.json leaves to be worked out."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def check_widths(config: PreTrainedConfig, asked: Mapping[str, int]) -> Widths:
    """The student's sizes, from the teacher's config and those of `WIDTHS` that are asked for.

    Without num_key_value_heads a teacher with a KV head for every query head gives a student like that. Raises
    ConfigError (one line, with what is allowed) for another architecture, sizes larger than the teacher's, query heads
    that do not go evenly to the groups, and sizes that transformers refuses.
    """
    if config.model_type not in ARCHITECTURES:
        raise ConfigError(
            f"student.init does not know the widths of model_type '{config.model_type}': allowed is "
            f"{' | '.join(ARCHITECTURES)}, or layers alone"
        )
    own = {name: int(getattr(config, name)) for name in WIDTHS}
    sizes = own | dict(asked)
    if "num_key_value_heads" not in asked and own["num_key_value_heads"] == own["num_attention_heads"]:
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    for name, size in sizes.items():
        if not 1 <= size <= own[name]:
            raise ConfigError(f"student.init.{name} is {size}: allowed is 1 to the teacher's {own[name]}")
    teacher, student = Widths(**own), Widths(**sizes)
    groups, most = student.num_key_value_heads, teacher.heads_per_group
    if student.num_attention_heads not in (allowed := [groups * each for each in range(1, most + 1)]):
        shown = " | ".join(map(str, allowed)) if len(allowed) <= 8 else f"a multiple of {groups} up to {groups * most}"
        raise ConfigError(
            f"student.init.num_attention_heads is {student.num_attention_heads}: allowed is {shown} with {groups} KV "
            f"heads (num_key_value_heads), each of which has {most} query heads in the teacher"
        )
    try:
        type(config).from_dict(config.to_dict() | config_values(config, student))
    except Exception as error:  # the strict dataclasses of huggingface_hub raise a class of their own
        heads = student.num_attention_heads
        if student.hidden_size % heads:  # which Llama refuses, and others with the same heads do not
            below = student.hidden_size // heads * heads
            near = [size for size in (below, below + heads) if 1 <= size <= teacher.hidden_size]
            raise ConfigError(
                f"student.init.hidden_size is {student.hidden_size}: allowed is a multiple of the student's {heads} "
                f"query heads (num_attention_heads) with model_type '{config.model_type}', for example "
                f"{' | '.join(map(str, near))}"
            ) from error
        reason = " ".join(str(error.__cause__ or error).split())
        raise ConfigError(f"student.init: a {config.model_type} of {_in_words(student)} cannot be: {reason}") from error
    return student


def config_values(config: PreTrainedConfig, widths: Widths) -> dict[str, int]:
    """The entries of config.json that make a model of these sizes with the teacher's heads."""
    return asdict(widths) | {"head_dim": head_dim_of(config)}


@dataclass(frozen=True, eq=False)
class Kept:
    """What stays of a teacher, by ascending indices; lists have an entry per layer of the teacher."""

    widths: Widths
    teacher_hidden_size: int
    head_dim: int
    channels: Tensor
    """int64 [H']."""
    neurons: list[Tensor]
    """int64 [I']."""
    heads: list[Tensor]
    """int64 [Q'], of query heads."""
    groups: list[Tensor]
    """int64 [G'], of KV heads."""

    def cut(self, name: str, weight: Tensor, layer: int | None) -> Tensor:
        """The part of a weight that stays. name: as in the model; layer: the teacher's, None outside the layers."""
        module = name.split(".")[-2]
        for dim, axis in zip(range(weight.dim()), _AXES[module], strict=False):
            if axis:
                weight = weight.index_select(dim, self._indices(axis, layer).to(weight.device))
        if module in _NORMS and self.widths.hidden_size != self.teacher_hidden_size:
            # The mean square is over fewer channels. Where those left out carry little of it, it grows by H / H', and
            # the output of the norm would shrink by the root of that.
            weight = weight * math.sqrt(self.teacher_hidden_size / self.widths.hidden_size)
        return weight

    def _indices(self, axis: str, layer: int | None) -> Tensor:
        if axis == "channels":
            return self.channels
        assert layer is not None
        if axis == "neurons":
            return self.neurons[layer]
        chosen = (self.heads if axis == "heads" else self.groups)[layer]
        return (chosen[:, None] * self.head_dim + torch.arange(self.head_dim)).flatten()


def choose_widths(config: PreTrainedConfig, importance: Importance, widths: Widths, layers: Sequence[int]) -> Kept:
    """What stays of a teacher with this config, by importance; the lower index where two are equally important.

    layers: the teacher's layers that the student keeps; channels of the residual stream are judged in these alone.
    """
    of_kept = importance.channels[[*layers, len(importance.channels) - 1]]
    chosen = [_best_heads(scores, int(config.num_key_value_heads), widths) for scores in importance.heads]
    return Kept(
        widths,
        int(config.hidden_size),
        head_dim_of(config),
        channels=_best(of_kept.sum(axis=0), widths.hidden_size),
        neurons=[_best(scores, widths.intermediate_size) for scores in importance.neurons],
        heads=[heads for heads, _ in chosen],
        groups=[groups for _, groups in chosen],
    )


def _best_heads(scores: NDArray[np.float64], num_groups: int, widths: Widths) -> tuple[Tensor, Tensor]:
    """Query heads [Q'] and KV heads [G'] of a layer: of each group its best heads, and the groups where these are best.

    scores [Q]; query heads i Q/G to (i + 1) Q/G - 1 are those of KV head i.
    """
    by_group = scores.reshape(num_groups, -1)
    best = np.stack([_best(of_group, widths.heads_per_group).numpy() for of_group in by_group])
    groups = _best(np.take_along_axis(by_group, best, axis=1).sum(axis=1), widths.num_key_value_heads)
    heads = best[groups.numpy()] + groups.numpy()[:, None] * by_group.shape[1]
    return torch.from_numpy(heads.flatten()), groups


def _best(scores: NDArray[np.float64], count: int) -> Tensor:
    """The `count` indices of highest score, ascending."""
    return torch.from_numpy(np.sort(np.argsort(-scores, kind="stable")[:count]))


def _in_words(widths: Widths) -> str:
    return ", ".join(f"{name}={size}" for name, size in asdict(widths).items())
