"""Credentials stay in the environment: what looks like one is refused in a config, and is masked in what is printed.

A config is written to the run folder, to every checkpoint and to the model card, and a command line is visible to all
users of a machine and to those of a Ray dashboard. So a key that names a credential, an address with a password and
the value of a secret environment variable are refused in both. Messages of libraries may still repeat one: `redact`
is the last thing that happens to a line before it is written.
"""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import parse_qsl, urlsplit

MASK = "***"

_NAMES = (
    r"(?:token|secret|password|passwd|passphrase|credentials?|authorization|bearer|connection_string"
    r"|(?:api|access|account|private|secret|shared)[_-]?key)"
)
_SECRET = re.compile(rf"(?:^|[_\-.]){_NAMES}$", re.IGNORECASE)
_OF_A_VOCABULARY = re.compile(
    r"(?:bos|eos|eot|pad|unk|sep|cls|mask|image|start|stop|end|per|.*_per)_token$", re.IGNORECASE
)
_ASSIGNED = re.compile(rf"""((?<![a-z]){_NAMES}["']?\s*[:=]\s*)(?:bearer\s+)?["']?[^\s,"'}}\]]+""", re.IGNORECASE)
_USER_INFO = re.compile(r"(://)[^/@\s:]*:[^/@\s]+@")
_SIGNATURES = ("sig", "signature", "x-amz-signature", "x-goog-signature")
_SHORTEST = 8
"""Characters of a variable's value that is taken for a secret: shorter ones are words like "none" and "tests"."""


def is_secret_name(name: str) -> bool:
    """Whether a key or a variable of that name holds a credential: hf_token, AWS_SECRET_ACCESS_KEY, x-api-key.

    The tokens of a vocabulary (eos_token) are none, nor is what only says where one is (api_key_env).
    """
    return bool(_SECRET.search(name)) and not _OF_A_VOCABULARY.match(name)


def redact(text: str) -> str:
    """The text with MASK for values of secret environment variables, passwords in addresses and `token=...`."""
    for _, value in _secret_variables():
        text = text.replace(value, MASK)
    return _ASSIGNED.sub(rf"\1{MASK}", _USER_INFO.sub(rf"\1{MASK}@", text))


def mask(value: Any) -> Any:
    """A config's plain containers with MASK for what `credentials` finds in them."""
    found = {place for place, _ in credentials(value)}

    def masked(inner: Any, key: str) -> Any:
        if isinstance(inner, Mapping):
            return {name: masked(item, _join(key, name)) for name, item in inner.items()}
        if isinstance(inner, list):
            return [masked(item, _join(key, place)) for place, item in enumerate(inner)]
        return MASK if key in found else inner

    return masked(value, "")


def credentials(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, what it is) for each text in plain containers that is, or holds, a credential."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            if isinstance(item, str | int) and not isinstance(item, bool) and is_secret_name(str(name)):
                if item not in ("", MASK):
                    yield _join(key, name), "is named like a credential"
            else:
                yield from credentials(item, _join(key, name))
    elif isinstance(value, list | tuple):
        for place, item in enumerate(value):
            yield from credentials(item, _join(key, place))
    elif isinstance(value, str) and (why := _why(value)) is not None:
        yield key, why


def _why(text: str) -> str | None:
    if (match := re.match(r"(\w+)://[^/@]*:[^/@]*@", text)) is not None:
        return f"is a {match[1]}:// URI with a password"
    if "://" in text and any(is_secret_name(name) or name.lower() in _SIGNATURES for name in _query_names(text)):
        return "is a URI with a credential in its query"
    named = next((name for name, value in _secret_variables() if value in text), None)
    return None if named is None else f"holds the value of the environment variable {named}"


def _query_names(text: str) -> list[str]:
    try:
        return [name for name, _ in parse_qsl(urlsplit(text).query)]
    except ValueError:  # no address after all: brackets that do not close
        return []


def _secret_variables() -> list[tuple[str, str]]:
    """(name, value), the longest values first: one may hold another."""
    found = [
        (name, value) for name, value in os.environ.items()
        if len(value) >= _SHORTEST and (is_secret_name(name) or name.upper().endswith("_KEY"))
    ]  # fmt: skip
    return sorted(found, key=lambda pair: -len(pair[1]))


def _join(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)
