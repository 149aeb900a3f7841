"""The objective as a list of terms: loss = sum over terms of weight(step) * mean over what the term counts.

`kd` and `ce` are made together by the fused loss on the head; the others are the kinds of `losses/features/`. Each is
a sum over the step's micro-batches and ranks divided once, by its own count over all of them: target tokens for `kd`
and `ce`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from ray_kd import plugins, schedules
from ray_kd.errors import ConfigError
from ray_kd.losses.features import Term
from ray_kd.losses.layer_map import ModelShape
from ray_kd.schedules import Schedule

GROUP = "losses.features"
KD, CE = "kd", "ce"
HEAD_KINDS = (KD, CE)


@dataclass(frozen=True)
class Entry:
    """One entry of `loss.terms`. Build the list with `parse_terms`, which checks it."""

    kind: str
    name: str
    """The kind, numbered from 1 where there are several of it: hidden_state_1, hidden_state_2."""
    key: str
    """Where it stands in the config, for messages: loss.terms[2]."""
    weight: Schedule
    module: ModuleType | None = None
    """Of a feature term: its file in `losses/features/`."""
    config: Any = None
    """Of a feature term: its module's Config."""

    @property
    def is_feature(self) -> bool:
        """Whether it compares what is inside the models, and not what their heads say."""
        return self.module is not None


@dataclass(frozen=True)
class Factors:
    """What the terms are weighed by in one optimiser step."""

    temperature: float
    weights: Mapping[str, float]
    """By the names of the terms."""

    def weight(self, name: str) -> float:
        """Of a term; 0 for one that is not in the objective."""
        return self.weights.get(name, 0.0)


@dataclass(frozen=True)
class Schedules:
    """The terms' weights and the temperature over the steps."""

    temperature: Schedule
    weights: Mapping[str, Schedule]

    @classmethod
    def of(cls, terms: Sequence[Entry], temperature: Any) -> "Schedules":
        """temperature: a number or a schedule, as the config has it."""
        return cls(parse_temperature(temperature), {term.name: term.weight for term in terms})

    def at(self, step: int) -> Factors:
        """The values at an optimiser step, from 1: a function of the step alone, so that a resume changes nothing."""
        return Factors(self.temperature(step), {name: weight(step) for name, weight in self.weights.items()})

    def metrics(self, step: int) -> dict[str, float]:
        """Those of them that change, as they are logged."""
        named = {"temperature": self.temperature} | {f"weight/{name}": one for name, one in self.weights.items()}
        return {f"train/{name}": one(step) for name, one in named.items() if not one.is_constant}


def loss_name(name: str) -> str:
    """Of a term's unweighted value in the metrics: hidden_state_1 -> hidden_state_loss_1."""
    kind, _, number = name.rpartition("_")
    return f"{kind}_loss_{number}" if number.isdigit() else f"{name}_loss"


def resolve(
    entries: Sequence[Entry], student: ModelShape, teacher: ModelShape, sequence_length: int
) -> dict[str, Term]:
    """The feature terms by name, their layers found in these two models.

    Raises ConfigError, one line, for layers, widths, heads and lengths that do not fit, naming the entry.
    """
    return {
        entry.name: entry.module.resolve(entry.config, student, teacher, sequence_length, entry.key)
        for entry in entries
        if entry.module is not None
    }


def parse_temperature(value: Any, key: str = "loss.temperature") -> Schedule:
    """The temperature of the loss. Raises ConfigError, one line, unless it is positive at every step."""
    temperature = schedules.parse(value, key)
    if min(temperature.values) <= 0:
        raise ConfigError(f"{key} is {min(temperature.values)!r}: allowed is a positive number")
    return temperature


def kinds() -> list[str]:
    """The kinds of terms there are."""
    return [*HEAD_KINDS, *plugins.available(GROUP)]


def parse_terms(entries: Sequence[Any], key: str = "loss.terms") -> list[Entry]:
    """The checked terms of a config, in its order.

    entries: kinds, or mappings with `kind`, `weight` (a number or a schedule, default 1) and the kind's options.
    Raises ConfigError, one line, for an unknown kind or option, a wrong type, a weight that is negative at some step,
    a second kd or ce, and for a list of which nothing would be trained.
    """
    given = [_as_mapping(entry, f"{key}[{place}]") for place, entry in enumerate(entries)]
    names = [entry["kind"].rpartition(".")[2] for entry in given]  # of a module of one's own, its last part
    several = {name for name, count in Counter(names).items() if count > 1}
    for name in HEAD_KINDS:
        if name in several:
            raise ConfigError(f"{key} has several terms of kind '{name}': allowed is one")
    seen: Counter[str] = Counter()
    terms = []
    for place, (entry, name) in enumerate(zip(given, names, strict=True)):
        seen[name] += 1
        numbered = f"{name}_{seen[name]}" if name in several else name
        terms.append(_entry(entry, numbered, f"{key}[{place}]"))
    if not any(value > 0 for term in terms for value in term.weight.values):
        raise ConfigError(f"{key}: {'all weights are 0' if terms else 'it is empty'}: nothing would be trained")
    return terms


def _as_mapping(entry: Any, key: str) -> dict[str, Any]:
    mapping = {"kind": entry} if isinstance(entry, str) else entry
    if not isinstance(mapping, Mapping) or not isinstance(mapping.get("kind"), str):
        raise ConfigError(f"{key} is {entry!r}: allowed is {{kind: ..., weight: ..., options}}. {_available()}")
    return dict(mapping)


def _entry(entry: dict[str, Any], name: str, key: str) -> Entry:
    weight = schedules.parse(entry.pop("weight", 1.0), f"{key}.weight")
    if min(weight.values) < 0:
        raise ConfigError(f"{key}.weight is {min(weight.values):g}: allowed is 0 or more")
    kind = entry["kind"]
    if kind not in HEAD_KINDS:
        if name in HEAD_KINDS:
            raise ConfigError(f"{key}: a kind '{kind}' would be named '{name}': allowed is a module of another name")
        if "." not in kind and kind not in kinds():
            raise ConfigError(f"{key}: unknown kind '{kind}'{plugins.nearest(kind, kinds()) or '.'} {_available()}")
        module, config = plugins.options(GROUP, entry, key)
        return Entry(kind, name, key, weight, module, config)
    for option in entry:
        if option != "kind":
            raise ConfigError(
                f"{key}: unknown option '{option}' of kind '{kind}'{plugins.nearest(option, ['weight'])}. "
                "Available: weight"
            )
    return Entry(kind, name, key, weight)


def _available() -> str:
    return f"Available: {', '.join(kinds())}"
