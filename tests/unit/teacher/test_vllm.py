"""What vLLM's lists mean, what is counted, and a vLLM that is not there: none of it needs vLLM."""

import sys
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest

from ray_kd.errors import ConfigError
from ray_kd.teacher.documents import Document
from ray_kd.teacher.engine import Request, RowError, Stats
from ray_kd.teacher.engines import fake, vllm
from tests.tiny import VOCAB_SIZE, tiny_llama

DOCUMENT = Document(row=0, prompt=np.array([5, 6, 7, 8, 9], np.int32), targets=np.array([0, 2, 3]))
# For each token of the prompt after the first, and for the one generated: that token, then the two likeliest.
PROMPT = SimpleNamespace(
    token_ids=[6, 6, 1, 7, 2, 3, 8, 4, 8],  # the likeliest, none of the two, the second
    logprobs=[-0.1, -0.1, -3.0, -9.0, -0.2, -2.0, -1.5, -0.5, -1.5],
    ranks=[1, 1, 2, 17, 1, 2, 2, 1, 2],
)
GENERATED = SimpleNamespace(token_ids=[1, 1, 9], logprobs=[-0.3, -0.3, -1.7], ranks=[1, 1, 2])


def test_an_answer_has_the_likeliest_tokens_after_each_target():
    found = vllm.answer(PROMPT, GENERATED, DOCUMENT, top_k=2)
    assert found.ids.tolist() == [[6, 1], [4, 8], [1, 9]]
    assert (found.ids.dtype, found.logprobs.dtype) == (np.int64, np.float32)
    np.testing.assert_allclose(found.logprobs, [[-0.1, -3.0], [-0.5, -1.5], [-0.3, -1.7]], rtol=1e-6)


def test_a_prompt_of_one_token_is_answered_by_what_follows_it():
    empty = SimpleNamespace(token_ids=[], logprobs=[], ranks=[])
    document = Document(row=0, prompt=np.array([5, 6], np.int32), targets=np.array([0]))
    assert vllm.answer(empty, GENERATED, document, top_k=2).ids.tolist() == [[1, 9]]


@pytest.mark.parametrize(
    "prompt",
    [
        SimpleNamespace(token_ids=[6, 6, 1], logprobs=[-0.1, -0.1, -3.0], ranks=[1, 1, 2]),  # positions left out
        SimpleNamespace(token_ids=PROMPT.token_ids, logprobs=PROMPT.logprobs, ranks=[1, 2, 1, 17, 1, 2, 2, 1, 2]),
    ],
)
def test_another_layout_is_no_answer(prompt):
    with pytest.raises(RuntimeError, match=r"entries for 4 tokens.*lays them out differently"):
        vllm.answer(prompt, GENERATED, DOCUMENT, top_k=2)


def test_a_missing_vllm_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"needs vLLM.*pip install '.\[vllm\]'") as error:
        vllm.Engine(vllm.Config(), model="nowhere")
    assert "\n" not in str(error.value)


class StubLLM:
    """vllm.LLM as far as the engine uses it, over the fake engine's distribution.

    The prompt that begins with token `broken` has NaN until the KV cache was cleaned for the first time.
    """

    def __init__(self, **options):
        self.broken = None
        self.is_clean = False

    def collective_rpc(self, method):
        self.is_clean = True

    def generate(self, prompts, params, use_tqdm):
        found = []
        for prompt in (one["prompt_token_ids"] for one in prompts):
            logprobs = fake.Engine(fake.Config(vocab_size=VOCAB_SIZE)).logprobs(np.array(prompt))
            if prompt[0] == self.broken and not self.is_clean:
                logprobs[:] = np.nan
            likeliest = np.argsort(-logprobs, axis=-1)[:, : params.logprobs]
            ids = np.concatenate([np.zeros((len(prompt), 1), np.int64), likeliest], axis=1)  # the token that is there
            values = np.take_along_axis(logprobs, ids, axis=-1)
            ranks = np.broadcast_to(np.arange(params.logprobs + 1), ids.shape)
            lists = [
                SimpleNamespace(
                    token_ids=ids[at].ravel().tolist(), logprobs=values[at].ravel().tolist(),
                    ranks=ranks[at].ravel().tolist(),
                )
                for at in (slice(None, -1), slice(-1, None))
            ]  # fmt: skip
            found.append(SimpleNamespace(prompt_logprobs=lists[0], outputs=[SimpleNamespace(logprobs=lists[1])]))
        return found


@pytest.fixture
def stub(monkeypatch):
    """The engine finds a vLLM with StubLLM in it."""

    @dataclass
    class EngineArgs:
        model: str = ""

    platform = SimpleNamespace(device_type="cpu")
    package = SimpleNamespace(LLM=StubLLM, EngineArgs=EngineArgs, SamplingParams=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "vllm", package)
    monkeypatch.setitem(sys.modules, "vllm.platforms", SimpleNamespace(current_platform=platform))
    monkeypatch.setattr(vllm, "_ENVIRONMENT", {})


@pytest.mark.usefixtures("stub")
def test_stats_are_of_prompts_and_of_those_asked_again(tmp_path):
    engine = vllm.Engine(vllm.Config(), model=str(tiny_llama(tmp_path)), batch_size=2)
    ids = np.arange(3, 33, dtype=np.int32).reshape(3, 10)
    positions = np.array([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5], range(10), range(10)], np.int32)
    labels = ids.copy()
    labels[1] = labels[2, 7:] = -100
    rows = {"row_id": np.arange(3), "input_ids": ids, "labels": labels, "position_ids": positions}
    answers = engine.annotate(rows, Request(top_k=4))
    assert [len(answer.ids) for answer in answers] == [8, 0, 6]
    assert engine.stats == Stats(tokens=3 + 5 + 6, places=3 + 5 + 6, retries=0)
    engine._llm.broken = ids[2, 0]
    assert not any(isinstance(answer, RowError) for answer in engine.annotate(rows, Request(top_k=4)))
    assert engine.stats == Stats(tokens=2 * 14, places=2 * 14 + 6, retries=1)
