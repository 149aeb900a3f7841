"""vLLM itself, on CPU, against the transformers engine: `make test-vllm`, which has an environment of its own."""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ray_kd import models, schema
from ray_kd.errors import ConfigError
from ray_kd.payloads import TopKLogprobs
from ray_kd.teacher.documents import documents
from ray_kd.teacher.engine import Request, RowError
from ray_kd.teacher.engines import hf, vllm
from tests.tiny import VOCAB_SIZE, tiny_llama

if importlib.util.find_spec("vllm") is None:
    pytest.skip("needs vLLM: make test-vllm", allow_module_level=True)

T, BROKEN_TOKEN = 48, 200
LENGTHS = ([48], [20, 1, 2, 16], [9, 30], [10, 20], [2, 45], [24, 24])
"""Documents of each row; what is left of T is padding."""


@dataclass
class Teacher:
    """One model in both engines, in float32."""

    path: Path
    hf: Any
    vllm: Any


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Teacher]:
    """The vocabulary of 259 is one that vLLM pads; a token has an embedding that is not finite."""
    path = tiny_llama(tmp_path_factory.mktemp("teacher"), hidden=128, tie=False)
    model = models.load_causal_lm(str(path))
    with torch.no_grad():
        model.get_input_embeddings().weight[BROKEN_TOKEN] = torch.nan
    model.save_pretrained(path)
    both = Teacher(path, hf.Engine(hf.Config(), model=str(path)), vllm.Engine(vllm.Config(), model=str(path)))
    yield both
    both.vllm.close()


@pytest.fixture(scope="module")
def rows() -> dict[str, np.ndarray]:
    """Prompts of different lengths, one row without a target."""
    rng = np.random.default_rng(0)
    ids = rng.choice(np.setdiff1d(np.arange(3, VOCAB_SIZE), BROKEN_TOKEN), (len(LENGTHS), T)).astype(np.int32)
    positions = np.zeros((len(LENGTHS), T), np.int32)
    labels = ids.copy()
    for row, lengths in enumerate(LENGTHS):
        positions[row] = np.concatenate([np.arange(n) for n in (*lengths, T - sum(lengths))])
        labels[row, sum(lengths) :] = schema.IGNORED_LABEL
        ids[row, sum(lengths) :] = 2
    labels[1, :7] = labels[2, 5:20] = labels[3] = labels[5, 20:24] = schema.IGNORED_LABEL
    return {"row_id": np.arange(len(LENGTHS)), "input_ids": ids, "labels": labels, "position_ids": positions}


def check(teacher: Teacher, answers: list[Any], rows: dict[str, np.ndarray], top_k: int, atol: float) -> float:
    """Each position has the top_k tokens of the transformers model, up to ties; returns the largest difference."""
    worst = 0.0
    for answer, full in zip(answers, teacher.hf.annotate(rows, Request(top_k=VOCAB_SIZE)), strict=True):
        assert isinstance(answer, TopKLogprobs)
        assert answer.ids.shape == answer.logprobs.shape == (len(full.ids), top_k)
        assert answer.logprobs.dtype == np.float32
        assert (answer.temperature, answer.vocab_size) == (1.0, VOCAB_SIZE)
        assert all(len(set(ids)) == top_k for ids in answer.ids.tolist())
        expected = np.empty_like(full.logprobs)
        np.put_along_axis(expected, full.ids.astype(np.int64), full.logprobs, axis=-1)
        own = np.take_along_axis(expected, answer.ids.astype(np.int64), axis=-1)
        np.testing.assert_allclose(answer.logprobs, own, atol=atol, rtol=0)
        np.testing.assert_allclose(answer.logprobs, full.logprobs[:, :top_k], atol=atol, rtol=0)
        worst = max(worst, float(np.abs(answer.logprobs - own).max(initial=0.0)))
    return worst


@pytest.mark.parametrize("top_k", [1, 8, 64, VOCAB_SIZE])
def test_answers_are_those_of_the_transformers_model(teacher, rows, top_k: int) -> None:
    answers = teacher.vllm.annotate(rows, Request(top_k=top_k))
    worst = check(teacher, answers, rows, top_k, atol=1e-4)
    print(f"top_k {top_k}: log-probabilities differ by at most {worst:.1e}")
    assert len(answers[3].ids) == 0
    assert answers[1].encode() == TopKLogprobs.decode(answers[1].encode()).encode()


