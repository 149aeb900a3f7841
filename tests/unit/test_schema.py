"""Which positions count, and which pairs of them, in packed rows."""

import numpy as np
import pytest

from ray_kd import schema
from tests.reference.feature_losses import counted


def random_rows(seed, num_rows=40, length=24):
    """Documents of 1 to 9 tokens with some labels in each, and padding behind most rows."""
    rng = np.random.default_rng(seed)
    labels, positions = np.full((num_rows, length), -100), np.zeros((num_rows, length), int)
    for row in range(num_rows):
        start, end = 0, length - rng.integers(0, 6)
        while start < end:
            stop = min(end, start + rng.integers(1, 10))
            positions[row, start:stop] = np.arange(stop - start)
            is_trained = rng.random(stop - start) < 0.6
            is_trained[rng.integers(stop - start)] = True
            labels[row, start:stop] = np.where(is_trained, 5, -100)
            start = stop
        positions[row, end:] = np.arange(length - end)
    return labels, positions


@pytest.mark.parametrize("seed", range(3))
def test_positions_and_pairs_are_those_of_the_documents(seed):
    labels, positions = random_rows(seed)
    masks = {
        "targets": schema.target_positions(labels, positions),
        "attention": schema.real_positions(labels, positions),
    }
    for row in range(len(labels)):
        for mask, found in masks.items():
            documents = counted(labels[row].tolist(), positions[row].tolist(), mask)
            assert np.flatnonzero(found[row]).tolist() == [t for document in documents for t in document]
            expected = [(q, k) for document in documents for q in document for k in document if k <= q]
            queries, keys = schema.causal_pairs(found[row], positions[row])
            assert list(zip(queries.tolist(), keys.tolist(), strict=True)) == expected


def test_targets_are_no_padding():
    labels, positions = random_rows(7)
    assert not (schema.target_positions(labels, positions) & ~schema.real_positions(labels, positions)).any()


def test_a_row_without_padding_and_a_part_of_a_row():
    labels, positions = np.array([3, 3, -100, 3]), np.array([0, 1, 0, 1])
    assert schema.real_positions(labels, positions).all()
    assert schema.real_positions(labels[:0], positions[:0]).shape == (0,)
    queries, keys = schema.causal_pairs(np.zeros(4, bool), positions)
    assert queries.dtype == keys.dtype == np.int64
    assert len(queries) == len(keys) == 0
