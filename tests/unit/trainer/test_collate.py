"""From rows of the stream to a micro-batch: targets, labels and payloads line up, weightless rows count for nothing."""

import numpy as np
import pytest
import torch

from ray_kd import schema
from ray_kd.payloads import HiddenStates, TopKLogprobs
from ray_kd.trainer.collate import collate
from ray_kd.trainer.feed import Expected
from tests.fake_prepared import random_rows
from tests.fake_stream import table

VOCAB, TOP_K = 50, 4
EXPECTED = Expected("topk_logprobs", TOP_K, 1.0)


def payload(num_targets, seed):
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.choice(VOCAB, TOP_K, replace=False) for _ in range(num_targets)]).astype(np.int32)
    logprobs = np.full((num_targets, TOP_K), -2.0, np.float32)
    return TopKLogprobs(ids, logprobs, 1.0, VOCAB)


@pytest.fixture
def rows():
    return random_rows(3, 20, VOCAB)


def counts(rows):
    return schema.target_positions(rows[schema.LABELS], rows[schema.POSITION_IDS]).sum(axis=1)


def test_targets_labels_and_payloads_line_up(rows):
    answers = [payload(n, seed) for seed, n in enumerate(counts(rows))]
    batch = collate(table([1, 1, 1], rows, [a.encode() for a in answers]), EXPECTED)
    assert len(batch.targets) == len(batch.labels) == len(batch.teacher["teacher_ids"]) == counts(rows).sum()
    np.testing.assert_array_equal(batch.teacher["teacher_ids"].numpy(), np.concatenate([a.ids for a in answers]))
    flat = rows[schema.INPUT_IDS].reshape(-1)
    np.testing.assert_array_equal(batch.labels.numpy(), flat[batch.targets.numpy() + 1])
    positions = rows[schema.POSITION_IDS].reshape(-1)
    assert (positions[batch.targets.numpy() + 1] == positions[batch.targets.numpy()] + 1).all()
    assert batch.teacher_busy_s == pytest.approx(1.5)


def test_rows_without_weight_have_no_targets(rows):
    answers = [payload(n, seed) for seed, n in enumerate(counts(rows))]
    encoded = [answers[0].encode(), b"", answers[2].encode()]
    batch = collate(table([1, 0, 1], rows, encoded), EXPECTED)
    assert len(batch.targets) == counts(rows)[0] + counts(rows)[2]
    assert batch.errors == ["", "refused", ""]
    assert batch.input_ids.shape == (3, 20)


def test_a_batch_of_dummies_is_empty_but_has_its_shape(rows):
    batch = collate(table([0, 0, 0], rows, [b"", b"", b""]), EXPECTED)
    assert batch.teacher["teacher_ids"].shape == (0, TOP_K)
    assert batch.num_tokens == 0
    assert batch.payload_nbytes == 0


def test_padding_is_not_counted(rows):
    answers = [payload(n, seed) for seed, n in enumerate(counts(rows))]
    batch = collate(table([1, 1, 1], rows, [a.encode() for a in answers]), EXPECTED)
    last_start = int(np.flatnonzero(rows[schema.POSITION_IDS][1] == 0)[-1])  # row 1 ends in padding
    assert batch.num_tokens == 20 + last_start + 20


def test_a_payload_of_the_wrong_length_is_an_alarm(rows):
    wrong = [payload(n + 1, seed).encode() for seed, n in enumerate(counts(rows))]
    with pytest.raises(AssertionError, match="alignment"):
        collate(table([1, 1, 1], rows, wrong), EXPECTED)


def test_a_payload_of_another_temperature_is_refused(rows):
    answers = [payload(n, seed).encode() for seed, n in enumerate(counts(rows))]
    with pytest.raises(ValueError, match=r"payload at temperature 1\.0, the loss is at 2\.0"):
        collate(table([1, 1, 1], rows, answers), Expected("topk_logprobs", TOP_K, 2.0))


def test_hidden_states_come_as_bfloat16_in_order(rows):
    expected = Expected("hidden_states", 6, 1.0)
    hidden = [torch.randn(n, 6).bfloat16() for n in counts(rows)]
    encoded = [HiddenStates(h.view(torch.uint16).numpy()).encode() for h in hidden]
    batch = collate(table([1, 0, 1], rows, [encoded[0], b"", encoded[2]]), expected)
    assert batch.teacher.keys() == {"teacher_hidden"}
    assert torch.equal(batch.teacher["teacher_hidden"], torch.cat([hidden[0], hidden[2]]))
    assert batch.payload_nbytes == len(encoded[0]) + len(encoded[2])
    empty = collate(table([0, 0, 0], rows, [b"", b"", b""]), expected).teacher["teacher_hidden"]
    assert (empty.shape, empty.dtype) == ((0, 6), torch.bfloat16)


def test_a_payload_of_another_kind_or_width_is_an_alarm(rows):
    answers = [payload(n, seed).encode() for seed, n in enumerate(counts(rows))]
    with pytest.raises(ValueError, match="not a hidden-states payload"):
        collate(table([1, 1, 1], rows, answers), Expected("hidden_states", 6, 1.0))
    narrow = [HiddenStates(np.zeros((n, 5), np.uint16)).encode() for n in counts(rows)]
    with pytest.raises(AssertionError, match="alignment"):
        collate(table([1, 1, 1], rows, narrow), Expected("hidden_states", 6, 1.0))
