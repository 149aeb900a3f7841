"""What a worker finds out about the user's input reaches the driver once, with its line."""

import errno

import pytest

from ray_kd import refusal, storage
from ray_kd.errors import ConfigError, RetryableError, StorageFull


class OfAModel(ConfigError):
    """A kind of its own."""


@pytest.mark.parametrize("error", [ConfigError, OfAModel, StorageFull])
def test_a_refusal_is_raised_here_and_there(tmp_path, error):
    refusal.Reported(tmp_path).check()
    with pytest.raises(error, match="it caps its logits"), refusal.reported(tmp_path):
        raise error("student: it caps its logits")
    with pytest.raises(ConfigError if error is OfAModel else error, match="it caps its logits"):
        refusal.Reported(tmp_path).check()


def test_where_there_is_no_space_for_the_line_the_error_is_raised_all_the_same(tmp_path):
    with pytest.raises(StorageFull, match="full"), refusal.reported(tmp_path / "nowhere"):
        raise StorageFull("full")


def test_a_disk_that_is_full_for_the_line_too_is_known_at_once(tmp_path, monkeypatch):
    """Ray would otherwise start the workers again as often as it may."""

    def write_text(target, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage, "write_text", write_text)
    with pytest.raises(StorageFull, match="the checkpoint"), refusal.reported(tmp_path):
        raise StorageFull("the checkpoint")
    with pytest.raises(StorageFull, match=f"no space left on device for '{tmp_path}'"):
        refusal.Reported(tmp_path).check()


def test_other_errors_are_not_refusals(tmp_path):
    with pytest.raises(OSError, match="disk"), refusal.reported(tmp_path):
        raise OSError("disk")
    with pytest.raises(RetryableError, match="lost"), refusal.reported(tmp_path):
        raise RetryableError("lost")
    refusal.Reported(tmp_path).check()
    assert list(tmp_path.iterdir()) == []
