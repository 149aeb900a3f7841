"""Checkpoint folders: complete or absent, and every kind of damage found before anything is read."""

import errno
import json
import logging
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ray_kd import checkpoint, storage
from ray_kd.checkpoint import CorruptCheckpoint
from ray_kd.errors import ConfigError, RetryableError


def save(root: Path, step: int, state: dict | None = None) -> Path:
    tmp = checkpoint.begin(root, step)
    (tmp / "rank00000.safetensors").write_bytes(bytes(range(256)) * 8)
    (tmp / "sub").mkdir()
    (tmp / "sub" / "rank00001.safetensors").write_bytes(b"x" * 100)
    return checkpoint.commit(tmp, root, step, next_slot=step * 8, state=state or {"epoch": 1})


def test_round_trip(tmp_path: Path) -> None:
    folder = save(tmp_path, 100, {"loss": 1.5, "nested": {"a": [1, None]}})
    assert folder == tmp_path / "step_00000100"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000100"]
    checkpoint.verify(folder)
    assert checkpoint.read_state(folder) == {
        "schema_version": checkpoint.SCHEMA_VERSION,
        "step": 100,
        "next_slot": 800,
        "state": {"loss": 1.5, "nested": {"a": [1, None]}},
    }


def flip_byte(folder: Path) -> None:
    path = folder / "rank00000.safetensors"
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)


