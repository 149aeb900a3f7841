"""Packing keeps every token once, starts every document anew, fills rows, and cuts without losing a target."""

from itertools import pairwise

import numpy as np
import pytest

from ray_kd import schema
from ray_kd.data.packing import cut, has_target, pack
from ray_kd.data.records import Document

PAD = 9


def document(num_tokens, trained_from=1, first=100):
    is_trained = np.arange(num_tokens) >= trained_from
    return Document(np.arange(first, first + num_tokens, dtype=np.int32), is_trained, np.ones(num_tokens, np.int32))


def drawn(count, longest, seed=0):
    rng = np.random.default_rng(seed)
    return [document(int(length), 1, first=1000 * i) for i, length in enumerate(rng.integers(2, longest + 1, count))]


def documents_of(rows):
    """(input_ids, labels) of every packed document, padding left out, from the columns alone."""
    found = []
    for ids, labels, positions in zip(rows.input_ids, rows.labels, rows.position_ids, strict=True):
        starts = [*np.flatnonzero(positions == 0), len(ids)]
        found += [(ids[a:b], labels[a:b]) for a, b in pairwise(starts)]
    return [(ids, labels) for ids, labels in found if (labels != schema.IGNORED_LABEL).any()]


@pytest.mark.parametrize("seed", range(3))
def test_every_document_is_in_one_row_whole(seed):
    given = drawn(200, 64, seed)
    found = documents_of(pack(given, 64, PAD))
    assert sorted(tuple(ids) for ids, _ in found) == sorted(tuple(doc.input_ids) for doc in given)


def test_positions_restart_and_padding_is_a_document_without_targets():
    rows = pack([document(3), document(4, first=200)], 10, PAD)
    assert rows.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1, 2]]
    assert rows.input_ids.tolist() == [[200, 201, 202, 203, 100, 101, 102, PAD, PAD, PAD]]
    assert rows.labels.tolist() == [[-100, 201, 202, 203, -100, 101, 102, -100, -100, -100]]
    assert schema.target_positions(rows.labels, rows.position_ids).sum() == 5
    assert rows.num_target_bytes.tolist() == [5]
    for column in (rows.input_ids, rows.labels, rows.position_ids, rows.num_target_bytes):
        assert column.dtype == np.int32


def test_rows_are_full_and_the_same_every_time():
    given = drawn(2000, 300)
    rows = pack(given, 512, PAD)
    used = sum(len(doc.input_ids) for doc in given)
    assert used / rows.input_ids.size > 0.99
    np.testing.assert_array_equal(pack(given, 512, PAD).input_ids, rows.input_ids)


def test_no_documents_give_no_rows():
    assert pack([], 16, PAD).input_ids.shape == (0, 16)


@pytest.mark.parametrize(("num_tokens", "length"), [(8, 8), (9, 8), (15, 8), (16, 8), (100, 8), (7, 2), (1000, 33)])
def test_a_cut_keeps_every_target_with_its_predecessor(num_tokens, length):
    whole = document(num_tokens)
    pieces = cut([whole], length)
    pairs = [pair for piece in pieces.pieces for pair in zip(piece.input_ids[:-1], piece.input_ids[1:], strict=True)]
    assert pairs == list(zip(whole.input_ids[:-1], whole.input_ids[1:], strict=True))
    assert all(2 <= len(piece.input_ids) <= length and not piece.is_trained[0] for piece in pieces.pieces)
    assert pieces.split_documents == (num_tokens > length)
    assert pieces.repeated_tokens == len(pieces.pieces) - 1
    assert pieces.dropped_tokens == 0


@pytest.mark.parametrize("trained", [range(1, 4), range(40, 44), [20], [7, 8, 49], range(1, 50)])
def test_pieces_without_targets_are_dropped_and_counted(trained):
    is_trained = np.zeros(50, np.bool_)
    is_trained[list(trained)] = True
    whole = Document(np.arange(50, dtype=np.int32), is_trained, np.ones(50, np.int32))
    pieces = cut([whole], 8)
    assert all(has_target(piece) for piece in pieces.pieces)
    kept = [token for piece in pieces.pieces for token in piece.input_ids]
    assert pieces.dropped_tokens == 50 - len(set(kept))
    assert pieces.repeated_tokens == len(kept) - len(set(kept))
    targets = [t for piece in pieces.pieces for t in piece.input_ids[1:][piece.is_trained[1:]]]
    assert targets == list(trained)
