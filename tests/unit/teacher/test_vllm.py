"""What vLLM's lists mean, and a vLLM that is not there: neither needs vLLM."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from ray_kd.errors import ConfigError
from ray_kd.teacher.documents import Document
from ray_kd.teacher.engines import vllm

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
    with pytest.raises(ConfigError, match=r"needs vLLM.*pip install 'ray_kd\[vllm\]'") as error:
        vllm.Engine(vllm.Config(), model="nowhere")
    assert "\n" not in str(error.value)
