"""Which teacher layer a student layer learns from, and what of two models' shapes must agree for that.

Everything here is known from the models' config.json, so that it can be refused before a model loads.
Indices are Hugging Face's: hidden states 0 to L (0 is the embeddings' output, L comes after the final norm), attention
0 to L - 1, L the model's number of layers. Negative ones count from the end of the model's own list.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray_kd.errors import ConfigError
from ray_kd.plugins import nearest

PROPORTIONAL, SAME, ORIGIN = "proportional", "same", "origin"
MAPS = (PROPORTIONAL, SAME, ORIGIN)


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a model that a feature loss depends on."""

    num_layers: int
    width: int
    num_heads: int | None
    """None: an architecture without attention heads."""
    origin: tuple[int, ...] | None = None
    """Of a student made of layers of the teacher that the config lists: these."""

    @classmethod
    def of(cls, config: Any) -> "ModelShape":
        """Of a transformers config. Raises ConfigError for one that does not name its layers or its width."""
        text = config.get_text_config()
        try:
            return cls(int(text.num_hidden_layers), int(text.hidden_size), getattr(text, "num_attention_heads", None))
        except (AttributeError, TypeError) as error:
            raise ConfigError(f"model_type '{config.model_type}' names no num_hidden_layers and hidden_size") from error


@dataclass(frozen=True)
class LayerMap:
    """Pairs of layers, both sides resolved: none negative, all there."""

    student: tuple[int, ...]
    """All different."""
    teacher: tuple[int, ...]
    """As many; one may stand there twice."""


def resolve_layers(
    key: str, layers: Sequence[int], teacher_layers: Sequence[int] | None, how: str | None, student: ModelShape,
    teacher: ModelShape, extra: int,
) -> LayerMap:  # fmt: skip
    """The layers of both sides.

    key: where the term stands in the config, for messages. how: one of `MAPS`, for teacher_layers None: proportional,
    layer i of n is learnt from layer round(i m / n) of m (halves up; Jiao et al. 2020, TinyBERT,
    https://arxiv.org/abs/1909.10351); same, the index as it is given; origin, the layer that it was, and after the
    final norm the teacher's after its own. None: origin where it is known, else proportional. extra: 1 for hidden
    states, which begin with the embeddings' output, 0 for attention.

    Raises ConfigError for no layer, one out of range or twice, lists of different lengths, an unknown map, and origin
    where it is not known.
    """
    counts = (student.num_layers, teacher.num_layers)
    if how is None:
        how = PROPORTIONAL if student.origin is None else ORIGIN
    check_choice(f"{key}.map", how, MAPS)
    if how == ORIGIN and student.origin is None:
        raise ConfigError(
            f"{key}.map is '{ORIGIN}', and which of the teacher's layers the student's were is not known: allowed is "
            f"{PROPORTIONAL} | {SAME}, or student.init.layers as a list"
        )
    if not layers:
        raise ConfigError(f"{key}.layers is []: allowed is one layer or more")
    chosen = tuple(_resolved(f"{key}.layers", layer, counts[0], "student", extra) for layer in layers)
    if len(set(chosen)) < len(chosen):
        raise ConfigError(
            f"{key}.layers is {list(layers)}, of the student's layers {list(chosen)}: allowed is each once"
        )
    if teacher_layers is not None and len(teacher_layers) != len(layers):
        raise ConfigError(
            f"{key}.teacher_layers has {len(teacher_layers)} entries: allowed is one for each of the {len(layers)} of "
            f"{key}.layers"
        )
    if teacher_layers is None and how == PROPORTIONAL:
        return LayerMap(chosen, tuple(_proportional(layer, counts, extra) for layer in chosen))
    if teacher_layers is None and how == ORIGIN:
        assert student.origin is not None
        # Of hidden states: what the embeddings give, what each layer gives, the last one after the final norm.
        known = (0, *(layer + 1 for layer in student.origin[:-1]), counts[1]) if extra else student.origin
        return LayerMap(chosen, tuple(known[layer] for layer in chosen))
    named = "teacher_layers" if teacher_layers is not None else "layers"
    asked = layers if teacher_layers is None else teacher_layers
    return LayerMap(chosen, tuple(_resolved(f"{key}.{named}", layer, counts[1], "teacher", extra) for layer in asked))


def check_choice(key: str, value: Any, allowed: Sequence[str]) -> None:
    """Raises ConfigError when a value is none of those allowed."""
    if value not in allowed:
        raise ConfigError(f"{key} is {value!r}: allowed is {' | '.join(allowed)}{nearest(str(value), allowed)}")


def _proportional(layer: int, counts: tuple[int, int], extra: int) -> int:
    """Attention i is made in layer i + 1, whose output is hidden state i + 1."""
    num_student, num_teacher = counts
    place = layer + 1 - extra
    return max((2 * place * num_teacher + num_student) // (2 * num_student), 1 - extra) - 1 + extra


def _resolved(key: str, layer: int, num_layers: int, who: str, extra: int) -> int:
    count = num_layers + extra
    if not -count <= layer < count:
        beside = " with what the embeddings give, 0" if extra else ""
        raise ConfigError(
            f"{key} has {layer}: allowed is {-count} to {count - 1}, the {who} has {count} of them{beside}"
        )
    return layer % count
