"""A teacher on a server: vLLM's completions API (or one that does the same), or SGLang's own.

Comes in: packed rows. Goes out: top-k log-probabilities at temperature 1. Each document of a row is a prompt of token
ids, `max_concurrency` requests are under way at once, and replies belong to their documents by construction, in
whatever order they come. Weights and their type are the server's; of `teacher.model` only config.json is read here.

    vllm serve MODEL --max-logprobs 64                 # at least teacher.top_k
    python -m sglang.launch_server --model-path MODEL

The server's context must be one token longer than the longest document (vLLM generates one), so
`--max-model-len` of at least data.sequence_length + 1.

What is tried again: no connection, no answer in `timeout_s`, 429 and 5xx, a reply that is cut short or does not fit
the question; with exponentially growing waits, or those of Retry-After. After `max_retries` or `deadline_s` the call
fails as a whole: a server that is gone would quarantine every row. A document alone is given up (a RowError) when
others of the same call were answered and the server does answer, but never usably, for this one: so a prompt that the
model computes NaN for, where vLLM replies with an error, costs its row and not the run.
(On a CPU, vLLM 0.32 lets such a NaN into later prompts that get its pages of the cache.)
Costs: about 5 kB and 0.1 to 0.2 ms of a core here a prompt token at K = 64 (`_prompt_logprobs.py`).
"""

import asyncio
import ipaddress
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from omegaconf import MISSING

from ray_kd import models
from ray_kd.errors import ConfigError, RetryableError
from ray_kd.payloads import TOPK_LOGPROBS, TopKLogprobs
from ray_kd.teacher.documents import Document, DocumentAnswer, documents, payloads
from ray_kd.teacher.engine import TOPK, Request, RowError, Rows, Stats, check_request
from ray_kd.teacher.engines._http_client import Client, GaveUp, Limits, read_key
from ray_kd.teacher.engines._prompt_logprobs import PROTOCOLS, UnusableReply


