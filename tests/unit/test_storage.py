"""The same calls on a disk and in an object store, over the S3 protocol."""

import fcntl
import os
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from upath import UPath

from ray_kd import checkpoint, run_folder, storage
from ray_kd.data.manifest import Manifest
from ray_kd.errors import ConfigError, RetryableError, StorageFull
from ray_kd.progress import Progress


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
        ("nowhere://a/b", "run.dir is 'nowhere://a/b': allowed is a path, or a URI of s3://, gs://"),
        ("memory://a/b", "allowed is a path"),
        ("gs://a/b", "gs:// needs another package .*gcsfs"),
        ("s3:/bucket/a", "did you mean 's3://bucket/a'"),
        ("s3:bucket/a", "did you mean 's3://bucket/a'"),
        ("s3://bucket", "is 's3://bucket', a whole store: allowed is the URI of a folder"),
        ("s3://key:word@bucket/a", "run.dir is a s3:// URI with a password; such values come from the environment"),
    ],
)
def test_a_uri_that_cannot_serve_is_refused(object_store, uri, why):
    with pytest.raises(ConfigError, match=why) as refused:
        storage.path(uri, "run.dir")
    assert "word@" not in str(refused.value)


def test_children(folder):
    assert storage.children(folder / "absent") == []
    for name in ("b/c", "a", "b/d/e"):
        storage.make_folder((folder / name).parent)
        storage.write_text(folder / name, "1")
    assert storage.children(folder) == [folder / "a", folder / "b"]
    assert storage.children(folder / "b") == [folder / "b" / "c", folder / "b" / "d"]


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


def test_a_put_in_the_background_that_fails_is_made_up_for(remote, monkeypatch, caplog):
    growing = storage.GrowingFile(remote / "a.jsonl")

    def fail(*_):
        raise OSError("the store is full")

    with monkeypatch.context() as patch:
        patch.setattr(storage.filesystem(remote)[0], "put_file", fail)
        growing.write("1\n")
        growing.publish(wait=False)
        growing.write("2\n")
        growing.publish(wait=False)
        assert "could not be put and will be again: the store is full" in caplog.text
        with pytest.raises(OSError, match="full"):
            growing.publish()
    growing.close()
    assert (remote / "a.jsonl").read_text() == "1\n2\n"