def truncate(folder: Path) -> None:
    path = folder / "rank00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def replace_by_link(folder: Path) -> None:
    path = folder / "rank00000.safetensors"
    path.rename(folder.parent / "elsewhere")
    path.symlink_to(folder.parent / "elsewhere")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped byte": (flip_byte, r"rank00000\.safetensors: sha256 differs"),
    "truncated": (truncate, r"rank00000\.safetensors: 2047 bytes, not 2048"),
    "missing": (lambda f: (f / "sub/rank00001.safetensors").unlink(), r"sub/rank00001\.safetensors: missing"),
    "extra": (lambda f: (f / "more.bin").write_bytes(b""), r"more\.bin: not in manifest"),
    "link": (replace_by_link, r"rank00000\.safetensors: neither a plain file"),
    "state changed": (lambda f: (f / "state.json").write_text("{}"), r"state\.json: 2 bytes"),
    "manifest empty": (lambda f: (f / "manifest.json").write_text(""), r"manifest\.json: cannot be read"),
    "manifest not JSON": (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe{"), r"manifest\.json: cannot be read"),
    "manifest a list": (lambda f: (f / "manifest.json").write_text("[]"), r"manifest\.json: cannot be read"),
    "manifest gone": (lambda f: (f / "manifest.json").unlink(), r"manifest\.json: cannot be read"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_and_named(tmp_path: Path, kind: str) -> None:
    folder = save(tmp_path, 7)
    damage, message = DAMAGE[kind]
    damage(folder)
    with pytest.raises(CorruptCheckpoint, match=message):
        checkpoint.verify(folder)


@pytest.mark.parametrize("kind", sorted(DAMAGE.keys() - {"manifest gone"}))
def test_newest_verified_falls_back_and_says_why(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    older, newest = save(tmp_path, 9), save(tmp_path, 10)
    DAMAGE[kind][0](newest)
    with caplog.at_level(logging.WARNING):
        assert checkpoint.newest_verified(tmp_path) == older
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "step_00000010" in caplog.text


def test_every_flipped_bit_of_the_manifest_is_harmless_or_found(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    path = folder / "manifest.json"
    good = path.read_bytes()
    document = json.loads(good)
    for position in range(0, len(good), 3):
        path.write_bytes(good[:position] + bytes([good[position] ^ 4]) + good[position + 1 :])
        try:
            checkpoint.verify(folder)
        except CorruptCheckpoint:
            continue
        assert json.loads(path.read_bytes()) == document


def test_cheap_check_sees_sizes_only(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    flip_byte(folder)
    assert checkpoint.newest_verified(tmp_path, full=False) == folder
    truncate(folder)
    assert checkpoint.newest_verified(tmp_path, full=False) is None


def test_state_is_not_read_unverified(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    path = folder / "state.json"
    path.write_text(path.read_text().replace('"next_slot": 8', '"next_slot": 9'))
    with pytest.raises(CorruptCheckpoint, match=r"state\.json: sha256"):
        checkpoint.read_state(folder)
    path.unlink()
    with pytest.raises(CorruptCheckpoint, match=r"state\.json: missing"):
        checkpoint.read_state(folder)


def test_a_renamed_folder_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, 1).rename(tmp_path / "step_00000002")
    with pytest.raises(CorruptCheckpoint, match="is of step 1, not of step_00000002"):
        checkpoint.verify(folder)


def test_ranks_hash_their_own_files(tmp_path: Path) -> None:
    tmp = checkpoint.begin(tmp_path, 5)
    assert checkpoint.begin(tmp_path, 5, rank=1) == tmp
    hashes = {}
    for rank in range(2):
        (tmp / f"rank{rank}").write_bytes(b"r" * (rank + 1))
        hashes.update(checkpoint.put_files(tmp, tmp_path, 5, [f"rank{rank}"]))
    folder = checkpoint.commit(tmp, tmp_path, 5, 40, {}, hashes)
    checkpoint.verify(folder)
    assert set(json.loads((folder / "manifest.json").read_text())["files"]) == {"rank0", "rank1", "state.json"}


@pytest.mark.parametrize(("content", "message"), [(b"longer", "6 bytes, not 1"), (None, "missing")])
def test_commit_refuses_hashes_that_do_not_fit(tmp_path: Path, content: bytes | None, message: str) -> None:
    tmp = checkpoint.begin(tmp_path, 5)
    (tmp / "rank0").write_bytes(b"r")
    hashes = checkpoint.put_files(tmp, tmp_path, 5, ["rank0"])
    (tmp / "rank0").unlink()
    if content is not None:
        (tmp / "rank0").write_bytes(content)
    with pytest.raises(CorruptCheckpoint, match=message):
        checkpoint.commit(tmp, tmp_path, 5, 40, {}, hashes)
    assert checkpoint.newest_verified(tmp_path) is None


def test_state_must_be_json(tmp_path: Path) -> None:
    for value in (float("nan"), {1, 2}):
        with pytest.raises((ValueError, TypeError)):
            checkpoint.commit(checkpoint.begin(tmp_path, 1), tmp_path, 1, 0, {"bad": value})
    assert checkpoint.newest_verified(tmp_path) is None


def test_begin_clears_a_killed_attempt_and_commit_replaces_the_same_step(tmp_path: Path) -> None:
    (checkpoint.begin(tmp_path, 4) / "left_over").write_bytes(b"1")
    folder = save(tmp_path, 4, {"attempt": 1})
    assert not (folder / "left_over").exists()
    flip_byte(folder)
    assert checkpoint.read_state(save(tmp_path, 4, {"attempt": 2}))["state"] == {"attempt": 2}
    checkpoint.verify(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000004"]


def test_sweep_removes_orphans_only(tmp_path: Path) -> None:
    assert checkpoint.sweep(tmp_path / "absent") == []
    folder = save(tmp_path, 1)
    checkpoint.begin(tmp_path, 2)
    (tmp_path / "step_00000003").mkdir()
    (tmp_path / "step_00000003" / "rank00000.safetensors").write_bytes(b"1")
    (tmp_path / "notes").mkdir()
    assert checkpoint.sweep(tmp_path) == [".tmp-step_00000002", "step_00000003"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "step_00000001"]
    checkpoint.verify(folder)


def test_rotate(tmp_path: Path) -> None:
    for step in (1, 2, 3, 100000000, 5):
        save(tmp_path, step)
    newest = 100000000
    assert checkpoint.rotate(tmp_path, newest=newest, keep_last=2, keep=[1]) == [2, 3]
    assert checkpoint.rotate(tmp_path, newest=newest, keep_last=9) == []
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step_00000001", "step_00000005", "step_100000000"]
    assert checkpoint.newest_verified(tmp_path) == tmp_path / "step_100000000"
    with pytest.raises(ValueError, match="keep_last is 0"):
        checkpoint.rotate(tmp_path, newest=newest, keep_last=0)


def test_rotation_after_a_fall_back_keeps_the_good_checkpoint(tmp_path: Path) -> None:
    """The newest is damaged, the run goes on from the one before and saves again: the damaged one must go."""
    save(tmp_path, 50)
    broken = save(tmp_path, 100)
    victim = next(path for path in broken.iterdir() if path.suffix == ".safetensors")
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    assert checkpoint.newest_verified(tmp_path) == tmp_path / "step_00000050"
    save(tmp_path, 75)
    assert checkpoint.rotate(tmp_path, newest=75, keep_last=1) == [50, 100]
    assert checkpoint.newest_verified(tmp_path) == tmp_path / "step_00000075"


def test_what_a_start_passes_over_counts_no_more_and_is_kept(tmp_path: Path) -> None:
    """Broken in between: as one of the last two it would push the good one out."""
    for step in (5, 7, 9):
        save(tmp_path, step)
    for step in (7, 9):
        truncate(tmp_path / f"step_{step:08d}")
    checkpoint.begin(tmp_path, 11)
    assert checkpoint.recover(tmp_path) == tmp_path / "step_00000005"
    save(tmp_path, 10)
    assert checkpoint.rotate(tmp_path, newest=10, keep_last=2) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged", "step_00000005", "step_00000010"]
    assert len(list((tmp_path / "damaged").iterdir())) == 2


def test_a_checkpoint_of_another_version_is_not_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 5)
    monkeypatch.setattr(checkpoint, "SCHEMA_VERSION", 2)
    for call in (checkpoint.newest_verified, checkpoint.recover):
        with pytest.raises(ConfigError, match="schema_version 1, this code reads 2: go on with the ray_kd that wrote"):
            call(tmp_path)
    assert (tmp_path / "step_00000005").exists()


@pytest.mark.parametrize("name", ["manifest.json", "rank00000.safetensors"])
def test_lost_bytes_are_damage_and_storage_that_fails_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    older, newest = save(tmp_path, 5), save(tmp_path, 6)
    code = errno.EIO
    opened = Path.open

    def fails(path: Path, *arguments: Any, **options: Any) -> Any:
        if path == newest / name:
            raise OSError(code, os.strerror(code), str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", fails)
    assert checkpoint.newest_verified(tmp_path) == older
    code = errno.ESTALE
    with pytest.raises(RetryableError, match=name) as caught:
        checkpoint.newest_verified(tmp_path)
    assert not isinstance(caught.value, CorruptCheckpoint)


@pytest.fixture
def store(object_store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """checkpoints/ of a run in an object store."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return storage.path(f"{object_store.uri}/{uuid.uuid4().hex}/checkpoints")


def save_in_store(root: Path, step: int, world: int = 2) -> Path:
    hashes = {}
    drafts = [checkpoint.begin(root, step, rank) for rank in range(world)]
    assert len(set(drafts)) == world
    for rank, tmp in enumerate(drafts):
        (tmp / f"rank{rank}").write_bytes(bytes([rank]) * 100)
        hashes.update(checkpoint.put_files(tmp, root, step, [f"rank{rank}"]))
    return checkpoint.commit(drafts[0], root, step, step * 8, {"a": 1}, hashes)


def test_in_a_store_the_manifest_is_the_commit(store: Path) -> None:
    assert checkpoint.newest_verified(store) is None
    assert checkpoint.sweep(store) == []
    folder = save_in_store(store, 3)
    assert checkpoint.newest_verified(store) == folder
    assert checkpoint.read_state(folder)["next_slot"] == 24
    checkpoint.verify(folder)
    half = save_in_store(store, 6)
    (half / "manifest.json").unlink()  # killed before the commit
    assert checkpoint.newest_verified(store) == folder
    assert checkpoint.sweep(store) == ["step_00000006"]
    assert storage.sizes(half) == {}
    copy = checkpoint.local_copy(folder)
    assert (copy / "rank1").read_bytes() == b"\1" * 100
    assert checkpoint.read_state(copy) == checkpoint.read_state(folder)
    assert checkpoint.local_copy(folder) == copy


def test_in_a_store_rotation_and_a_second_try(store: Path) -> None:
    for step in (1, 2, 3):
        save_in_store(store, step)
    assert checkpoint.rotate(store, newest=3, keep_last=2) == [1]
    assert [folder.name for folder in checkpoint.folders(store)] == ["step_00000002", "step_00000003"]
    (store / "step_00000003" / "rank7").write_bytes(b"of an attempt with more ranks")
    with pytest.raises(CorruptCheckpoint, match="rank7: not in"):
        checkpoint.verify(store / "step_00000003")
    checkpoint.verify(save_in_store(store, 3))


def test_in_a_store_an_odd_key_ends_no_run(store: Path, object_store) -> None:
    """Tools make empty keys for folders; a key that is no path inside makes its checkpoint a broken one."""
    import boto3

    older, newest = save_in_store(store, 1), save_in_store(store, 2)
    client, key = boto3.client("s3"), str(newest).removeprefix("s3://runs/")
    client.put_object(Bucket="runs", Key=f"{key}/", Body=b"")
    assert checkpoint.newest_verified(store) == newest
    client.put_object(Bucket="runs", Key=f"{key}/../out", Body=b"x")
    assert checkpoint.newest_verified(store) == older


def test_in_a_store_a_broken_checkpoint_is_given_up_for_the_one_before(store: Path) -> None:
    good = save_in_store(store, 1)
    broken = save_in_store(store, 2)
    (broken / "rank0").write_bytes(b"\7" * 100)
    assert checkpoint.newest_verified(store) == broken  # the sizes are right
    with pytest.raises(CorruptCheckpoint, match="rank0: sha256 differs"):
        checkpoint.local_copy(broken)  # a reader touches nothing
    assert checkpoint.newest_verified(store) == broken
    with pytest.raises(RetryableError, match=r"rank0: sha256 differs .* given up for the one before"):
        checkpoint.local_copy(broken, of_writer=True)
    assert checkpoint.newest_verified(store) == good
    checkpoint.local_copy(good)
    (good / "rank0").unlink()
    assert checkpoint.newest_verified(store) is None


def test_in_a_store_a_bad_copy_is_not_a_bad_checkpoint(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_in_store(store, 1)
    download = storage._download

    def damaged(source: Path, target: Path) -> None:
        download(source, target)
        (target / "rank1").write_bytes(b"?" * 100)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "_download", damaged)
        with pytest.raises(RetryableError, match=r"rank1: sha256 differs .*, in the copy on .*the original is good"):
            checkpoint.local_copy(folder, of_writer=True)
    assert (checkpoint.local_copy(checkpoint.newest_verified(store)) / "rank1").read_bytes() == b"\1" * 100


def test_in_a_store_that_fails_no_checkpoint_is_taken_for_broken(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_in_store(store, 1)
    save_in_store(store, 2)

    def fail(*_: object) -> bytes:
        raise OSError("503 slow down")

    monkeypatch.setattr(storage.filesystem(store)[0], "cat_file", fail)
    with pytest.raises(OSError, match="503"):
        checkpoint.newest_verified(store)


def test_in_a_store_a_commit_wants_every_file(store: Path) -> None:
    tmp = checkpoint.begin(store, 5)
    (tmp / "rank0").write_bytes(b"r")
    hashes = checkpoint.put_files(tmp, store, 5, ["rank0"])
    (store / "step_00000005" / "rank0").unlink()
    with pytest.raises(CorruptCheckpoint, match="rank0: missing"):
        checkpoint.commit(tmp, store, 5, 40, {}, hashes)
    assert checkpoint.newest_verified(store) is None
