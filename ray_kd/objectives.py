"""What the terms of the loss ask of the teacher, of the student and of the link between them.

From the config and the models' config.json alone: refused before a model loads. Imports torch when called, not when
imported: the train function carries a reference to this module.
"""

import logging
from collections.abc import Iterable
from dataclasses import replace
from functools import partial, reduce
from typing import TYPE_CHECKING, Any

from ray_kd import schedules
from ray_kd.config import RunConfig, each_teacher
from ray_kd.errors import ConfigError
from ray_kd.payloads import FEATURES, HIDDEN_STATES, FeatureSpec, features, hidden_states, topk_logprobs
from ray_kd.teacher.mixture import mixed_width
from ray_kd.trainer.feed import ExpectedFeatures

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedConfig

    from ray_kd.losses.features import Term
    from ray_kd.losses.layer_map import ModelShape
    from ray_kd.losses.terms import Entry

logger = logging.getLogger(__name__)

_BUDGET = "teacher.max_bytes_per_token"
_Plain = tuple[int, int, int | None, tuple[int, ...] | None]
"""A ModelShape by its fields, since unpickling one imports torch."""


def payload_temperature(config: RunConfig) -> float:
    """The temperature the teacher takes its log-probabilities at: the loss's, and 1 where that changes.

    A payload has one; the loss rescales it to others on the tokens that it names (`loss.tail: renormalize`).
    """
    temperature = schedules.parse(config.loss.temperature, "loss.temperature")
    return temperature.start if temperature.is_constant else 1.0


def check_terms(config: RunConfig) -> None:
    """Refuse terms, schedules and divergences that are wrong by themselves, or that the payload cannot serve.

    Raises ConfigError, one line.
    """
    from ray_kd.losses.objective import make_objective
    from ray_kd.losses.terms import parse_temperature, parse_terms

    loss, payload = config.loss, config.teacher.payload
    entries = parse_terms(loss.terms)
    temperature = parse_temperature(loss.temperature)
    if not temperature.is_constant and payload != HIDDEN_STATES and loss.tail != "renormalize":
        raise ConfigError(
            f"loss.temperature is a schedule, and the teacher's tail is known at one temperature: allowed with it is "
            f"loss.tail=renormalize (it is '{loss.tail}') or teacher.payload={HIDDEN_STATES}"
        )
    for value in temperature.values:
        make_objective(
            loss.divergence, None if payload == HIDDEN_STATES else loss.tail, value,
            payload_temperature=payload_temperature(config),
        )  # fmt: skip
    needing = [entry for entry in entries if entry.is_feature]
    if needing and payload != FEATURES:
        raise ConfigError(
            f"{needing[0].key} is of kind '{needing[0].kind}', which needs what is inside the teacher: allowed is "
            f"teacher.payload={FEATURES} (it is {payload!r})"
        )
    if payload == FEATURES and not needing:
        raise ConfigError(
            f"teacher.payload is '{FEATURES}' and no term of loss.terms needs it: allowed is another payload, or a "
            "term of a kind that compares hidden states or attention"
        )


def idle_terms(config: RunConfig, num_steps: int | None) -> list[str]:
    """Where the terms stand (loss.terms[2]) whose weight is 0 at each of the run's steps.

    num_steps: None where it is not known; the schedules are then looked at to their end.
    Raises ConfigError when that is true of all of them.
    """
    entries = _entries(config)
    idle = [entry.key for entry in entries if entry.weight.is_zero_until(num_steps)]
    if len(idle) == len(entries):
        until = f" at each of the run's {num_steps} steps" if num_steps is not None else ""
        raise ConfigError(
            f"loss.terms: all weights are 0{until}, so nothing would be trained: allowed is a weight above 0 by then "
            "(a smaller from_step, or more steps)"
        )
    return idle


def check_models(config: RunConfig, teacher: "PreTrainedConfig", student: "PreTrainedConfig | None") -> None:
    """Refuse feature terms that do not fit the two models, and a payload that is too large for the link; report it.

    student None: it is made of the teacher's layers. Raises ConfigError, one line.
    """
    from ray_kd import models

    terms = make_features(config, teacher, student)() if config.teacher.payload == FEATURES else {}
    for entry in _entries(config):
        if entry.is_feature and terms[entry.name].attention_layers:
            models.check_attention_support(teacher, entry.key)
            models.check_attention_support(student or teacher, entry.key)
            _report_attention(config, entry.key, student or teacher, _student_shape(config, teacher, student))
    _check_budget(config, teacher, _asked(terms.values()))


def make_features(
    config: RunConfig, teacher: "PreTrainedConfig", student: "PreTrainedConfig | None"
) -> "Callable[[], dict[str, Term]]":
    """A picklable function, light to unpickle, that finds the layers of the feature terms in these two models.

    It raises ConfigError, one line, for what does not fit.
    """
    shapes = _plain(_student_shape(config, teacher, student)), _plain(_shape(teacher))
    return partial(_find_features, config.loss.terms, shapes, config.data.sequence_length)


def asked_features(config: RunConfig) -> FeatureSpec | None:
    """What the run's feature terms ask of the teacher beside its log-probabilities; None without such terms."""
    return _asked(features_of(config)().values())


def expected_features(config: RunConfig) -> ExpectedFeatures | None:
    """What every payload has for the run's feature terms; None without such terms."""
    asked = asked_features(config)
    if asked is None:
        return None
    shape = _shape(_read_models(config)[0])
    return ExpectedFeatures(asked, shape.width, shape.num_heads or 0)


