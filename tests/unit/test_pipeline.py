"""How large a block of the stream is: a divisor of every rank's share, within memory and the run-ahead."""

import pytest

from ray_kd.pipeline import _block_rows


@pytest.mark.parametrize(
    ("rows_per_rank", "micro_batch_size", "max_rows", "expected"),
    [
        (8, 1, 100, 8),
        (8, 2, 100, 8),
        (8, 2, 7, 4),
        (12, 2, 8, 6),
        (12, 3, 5, 3),
        (8, 4, 1, 4),  # never less than a micro-batch
        (1, 1, 0, 1),
    ],
)
def test_a_block_divides_the_ranks_share_and_fits(rows_per_rank, micro_batch_size, max_rows, expected):
    rows = _block_rows(rows_per_rank, micro_batch_size, max_rows)
    assert rows == expected
    assert rows_per_rank % rows == 0
    assert rows % micro_batch_size == 0
