"""A staged folder appears whole or not at all, whoever else is at work and however a driver ended."""

import os
import subprocess
import sys
import uuid

import pytest

from ray_kd import storage
from ray_kd.data.manifest import MANIFEST_NAME
from ray_kd.data.staging import commit, staging, sweep
from ray_kd.errors import ConfigError


def is_whole(folder):
    return (folder / "manifest").is_file()


def test_a_committed_folder_stays_and_a_failed_one_leaves_nothing(tmp_path):
    with staging(tmp_path) as folder:
        (folder / "manifest").touch()
        commit(folder, tmp_path / "final", is_whole)
    with pytest.raises(FileNotFoundError), staging(tmp_path) as folder:
        os.rename(folder / "absent", folder / "half")
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_the_first_of_two_drivers_wins(tmp_path):
    with staging(tmp_path) as one, staging(tmp_path) as two:
        for name, folder in (("one", one), ("two", two)):
            (folder / "manifest").write_text(name)
        commit(one, tmp_path / "final", is_whole)
        commit(two, tmp_path / "final", is_whole)
    assert (tmp_path / "final" / "manifest").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_what_is_not_whole_is_replaced(tmp_path):
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "half").touch()
    with staging(tmp_path) as folder:
        (folder / "manifest").touch()
        commit(folder, tmp_path / "final", is_whole)
    assert [path.name for path in (tmp_path / "final").iterdir()] == ["manifest"]


def test_only_the_folders_of_dead_drivers_are_swept(tmp_path):
    killed = (
        "import os, signal, sys; from pathlib import Path; from ray_kd.data.staging import staging\n"
        "with staging(Path(sys.argv[1])) as folder:\n    os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", killed, str(tmp_path)], check=False)
    [dead] = (path.name for path in tmp_path.iterdir() if path.is_dir())
    with staging(tmp_path) as alive:
        assert sweep(tmp_path) == [dead]
        assert alive.is_dir()
        assert not (tmp_path / dead).exists()
    assert not list(tmp_path.iterdir())


def test_in_a_store_the_manifest_arrives_last_and_what_is_there_stays(object_store, monkeypatch):
    parent = storage.path(f"{object_store.uri}/{uuid.uuid4().hex}")
    final = parent / "final"
    with staging(parent) as folder:
        storage.write_text(folder / MANIFEST_NAME, "{}")
        storage.write_text(folder / "a", "1")
        storage.write_text(final / "a", "of a driver that is copying the same")
        copied = []
        fs, _ = storage.filesystem(parent)
        copy = fs.cp_file
        monkeypatch.setattr(fs, "cp_file", lambda one, other: (copied.append(other), copy(one, other)))
        commit(folder, final, lambda place: (place / MANIFEST_NAME).exists())
        assert [name.rsplit("/", 1)[1] for name in copied] == ["a", MANIFEST_NAME]
        commit(folder, final, lambda place: (place / MANIFEST_NAME).exists())
        assert len(copied) == 2
    assert sorted(storage.sizes(parent)) == ["final/a", f"final/{MANIFEST_NAME}"]
    assert storage.read_text(final / "a") == "1"


def test_in_a_store_what_is_a_week_old_is_swept(object_store):
    parent = storage.path(f"{object_store.uri}/{uuid.uuid4().hex}")
    assert sweep(parent) == []
    with staging(parent) as alive:
        for name in (".preparing-1000-abc", ".preparing-deadbeef", "final"):
            storage.write_text(parent / name / "a", "1")
        assert sweep(parent) == [".preparing-1000-abc"]
        assert (alive / ".started").exists()
    assert sorted(storage.sizes(parent)) == [".preparing-deadbeef/a", "final/a"]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="prepared_dir"), staging(tmp_path / "file"):
        pass
