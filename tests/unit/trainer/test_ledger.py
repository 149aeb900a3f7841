"""What was trained is counted from the rows themselves, and survives a checkpoint."""

import json

import numpy as np

from ray_kd.trainer.ledger import Ledger
from ray_kd.trainer.step import Flags, StepResult


def step(slots, row_ids, is_trained=None, is_applied=True, is_bad=False):
    row_ids = np.array(row_ids)
    return StepResult(
        metrics={}, grad_norm=0.0, is_applied=is_applied, is_bad=is_bad,
        num_valid_tokens=3, num_tokens=5, payload_nbytes=7,
        teacher_busy_s=0.0, flags=Flags(0, 0, 0, 0), slots=np.array(slots), row_ids=row_ids,
        is_trained=row_ids >= 0 if is_trained is None else np.array(is_trained),
    )  # fmt: skip


def add(ledger, *results):
    for result in results:
        ledger.add(result, step_s=2.0, wait_s=0.5, is_timed=True)


def test_every_row_once_an_epoch():
    ledger = Ledger(num_rows=3, num_planned_rows=6)
    add(ledger, step([0, 1], [2, 0]), step([2, 3], [1, 2]), step([4, 5], [0, 1]))
    assert ledger.rows_consumed == 6
    assert ledger.totals.rows_duplicated == 0


def test_a_row_trained_twice_in_an_epoch_is_seen():
    ledger = Ledger(num_rows=3, num_planned_rows=6)
    add(ledger, step([0, 1], [2, 2]), step([2, 3], [2, 1]))
    assert ledger.totals.rows_duplicated == 2
    assert ledger.rows_consumed == 2


def test_dummies_are_nothing_and_refused_rows_are_counted_apart():
    ledger = Ledger(num_rows=3, num_planned_rows=3)
    add(ledger, step([0, 1], [0, 1], [True, False]), step([2, 3], [2, -1]))
    assert ledger.rows_consumed == 2
    assert ledger.totals.rows_refused == 1


def test_the_state_goes_through_json():
    ledger = Ledger(num_rows=100, num_planned_rows=250)
    add(ledger, *(step([s, s + 1], [s % 100, (s + 1) % 100]) for s in range(0, 120, 2)))
    restored = Ledger.from_state(100, 250, json.loads(json.dumps(ledger.state())))
    assert restored.totals == ledger.totals
    assert restored.rows_consumed == ledger.rows_consumed == 120
    add(restored, step([0, 120], [0, 20]))
    assert restored.totals.rows_duplicated == 1
    assert restored.rows_consumed == 121


def test_bad_steps_are_counted_until_one_is_applied_and_across_a_checkpoint():
    ledger = Ledger(num_rows=9, num_planned_rows=9)
    bad, overflow = {"is_applied": False, "is_bad": True}, {"is_applied": False}
    add(ledger, step([0], [0]), step([1], [1], **bad), step([2], [2], **overflow), step([3], [3], **bad))
    assert ledger.bad_in_a_row == [2, 4]  # a step that fp16 left out is neither
    state = json.loads(json.dumps(ledger.state()))
    restored = Ledger.from_state(9, 9, state)
    add(restored, step([4], [4], **bad))
    assert restored.bad_in_a_row == [2, 4, 5]
    add(restored, step([5], [5]))
    assert restored.bad_in_a_row == []
    assert (restored.totals.bad_steps, restored.totals.steps_skipped) == (3, 4)
    assert restored.rows_consumed == 6
    del state["bad_in_a_row"], state["totals"]["bad_steps"]  # a checkpoint from before
    assert Ledger.from_state(9, 9, state).bad_in_a_row == []


def test_a_state_stays_as_it_was_while_its_checkpoint_is_written():
    ledger = Ledger(num_rows=9, num_planned_rows=9)
    bad = {"is_applied": False, "is_bad": True}
    add(ledger, step([0], [0], **bad))
    state = ledger.state()
    before = json.dumps(state)
    add(ledger, step([1], [1], **bad))
    assert json.dumps(state) == before


def test_the_first_step_of_an_attempt_is_not_timed():
    ledger = Ledger(num_rows=3, num_planned_rows=3)
    ledger.add(step([0], [0]), step_s=30.0, wait_s=29.0, is_timed=False)
    ledger.add(step([1], [1]), step_s=2.0, wait_s=0.5, is_timed=True)
    assert (ledger.totals.step_s, ledger.totals.timed_step_s, ledger.totals.wait_s) == (32.0, 2.0, 0.5)