@dataclass
class Config:
    """Options of `teacher.engine: {kind: http, url: ...}`."""

    url: str = MISSING
    """The server's address, for example http://127.0.0.1:8000 or https://host/prefix (with or without /v1)."""
    protocol: str = "openai"
    """openai: vLLM's /v1/completions, teacher.batch_size prompts a request | sglang: SGLang's /generate, one prompt."""
    served_model: str | None = None
    """The model's name on the server (openai). Default: the one it serves; of several, that of teacher.model."""
    max_concurrency: int = 16
    """Requests under way at once, of each teacher actor."""
    timeout_s: float = 300.0
    """Longest wait for one reply."""
    deadline_s: float = 900.0
    """Longest time for one request over all its tries."""
    max_retries: int = 10
    """Tries after the first; with the waits below ten take about two minutes."""
    backoff_s: float = 0.5
    """Wait before the first retry; doubled for each further one up to 30 s, then shortened by up to half at random."""
    api_key_env: str | None = None
    """Environment variable, on the teacher's nodes, that holds the server's key. The key itself never stands here."""
    insecure: bool = False
    """Allow the key to travel in clear text: over http:// to another machine."""

    def __post_init__(self) -> None:
        key = "teacher.engine"
        if self.protocol not in PROTOCOLS:
            raise ConfigError(f"{key}.protocol is {self.protocol!r}: allowed is {' | '.join(PROTOCOLS)}")
        if self.served_model is not None and self.protocol != "openai":
            raise ConfigError(f"{key}.served_model has no effect with protocol {self.protocol}, which names no model")
        for name, least in (("max_concurrency", 1), ("max_retries", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{key}.{name} is {getattr(self, name)}: allowed is at least {least}")
        for name in ("timeout_s", "deadline_s", "backoff_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{key}.{name} is {getattr(self, name)}: allowed is above 0")
        if self.api_key_env is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", self.api_key_env):
            # Not repeated here: it may be a key that was put in the wrong place.
            raise ConfigError(f"{key}.api_key_env is not the name of an environment variable, in capitals")
        _check_url(self)


class Engine:
    """Keeps its connections open from call to call. Nothing is sent before the first row is asked for."""

    provides = frozenset({TOPK_LOGPROBS})
    selections = frozenset({TOPK})
    any_temperature = False
    is_local_model = False
    takes_batch_tokens = False

    def __init__(
        self,
        config: Config,
        *,
        model: str,
        revision: str | None = None,
        dtype: str = "auto",
        device: str = "cpu",
        batch_size: int = 4,
    ) -> None:
        """batch_size: prompts in one request, where the protocol takes several.

        Raises ConfigError when the model's config.json or the key cannot be found.
        """
        self.stats = Stats()
        self._config = config
        self._protocol = PROTOCOLS[config.protocol]
        self._batch_size = batch_size if self._protocol.takes_batches else 1
        self._model = model
        self._vocab_size = models.check_model(model, revision, "teacher", needs_weights=False).vocab_size
        self._served_model = config.served_model if config.protocol == "openai" else ""
        self._key = read_key(config.api_key_env)
        self._runner: asyncio.Runner | None = None
        self._client: Client | None = None

    def annotate(self, rows: Rows, request: Request) -> list[TopKLogprobs | RowError]:
        """One payload per row, in order.

        Raises ConfigError for what the server refuses for good, RetryableError when it does not answer.
        """
        check_request(request, self.provides, self.selections, self._vocab_size, self.any_temperature)
        asked = documents(rows)
        answers: Sequence[DocumentAnswer | RowError] = []
        if asked:
            self._runner = self._runner or asyncio.Runner()
            answers = self._runner.run(self._answer_all(asked, request.top_k))
        num_tokens = sum(len(document.prompt) for document in asked)
        self.stats.tokens += num_tokens
        self.stats.places += num_tokens  # those of the server's batches are not known here
        return payloads(rows, asked, answers, request, self._vocab_size)

    def close(self) -> None:
        """Close the connections."""
        if self._runner is not None:
            if self._client is not None:
                self._runner.run(self._client.close())
            self._runner.close()
        self._runner = self._client = None

    async def _answer_all(self, asked: Sequence[Document], top_k: int) -> list[DocumentAnswer | RowError]:
        """One answer a document, in order. The first error of the whole call cancels the requests under way."""
        self._client = client = self._client or self._connect()
        slots = asyncio.Semaphore(self._config.max_concurrency)
        try:
            if self._served_model is None:
                self._served_model = await client.fetch("GET", "/v1/models", None, self._choose_model)
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._answer(client, asked[start : start + self._batch_size], top_k, slots))
                    for start in range(0, len(asked), self._batch_size)
                ]
        except* (ConfigError, GaveUp) as errors:
            first = errors.exceptions[0]
        else:
            return _row_errors([answer for task in tasks for answer in task.result()])
        raise first if isinstance(first, ConfigError) else RetryableError(str(first)) from first

    async def _answer(
        self, client: Client, asked: Sequence[Document], top_k: int, slots: asyncio.Semaphore
    ) -> Sequence[DocumentAnswer | GaveUp]:
        """The answers to the documents of one request; if the server fails on them, they are asked one by one."""
        body = json.dumps(self._protocol.request(asked, top_k, self._served_model or "")).encode()
        try:
            async with slots:
                return await client.fetch(
                    "POST", self._protocol.path, body, lambda reply: self._protocol.answers(reply, asked, top_k)
                )
        except GaveUp as error:
            if not error.has_answered:
                raise
            if len(asked) == 1:
                return [error]
        self.stats.retries += len(asked)
        return [answer for one in asked for answer in await self._answer(client, [one], top_k, slots)]

    def _connect(self) -> Client:
        config = self._config
        limits = Limits(
            config.max_concurrency, config.timeout_s, config.deadline_s, config.max_retries, config.backoff_s
        )
        return Client(config.url.rstrip("/").removesuffix("/v1"), limits, config.api_key_env, self._key, self.stats)

    def _choose_model(self, reply: Any) -> str:
        """The name of the model in the reply of /v1/models."""
        try:
            names = [str(card["id"]) for card in reply["data"]]
        except (TypeError, KeyError) as error:
            raise UnusableReply("a list of models without data[].id") from error
        if len(names) == 1:
            return names[0]
        if self._model in names:
            return self._model
        raise ConfigError(
            f"the teacher's server {self._config.url} serves {', '.join(names[:8]) or 'no model'}: "
            "name one in teacher.engine.served_model"
        )


def _row_errors(answers: Sequence[DocumentAnswer | GaveUp]) -> list[DocumentAnswer | RowError]:
    """Documents given up are errors of their rows, unless no other was answered: then the server is to blame."""
    given_up = [answer for answer in answers if isinstance(answer, GaveUp)]
    if len(given_up) == len(answers):
        raise RetryableError(str(given_up[0])) from given_up[0]
    return [RowError(str(answer)) if isinstance(answer, GaveUp) else answer for answer in answers]


def _check_url(config: Config) -> None:
    """Refuse what is no address, and a key in clear text."""
    parts = urlsplit(config.url)
    if parts.username or parts.password or parts.query or parts.fragment:  # not repeated: there may be a key in it
        raise ConfigError("teacher.engine.url has more than an address and a path: a key goes by api_key_env")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"teacher.engine.url is {config.url!r}: allowed is http://host:port or https://host")
    is_clear = parts.scheme == "http" and not _is_loopback(parts.hostname)
    if config.api_key_env is not None and is_clear and not config.insecure:
        raise ConfigError(
            f"teacher.engine.url {config.url} would carry the key of {config.api_key_env} in clear text: "
            "use https://, or set teacher.engine.insecure=true"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"
