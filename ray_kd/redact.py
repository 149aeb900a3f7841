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
_SECOND_WORD = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")  # of accessToken
_OF_A_VOCABULARY = re.compile(
    r"(?:bos|eos|eot|pad|unk|sep|cls|mask|image|start|stop|end|per|.*_per)_token$", re.IGNORECASE
)
_CERTAIN_TOKEN = re.compile(
    r"(?:.*[_\-.])?(?:hf|hub|huggingface|api|access|auth|bearer|refresh|session|security|private|oauth|wandb)[_-]token$"
    r"|token$",
    re.IGNORECASE,
)
_ASSIGNED = re.compile(
    rf"""([\w\-]*(?<![a-z]){_NAMES})(["']?\s*[:=]\s*)(?:bearer\s+)?["']?[^\s,"'}}\]]+""", re.IGNORECASE
)
_PROSE = re.compile(r":\s+$")
_USER_INFO = re.compile(r"(://)[^/@\s:]*:[^/@\s]+@")
_PASSWORD = re.compile(r"([a-z][\w+.\-]*)://[^/@?#\s]*:[^/@?#\s]*@", re.IGNORECASE)
_USER = re.compile(r"(https?)://[^/@?#\s]+@", re.IGNORECASE)
_BEARER = re.compile(r"bearer\s+\S{8,}", re.IGNORECASE)
_QUERY_NAMES = ("key", "sig", "signature", "x-amz-signature", "x-goog-signature")
_SHORTEST = 8
"""Characters of a variable's value that is taken for a secret: shorter ones are words like "none" and "tests"."""
_LONG = 16
"""Characters from which a secret is no word: it is found inside of others too. Tokens of a vocabulary are shorter."""


def is_secret_name(name: str) -> bool:
    """Whether a key or a variable of that name holds a credential: hf_token, AWS_SECRET_ACCESS_KEY, x-api-key.

    The tokens of a vocabulary (eos_token) are none, nor is what only says where one is (api_key_env).
    """
    return bool(_SECRET.search(_SECOND_WORD.sub("_", name))) and not _OF_A_VOCABULARY.match(name)


def redact(text: str) -> str:
    """The text with MASK for values of secret environment variables, passwords in addresses and `token=...`."""
    for _, value in _secret_variables():
        pattern = re.escape(value)
        text = re.sub(pattern if len(value) >= _LONG else rf"(?<!\w){pattern}(?!\w)", MASK, text)
    return _ASSIGNED.sub(_masked, _USER_INFO.sub(rf"\1{MASK}@", text))


def _masked(match: re.Match[str]) -> str:
    """An assignment without its value. A key of a vocabulary, "388 bytes a token: 12" and the like are none."""
    name, sign = match[1], match[2]
    is_prose = name.lower() in ("token", "credential", "credentials") and _PROSE.fullmatch(sign)
    return match[0] if is_prose or _OF_A_VOCABULARY.match(name) else f"{name}{sign}{MASK}"


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
            if is_secret_name(str(name)):
                yield from _named(str(name), item, _join(key, name))
            else:
                yield from credentials(item, _join(key, name))
    elif isinstance(value, list | tuple):
        for place, item in enumerate(value):
            yield from credentials(item, _join(key, place))
    elif isinstance(value, str) and (why := _why(value)) is not None:
        yield key, why


def _named(name: str, value: Any, key: str) -> Iterator[tuple[str, str]]:
    """What is under the name of a credential: everything, but that a token of some vocabulary is no secret."""
    if isinstance(value, Mapping):
        for inner, item in value.items():
            yield from _named(name, item, _join(key, inner))
    elif isinstance(value, list | tuple):
        for place, item in enumerate(value):
            yield from _named(name, item, _join(key, place))
    elif isinstance(value, str | int) and not isinstance(value, bool) and value not in ("", MASK):
        is_vague = name.lower().endswith("_token") and not _CERTAIN_TOKEN.match(name)
        if not is_vague or (isinstance(value, str) and len(value) >= _LONG and value.isascii() and value.isalnum()):
            yield key, "is named like a credential"


def _why(text: str) -> str | None:
    if (match := _PASSWORD.search(text)) is not None:
        return f"is a {match[1]}:// URI with a password"
    if (match := _USER.search(text)) is not None:
        return f"is a {match[1]}:// URI with a user or a token"
    if "://" in text and any(is_secret_name(name) or name.lower() in _QUERY_NAMES for name in _query_names(text)):
        return "is a URI with a credential in its query"
    if _BEARER.match(text) is not None:
        return "is a bearer token"
    named = next((name for name, value in _secret_variables() if _holds(text, value)), None)
    return None if named is None else f"holds the value of the environment variable {named}"


def _holds(text: str, value: str) -> bool:
    """A short value is one only where it is a whole text: /data/training holds no JUPYTER_TOKEN=training."""
    return text == value or (len(value) >= _LONG and value in text)


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
