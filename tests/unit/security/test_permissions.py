"""What jobs write is theirs: not for everyone to write, and copies under TMPDIR for nobody else to read."""

import os
import stat
import tempfile
import uuid
from pathlib import Path

import pytest
import ray

from ray_kd import cli, storage
from ray_kd.errors import ConfigError
from tests.fake_run import write_run


@pytest.fixture
def umask_of_none():
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.fixture
def scratch(tmp_path, monkeypatch) -> Path:
    """TMPDIR, and the folder there that is this user's."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path / f"ray_kd-{os.getuid()}"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def for_everyone(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if mode(path) & stat.S_IWOTH and not path.is_symlink()]


@pytest.mark.usefixtures("umask_of_none")
def test_no_job_writes_files_for_everyone(tmp_path, monkeypatch):
    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    run = write_run(tmp_path / "home")
    assert for_everyone(tmp_path / "home"), "so a container without a umask would leave them"
    for path in for_everyone(tmp_path):
        path.chmod(mode(path) & ~stat.S_IWOTH)
    assert cli.main("export", [str(run), str(tmp_path / "out")]) == 0
    (run / "metrics.jsonl").open("a").write("cut")
    assert cli.main("doctor", [str(run), "--fix"]) == 0
    recipe = run / "config.yaml"
    assert cli.main("distill", [str(recipe), f"run.dir={tmp_path / 'other'}"]) == ConfigError.exit_code
    assert {"driver.log"} <= {path.name for path in (tmp_path / "other").iterdir()}
    assert for_everyone(tmp_path) == []
    assert os.umask(0) & stat.S_IWOTH, "and the processes that it starts have it"


def test_copies_are_in_a_folder_of_this_user(scratch, object_store):
    folder = storage.path(f"{object_store.uri}/{uuid.uuid4().hex}")
    (folder / "a").write_text("1")
    copy = storage.fetch(folder)
    assert copy.is_relative_to(scratch)
    assert mode(scratch) == 0o700


@pytest.mark.usefixtures("umask_of_none")
def test_whatever_the_umask(scratch):
    storage.scratch("a")
    assert mode(scratch) == 0o700


def test_a_link_in_its_place_is_refused(scratch, tmp_path):
    (tmp_path / "theirs").mkdir()
    scratch.symlink_to(tmp_path / "theirs")
    with pytest.raises(ConfigError, match="is not a folder of this user: set TMPDIR to one of your own"):
        storage.scratch("a")
    assert list((tmp_path / "theirs").iterdir()) == []


def test_a_file_in_its_place_is_refused(scratch):
    scratch.write_text("")
    with pytest.raises((ConfigError, FileExistsError)):
        storage.scratch("a")


def test_a_folder_of_another_user_is_refused(scratch, monkeypatch):
    storage.scratch("a")
    me = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: me + 1)
    scratch.rename(scratch.with_name(f"ray_kd-{me + 1}"))
    with pytest.raises(ConfigError, match="is not a folder of this user"):
        storage.scratch("b")


@pytest.mark.parametrize("open_to", [0o770, 0o701, 0o777, 0o1777])
def test_a_folder_that_others_may_enter_is_refused(scratch, open_to):
    scratch.mkdir()
    scratch.chmod(open_to)
    with pytest.raises(ConfigError, match=f"is open to other users .mode {open_to:o}.: chmod it to 700"):
        storage.scratch("a")


def test_what_is_kept_for_a_store_is_this_users_alone(object_store):
    growing = storage.GrowingFile(storage.path(f"{object_store.uri}/{uuid.uuid4().hex}/metrics.jsonl"))
    assert mode(Path(growing._file.name)) == 0o600
    assert Path(growing._file.name).is_relative_to(tempfile.gettempdir())
    growing.close()
