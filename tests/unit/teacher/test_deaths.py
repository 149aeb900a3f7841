"""What actors that died leave to those after them: a block again, its rows one by one, and a row refused."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from ray_kd import schema
from ray_kd.payloads import TopKLogprobs
from ray_kd.teacher import deaths
from ray_kd.teacher.deaths import ALONE_AFTER, REFUSED_AFTER, Deaths
from ray_kd.teacher.engine import Request
from ray_kd.teacher.stage import EngineSpec, TeacherStage
from tests.unit.teacher.test_stage import VOCAB, block


def die(run_dir: Path, attempt: str | None, slots: Sequence[int], teacher: str = "") -> None:
    """An actor's process ends while it asks for these slots."""
    if (pid := os.fork()) == 0:
        with Deaths(run_dir, attempt, teacher).noted(slots):
            os._exit(1)
    os.waitpid(pid, 0)


def test_a_row_is_asked_for_with_its_block_then_alone_then_not_at_all(tmp_path):
    attempt = deaths.begin(tmp_path)
    slots = np.arange(4, 8)
    for count in range(REFUSED_AFTER + 1):
        now = Deaths(tmp_path, attempt)
        groups = now.groups(slots, [0, 2, 3])
        assert groups == ([[0, 2, 3]] if count < ALONE_AFTER else [[0], [2], [3]])
        error = now.error(slot=6, row_id=60)
        assert (error is not None) == (count == REFUSED_AFTER)
        die(tmp_path, attempt, [4, 6, 7] if count < ALONE_AFTER else [6])
    assert error is not None
    assert "ended 4 times" in error.reason
    assert Deaths(tmp_path, attempt).error(slot=4, row_id=40) is None, "was there at the first deaths only"
    # The next attempt remembers who was refused, in any epoch.
    later = Deaths(tmp_path, deaths.begin(tmp_path))
    assert later.error(slot=600, row_id=60) is not None
    assert later.groups(slots, [0, 2, 3]) == [[0], [2], [3]], "deaths go along"
    assert later.groups(slots, []) == []


def test_a_row_that_ends_each_attempt_before_its_fourth_death_is_refused_in_the_end(tmp_path):
    """One that hangs takes `teacher.timeout_s` for a death; the attempt ends while the next actor is asked for it."""
    for count in range(REFUSED_AFTER):
        attempt = deaths.begin(tmp_path)
        now = Deaths(tmp_path, attempt)
        assert now.error(slot=5, row_id=50) is None
        assert now.groups(np.array([5, 6]), [0, 1]) == ([[0, 1]] if count < ALONE_AFTER else [[0], [1]])
        die(tmp_path, attempt, [5])
        die(tmp_path, attempt, [5])  # with its stream, which says nothing
    assert Deaths(tmp_path, deaths.begin(tmp_path)).error(slot=5, row_id=50) is not None


def test_what_ended_with_its_stream_says_nothing_of_its_rows(tmp_path):
    for _ in range(2 * REFUSED_AFTER):
        attempt = deaths.begin(tmp_path)
        die(tmp_path, attempt, [5])
    later = Deaths(tmp_path, deaths.begin(tmp_path))
    assert later.error(slot=5, row_id=50) is None
    assert later.groups(np.array([5, 6]), [0, 1]) == [[0, 1]]


def test_what_came_back_is_no_death(tmp_path):
    attempt = deaths.begin(tmp_path)
    now = Deaths(tmp_path, attempt)
    for _ in range(REFUSED_AFTER):
        with pytest.raises(RuntimeError, match="the engine's own"), now.noted([1, 2]):
            raise RuntimeError("the engine's own")
    assert Deaths(tmp_path, attempt).groups(np.arange(3), [1, 2]) == [[1, 2]]


def test_teachers_know_nothing_of_each_other(tmp_path):
    attempt = deaths.begin(tmp_path)
    for _ in range(REFUSED_AFTER):
        die(tmp_path, attempt, [3], teacher="one")
    assert Deaths(tmp_path, attempt, "two").error(slot=3, row_id=3) is None
    assert Deaths(tmp_path, attempt, "one").error(slot=3, row_id=3) is not None


def test_a_note_that_a_full_disk_cut_counts_as_nothing(tmp_path):
    attempt = deaths.begin(tmp_path)
    assert attempt is not None
    (tmp_path / deaths.FOLDER / attempt / "cut").write_text('["", [1, 2')
    (tmp_path / deaths.FOLDER / "refused.jsonl").write_text('["", [7]]\n["", [8')
    now = Deaths(tmp_path, attempt)
    assert now.groups(np.arange(3), [1, 2]) == [[1, 2]]
    assert [row for row in range(10) if now.error(row, row)] == [7]


def test_the_stage_answers_the_other_rows_of_the_block(tmp_path):
    attempt = deaths.begin(tmp_path)
    for _ in range(REFUSED_AFTER):
        die(tmp_path, attempt, [1])
    spec = EngineSpec({"kind": "fake", "vocab_size": VOCAB}, "teacher", None, "auto", 4, num_gpus=0, threads=1)
    rows = TeacherStage(spec, Request(top_k=16), str(tmp_path), attempt=attempt)(block(4, 128))  # the last is a dummy
    assert rows.column(schema.WEIGHT).to_pylist() == [1, 0, 1, 0]
    assert ["ended 4 times" in error for error in rows.column(schema.TEACHER_ERROR).to_pylist()] == [0, 1, 0, 0]
    undisturbed = TeacherStage(spec, Request(top_k=16), str(tmp_path))(block(4, 128))
    payloads, expected = (table.column(schema.TEACHER_PAYLOAD).to_pylist() for table in (rows, undisturbed))
    assert payloads == [expected[0], b"", expected[2], b""]
    assert TopKLogprobs.decode(payloads[0]).ids.shape[1] == 16


def test_an_object_store_is_not_written_to_for_each_block():
    assert deaths.begin(deaths.storage.path("s3://bucket/run")) is None
