"""The feed hands out whole steps, measures the wait, and never hangs or swallows an error."""

import threading
import time

import pyarrow as pa
import pytest

from ray_kd.errors import RetryableError
from ray_kd.trainer import collate, feed


@pytest.fixture(autouse=True)
def _plain_rows(monkeypatch):
    """Rows of one number: what collate does has tests of its own."""
    monkeypatch.setattr(collate, "collate", lambda rows, expected: rows.column("x").to_pylist())


def blocks(*sizes):
    start = 0
    for size in sizes:
        yield pa.table({"x": list(range(start, start + size))})
        start += size


def never():
    return False


def make(source, accumulation=2, timeout_s=5.0):
    return feed.Feed(
        source,
        micro_batch_size=2,
        accumulation=accumulation,
        timeout_s=timeout_s,
        expected=feed.Expected("topk_logprobs", 1, 1.0),
    )


def test_micro_batches_come_in_order_and_in_steps():
    fed = make(lambda: blocks(4, 4, 4))
    assert [fed.next_step(never)[0] for _ in range(3)] == [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9], [10, 11]]]
    fed.close()


def test_the_wait_is_measured():
    def slow():
        time.sleep(0.3)
        yield from blocks(4)

    assert 0.2 < make(slow).next_step(never)[1] < 3.0


def test_a_stream_that_stops_moving_is_an_error_after_the_deadline():
    block = threading.Event()

    def stuck():
        yield from blocks(2)
        block.wait(10)

    with pytest.raises(RetryableError, match=r"no rows from the teacher stage for 0 s.*train\.timeout_s"):
        make(stuck, timeout_s=0.2).next_step(never)
    block.set()


def test_a_run_that_is_asked_to_stop_does_not_wait_for_rows():
    block = threading.Event()

    def stuck():
        yield from blocks(6)
        block.wait(10)

    fed = make(stuck, timeout_s=60)
    assert fed.next_step(lambda: True)[0] == [[0, 1], [2, 3]], "rows that are there are trained"
    assert fed.next_step(lambda: True)[0] == [], "half a step is none"
    block.set()


def test_an_error_in_the_stream_reaches_the_training_thread():
    def broken():
        yield from blocks(2)
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        make(broken).next_step(never)


def test_a_stream_that_ends_early_is_an_error():
    with pytest.raises(RuntimeError, match="ended before"):
        make(lambda: blocks(2)).next_step(never)


def test_close_lets_the_thread_go():
    fed = make(lambda: blocks(*[2] * 1000))
    fed.close()
    fed._thread.join(timeout=5)
    assert not fed._thread.is_alive()
