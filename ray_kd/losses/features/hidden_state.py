"""Hidden states of chosen layers: the mean squared error to the teacher's, or one minus their cosine.

For pairs (i, j) of layers, n valid tokens of the global batch, width D of the teacher, s and t the states at a token:

    mse       sum over pairs, tokens, channels of (s - t)^2 / (n D pairs)
    cosine    sum over pairs, tokens of (1 - s.t / (|s| |t|)) / (n pairs)

One denominator, whether prompt and padding are masked out or there are none. Where the widths differ, s is what a
learnt linear map makes of the student's state (Romero et al. 2015, FitNets, https://arxiv.org/abs/1412.6550).
The teacher's states come in bfloat16: 2 D bytes a token and layer on the wire.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn import functional

from ray_kd.errors import ConfigError
from ray_kd.losses.feature_batch import FeatureBatch
from ray_kd.losses.features import Projectors
from ray_kd.losses.layer_map import LayerMap, ModelShape, check_choice, resolve_layers
from ray_kd.losses.precision import at_least_float32
from ray_kd.payloads import FeatureSpec
from ray_kd.payloads.features import MASKS

MSE, COSINE, LINEAR = "mse", "cosine", "linear"
_EPSILON = 1e-6


@dataclass(frozen=True)
class Config:
    """Which states are compared, and how."""

    measure: str = "mse"
    """mse | cosine: the squared error a channel, or one minus the cosine."""
    layers: list[int] = field(default_factory=lambda: [-1])
    """The student's hidden states: 0 is what the embeddings give, i what the i-th layer gives, -1 the last one, after
    the final norm."""
    teacher_layers: list[int] | None = None
    """The teacher's, one for each of layers, counted alike; null: by map."""
    map: str | None = None
    """proportional | same | origin: the teacher layer at the same depth, of the same index, or that the student's layer
    was; null: origin where student.init.layers is a list, else proportional."""
    mask: str = "targets"
    """targets | attention: the positions that predict a label, or all that are not padding."""
    projector: str | None = None
    """linear: a map from the student's width to the teacher's, learnt for each layer; needed where they differ."""
    projector_learning_rate: float | None = None
    """Of the projectors; null: train.learning_rate."""


@dataclass(frozen=True)
class HiddenState:
    """The loss on the states of a resolved map."""

    measure: str
    mask: str
    map: LayerMap
    projectors: Projectors | None

    @property
    def asks(self) -> FeatureSpec:
        """The teacher's states of the map."""
        return FeatureSpec(hidden_layers=tuple(sorted(set(self.map.teacher))), hidden_mask=self.mask)

    @property
    def hidden_layers(self) -> tuple[int, ...]:
        """The student's, in the order of the map."""
        return self.map.student

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """None."""
        return ()

    def count(self, batch: FeatureBatch) -> int:
        """Valid tokens."""
        return len(batch.tokens[self.mask].student)

    def __call__(
        self, student: Sequence[Tensor], batch: FeatureBatch, projectors: nn.ModuleList | None = None
    ) -> Tensor:
        """The sum over valid tokens. student: [B, T, H] of each of `hidden_layers`."""
        places = batch.tokens[self.mask].student
        total = student[0].new_zeros((), dtype=at_least_float32(student[0].dtype))
        for index, (states, layer) in enumerate(zip(student, self.map.teacher, strict=True)):
            s = states.flatten(0, 1)[places]
            if projectors is not None:
                projector = projectors[index]
                s = projector(s.to(next(projector.parameters()).dtype))
            s = s.to(total.dtype)
            t = batch.hidden_of(layer, self.mask).to(total.dtype)
            total = total + (_squared(s, t) if self.measure == MSE else _one_minus_cosine(s, t))
        return total / len(student)


def resolve(config: Config, student: ModelShape, teacher: ModelShape, sequence_length: int, key: str) -> HiddenState:
    """The loss between these models. sequence_length is of no matter here.

    Raises ConfigError for an unknown value, layers that do not map, and widths that differ without a projector.
    """
    check_choice(f"{key}.measure", config.measure, (MSE, COSINE))
    check_choice(f"{key}.mask", config.mask, MASKS)
    layer_map = resolve_layers(key, config.layers, config.teacher_layers, config.map, student, teacher, extra=1)
    if config.projector is not None:
        check_choice(f"{key}.projector", config.projector, (LINEAR,))
    elif student.width != teacher.width:
        raise ConfigError(
            f"{key}: the student's hidden states have width {student.width} and the teacher's {teacher.width}: allowed "
            f"is equal widths, or {key}.projector={LINEAR}"
        )
    rate = config.projector_learning_rate
    if rate is not None and config.projector is None:
        raise ConfigError(f"{key}.projector_learning_rate is {rate:g} and there is no projector: allowed is null")
    if rate is not None and not (rate > 0 and math.isfinite(rate)):
        raise ConfigError(f"{key}.projector_learning_rate is {rate}: allowed is a positive number, or null")
    projectors = Projectors(len(layer_map.student), student.width, teacher.width, rate) if config.projector else None
    return HiddenState(config.measure, config.mask, layer_map, projectors)


def _squared(s: Tensor, t: Tensor) -> Tensor:
    return (s - t).square().sum() / t.shape[-1]


def _one_minus_cosine(s: Tensor, t: Tensor) -> Tensor:
    """A state that is zero has cosine 0 to any."""
    cosine = (functional.normalize(s, dim=-1, eps=_EPSILON) * functional.normalize(t, dim=-1, eps=_EPSILON)).sum(-1)
    return (1 - cosine).sum()
