"""Requests to one server that are tried again: waits, deadlines, and what a failure means.

Tried again: no connection, no answer in time, 429, 5xx, and replies whose reader finds them unusable. Everything else
that is not a reply of status 200 is a ConfigError with the server's own words and, where it is known, what to do.
The key is in the header of a request and nowhere else: not in a message, a log record or an address.
"""

import asyncio
import json
import logging
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import aiohttp

from ray_kd.errors import ConfigError
from ray_kd.teacher.engine import Stats
from ray_kd.teacher.engines._prompt_logprobs import UnusableReply, decode

logger = logging.getLogger(__name__)

T = TypeVar("T")

_LONGEST_WAIT_S = 30.0
_LONGEST_MESSAGE = 300
_HAS_NAN = "not JSON compliant"
"""What vLLM says, with status 400 as if the request were wrong, when its own answer holds a NaN."""


class GaveUp(Exception):
    """All tries of a request failed; the text is a line for the user."""

    def __init__(self, line: str, has_answered: bool) -> None:
        super().__init__(line)
        self.has_answered = has_answered
        """Whether the server answered the last try, with nothing that can be used: it is there, and fails on this."""


@dataclass(frozen=True)
class Limits:
    """How often and for how long a request is tried; as in `http.Config`."""

    max_concurrency: int
    timeout_s: float
    deadline_s: float
    max_retries: int
    backoff_s: float


class Client:
    """Connections to one server, kept open; lives in one event loop."""

    def __init__(self, url: str, limits: Limits, api_key_env: str | None, key: str, stats: Stats) -> None:
        """key: what `read_key` found in the environment variable api_key_env, "" for none. stats: gets the retries."""
        self.url = url
        self._limits = limits
        self._api_key_env = api_key_env
        self._key = key
        self._stats = stats
        self._random = random.Random()  # of its own: training draws from the global one
        self._session = aiohttp.ClientSession(
            headers={"Accept-Encoding": "gzip, deflate", "Content-Type": "application/json"}
            | ({"Authorization": f"Bearer {key}"} if key else {}),
            connector=aiohttp.TCPConnector(limit=limits.max_concurrency),
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()

    async def fetch(self, method: str, path: str, body: bytes | None, read: Callable[[Any], T]) -> T:
        """What `read` makes of the decoded reply; it raises UnusableReply for one that should be asked for again.

        Raises GaveUp after the last try or at the deadline, ConfigError for what the server refuses for good.
        """
        limits, start = self._limits, time.monotonic()
        for num_tries in range(1, limits.max_retries + 2):
            left_s = limits.deadline_s - (time.monotonic() - start)
            try:
                return read(decode(await self._send(method, path, body, min(limits.timeout_s, left_s))))
            except UnusableReply as error:
                failure = _Failure(f"an unusable reply: {error}", has_answered=True)
            except _Failure as error:
                failure = error
            wait_s = min(limits.backoff_s * 2 ** (num_tries - 1), _LONGEST_WAIT_S) * self._random.uniform(0.5, 1)
            wait_s = max(wait_s, failure.retry_after_s)
            spent_s = time.monotonic() - start
            logger.info("%s, try %d after %.1f s: %s", self.url, num_tries, spent_s, failure)
            if spent_s + wait_s >= limits.deadline_s or num_tries > limits.max_retries:
                break
            await asyncio.sleep(wait_s)
            self._stats.retries += 1  # requests under way share one thread, and none is awaited here
        raise GaveUp(
            f"the teacher's server {self.url} gave no usable answer in {spent_s:.1f} s and {num_tries} "
            f"{'try' if num_tries == 1 else 'tries'}; the last: {failure}",
            failure.has_answered,
        )

    async def _send(self, method: str, path: str, body: bytes | None, timeout_s: float) -> bytes:
        """The body of a reply of status 200, decompressed. Raises _Failure for what may be tried again."""
        timeout = aiohttp.ClientTimeout(total=max(timeout_s, 0.001))  # 0 would be no limit at all
        try:
            # A redirect could lead from https to http, and the key with it.
            async with self._session.request(
                method, self.url + path, data=body, timeout=timeout, allow_redirects=False
            ) as response:
                reply, status, retry_after = await response.read(), response.status, response.headers.get("Retry-After")
        except TimeoutError:
            raise _Failure(f"no answer within {timeout_s:.3g} s") from None
        except aiohttp.ClientError as error:
            raise _Failure(f"{type(error).__name__}: {self.line(str(error))}") from error
        if status == 200:
            return reply
        text = f"HTTP {status}: {self.line(_message(reply))}"
        if status == 429 or status >= 500 or _HAS_NAN in text:
            raise _Failure(text, seconds(retry_after or ""), has_answered=status in (400, 500))
        raise ConfigError(f"the teacher's server {self.url} refused {path} with {text}{self._hint(status, text)}")

    def line(self, text: str) -> str:
        """One line of somebody else's text, without the key."""
        text = " ".join(text.split())
        text = text.replace(self._key, "***") if self._key else text
        return text if len(text) <= _LONGEST_MESSAGE else text[: _LONGEST_MESSAGE - 3] + "..."

    def _hint(self, status: int, text: str) -> str:
        if status in (401, 403):
            return (
                f"; check the key in {self._api_key_env}" if self._key else "; name the key's variable in api_key_env"
            )
        if "logprobs" in text:
            return "; start it with a --max-logprobs of at least teacher.top_k, or lower that"
        if any(words in text for words in ("context length", "maximum model length", "max_tokens")):
            return "; lower data.sequence_length, or raise --max-model-len above it"
        return ""


def read_key(variable: str | None) -> str:
    """The key, or "" without a variable. Raises ConfigError when the variable holds none that can be sent."""
    if variable is None:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(f"environment variable {variable} (teacher.engine.api_key_env) is not set on this node")
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"environment variable {variable} (teacher.engine.api_key_env) holds no key of plain ASCII")
    return key


def seconds(retry_after: str) -> float:
    """Retry-After in seconds from now, whether it is a number or a date; 0 for neither."""
    if retry_after.strip().isdigit():
        return float(retry_after)
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return 0.0


class _Failure(Exception):
    """One try failed, and the next may not."""

    def __init__(self, cause: str, retry_after_s: float = 0.0, has_answered: bool = False) -> None:
        super().__init__(cause)
        self.retry_after_s = retry_after_s
        self.has_answered = has_answered


def _message(reply: bytes) -> str:
    """What a server says of an error: {error: {message}}, {message}, {detail} or {error}; else its text."""
    text = reply.decode(errors="replace")
    try:
        content = json.loads(text)
    except ValueError:
        return text
    if isinstance(content, dict):
        error = content.get("error")
        content = error if isinstance(error, dict) else content
        return str(content.get("message") or content.get("detail") or error or text)
    return text
