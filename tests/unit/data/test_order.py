"""The order of a run: bijective in each epoch, different between epochs, the same for every way of reading it."""

import numpy as np
import pytest

from ray_kd.data.order import DUMMY_ROW, SlotOrder


def order(num_rows, epochs=1, batch=8, seed=0, max_steps=None, rows_per_group=256):
    return SlotOrder(num_rows, batch, epochs, max_steps, seed, rows_per_group)


@pytest.mark.parametrize("num_rows", [1, 2, 5, 60, 255, 256, 257, 1000, 5000])
def test_every_epoch_holds_every_row_once(num_rows):
    slots = order(num_rows, epochs=3)
    rows = slots.rows(0, slots.num_slots)
    for epoch in range(3):
        assert sorted(rows[epoch * num_rows : (epoch + 1) * num_rows]) == list(range(num_rows))
    assert (rows[3 * num_rows :] == DUMMY_ROW).all()
    assert slots.num_slots - 3 * num_rows < slots.global_batch_size
    assert slots.num_planned_rows == 3 * num_rows


def test_reading_in_pieces_gives_the_same_order():
    slots = order(1500, epochs=2, rows_per_group=64)
    whole = slots.rows(0, slots.num_slots)
    for piece in (1, 7, 64, 999):
        parts = [slots.rows(a, min(a + piece, slots.num_slots)) for a in range(0, slots.num_slots, piece)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_epochs_and_seeds_differ():
    slots = order(2000, epochs=2)
    first, second = slots.rows(0, 2000), slots.rows(2000, 4000)
    assert (first == second).mean() < 0.02
    assert (order(2000, seed=1).rows(0, 2000) == first).mean() < 0.02


def test_shuffle_is_close_to_uniform():
    """Where a row lands must not depend on where it was: rank correlation near 0, every tenth holds its share."""
    num_rows = 20_000
    rows = order(num_rows, rows_per_group=64).rows(0, num_rows)
    assert abs(np.corrcoef(rows, np.arange(num_rows))[0, 1]) < 0.1
    neighbours = np.abs(np.diff(rows)) == 1
    assert neighbours.mean() < 0.02


def test_max_steps_ends_the_run_without_dummies():
    slots = order(100, epochs=5, batch=8, max_steps=3)
    assert (slots.num_steps, slots.num_slots, slots.num_planned_rows) == (3, 24, 24)
    assert (slots.rows(0, 24) >= 0).all()


def test_the_order_is_frozen():
    """A resumed run must find the order it started with, in every later version."""
    assert order(10, seed=3).rows(0, 10).tolist() == [2, 5, 3, 4, 1, 9, 8, 7, 0, 6]