@pytest.fixture
def unreachable(monkeypatch, tmp_path):
    """A folder of a store where nobody answers."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found = UPath("s3://runs/a", endpoint_url="http://127.0.0.1:9", key="k", secret="s", use_listings_cache=False,
                  config_kwargs={"retries": {"max_attempts": 0}, "connect_timeout": 1})  # fmt: skip
    monkeypatch.setattr(storage.filesystem(found)[0], "retries", 1)
    return found


@pytest.mark.parametrize(
    "call",
    [
        lambda folder: storage.read_text(folder / "a"),
        lambda folder: list(storage.read_lines(folder / "a")),
        lambda folder: storage.write_text(folder / "a", "1"),
        lambda folder: storage.fetch(folder),
        lambda folder: (folder / "a").exists(),
        lambda folder: run_folder.create(folder),
        lambda folder: Manifest.read(folder),
        lambda folder: storage.children(folder),
        lambda folder: checkpoint.newest_verified(folder),
    ],
    ids=["read", "lines", "write", "fetch", "exists", "run_dir", "manifest", "children", "checkpoint"],
)
def test_a_store_that_cannot_be_reached_is_retryable(unreachable, call):
    with pytest.raises(RetryableError, match="the object store failed"), storage.store_errors():
        call(unreachable)


def test_what_only_looks_goes_on_without_the_store(unreachable, caplog):
    assert not storage.Flag(unreachable / ".stop").is_set()
    assert "could not be looked at" in caplog.text
    Progress(unreachable / "metrics.jsonl", num_steps=3).update(is_last=True)


def test_a_store_without_credentials_is_the_users_matter(monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    nobody = UPath("s3://runs/nobody", endpoint_url="http://127.0.0.1:9", use_listings_cache=False)
    with pytest.raises(ConfigError, match=r"let nobody in .*set its credentials"), storage.store_errors():
        storage.read_text(nobody / "a")


def test_other_errors_are_not_the_stores():
    with pytest.raises(KeyError), storage.store_errors():
        raise KeyError("a")
    with pytest.raises(ConfigError), storage.store_errors():
        raise ConfigError("a")


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
    remove, remove_one = fs.rm, fs.rm_file
    monkeypatch.setattr(fs, "rm", lambda names: (removed.extend(names), remove(names)))
    monkeypatch.setattr(fs, "rm_file", lambda name: (removed.append(name), remove_one(name)))
    storage.remove(remote / "model", first="config.json")
    assert [Path(name).name for name in removed] == ["config.json", "a", "z"]
    assert storage.sizes(remote) == {}


def test_a_draft_replaces_what_a_killed_upload_left(remote):
    storage.write_text(remote / "model" / "shard-9", "left")
    with storage.drafted_folder(remote / "model", last="config.json") as draft:
        draft.mkdir()
        (draft / "config.json").write_text("{}")
    assert list(storage.sizes(remote)) == ["model/config.json"]


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
    with pytest.raises(FileNotFoundError):
        storage.fetch(remote / "absent")


def test_a_copy_is_made_again_when_the_original_has_changed(remote):
    for content in ("one", "two"):
        storage.write_text(remote / "final" / "config.json", content)
        for _ in range(2):
            copy = storage.fetch(remote / "final", marker="config.json")
            assert (copy / "config.json").read_text() == content


def test_copies_that_nobody_used_for_days_are_swept(tmp_path, monkeypatch, remote):
    storage.write_text(remote / "a", "1")
    copy = storage.fetch(remote / "a")
    home = copy.parent.parent
    storage.scratch("another")
    assert copy.exists()
    os.utime(home, (0, 0))
    with (home / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        storage.scratch("while it is in use")
    assert copy.exists()
    storage.scratch("a third")
    assert not home.exists()
    assert storage.fetch(remote / "a").read_text() == "1"


def test_another_users_scratch_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"ray_kd-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="is not a folder of this user: set TMPDIR"):
        storage.scratch("a")


def test_the_last_lines_and_ranges_of_a_file(remote):
    assert storage.read_last_lines(remote / "a.jsonl", 8) == []
    storage.write_text(remote / "a.jsonl", "1234\n5678\n9")
    assert storage.read_last_lines(remote / "a.jsonl", 100) == ["1234\n", "5678\n"]
    assert storage.read_last_lines(remote / "a.jsonl", 8) == ["5678\n"]
    assert storage.read_ranges([(remote / "a.jsonl", 5, 7), (remote / "a.jsonl", 0, 2)]) == [b"56", b"12"]


def test_no_bucket_is_made_for_a_typo(object_store):
    with pytest.raises(ConfigError, match="'s3://typo/run' cannot be written"):
        run_folder.create(storage.path("s3://typo/run"))


def test_a_flag_in_a_store_is_looked_at_now_and_then(folder):
    flag = storage.Flag(folder / ".stop")
    assert not flag.is_set()
    storage.write_text(folder / ".stop", "")
    assert flag.is_set() == (not storage.is_remote(folder))
    assert flag.is_set(at_once=True)


def test_a_full_disk_is_retryable_when_there_is_space():
    with (
        pytest.raises(StorageFull, match=r"No space left on device.*: the same command goes on"),
        storage.store_errors(),
    ):
        Path("/dev/full").write_bytes(b"1")


def test_a_line_cut_short_does_not_take_the_next_one_with_it(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    storage.append_text(path, '{"row": 1}\n')
    with path.open("a") as file:
        file.write('{"ro')
    for number in (2, 3):
        storage.append_text(path, f'{{"row": {number}}}\n')
    assert path.read_text().splitlines() == ['{"row": 1}', '{"row": 2}', '{"row": 3}']


def test_of_several_who_add_lines_at_once_none_is_lost(tmp_path):
    path = tmp_path / "refused.jsonl"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: storage.append_text(path, f"{number}\n"), range(2000)))
    assert sorted(map(int, path.read_text().split())) == list(range(2000))


def test_a_line_that_another_is_writing_is_not_taken_for_one_cut_short(tmp_path):
    path = tmp_path / "refused.jsonl"
    with ThreadPoolExecutor(1) as pool, path.open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write("fir")
        other.flush()
        second = pool.submit(storage.append_text, path, "second\n")
        with pytest.raises(TimeoutError):
            second.result(timeout=0.2)
        other.write("st\n")
        other.close()
        second.result(timeout=60)
    assert path.read_text() == "first\nsecond\n"


def test_a_file_that_could_not_be_written_leaves_nothing(tmp_path):
    """Part of one would fill a full disk for good."""
    (tmp_path / "taken" / "by").mkdir(parents=True)
    for write, content in ((storage.write_text, "1"), (storage.write_bytes, b"1")):
        with pytest.raises(OSError, match="taken"):
            write(tmp_path / "taken", content)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
