"""The options of the distillation loss, checked once: which divergence, which tail, which temperature, which weights.

loss = (1 / num_valid_tokens) * sum over tokens [ ce_weight CE + kd_weight T^2 D ]
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ray_kd import plugins
from ray_kd.errors import ConfigError
from ray_kd.losses.tail import TAILS

GROUP = "losses.divergences"


@dataclass(frozen=True)
class Objective:
    """What one call of the loss minimises. Build it with `make_objective`, which checks the combination."""

    divergence: Callable[[Tensor, Tensor, Any], tuple[Tensor, Tensor]]
    config: Any
    tail: str | None
    """None: the teacher is known over the whole vocabulary."""
    temperature: float
    payload_temperature: float
    kd_weight: float
    ce_weight: float

    @property
    def ignores_rest(self) -> bool:
        """Whether the divergence never looks at tokens the teacher did not send."""
        return self.tail == "renormalize"

    @property
    def compares_logits(self) -> bool:
        """Whether the divergence is one of logits and not of log-probabilities."""
        return _compares_logits(self.config)


def make_objective(
    divergence: str | Mapping[str, Any] | Any = "forward_kl",
    tail: str | None = "bucket",
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    beta: float = 0.5,
    payload_temperature: float | None = None,
) -> Objective:
    """Check the options of the loss and find the divergence.

    divergence: a kind, a mapping with `kind` and options, or a divergence's own Config; beta fills in the option of
    that name where the divergence has one and none was given. tail None: the teacher is known over the whole
    vocabulary. payload_temperature: the one the teacher's log-probabilities were taken at, None for `temperature`.
    Raises ValueError for every refused value or combination.
    """
    if tail is not None and tail not in TAILS:
        raise ConfigError(
            f"loss.tail: unknown tail '{tail}'{plugins.nearest(str(tail), TAILS) or '.'} {_allowed(TAILS)}"
        )
    payload_temperature = temperature if payload_temperature is None else payload_temperature
    for name, value in (("temperature", temperature), ("payload_temperature", payload_temperature)):
        if not (value > 0 and math.isfinite(value)):
            raise ConfigError(f"loss.{name}: {value} is not a positive number")
    for name, value in (("kd_weight", kd_weight), ("ce_weight", ce_weight)):
        if not (value >= 0 and math.isfinite(value)):
            raise ConfigError(f"{name}: {value} is negative or not finite")
    if payload_temperature != temperature and tail not in (None, "renormalize"):
        raise ConfigError(
            f"loss.tail: '{tail}' needs the teacher's log-probabilities at the loss's temperature {temperature}, "
            f"and these were taken at {payload_temperature}: the tail cannot be recovered. {_allowed(['renormalize'])}"
        )
    kind, function, config = _find(divergence, beta)
    tails = getattr(config, "tails", ("bucket", "renormalize"))
    if tail is not None and _compares_logits(config):
        raise ConfigError(
            f"loss.divergence: '{kind}' compares whole logits, which the likeliest tokens are not. "
            "Allowed with it: teacher.payload=hidden_states"
        )
    if tail is not None and tail not in tails:
        raise ConfigError(f"loss.tail: '{tail}' is ill-posed with the divergence '{kind}'. {_allowed(tails)}")
    return Objective(function, config, tail, temperature, payload_temperature, kd_weight, ce_weight)


def _find(divergence: str | Mapping[str, Any] | Any, beta: float) -> tuple[str, Callable[..., Any], Any]:
    """The kind, function and Config of a divergence given in any of its three forms."""
    if isinstance(divergence, str):
        module = plugins.load(GROUP, divergence, "loss.divergence")
        return divergence, module.divergence, module.Config(**_beta_if_taken(module.Config, beta))
    if isinstance(divergence, Mapping):
        kind = str(divergence.get("kind"))
        given = _beta_if_taken(plugins.load(GROUP, kind, "loss.divergence").Config, beta) | dict(divergence)
        module, config = plugins.options(GROUP, given, "loss.divergence")
        return kind, module.divergence, config
    module = sys.modules[type(divergence).__module__]
    if not (dataclasses.is_dataclass(divergence) and hasattr(module, "divergence")):
        raise ConfigError(
            f"loss.divergence: {divergence!r} is neither a kind, a mapping with `kind`, nor the Config of a divergence."
            f" {_allowed(plugins.available(GROUP))}"
        )
    return module.__name__.rsplit(".", 1)[-1], module.divergence, divergence


def _compares_logits(config: Any) -> bool:
    return getattr(config, "compares_logits", False)


def _beta_if_taken(config_class: type, beta: float) -> dict[str, Any]:
    return {"beta": beta} if any(field.name == "beta" for field in dataclasses.fields(config_class)) else {}


def _allowed(values: Any) -> str:
    return f"Allowed: {', '.join(values)}"
