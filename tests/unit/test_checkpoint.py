"""Checkpoint folders: complete or absent, and every kind of damage found before anything is read."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from ray_kd import checkpoint
from ray_kd.checkpoint import CorruptCheckpoint


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
        hashes.update(checkpoint.hash_files(tmp, [f"rank{rank}"]))
    folder = checkpoint.commit(tmp, tmp_path, 5, 40, {}, hashes)
    checkpoint.verify(folder)
    assert set(json.loads((folder / "manifest.json").read_text())["files"]) == {"rank0", "rank1", "state.json"}


@pytest.mark.parametrize(("content", "message"), [(b"longer", "6 bytes, not 1"), (None, "missing")])
def test_commit_refuses_hashes_that_do_not_fit(tmp_path: Path, content: bytes | None, message: str) -> None:
    tmp = checkpoint.begin(tmp_path, 5)
    (tmp / "rank0").write_bytes(b"r")
    hashes = checkpoint.hash_files(tmp, ["rank0"])
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
