"""Rows taken apart into prompts and put together again, against an engine that answers whole rows."""

import re
from dataclasses import replace

import numpy as np
import pytest

from ray_kd import schema
from ray_kd.payloads import TopKLogprobs
from ray_kd.teacher.documents import Document, DocumentAnswer, documents, payloads
from ray_kd.teacher.engine import Request, RowError
from ray_kd.teacher.engines.fake import Config, Engine

VOCAB_SIZE, TOP_K = 50, 4


def some_rows() -> dict[str, np.ndarray]:
    """Row 0: documents of 5, 1 and 4 tokens; row 1: one of 10; row 2: nothing to predict; row 3: 4 and padding."""
    rng = np.random.default_rng(0)
    ids = rng.integers(3, VOCAB_SIZE, (4, 10)).astype(np.int32)
    positions = np.array([[0, 1, 2, 3, 4, 0, 0, 1, 2, 3], range(10), range(10), [0, 1, 2, 3, *range(6)]], np.int32)
    labels = ids.copy()
    labels[0, 1] = labels[1, 7:] = labels[2] = labels[3, 4:] = schema.IGNORED_LABEL
    return {"row_id": np.arange(4), "input_ids": ids, "labels": labels, "position_ids": positions}


def answer(document: Document) -> DocumentAnswer:
    """As a server: of each token of the prompt but the first, what was expected there given those before it."""
    logprobs = Engine(Config(vocab_size=VOCAB_SIZE)).logprobs(document.prompt[:-1])[document.targets]
    ids = np.argsort(-logprobs, axis=-1, kind="stable")[:, :TOP_K]
    return DocumentAnswer(ids, np.take_along_axis(logprobs, ids, axis=-1).astype(np.float32))


def test_a_prompt_ends_with_the_token_that_its_last_target_predicts():
    rows = some_rows()
    found = [(d.row, d.prompt.tolist(), d.targets.tolist()) for d in documents(rows)]
    ids = rows["input_ids"].tolist()
    assert found == [
        (0, ids[0][:5], [1, 2, 3]),
        (0, ids[0][6:], [0, 1, 2]),
        (1, ids[1][:7], [0, 1, 2, 3, 4, 5]),
        (3, ids[3][:4], [0, 1, 2]),
    ]


def test_the_answers_make_the_payloads_of_the_rows():
    rows = some_rows()
    asked = documents(rows)
    found = payloads(rows, asked, [answer(document) for document in asked], Request(top_k=TOP_K), VOCAB_SIZE)
    expected = Engine(Config(vocab_size=VOCAB_SIZE)).annotate(rows, Request(top_k=TOP_K))
    for got, want in zip(found, expected, strict=True):
        assert isinstance(got, TopKLogprobs)
        assert got.encode() == want.encode()


def test_no_rows_make_no_payloads():
    rows = {name: column[:0] for name, column in some_rows().items()}
    assert documents(rows) == []
    assert payloads(rows, [], [], Request(top_k=TOP_K), VOCAB_SIZE) == []


BROKEN = {
    "refused": (lambda a: RowError("the server said no"), "the server said no"),
    "nan": (lambda a: replace(a, logprobs=np.where(a.ids >= 0, np.nan, 0)), "not finite at 3 of 3"),
    "short": (lambda a: DocumentAnswer(a.ids[:-1], a.logprobs[:-1]), r"\(2, 4\) ids.*not \(3, 4\)"),
    "other_vocabulary": (lambda a: replace(a, ids=a.ids + VOCAB_SIZE), "outside its vocabulary of 50"),
    "negative": (lambda a: replace(a, ids=a.ids - VOCAB_SIZE), "outside its vocabulary of 50"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_one_unusable_document_makes_its_row_unusable_and_no_other(case):
    spoil, message = BROKEN[case]
    rows = some_rows()
    asked = documents(rows)
    answers = [answer(document) for document in asked]
    found = payloads(rows, asked, [answers[0], spoil(answers[1]), *answers[2:]], Request(top_k=TOP_K), VOCAB_SIZE)
    assert [isinstance(one, RowError) for one in found] == [True, False, False, False]
    assert re.search(message, found[0].reason)


def test_ids_of_no_token_are_left_out_and_their_mass_is_shared():
    """A server says what its model thinks of all ids, and the request is for the distribution over the first 40."""
    rows, num_ids = some_rows(), 40
    asked = documents(rows)
    found = payloads(rows, asked, [answer(d) for d in asked], Request(top_k=TOP_K, vocab_size=num_ids), VOCAB_SIZE)
    has_padding = 0
    for row, one in enumerate(found):
        assert one.vocab_size == num_ids
        answers = [answer(document) for document in asked if document.row == row]
        ids, logprobs = (np.concatenate([np.empty((0, TOP_K))] + [getattr(a, name) for a in answers])
                         for name in ("ids", "logprobs"))  # fmt: skip
        for position in range(len(ids)):
            inside = [(int(i), np.exp(float(lp))) for i, lp in zip(ids[position], logprobs[position], strict=True)
                      if i < num_ids]  # fmt: skip
            padding = sum(np.exp(float(lp)) for i, lp in zip(ids[position], logprobs[position], strict=True)
                          if i >= num_ids)  # fmt: skip
            has_padding += padding > 0
            assert one.ids[position].tolist() == [i for i, _ in inside] + [-1] * (TOP_K - len(inside))
            expected = [p / (1 - padding) for _, p in inside] + [0.0] * (TOP_K - len(inside))
            np.testing.assert_allclose(np.exp(one.logprobs[position]), expected, rtol=1e-5)
        assert TopKLogprobs.decode(one.encode()).ids.tolist() == one.ids.tolist()
    assert has_padding > 3


def test_a_teacher_that_names_only_ids_of_no_token_makes_its_row_unusable():
    rows = some_rows()
    asked = documents(rows)
    answers = [answer(document) for document in asked]
    answers[2] = replace(
        answers[2], ids=answers[2].ids % 5 + 45, logprobs=np.log(np.full_like(answers[2].logprobs, 0.25))
    )
    found = payloads(rows, asked, answers, Request(top_k=TOP_K, vocab_size=45), VOCAB_SIZE)
    assert isinstance(found[1], RowError)
    assert found[1].reason == "the teacher names ids from 45 on alone, which are of no token"
