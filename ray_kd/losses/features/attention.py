"""Attention maps of chosen layers: the mean squared error between probabilities, or the KL over each query's keys.

For pairs (i, j) of layers, h heads, a and b the student's and the teacher's probabilities; P causal pairs (query, key)
of valid tokens inside one document and n queries among them, both of the global batch:

    mse    sum over layers, heads, pairs of (a - b)^2 / (P h layers)
    kl     sum over layers, heads, queries of KL(b || a) over the query's keys / (n h layers)

(Jiao et al. 2020, TinyBERT, https://arxiv.org/abs/1909.10351; Wang et al. 2020, MiniLM, https://arxiv.org/abs/2002.10957.)

With `mask: targets` keys that are no targets are left out, as the prompt's, where much attention goes, and rows do not
sum to one. Normalised rows do: a' = max(a, 1e-7) / sum of max(a, 1e-7) over the query's keys, on both sides; KL needs
them. A token outside a sliding window has probability 0, as in the model.

Costs: maps exist with eager attention alone, which makes all layers' [B, h, T, T] and keeps them for backward;
`max_sequence_length` guards against more than was meant. On the wire, 2 bytes a pair, layer and head in float16. A
student with attention dropout shows its maps after dropout.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from ray_kd.errors import ConfigError
from ray_kd.losses.feature_batch import FeatureBatch
from ray_kd.losses.layer_map import LayerMap, ModelShape, check_choice, resolve_layers
from ray_kd.losses.precision import at_least_float32
from ray_kd.payloads import FeatureSpec
from ray_kd.payloads.features import MASKS

MSE, KL, MATCH, MEAN = "mse", "kl", "match", "mean"
_FLOOR = 1e-7


@dataclass(frozen=True)
class Config:
    """Which maps are compared, and how."""

    measure: str = "mse"
    """mse | kl: the squared error a pair of tokens, or the KL over the keys of each query, teacher first."""
    layers: list[int] = field(default_factory=lambda: [-1])
    """The student's layers: 0 is the first one, -1 the last one."""
    teacher_layers: list[int] | None = None
    """The teacher's, one for each of layers, counted alike; null: by map."""
    map: str | None = None
    """proportional | same | origin: the teacher layer at the same depth, of the same index, or that the student's layer
    was; null: origin where student.init.layers is a list, else proportional."""
    mask: str = "targets"
    """targets | attention: pairs of positions that predict a label, or of all that are not padding."""
    heads: str = "match"
    """match | mean: head by head, as many on both sides, or the means over heads, which is all that is sent then."""
    normalize_rows: bool | None = None
    """Whether each query's probabilities are made to sum to one over its keys; null: for kl, which needs it."""
    max_sequence_length: int = 1024
    """Refuse a longer data.sequence_length T: eager attention keeps heads x T^2 numbers a layer and row."""


@dataclass(frozen=True)
class Attention:
    """The loss on the maps of resolved layers."""

    measure: str
    mask: str
    map: LayerMap
    mean_over_heads: bool
    normalizes_rows: bool

    @property
    def asks(self) -> FeatureSpec:
        """The teacher's maps."""
        layers = tuple(sorted(set(self.map.teacher)))
        return FeatureSpec(attention_layers=layers, attention_mask=self.mask, mean_over_heads=self.mean_over_heads)

    @property
    def hidden_layers(self) -> tuple[int, ...]:
        """None."""
        return ()

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """The student's, in the order of the map."""
        return self.map.student

    @property
    def projectors(self) -> None:
        """None: heads either match or are averaged."""
        return None

    def count(self, batch: FeatureBatch) -> int:
        """Causal pairs of valid tokens for mse, queries for kl."""
        return len(batch.pairs[self.mask].student) if self.measure == MSE else batch.num_queries[self.mask]

    def __call__(
        self, student: Sequence[Tensor], batch: FeatureBatch, projectors: nn.ModuleList | None = None
    ) -> Tensor:
        """The sum over pairs, or over queries. student: [B, h, T, T] of each of `attention_layers`."""
        pairs = batch.pairs[self.mask].student
        length = student[0].shape[-1]
        total = student[0].new_zeros((), dtype=at_least_float32(student[0].dtype))
        for maps, layer in zip(student, self.map.teacher, strict=True):
            own = _at(maps, pairs, self.mean_over_heads).to(total.dtype)
            sent = batch.attention_of(layer, self.mask).to(total.dtype)
            if self.mean_over_heads:
                sent = sent.mean(dim=0, keepdim=True)
            if self.normalizes_rows:
                queries, num_places = pairs // length, maps.shape[0] * length
                own, sent = (_normalised(values, queries, num_places) for values in (own, sent))
            errors = (own - sent).square() if self.measure == MSE else sent * (sent.log() - own.log())
            total = total + errors.sum() / len(own)
        return total / len(student)


def resolve(config: Config, student: ModelShape, teacher: ModelShape, sequence_length: int, key: str) -> Attention:
    """The loss between these models on rows of `sequence_length` tokens.

    Raises ConfigError for an unknown value, layers that do not map, models without heads, head counts that differ and
    are not averaged, a KL of rows that are not normalised, and rows longer than `max_sequence_length`.
    """
    check_choice(f"{key}.measure", config.measure, (MSE, KL))
    check_choice(f"{key}.mask", config.mask, MASKS)
    check_choice(f"{key}.heads", config.heads, (MATCH, MEAN))
    if config.measure == KL and config.normalize_rows is False:
        raise ConfigError(f"{key}.normalize_rows is False: allowed is true or null with {key}.measure={KL}, which is "
                          "between distributions")  # fmt: skip
    if sequence_length > config.max_sequence_length:
        raise ConfigError(
            f"data.sequence_length is {sequence_length}: allowed is at most {key}.max_sequence_length="
            f"{config.max_sequence_length}, since eager attention keeps heads x T^2 numbers a layer and row"
        )
    for who, shape in (("student", student), ("teacher", teacher)):
        if shape.num_heads is None:
            raise ConfigError(
                f"{key}: the {who} has no attention heads: allowed is a model with attention in all layers"
            )
    if config.heads == MATCH and student.num_heads != teacher.num_heads:
        raise ConfigError(
            f"{key}: the student has {student.num_heads} heads and the teacher {teacher.num_heads}: allowed is as "
            f"many, or {key}.heads={MEAN}"
        )
    layer_map = resolve_layers(key, config.layers, config.teacher_layers, config.map, student, teacher, extra=0)
    normalizes = config.measure == KL if config.normalize_rows is None else config.normalize_rows
    return Attention(config.measure, config.mask, layer_map, config.heads == MEAN, normalizes)


def _at(maps: Tensor, pairs: Tensor, mean_over_heads: bool) -> Tensor:
    """[h, P] of maps [B, h, T, T] at pairs [P] of [B T T] flattened, [1, P] of their mean over heads.

    Both indices stand side by side, so that no copy of the maps in another order is made.
    """
    if mean_over_heads:
        maps = maps.mean(dim=1, keepdim=True, dtype=at_least_float32(maps.dtype))
    num_pairs = maps.shape[-1] ** 2
    return maps.flatten(2)[pairs // num_pairs, :, pairs % num_pairs].t()


def _normalised(values: Tensor, queries: Tensor, num_places: int) -> Tensor:
    """values [h, P] over their sums for each of their queries [P], places of [B T]; floored, so never 0 / 0."""
    floored = values.clamp_min(_FLOOR)
    sums = floored.new_zeros(len(values), num_places).index_add(1, queries, floored)
    return floored / sums[:, queries]
