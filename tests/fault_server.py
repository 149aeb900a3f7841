"""A teacher's server on loopback that answers from the fake engine's distribution, and fails on demand.

It speaks vLLM's /v1/completions and SGLang's /generate as their sources and documentation have them.
"""

import gzip
import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from ray_kd.teacher.engines import fake
from tests.tiny import VOCAB_SIZE

Prompts = list[list[int]]


@dataclass(frozen=True)
class Fault:
    """What is wrong with one reply."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    message: str = "the server's own words"
    """Of a status other than 200."""
    delay_s: float = 0.0
    edit: Callable[[Any], Any] = lambda reply: reply
    """The reply before it is written -> what is written instead."""
    cut: int | None = None
    """Bytes of the body that are sent."""
    announces_all: bool = False
    """With `cut`: Content-Length is that of the whole body, and the connection is closed early."""
    is_dropped: bool = False
    """The connection is closed instead of a reply."""
    is_gzip: bool = False


@dataclass
class Asked:
    """One request as it arrived."""

    path: str
    headers: dict[str, str]
    body: Any
    prompts: Prompts
    connection: int
    """Number of the connection it came on."""


@dataclass
class FaultServer:
    """Settings may be changed between requests."""

    vocab_size: int = VOCAB_SIZE
    fault: Callable[[int, Prompts], Fault | None] = lambda number, prompts: None
    """(number of the request for answers, from 0; its prompts) -> what is wrong with the reply."""
    models: Sequence[str] = ("served",)
    max_logprobs: int = 10**6
    max_model_len: int = 10**6
    api_key: str | None = None
    url: str = ""
    asked: list[Asked] = field(default_factory=list)
    most_at_once: int = 0
    _now: int = 0
    _connections: int = 0
    _lock: Any = field(default_factory=threading.Lock)

    def answer(self, asked: Asked, number: int) -> tuple[int, dict[str, str], Any]:
        """(status, headers, body) without any fault."""
        if self.api_key is not None and asked.headers.get("authorization") != f"Bearer {self.api_key}":
            return 401, {}, {"error": f"Unauthorized: {asked.headers.get('authorization')}"}
        if asked.path == "/v1/models":
            return 200, {}, {"object": "list", "data": [{"id": name} for name in self.models]}
        if max(map(len, asked.prompts)) + 1 > self.max_model_len:
            return 400, {}, _error(f"This model's maximum context length is {self.max_model_len} tokens.")
        return 200, {}, self._completions(asked) if asked.path == "/v1/completions" else self._generate(asked)

    def _completions(self, asked: Asked) -> Any:
        top_k = asked.body["prompt_logprobs"]
        choices = []
        for index, prompt in enumerate(asked.prompts):
            positions: list[Any] = [None]
            for logprobs, token in zip(self._logprobs(prompt[:-1]), prompt[1:], strict=True):
                order = np.argsort(-logprobs, kind="stable").tolist()
                shown = [token, *order[: min(top_k, self.max_logprobs)]]  # as vLLM: the token that stands there first
                positions.append(
                    {
                        str(one): {
                            "logprob": max(float(logprobs[one]), -9999.0),
                            "rank": order.index(one) + 1,
                            "decoded_token": f" {one}",
                        }
                        for one in dict.fromkeys(shown)
                    }
                )
            choices.append({"index": index, "text": "x", "finish_reason": "length", "prompt_logprobs": positions})
        return {"object": "text_completion", "model": asked.body["model"], "choices": choices}

    def _generate(self, asked: Asked) -> Any:
        (prompt,), start = asked.prompts, asked.body["logprob_start_len"]
        positions: list[Any] = [None]
        for logprobs in self._logprobs(prompt[:-1])[start:]:
            order = np.argsort(-logprobs, kind="stable").tolist()[: asked.body["top_logprobs_num"]]
            positions.append([[_or_null(logprobs[one]), one, None] for one in order])
        return {"text": "", "meta_info": {"prompt_tokens": len(prompt), "input_top_logprobs": positions}}

    def _logprobs(self, tokens: list[int]) -> np.ndarray:
        engine = fake.Engine(fake.Config(vocab_size=self.vocab_size))
        return engine.logprobs(np.array(tokens)).astype(np.float32)


@contextmanager
def serving(server: FaultServer) -> Iterator[FaultServer]:
    """The server at `url` until the block ends."""
    http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"owner": server}))
    http.daemon_threads = True
    server.url = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    owner: FaultServer
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        with self.owner._lock:
            self.owner._connections += 1
            self.number = self.owner._connections

    def do_GET(self) -> None:
        self._reply(None)

    def do_POST(self) -> None:
        self._reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _reply(self, body: Any) -> None:
        owner = self.owner
        content = body or {}
        prompts = [content["input_ids"]] if "input_ids" in content else content.get("prompt", [])
        headers = {name.lower(): value for name, value in self.headers.items()}
        asked = Asked(self.path, headers, body, prompts, self.number)
        with owner._lock:
            number = sum(one.body is not None for one in owner.asked)
            owner.asked.append(asked)
            owner._now += 1
            owner.most_at_once = max(owner.most_at_once, owner._now)
        fault = (owner.fault(number, prompts) if body is not None else None) or Fault()
        time.sleep(fault.delay_s)
        with owner._lock:
            owner._now -= 1
        if fault.is_dropped:
            self.close_connection = True
            return
        status, extra, reply = owner.answer(asked, number)
        if fault.status != 200:
            status, reply = fault.status, _error(fault.message)
        sent = json.dumps(fault.edit(reply) if status == 200 and body is not None else reply).encode()
        sent = gzip.compress(sent) if fault.is_gzip else sent
        length = len(sent) if fault.announces_all else len(sent[: fault.cut])
        self.close_connection = fault.announces_all
        self.send_response(status)
        encoding = {"Content-Encoding": "gzip"} if fault.is_gzip else {}
        for name, value in {**extra, **fault.headers, **encoding, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(sent[: fault.cut])

    def handle(self) -> None:
        try:
            super().handle()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client stopped waiting, as it should

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "BadRequestError", "code": 400}}


def _or_null(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
