"""The alarms of the ordered stream: a row of another step before a step is trained, one that is there twice after."""

from types import SimpleNamespace

import numpy as np
import pytest

from ray_kd.trainer.loop import _check_all_slots, _check_slots


def test_a_row_of_another_step_is_seen():
    _check_slots([SimpleNamespace(slots=np.array([4, 5]))], 2, 4)
    with pytest.raises(AssertionError, match=r"step 2 got slots \[5, 8\]"):
        _check_slots([SimpleNamespace(slots=np.array([5, 8]))], 2, 4)


@pytest.mark.parametrize("slots", [[4, 4, 5, 6], [4, 5, 6], [4, 5, 6, 7, 7]])
def test_a_slot_that_is_there_twice_or_not_is_seen(slots):
    _check_all_slots(np.arange(4, 8), 2, 4)
    with pytest.raises(AssertionError, match="step 2 got slots"):
        _check_all_slots(np.array(slots), 2, 4)