def test_the_token_of_the_data_is_no_entry_unless_it_is_likely(teacher, rows) -> None:
    """vLLM reports it beside the others, at the head of the list: here it is mostly not one of them."""
    top_k = 64
    for answer, document_rows in zip(
        teacher.vllm.annotate(rows, Request(top_k=top_k)), range(len(LENGTHS)), strict=True
    ):
        row = {name: column[document_rows : document_rows + 1] for name, column in rows.items()}
        following = [d.prompt[d.targets + 1] for d in documents(row)]
        if following:
            is_likely = (answer.ids == np.concatenate(following)[:, None]).any(axis=1)
            assert 0 < is_likely.mean() < 1


def test_the_same_rows_again_have_the_same_answers(teacher, rows) -> None:
    """Of a prefix that were taken from a cache there would be no log-probabilities."""
    request = Request(top_k=8)
    first, again = teacher.vllm.annotate(rows, request), teacher.vllm.annotate(rows, request)
    assert [answer.encode() for answer in first] == [answer.encode() for answer in again]
    shared = {name: np.concatenate([column[:1], column[:1]]) for name, column in rows.items()}
    shared["input_ids"][1, -8:] = 7
    check(teacher, teacher.vllm.annotate(shared, request), shared, 8, atol=1e-4)


def test_no_rows_have_no_answers(teacher, rows) -> None:
    assert teacher.vllm.annotate({name: column[:0] for name, column in rows.items()}, Request(top_k=4)) == []


def test_a_broken_row_is_reported_alone(teacher, rows) -> None:
    """Rows of the same call and of later ones are as they were, though they get the same pages of the KV cache."""
    request = Request(top_k=4)
    expected = teacher.vllm.annotate(rows, request)
    broken = dict(rows, input_ids=rows["input_ids"].copy())
    broken["input_ids"][1, 4] = BROKEN_TOKEN
    answers = teacher.vllm.annotate(broken, request)
    assert [isinstance(answer, RowError) for answer in answers] == [row == 1 for row in range(len(LENGTHS))]
    assert "not finite" in answers[1].reason
    answers[1] = expected[1]
    for found in (answers, teacher.vllm.annotate(rows, request)):
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a.ids, b.ids)
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(kind="hidden_states"), "provides .*topk_logprobs, not 'hidden_states'"),
        (Request(selection="sample"), "selects by topk, not 'sample'"),
        (Request(top_k=VOCAB_SIZE + 1), "allowed: 1 to the vocabulary size 259"),
        (Request(top_k=0), "allowed: 1 to"),
        (Request(temperature=2.0), "the engine answers at 1 alone"),
    ],
)
def test_requests_that_cannot_be_served_are_refused(teacher, rows, request_: Request, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        teacher.vllm.annotate(rows, request_)


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({"options": {"enforce_eagre": True}}, {}, "options.enforce_eagre is no argument .*mean 'enforce_eager'"),
        ({"options": {"enable_prefix_caching": True}}, {}, "options.enable_prefix_caching is set by the engine"),
        ({}, {"device": "cuda"}, "is to run on 'cuda' .*computes on 'cpu'"),
        ({}, {"model": "./nowhere"}, "nowhere"),
    ],
)
def test_what_cannot_be_built_is_one_line(teacher, options, arguments, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        vllm.Engine(vllm.Config(**options), **{"model": str(teacher.path), **arguments})
    assert "\n" not in str(error.value)


def test_neither_batch_size_nor_pieces_nor_a_full_context_change_an_answer(teacher, rows) -> None:
    """Last, because a process has one vLLM at a time: closing frees it, also twice."""
    request = Request(top_k=8)
    expected = teacher.vllm.annotate(rows, request)
    teacher.vllm.close()
    teacher.vllm.close()
    config = vllm.Config(max_num_batched_tokens=16, max_model_len=T)
    engine = vllm.Engine(config, model=str(teacher.path), batch_size=1)
    answers = engine.annotate(rows, request)
    engine.close()
    check(teacher, answers, rows, 8, atol=1e-4)
    for a, b in zip(answers, expected, strict=True):
        np.testing.assert_array_equal(a.ids, b.ids)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


@pytest.mark.ray
def test_a_student_learns_from_vllm_what_it_learns_from_transformers(local_jobs) -> None:
    """The whole of it, in a Ray Data actor: the same rows, and losses that differ by rounding alone."""
    path = tiny_llama(local_jobs.folder / "teacher_for_vllm", hidden=128, seed=1)
    losses = []
    for kind in ("hf", "vllm"):
        job = local_jobs.distill(f"from-{kind}", f"teacher.model={path}", f"teacher.engine={kind}", "train.max_steps=3")
        assert job.exit_code == 0, job.stderr
        assert job.summary["rows_missing"] == job.summary["rows_quarantined"] == 0
        losses.append([line["train/kd_loss"] for line in job.metrics])
    np.testing.assert_allclose(*losses, atol=1e-3)
