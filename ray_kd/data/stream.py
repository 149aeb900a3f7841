"""One Ray Data execution for the whole run: slot windows read from the prepared Parquet, in order.

Comes in: a SlotOrder and the folder of prepared data. Goes out: rows with `slot` and `weight` added, in blocks of
exactly `block_rows`, which the caller maps through the teacher stage. With preserve_order and block_rows dividing
G / world, Ray Train's equal split gives every worker its part of each global batch, whatever the number of workers.

Costs: 7-18 ms of executor CPU per block, so blocks are as large as the batch allows; real rows (kilobytes each) are
in the blocks, not indices, because the object store's byte limit is what bounds the run-ahead.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import ray
from ray.data import Dataset, Datasource, ReadTask
from ray.data._internal.execution.execution_callback import ExecutionCallback  # DataContext takes its subclasses
from ray.data.block import BlockMetadata

from ray_kd import schema
from ray_kd.data.order import DUMMY_ROW, SlotOrder
from ray_kd.data.prepared import PreparedData

READ_NUM_CPUS = 0.25
"""Logical CPUs of one read task; the default of 1 starves a small machine."""

_STEP_PAUSE_S = 0.02
_MIN_WINDOW_SLOTS = 1024
_MAX_WINDOWS = 2000  # every ReadTask is put into the object store when the execution starts


Transform = Callable[[pa.Table], pa.Table]
"""What is made of a block of rows: the same rows with more columns."""


def ordered_rows(
    order: SlotOrder, prepared_dir: str, *, start_slot: int, block_rows: int,
    make_transforms: Sequence[Callable[[], Transform]] = (),
) -> Dataset:  # fmt: skip
    """The rows of slots [start_slot, num_slots) in order, in blocks of block_rows.

    make_transforms: each called in each read task, for something to be done to its blocks where they are read.
    """
    source = _SlotWindows(order, prepared_dir, start_slot, block_rows, make_transforms)
    rows = ray.data.read_datasource(
        source, override_num_blocks=len(source.windows), ray_remote_args={"num_cpus": READ_NUM_CPUS}
    )
    return rows.repartition(target_num_rows_per_block=block_rows)


def read_slots(order: SlotOrder, prepared: PreparedData, start: int, stop: int) -> pa.Table:
    """The rows of slots [start, stop) with `slot` and `weight`; dummies are row 0 with every label ignored.

    Columns: PREPARED_COLUMNS, route, slot, weight. A dummy keeps the route of row 0.
    """
    row_ids = order.rows(start, stop)
    is_dummy = row_ids == DUMMY_ROW
    table = prepared.read_rows(np.where(is_dummy, 0, row_ids)).select([*schema.PREPARED_COLUMNS, schema.ROUTE])
    if is_dummy.any():
        labels = schema.to_numpy(table.select([schema.LABELS]))[schema.LABELS].copy()
        labels[is_dummy] = schema.IGNORED_LABEL
        table = _replace(table, schema.ROW_ID, pa.array(row_ids))
        flat = pa.array(labels.reshape(-1), type=pa.int32())
        table = _replace(table, schema.LABELS, pa.FixedSizeListArray.from_arrays(flat, labels.shape[1]))
    table = table.append_column(schema.SLOT, pa.array(np.arange(start, stop, dtype=np.int64)))
    return table.append_column(schema.WEIGHT, pa.array((~is_dummy).astype(np.float32)))


class PausedSteps(ExecutionCallback):
    """A pause in each step of Ray Data's scheduling loop, for `DataContext.custom_execution_callback_classes`.

    The loop waits for tasks with output. While output is ready but held back, which is the normal state of a stream
    whose consumer is slower than its teacher, that wait returns at once and the loop spins: it took 0.9 of a core,
    beside the 0.85 of the student it slowed down. A block comes at most a few pauses later, and prefetch hides that.
    """

    def on_execution_step(self, executor: object) -> None:
        time.sleep(_STEP_PAUSE_S)


class _SlotWindows(Datasource):
    """A Datasource of slot windows, each a multiple of block_rows and read by one task."""

    def __init__(
        self, order: SlotOrder, prepared_dir: str, start_slot: int, block_rows: int,
        make_transforms: Sequence[Callable[[], Transform]],
    ) -> None:  # fmt: skip
        super().__init__()
        self._make_transforms = make_transforms
        self._order, self._prepared_dir, self._block_rows = order, prepared_dir, block_rows
        slots = order.num_slots - start_slot
        window = max(_MIN_WINDOW_SLOTS, -(-slots // _MAX_WINDOWS))
        window = -(-window // block_rows) * block_rows
        # One empty window when nothing is left: the last worker died after its last checkpoint.
        edges = [*(range(start_slot, order.num_slots, window) or [start_slot]), order.num_slots]
        self.windows = list(itertools.pairwise(edges))

    def get_name(self) -> str:
        return "Slots"

    def estimate_inmemory_data_size(self) -> int:
        return sum(self._nbytes(stop - start) for start, stop in self.windows)

    def get_read_tasks(self, parallelism: int, *args: object, **kwargs: object) -> list[ReadTask]:
        """One task per window, in order; Ray's wish for parallelism was granted by override_num_blocks."""
        order, folder, block_rows = self._order, self._prepared_dir, self._block_rows
        make_transforms = self._make_transforms

        def task(start: int, stop: int) -> ReadTask:
            def read() -> Iterator[pa.Table]:
                prepared = PreparedData(folder)
                transforms = [make() for make in make_transforms]
                for first in range(start, stop, block_rows):
                    rows = read_slots(order, prepared, first, min(first + block_rows, stop))
                    for transform in transforms:
                        rows = transform(rows)
                    yield rows

            rows = stop - start
            return ReadTask(read, BlockMetadata(rows, self._nbytes(rows), None, None))

        return [task(start, stop) for start, stop in self.windows]

    def _nbytes(self, rows: int) -> int:
        return rows * (12 * PreparedData(self._prepared_dir).manifest.sequence_length + 24)


def _replace(table: pa.Table, name: str, column: pa.Array) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), name, column)
