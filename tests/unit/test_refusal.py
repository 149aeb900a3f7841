"""What a worker finds out about the user's input reaches the driver once, with its line."""

import pytest

from ray_kd import refusal
from ray_kd.errors import ConfigError


def refuse(folder):
    with refusal.reported(folder):
        raise ConfigError("student: it caps its logits")


def test_a_refusal_is_raised_here_and_there(tmp_path):
    refusal.Reported(tmp_path).check()
    with pytest.raises(ConfigError, match="caps its logits"):
        refuse(tmp_path)
    with pytest.raises(ConfigError, match="caps its logits"):
        refusal.Reported(tmp_path).check()


def test_other_errors_are_not_refusals(tmp_path):
    with pytest.raises(OSError, match="disk"), refusal.reported(tmp_path):
        raise OSError("disk")
    refusal.Reported(tmp_path).check()
    assert list(tmp_path.iterdir()) == []
