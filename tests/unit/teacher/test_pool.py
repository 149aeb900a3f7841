"""When a pool grows and when it shrinks, played through second by second."""

import itertools

from ray_kd.teacher.pool import Size


def play(size, seconds, load, queue=5, loading_s=8.0, start=0.0):
    """Look ten times a second. load: blocks that could be worked on at once. Returns (when, size) of each change."""
    running, ready_at, changes = size.wanted, None, []
    for tick in range(int(10 * seconds)):
        now = start + tick / 10
        if ready_at is not None and now >= ready_at:
            running, ready_at = size.wanted, None
        before = size.wanted
        wanted = size.look(now, running, min(running, load(tick / 10)), queue)
        if wanted != before:
            changes.append((tick / 10, wanted))
            running, ready_at = (running, now + loading_s) if wanted > before else (wanted, None)
    return changes


def test_a_pool_whose_actors_are_all_busy_grows_to_its_most():
    assert [wanted for _, wanted in play(Size(1, 6), 200, lambda _: 99)] == [2, 4, 6]


def test_it_does_not_grow_while_nothing_waits_nor_for_a_burst():
    assert play(Size(1, 6), 200, lambda _: 99, queue=0) == []
    assert play(Size(1, 6), 300, lambda now: 2 if now % 10 < 4 else 0) == [], "as a pool that is far ahead"


def test_it_shrinks_one_by_one_to_its_least_once_the_rest_is_cached():
    size = Size(2, 6)
    play(size, 200, lambda _: 99)
    assert size.wanted == 6
    changes = play(size, 300, lambda now: 1 if now % 3 < 0.1 else 0, start=200)
    assert [wanted for _, wanted in changes] == [5, 4, 3, 2]
    assert all(later - earlier >= 15 for (earlier, _), (later, _) in itertools.pairwise(changes))


def test_it_keeps_a_size_that_fits():
    size = Size(1, 4)
    play(size, 100, lambda _: 99)
    assert size.wanted == 4
    assert play(size, 200, lambda _: 3.4, start=100) == [], "three would be busy all the time"
