"""What the actors' and the pools' lines add up to."""

import pytest

from ray_kd.teacher.journal import POOLS, Journal, count_rows, read_pools

LINE = {"node": "n", "time": 5.0, "cached": 0, "busy_s": 2.0, "idle_s": 1.0, "tokens": 80, "places": 100, "retries": 1}


def test_rows_are_counted_by_actor_and_those_done_again_apart(tmp_path):
    for pid, slots in ((7, [0, 1]), (7, [2, 3]), (8, [1, 2, 5000])):
        Journal(tmp_path).add(LINE | {"teacher": "a", "pid": pid, "slots": slots})
    Journal(tmp_path).add(LINE | {"teacher": "b", "pid": 7, "slots": [0], "cached": 3})
    work = count_rows(tmp_path)
    assert (work.computed, work.repeated, work.from_cache) == (8, 2, 3)
    assert sorted((a.teacher, a.pid, a.rows_computed, a.blocks) for a in work.actors) == [
        ("a", 7, 4, 2), ("a", 8, 3, 1), ("b", 7, 1, 1),
    ]  # fmt: skip
    (busiest,) = (actor.report() for actor in work.actors if actor.blocks == 2)
    assert busiest | {"tokens_per_second": 40.0, "batch_fill": 0.8, "retries": 2} == busiest
    assert busiest["busy_fraction"] == pytest.approx(2 / 3)


def test_lines_of_a_run_from_before_there_were_several_teachers_still_count(tmp_path):
    Journal(tmp_path).add({"slots": [0, 1], "time": 1.0, "busy_s": 0.5, "pid": 3})
    work = count_rows(tmp_path)
    assert (work.computed, work.repeated, work.from_cache) == (2, 0, 0)
    assert work.actors[0].report()["busy_fraction"] == 1.0


def test_a_pool_is_averaged_over_the_time_in_which_it_had_actors(tmp_path):
    journal = Journal(tmp_path, POOLS)
    for time, actors, queue in ((0.0, 0, 9), (4.0, 2, 4), (6.0, 1, 0), (12.0, 0, 0), (99.0, 0, 0)):
        journal.add({"teacher": "", "time": time, "actors": actors, "queue": queue})
    (pool,) = read_pools(tmp_path)
    assert (pool.most_actors, pool.mean_actors, pool.mean_queue) == (2, 1.25, 1.0)
    assert read_pools(tmp_path / "none") == []


def test_a_pool_that_was_killed_is_not_counted_while_the_run_stood_still(tmp_path):
    for start, actors in ((0.0, 4), (90000.0, 2)):  # no closing line
        journal = Journal(tmp_path, POOLS)
        for second in range(0, 40, 5):
            journal.add({"teacher": "", "time": start + second, "actors": actors, "queue": 0})
    (pool,) = read_pools(tmp_path)
    assert pool.mean_actors == pytest.approx((45 * 4 + 35 * 2) / 80)
