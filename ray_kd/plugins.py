"""`kind: x` -> the module x of a package: the file name is the config value.

A plug-in file holds a `Config` dataclass with its options and one well-known function or class.
A third party's file works too: a kind with a dot is imported as it stands (`my_pkg.my_divergence`).
Listing and describing read the files without importing them, so `--help` needs no torch.
"""

import ast
import difflib
import importlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ray_kd.errors import ConfigError

_PACKAGE = Path(__file__).parent

GROUPS = {
    "run.trackers": "trackers",
    "data.source": "data.sources",
    "data.format": "data.formats",
    "teacher.engine": "teacher.engines",
    "loss.divergence": "losses.divergences",
    "loss.terms": "losses.features",
}
"""Config key -> the sub-package its kinds live in."""


@dataclass(frozen=True)
class Field:
    """One config field as written in its source file: name, annotation, default and the sentence under it."""

    name: str
    annotation: str
    default: str | None
    sentence: str


def available(group: str) -> list[str]:
    """The kinds on disk of a group such as "data.sources", sorted."""
    folder = _PACKAGE.joinpath(*group.split("."))
    return sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint `; did you mean 'x'?` for a misspelt name, or nothing when none is close."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


_IN_WORDS = {
    "is not a ListConfig": "allowed is a list, for example [a, b]",
    "is not a subclass of": "allowed is a mapping, or its keys one by one (KEY.NAME=VALUE)",
    "is not Optional": "a value is missing",
    "Incompatible value 'None'": "a value is missing",
    "Cannot assign str to Dict": "allowed is a mapping, for example {{key: value}}",
    "Cannot merge incompatible container types": "allowed is a kind, or a mapping {{kind: ..., options}}",
    "could not be converted to Integer": "{value} is no integer, for example 8",
    "could not be converted to Float": "{value} is no number, for example 0.5 or 1.0e-4",
    "is not a valid bool": "{value} is not one of true, false",
}


def explain(error: Exception) -> str:
    """What OmegaConf says of a value, in one line and in the words of a user."""
    line = str(getattr(error, "msg", None) or error).splitlines()[0]
    value = re.search(r"Value ('.*?'|\S+) (?:of|is|could)", line)
    given = value[1] if value else "the value"
    return next((words.format(value=given) for text, words in _IN_WORDS.items() if text in line), line)


def load(group: str, kind: str, key: str | None = None) -> ModuleType:
    """Import the plug-in `kind` of `group`. Raises ConfigError naming the kinds on disk for an unknown one.

    key: where the kind stands in the config, for messages.
    """
    key = key or group
    if "." in kind:
        try:
            module = importlib.import_module(kind)
        except ImportError as error:
            if "/" in kind:  # a path, in the place of what reads it
                raise ConfigError(
                    f"{key} is '{kind}': allowed is a kind, or {{kind: ..., options}}. {_available(group)}"
                ) from error
            raise ConfigError(f"{key}: kind '{kind}' cannot be imported ({error}). {_available(group)}") from error
        if not hasattr(module, "Config"):
            raise ConfigError(f"{key}: kind '{kind}' is no plug-in: the module has no Config")
        return module
    kinds = available(group)
    if kind not in kinds:
        raise ConfigError(f"{key}: unknown kind '{kind}'{nearest(kind, kinds) or '.'} {_available(group)}")
    return importlib.import_module(f"ray_kd.{group}.{kind}")


def options(group: str, value: str | Mapping[str, Any], key: str) -> tuple[ModuleType, Any]:
    """The plug-in module and its filled-in Config for a config value: a kind, or a mapping with `kind` and options.

    key: where the value stands in the config, for messages. Raises ConfigError for an unknown kind or option,
    a wrong type, or an option that has no default and is missing.
    """
    from omegaconf import MissingMandatoryValue, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not isinstance(value, str | Mapping):
        raise ConfigError(f"{key} is {value!r}: allowed is a kind or {{kind: ..., options}}. {_available(group)}")
    given = {"kind": value} if isinstance(value, str) else dict(value)
    kind = given.pop("kind", None)
    if not isinstance(kind, str):
        raise ConfigError(f"{key}.kind is missing. {_available(group)}")
    module = load(group, kind, key)
    schema = OmegaConf.structured(module.Config)
    names = [str(name) for name in schema]  # `in` would leave out the required ones
    for name in given:
        if name not in names:
            raise ConfigError(
                f"{key}: unknown option '{name}' of kind '{kind}'{nearest(name, names)}"
                f". Available: {', '.join(names) or 'none'}"
            )
    try:
        return module, OmegaConf.to_object(OmegaConf.merge(schema, given))
    except MissingMandatoryValue as error:
        raise ConfigError(f"{key}.{error.full_key} is missing (kind '{kind}' needs it)") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{key}.{error.full_key}: {explain(error)}") from error


def kind_of(value: str | Mapping[str, Any]) -> str:
    """The kind named by a config value that is a kind or a mapping with `kind`."""
    return value if isinstance(value, str) else str(value.get("kind"))


def describe_kinds(group: str) -> Iterator[tuple[str, str, list[Field]]]:
    """(kind, first sentence of the file, its Config's fields) for every kind on disk, without importing any."""
    for kind in available(group):
        tree = ast.parse(_PACKAGE.joinpath(*group.split("."), f"{kind}.py").read_text())
        yield kind, (ast.get_docstring(tree) or "").split("\n")[0], fields_of(tree, "Config")


def _available(group: str) -> str:
    return f"Available: {', '.join(available(group))}"


def fields_of(tree: ast.Module, class_name: str) -> list[Field]:
    """The annotated fields of a class in a parsed file, each with the string literal that follows it."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            return list(_fields(node))
    return []


def _fields(node: ast.ClassDef) -> Iterator[Field]:
    for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        sentence = ""
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            sentence = " ".join(str(following.value.value).split())
        default = ast.unparse(statement.value) if statement.value is not None else None
        yield Field(statement.target.id, ast.unparse(statement.annotation), default, sentence)
