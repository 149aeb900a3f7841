"""The HTTP engine and a real vLLM server on CPU, against the transformers engine on the same packed rows."""

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ray_kd import models, schema
from ray_kd.errors import ConfigError
from ray_kd.payloads import TopKLogprobs
from ray_kd.teacher.engine import Request, RowError
from ray_kd.teacher.engines import hf, http
from tests.tiny import VOCAB_SIZE, tiny_llama

if importlib.util.find_spec("vllm") is None:
    pytest.skip("needs vLLM: make test-vllm", allow_module_level=True)

TOP_K, MAX_MODEL_LEN, START_S = 64, 64, 420
KEY, BROKEN_TOKEN = "sk-of-the-test", 200


@dataclass(frozen=True)
class Server:
    url: str
    model: str


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """What `vllm serve` starts, as a module: the CPU build's command does not find its own version."""
    folder = tmp_path_factory.mktemp("server")
    model = str(tiny_llama(folder / "teacher", hidden=128, tie=False))  # heads of 16 are too small for vLLM on a CPU
    broken = models.load_causal_lm(model)
    with torch.no_grad():
        broken.get_input_embeddings().weight[BROKEN_TOKEN] = torch.nan
    broken.save_pretrained(model)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = {
        "model": model, "host": "127.0.0.1", "port": port, "dtype": "float32", "max-logprobs": TOP_K,
        "max-model-len": MAX_MODEL_LEN, "max-num-seqs": 16, "max-num-batched-tokens": 64,
    }  # fmt: skip
    environment = os.environ | {
        "VLLM_API_KEY": KEY, "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    log = folder / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager",
             *(word for name, value in arguments.items() for word in (f"--{name}", str(value)))],
            env=environment, stdout=file, stderr=file,
        )  # fmt: skip
    try:
        wait_until_ready(process, f"http://127.0.0.1:{port}", log)
        yield Server(f"http://127.0.0.1:{port}", model)
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_ready(process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"vLLM did not start:\n{log.read_text(errors='replace')[-4000:]}")


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", KEY)


@pytest.fixture
def build(server: Server) -> Iterator[Callable[..., http.Engine]]:
    """Makes engines for the server; they are closed at the end."""
    engines = []

    def make(batch_size: int = 2, **options: Any) -> http.Engine:
        given = {"url": server.url, "api_key_env": "TEACHER_KEY", "max_retries": 1, "deadline_s": 120.0, **options}
        engines.append(http.Engine(http.Config(**given), model=server.model, batch_size=batch_size))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def rows_of(*documents: list[int]) -> dict[str, np.ndarray]:
    """A row for each list of document lengths; in the second half of the rows every other token is no target."""
    rng = np.random.default_rng(0)
    positions = np.stack([np.concatenate([np.arange(length) for length in lengths]) for lengths in documents])
    ids = rng.integers(3, BROKEN_TOKEN, positions.shape).astype(np.int32)
    labels = ids.copy()
    labels[len(labels) // 2 :, ::2] = schema.IGNORED_LABEL
    return {
        "row_id": np.arange(len(ids)), "input_ids": ids, "labels": labels, "position_ids": positions.astype(np.int32),
    }  # fmt: skip


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_answers_are_those_of_the_model(build, server, batch_size):
    rows = rows_of([48], [20, 1, 2, 25], [2, 46], [24, 24], [7, 9, 15, 17])
    answers = build(batch_size).annotate(rows, Request(top_k=TOP_K))
    full = hf.Engine(hf.Config(), model=server.model, dtype="float32").annotate(rows, Request(top_k=VOCAB_SIZE))
    worst, num_targets = 0.0, 0
    for answer, every in zip(answers, full, strict=True):
        assert isinstance(answer, TopKLogprobs)
        assert answer.ids.shape == answer.logprobs.shape == (len(every.ids), TOP_K)
        assert (np.diff(answer.logprobs, axis=-1) <= 0).all()
        assert all(len(set(ids)) == TOP_K for ids in answer.ids.tolist())
        dense = np.empty_like(every.logprobs)
        np.put_along_axis(dense, every.ids.astype(np.int64), every.logprobs, axis=-1)
        own = np.take_along_axis(dense, answer.ids.astype(np.int64), axis=-1)
        # The same log-probability of each token, and no likelier one left out: the same tokens up to ties.
        np.testing.assert_allclose(answer.logprobs, own, atol=2e-3, rtol=0)
        np.testing.assert_allclose(answer.logprobs, every.logprobs[:, :TOP_K], atol=2e-3, rtol=0)
        worst = max(worst, float(np.abs(answer.logprobs - own).max(initial=0.0)))
        num_targets += len(answer.ids)
    print(f"largest difference {worst:.2e} at {num_targets} targets")
    assert num_targets > 100


def test_a_document_may_be_one_token_shorter_than_the_context(build):
    (answer,) = build().annotate(rows_of([MAX_MODEL_LEN - 1]), Request(top_k=4))
    assert isinstance(answer, TopKLogprobs)
    with pytest.raises(ConfigError, match=r"HTTP 400: .*; lower data\.sequence_length, or raise --max-model-len"):
        build().annotate(rows_of([MAX_MODEL_LEN]), Request(top_k=4))


def test_refusals_say_what_to_do(build, monkeypatch):
    rows = rows_of([8])
    with pytest.raises(ConfigError, match=r"HTTP 400: .*logprobs of 65.*; start it with a --max-logprobs of at least"):
        build().annotate(rows, Request(top_k=TOP_K + 1))
    with pytest.raises(ConfigError, match=r"HTTP 404: .*nobody"):
        build(served_model="nobody").annotate(rows, Request(top_k=4))
    monkeypatch.setenv("TEACHER_KEY", "sk-wrong")
    with pytest.raises(ConfigError, match=r"HTTP 401: .*; check the key in TEACHER_KEY$"):
        build().annotate(rows, Request(top_k=4))


def test_a_document_of_nan_costs_its_row(build):
    """The last of this file: on a CPU, vLLM 0.32 lets the NaN into later prompts that get its pages of the cache."""
    rows = rows_of([8], [8], [8])
    rows["input_ids"][2, 3] = BROKEN_TOKEN
    answers = build(batch_size=1, max_concurrency=1).annotate(rows, Request(top_k=4))
    assert [isinstance(answer, RowError) for answer in answers] == [False, False, True]
    assert "2 tries; the last: HTTP 400: Out of range float values" in answers[2].reason
