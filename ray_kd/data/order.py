"""The order of a run: every row has a slot, and a slot's row follows from three integers.

Slot s in [0, num_steps * G) belongs to epoch s // N; global batch k is slots [kG, (k+1)G) on any number of
workers and after any resume, so the ledger of a checkpoint is one integer, the next slot. Slots past the last
epoch are dummies of weight 0 that fill the last global batch.

An epoch permutes the row groups of the prepared data and then the rows inside windows of a few groups, so that
reads stay sequential on object storage while the data itself was shuffled once, globally, when it was prepared.
Cost: one permutation of N / 256 groups an epoch (10 ms at 1e8 rows) and of about 1,000 rows a window.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

GROUPS_PER_WINDOW = 4

DUMMY_ROW = -1
"""row_id of a slot past the last epoch."""


@dataclass(frozen=True)
class SlotOrder:
    """Maps the slots of a run to rows.

    num_rows: N, training rows of the prepared data. global_batch_size: G, slots of an optimiser step.
    The run ends after `epochs` passes or `max_steps` steps, whichever comes first.
    """

    num_rows: int
    global_batch_size: int
    epochs: int
    max_steps: int | None
    seed: int
    rows_per_group: int = 256

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the whole run."""
        steps = -(-self.num_rows * self.epochs // self.global_batch_size)
        return steps if self.max_steps is None else min(steps, self.max_steps)

    @property
    def num_slots(self) -> int:
        """Slots of the whole run, dummies included: a multiple of the global batch size."""
        return self.num_steps * self.global_batch_size

    @property
    def num_planned_rows(self) -> int:
        """(epoch, row) pairs the run trains: its slots less the dummies."""
        return min(self.num_slots, self.num_rows * self.epochs)

    def rows(self, start: int, stop: int) -> NDArray[np.int64]:
        """The row_id of each slot in [start, stop), int64; DUMMY_ROW for dummies."""
        row_ids = np.full(stop - start, DUMMY_ROW, dtype=np.int64)
        slot, end = start, min(stop, self.num_rows * self.epochs)
        while slot < end:
            epoch, place = divmod(slot, self.num_rows)
            starts = _epoch_groups(self, epoch)[1]
            window = int(np.searchsorted(starts, place, side="right")) - 1
            rows = _window_rows(self, epoch, window)[place - int(starts[window]) :][: end - slot]
            row_ids[slot - start : slot - start + len(rows)] = rows
            slot += len(rows)
        return row_ids


# RandomState, not Generator: NEP 19 freezes its stream for ever, so a resumed run keeps its order across numpy
# versions.


@lru_cache(maxsize=4)
def _epoch_groups(order: SlotOrder, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The permuted row groups of an epoch, and the place in the epoch at which each window of groups starts."""
    num_groups = -(-order.num_rows // order.rows_per_group)
    groups = np.random.RandomState([order.seed & 0xFFFFFFFF, epoch]).permutation(num_groups).astype(np.int64)
    sizes = np.full(num_groups, order.rows_per_group, dtype=np.int64)
    sizes[groups == num_groups - 1] = order.num_rows - (num_groups - 1) * order.rows_per_group
    starts = (np.cumsum(sizes) - sizes)[::GROUPS_PER_WINDOW]
    return groups, starts


@lru_cache(maxsize=4)
def _window_rows(order: SlotOrder, epoch: int, window: int) -> NDArray[np.int64]:
    """The row_ids of one window of an epoch, in the order they are trained."""
    groups = _epoch_groups(order, epoch)[0][window * GROUPS_PER_WINDOW : (window + 1) * GROUPS_PER_WINDOW]
    rows = np.concatenate(
        [np.arange(g * order.rows_per_group, min((g + 1) * order.rows_per_group, order.num_rows)) for g in groups]
    )
    shuffle = np.random.RandomState([order.seed & 0xFFFFFFFF, epoch, window])
    return rows[shuffle.permutation(len(rows))].astype(np.int64)
