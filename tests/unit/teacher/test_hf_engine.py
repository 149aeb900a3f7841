"""What the transformers engine sends through its decoder: rows cut after their last target, batches of any make."""

import numpy as np
import pytest
import torch

from ray_kd import models, schema
from ray_kd.config import Teacher
from ray_kd.payloads import HIDDEN_STATES
from ray_kd.teacher.engine import Request
from ray_kd.teacher.engines import hf
from ray_kd.teacher.stage import EngineSpec
from tests.reference.teacher_rows import row_logprobs
from tests.tiny import VOCAB_SIZE, tiny_llama

T = 48
DOCUMENTS = ([48], [20, 1, 2, 16], [3], [24, 24], [1, 30], [9, 4], [40])
"""Lengths of the documents of each row; what is left of T is padding."""
LENGTHS = [47, 38, 2, 0, 30, 1, 19]
"""Tokens up to each row's last target: row 3 has none, that of row 5 is its first token, those of row 6 end early."""


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    """In float64, so that what is left of a difference is that of the fp32 log-probabilities."""
    return str(tiny_llama(tmp_path_factory.mktemp("teacher"), dtype=torch.float64))


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    ids = rng.integers(3, VOCAB_SIZE, (len(DOCUMENTS), T)).astype(np.int32)
    labels = ids.copy()
    positions = np.zeros((len(DOCUMENTS), T), np.int32)
    for row, lengths in enumerate(DOCUMENTS):
        positions[row] = np.concatenate([np.arange(n) for n in (*lengths, T - sum(lengths))])
        labels[row, sum(lengths) :] = schema.IGNORED_LABEL
    labels[0, :20] = labels[3] = labels[5, 2:] = labels[6, 20:] = schema.IGNORED_LABEL
    return {"row_id": np.arange(len(DOCUMENTS)), "input_ids": ids, "labels": labels, "position_ids": positions}


@pytest.fixture
def build(model_path):
    def built(batch_size=4, batch_tokens=None):
        return hf.Engine(hf.Config(), model=model_path, batch_size=batch_size, batch_tokens=batch_tokens)

    return built


def forwards(engine):
    """A list that gets (rows, tokens) of every forward of the decoder from now on."""
    shapes = []
    engine._model.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return shapes


@pytest.mark.parametrize(
    ("batch_size", "batch_tokens"), [(1, None), (3, None), (16, None), (4, 1), (4, 40), (1, 60), (4, 10**6)]
)
def test_cut_rows_have_the_answers_of_whole_rows_alone(build, model_path, rows, batch_size, batch_tokens):
    model = models.load_causal_lm(model_path)
    assert model.dtype == torch.float64
    answers = build(batch_size, batch_tokens).annotate(rows, Request(top_k=VOCAB_SIZE))
    for row, answer in enumerate(answers):
        columns = (torch.from_numpy(rows[name][row]).long() for name in ("input_ids", "labels", "position_ids"))
        expected = row_logprobs(model, *columns).numpy()
        found = np.zeros_like(expected)
        np.put_along_axis(found, answer.ids.astype(np.int64), answer.logprobs.astype(np.float64), axis=-1)
        np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
    assert [len(answer.ids) for answer in answers] == [28, 19 + 0 + 1 + 15, 2, 0, 29, 1, 19]


def test_batches_of_rows_are_in_order_and_as_long_as_their_longest(build, rows):
    engine = build(batch_size=2)
    shapes = forwards(engine)
    engine.annotate(rows, Request(top_k=4))
    assert shapes == [(2, 47), (2, 30), (2, 19)]  # rows 0 and 1, 2 and 4, 5 and 6
    assert (engine.stats.tokens, engine.stats.places) == (sum(LENGTHS), 2 * (47 + 30 + 19))


@pytest.mark.parametrize(
    ("batch_tokens", "expected"),
    [
        (80, [(1, 47), (2, 38), (3, 19)]),
        (37, [(1, 47), (1, 38), (1, 30), (1, 19), (2, 2)]),  # a row that is longer goes alone
        (10**6, [(6, 47)]),
    ],
)
def test_batches_by_tokens_are_full_and_longest_first(build, rows, batch_tokens, expected):
    engine = build(batch_tokens=batch_tokens)
    shapes = forwards(engine)
    engine.annotate(rows, Request(top_k=4))
    assert shapes == expected
    assert engine.stats.places == sum(num_rows * length for num_rows, length in expected)
    assert engine.stats.tokens == sum(LENGTHS)


def test_rows_without_a_target_need_no_forward(build, rows):
    for engine in (build(), build(batch_tokens=64)):
        shapes = forwards(engine)
        for request in (Request(top_k=4), Request(top_k=4, selection="sample"), Request(kind=HIDDEN_STATES)):
            (answer,) = engine.annotate({name: column[3:4] for name, column in rows.items()}, request)
            assert len(answer.bits if request.kind == HIDDEN_STATES else answer.ids) == 0
        assert shapes == []


@pytest.mark.parametrize("request_", [Request(top_k=16, selection="sample", seed=3), Request(kind=HIDDEN_STATES)])
def test_other_answers_reach_their_rows_too(build, rows, request_):
    expected = [answer.encode() for answer in build(batch_size=1).annotate(rows, request_)]
    assert len(set(expected)) == len(expected)
    assert [answer.encode() for answer in build(batch_tokens=80).annotate(rows, request_)] == expected


def test_the_configured_tokens_reach_the_engine(model_path, rows):
    teacher = Teacher(model=model_path, batch_tokens=80)
    engine = EngineSpec.of(teacher, threads=torch.get_num_threads()).build()
    shapes = forwards(engine)
    engine.annotate(rows, Request(top_k=4))
    assert shapes == [(1, 47), (2, 38), (3, 19)]
    teacher.engine = {"kind": "fake"}
    EngineSpec.of(teacher, threads=torch.get_num_threads()).build()  # which does not take them