def features_of(config: RunConfig) -> "Callable[[], dict[str, Term]]":
    """`make_features` for the models of the config, whose config.json it reads where there are feature terms."""
    if config.teacher.payload != FEATURES:
        return dict
    return make_features(config, *_read_models(config))


def planned_nbytes_per_token(config: RunConfig) -> int:
    """The most bytes of a token of the payload, in front of the student. Reads the config.json of both models."""
    return nbytes_per_token(config, *_read_models(config))


def nbytes_per_token(config: RunConfig, teacher: "PreTrainedConfig", student: "PreTrainedConfig | None") -> int:
    """`planned_nbytes_per_token` of models whose configs are known. student None: made of the teacher's layers."""
    terms = make_features(config, teacher, student)() if config.teacher.payload == FEATURES else {}
    return _nbytes_per_token(config, teacher, _asked(terms.values()))


def _nbytes_per_token(config: RunConfig, teacher: "PreTrainedConfig", asked: FeatureSpec | None) -> int:
    kind, text = config.teacher.payload, teacher.get_text_config()
    if kind == HIDDEN_STATES:
        return hidden_states.nbytes_per_token(int(text.hidden_size))
    if asked is not None:
        shape = _shape(teacher)
        return features.nbytes_per_token(
            asked, top_k=config.teacher.top_k, vocab_size=teacher.vocab_size, width=shape.width,
            num_heads=shape.num_heads or 0, sequence_length=config.data.sequence_length,
        )  # fmt: skip
    width = mixed_width([one.rows for one, _ in each_teacher(config) if one], config.teacher.top_k, teacher.vocab_size)
    return topk_logprobs.nbytes_per_token(width, teacher.vocab_size)


def _check_budget(config: RunConfig, teacher: "PreTrainedConfig", asked: FeatureSpec | None) -> None:
    nbytes, budget = _nbytes_per_token(config, teacher, asked), config.teacher.max_bytes_per_token
    logger.info("teacher.payload=%s takes up to %d bytes a token", config.teacher.payload, nbytes)
    if budget is not None and nbytes > budget:
        less = {
            FEATURES: "fewer layers, attention with heads: mean, a smaller data.sequence_length or teacher.top_k",
            HIDDEN_STATES: "teacher.payload=topk_logprobs",
        }
        raise ConfigError(
            f"{_BUDGET} is {budget} and teacher.payload={config.teacher.payload} takes up to {nbytes} bytes a token: "
            f"allowed is {nbytes} or more, or {less.get(config.teacher.payload, 'a smaller teacher.top_k')}"
        )


def _report_attention(config: RunConfig, key: str, model: "PreTrainedConfig", shape: "ModelShape") -> None:
    from ray_kd.models import attention_nbytes

    # Half-precision models take the softmax in float32 and keep it beside the copy in their own type.
    size = {"float32": 4}.get(config.student.dtype, 6)
    nbytes = attention_nbytes(model, config.train.micro_batch_size, config.data.sequence_length, size)
    whole = _shape(model)
    nbytes = nbytes * shape.num_layers // whole.num_layers * (shape.num_heads or 1) // (whole.num_heads or 1)
    logger.info("%s: the student's attention is eager, %.1f MB of maps a micro-batch", key, nbytes / 1e6)


def _find_features(terms: list[Any], shapes: tuple[_Plain, _Plain], sequence_length: int) -> "dict[str, Term]":
    from ray_kd.losses.layer_map import ModelShape
    from ray_kd.losses.terms import parse_terms, resolve

    student, teacher = (ModelShape(*shape) for shape in shapes)
    return resolve(parse_terms(terms), student, teacher, sequence_length)


def _entries(config: RunConfig) -> "list[Entry]":
    from ray_kd.losses.terms import parse_terms

    return parse_terms(config.loss.terms)


def _asked(terms: "Iterable[Term]") -> FeatureSpec | None:
    asks = [term.asks for term in terms]
    return reduce(FeatureSpec.union, asks) if asks else None


def _read_models(config: RunConfig) -> "tuple[PreTrainedConfig, PreTrainedConfig | None]":
    from ray_kd.models import check_model

    teacher = check_model(config.teacher.model, config.teacher.revision, "teacher", needs_weights=False)
    student = config.student.model
    return teacher, None if student is None else check_model(student, config.student.revision, "student")


def _shape(model: "PreTrainedConfig") -> "ModelShape":
    from ray_kd.losses.layer_map import ModelShape

    return ModelShape.of(model)


def _student_shape(config: RunConfig, teacher: "PreTrainedConfig", student: "PreTrainedConfig | None") -> "ModelShape":
    if student is not None:
        return _shape(student)
    assert config.student.init is not None  # validate: exactly one of model and init
    from ray_kd.models import asked_widths, check_widths

    layers, shape = config.student.init.layers, _shape(teacher)
    if asked := asked_widths(config.student.init):
        widths = check_widths(teacher, asked)
        shape = replace(shape, width=widths.hidden_size, num_heads=widths.num_attention_heads)
    if isinstance(layers, list):
        return replace(shape, num_layers=len(layers), origin=tuple(layers))
    return replace(shape, num_layers=layers)


def _plain(shape: "ModelShape") -> _Plain:
    return shape.num_layers, shape.width, shape.num_heads, shape.origin
