"""The same calls on a disk and in an object store, over the S3 protocol."""

import uuid
from pathlib import Path

import pytest

from ray_kd import storage
from ray_kd.errors import ConfigError, RetryableError


@pytest.fixture(params=["disk", "store"])
def folder(request, tmp_path, monkeypatch):
    """A folder of either kind, empty."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    if request.param == "disk":
        (tmp_path / "folder").mkdir()
        return tmp_path / "folder"
    return storage.path(f"{request.getfixturevalue('object_store').uri}/{uuid.uuid4().hex}")


@pytest.fixture
def remote(object_store, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return storage.path(f"{object_store.uri}/{uuid.uuid4().hex}")


def test_a_location_is_a_path_or_a_uri(object_store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert storage.path("a/b") == tmp_path / "a" / "b"
    assert storage.path(f"file://{tmp_path}/a") == tmp_path / "a"
    assert str(storage.path("s3://runs/a") / "b") == "s3://runs/a/b"
    assert not storage.is_remote(storage.path("a"))
    assert storage.is_remote(storage.path("s3://runs/a").parent / "b")


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("nowhere://a/b", "no file system is known for nowhere://"),
        ("gs://a/b", "needs another package .*gcsfs"),
        ("memory://a/b", "in one process only"),
        ("s3://bucket", "is a whole store: allowed is a path, or the URI of a folder"),
    ],
)
def test_a_uri_that_cannot_serve_is_refused(object_store, uri, why):
    with pytest.raises(ConfigError, match=why):
        storage.path(uri)


def test_text_is_written_and_added_to(folder):
    storage.append_text(folder / "a.jsonl", "1\n")
    storage.append_text(folder / "a.jsonl", "2\n")
    storage.write_text(folder / "b.json", "x")
    storage.write_text(folder / "b.json", "y")
    assert (folder / "a.jsonl").read_text() == "1\n2\n"
    assert (folder / "b.json").read_text() == "y"
    assert sorted(found.name for found in folder.iterdir()) == ["a.jsonl", "b.json"]


def test_a_file_is_read_while_it_is_replaced(folder):
    """One open for reading in a store would be refused after the first block: its content has changed."""
    assert list(storage.read_lines(folder / "a.jsonl")) == []
    with pytest.raises(FileNotFoundError):
        storage.read_text(folder / "a.jsonl")
    storage.write_text(folder / "a.jsonl", "one\ntwo")
    assert storage.read_text(folder / "a.jsonl") == "one\ntwo"
    lines = storage.read_lines(folder / "a.jsonl")
    assert next(lines) == "one\n"
    storage.write_text(folder / "a.jsonl", "three")
    assert list(lines) == ["two"]


def test_a_growing_file_goes_on_where_it_stood(folder):
    for line in ("1\n", "2\n"):
        growing = storage.GrowingFile(folder / "a.jsonl")
        growing.write(line)
        growing.publish(wait=False)
        growing.close()
    assert (folder / "a.jsonl").read_text() == "1\n2\n"


def test_what_grows_in_a_store_is_seen_once_published(remote):
    growing = storage.GrowingFile(remote / "a.jsonl")
    growing.write("1\n")
    assert not (remote / "a.jsonl").exists()
    growing.publish()
    assert (remote / "a.jsonl").read_text() == "1\n"
    growing.close()


def test_what_goes_wrong_in_the_background_is_raised(remote, monkeypatch):
    growing = storage.GrowingFile(remote / "a.jsonl")

    def fail(*_):
        raise OSError("the store is full")

    monkeypatch.setattr(storage.filesystem(remote)[0], "put_file", fail)
    growing.publish(wait=False)
    with pytest.raises(OSError, match="full"):
        growing.publish(wait=False)


def test_drafts_arrive_whole(folder):
    with storage.drafted_file(folder / "a.bin") as draft:
        draft.write_bytes(b"1")
    with storage.drafted_folder(folder / "model", last="config.json") as draft:
        (draft / "sub").mkdir(parents=True)
        (draft / "sub" / "w").write_bytes(b"2")
        (draft / "config.json").write_text("{}")
    assert (folder / "a.bin").read_bytes() == b"1"
    assert (folder / "model" / "sub" / "w").read_bytes() == b"2"
    local = storage.fetch(folder / "model")
    assert sorted(p.relative_to(local).as_posix() for p in local.rglob("*") if p.is_file()) == ["config.json", "sub/w"]
    storage.remove(folder / "model", first="config.json")
    assert not (folder / "model" / "sub" / "w").exists()
    assert not (folder / "model" / "config.json").exists()
    storage.remove(folder / "model")  # nothing there is fine


def test_a_draft_that_failed_does_not_arrive(remote):
    def fail():
        with storage.drafted_folder(remote / "model", last="config.json") as draft:
            draft.mkdir()
            (draft / "config.json").write_text("{}")
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 (the one above)
        fail()
    assert storage.sizes(remote) == {}


def test_the_file_that_makes_a_folder_count_is_put_last_and_removed_first(remote, monkeypatch):
    calls = []
    fs, _ = storage.filesystem(remote)
    put = fs.put_file
    monkeypatch.setattr(fs, "put_file", lambda source, name: (calls.append(Path(name).name), put(source, name)))
    with storage.drafted_folder(remote / "model", last="config.json") as draft:
        draft.mkdir()
        for name in ("z", "config.json", "a"):
            (draft / name).write_text(name)
    assert sorted(calls[:2]) == ["a", "z"]
    assert calls[2:] == ["config.json"]
    removed = []
    unlink = type(remote).unlink
    monkeypatch.setattr(type(remote), "unlink", lambda p, **kw: (removed.append(p.name), unlink(p, **kw)))
    storage.remove(remote / "model", first="config.json")
    assert removed == ["config.json", "a", "z"]


def test_copies_on_a_node_are_shared_and_follow_the_version(remote):
    storage.write_text(remote / "step_1" / "w", "one")
    first = storage.fetch(remote / "step_1", group="run", version="1")
    assert (first / "w").read_text() == "one"
    storage.write_text(remote / "step_1" / "w", "two")
    assert storage.fetch(remote / "step_1", group="run", version="1") == first
    assert (first / "w").read_text() == "one"
    second = storage.fetch(remote / "step_1", group="run", version="2")
    assert (second / "w").read_text() == "two"
    assert not first.exists()
    storage.write_text(remote / "file", "f")
    assert storage.fetch(remote / "file").read_text() == "f"


def test_a_copy_that_fails_leaves_nothing(remote):
    def refuse(copy):
        assert (copy / "w").exists()
        raise ValueError

    storage.write_text(remote / "step_1" / "w", "one")
    with pytest.raises(ValueError):  # noqa: PT011 (the one above)
        storage.fetch(remote / "step_1", check=refuse)
    assert [p.name for p in storage.scratch(str(remote / "step_1")).iterdir()] == [".lock"]
    with pytest.raises(RetryableError, match="cannot be copied"):
        storage.fetch(remote / "absent")


def test_a_flag_in_a_store_is_looked_at_now_and_then(folder):
    flag = storage.Flag(folder / ".stop")
    assert not flag.is_set()
    storage.write_text(folder / ".stop", "")
    assert flag.is_set() == (not storage.is_remote(folder))
    assert flag.is_set(at_once=True)
