"""A checkpoint counts only once it is committed, and training does not wait for its files before that."""

import errno
import json
import threading
import time

import pytest
import ray.train
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file

from ray_kd import checkpoint
from ray_kd.config import Train
from ray_kd.errors import RetryableError, StorageFull
from ray_kd.locks import Held, Lost
from ray_kd.trainer import fragments, saver


class Engine:
    """A state of one number, that the next step changes in place."""

    module = None
    number = torch.zeros(1)


@pytest.fixture(autouse=True)
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def reported(monkeypatch):
    """What Ray Train was told."""
    reports = []
    monkeypatch.setattr(ray.train, "report", lambda metrics, **_: reports.append(metrics["step"]))
    return reports


@pytest.fixture(autouse=True)
def copied(monkeypatch):
    """In the place of DeepSpeed's state: the engine's number, copied as the real one is."""

    def parts(engine):
        yield {"number": engine.number.clone()}

    def copy(engine, module, *, at_once):
        made = parts(engine)
        return fragments.Copy(iter(list(made)) if at_once else made, {"rank": 0})

    monkeypatch.setattr(saver, "copy_fragments", copy)


@pytest.fixture
def gate(monkeypatch):
    """Files are not written before it is set."""
    gate = threading.Event()

    def late(copy, folder):
        assert gate.wait(timeout=30)
        return fragments.write_fragments(copy, folder)

    monkeypatch.setattr(saver, "write_fragments", late)
    return gate


@pytest.fixture
def commits():
    """(step, seconds of writing) of each checkpoint that its maker was told of."""
    return []


@pytest.fixture
def build(tmp_path, commits):
    def built(held=None, **options):
        train = Train(global_batch_size=4, **options)
        return saver.Saver(
            tmp_path / "checkpoints", Engine(), train, "run: {}", held or Held(), saved_step=0,
            on_commit=lambda step, write_s: commits.append((step, write_s)),
        )  # fmt: skip

    return built


def number(folder):
    return load_file(folder / "rank00000-00000.safetensors")["number"].item()


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_training_goes_on_while_the_files_are_written(build, gate, reported, commits, tmp_path):
    writer, root = build(), tmp_path / "checkpoints"
    Engine.number.fill_(7)
    writer.start(3, {"ledger": "of step 3"}, loss=1.0)
    Engine.number.fill_(8)
    assert not writer.is_written
    assert (checkpoint.newest_verified(root), len(checkpoint.orphans(root)), writer.saved_step) == (None, 1, 0)
    gate.set()
    wait_for(lambda: writer.is_written)
    assert (checkpoint.newest_verified(root), reported, commits) == (None, [], [])  # only a commit makes it count
    writer.commit()
    ((step, write_s),) = commits
    assert step == 3
    assert 0 < write_s < 30
    folder = checkpoint.newest_verified(root)
    document = checkpoint.read_state(folder)
    assert (document["step"], document["next_slot"], document["state"]) == (3, 12, {"ledger": "of step 3"})
    assert number(folder) == 7
    assert (folder / "config.yaml").read_text() == "run: {}"
    assert (checkpoint.orphans(root), reported, writer.saved_step) == ([], [3], 3)
    writer.commit()  # there is none
    assert reported == [3]


def test_the_next_one_waits_for_the_one_before(build, gate, reported, tmp_path):
    writer = build(keep_checkpoints=5)
    writer.start(1, {}, loss=None)
    threading.Timer(0.2, gate.set).start()
    writer.start(2, {}, loss=None)
    assert reported == [1]
    writer.commit()
    assert [folder.name for folder in checkpoint.folders(tmp_path / "checkpoints")] == [
        "step_00000001",
        "step_00000002",
    ]


def test_without_a_copy_the_files_are_there_at_once(build, tmp_path):
    writer = build(async_checkpoints=False)
    Engine.number.fill_(5)
    writer.start(1, {}, loss=None)
    assert writer.is_written
    Engine.number.fill_(6)
    writer.commit()
    assert number(checkpoint.newest_verified(tmp_path / "checkpoints")) == 5


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_one_line_and_costs_no_good_checkpoint(build, tmp_path, monkeypatch, error):
    writer, root = build(), tmp_path / "checkpoints"
    writer.start(1, {}, loss=None)
    writer.commit()

    def fail(copy, folder):
        (folder / "rank00000-00000.safetensors").write_bytes(b"as far as there was space")
        raise error

    monkeypatch.setattr(saver, "write_fragments", fail)
    writer.start(2, {}, loss=None)
    with pytest.raises(StorageFull, match=r"no space left on device for the checkpoint of step 2 .* step 1 is good"):
        writer.commit()
    assert checkpoint.newest_verified(root).name == "step_00000001"
    assert [list(orphan.iterdir()) for orphan in checkpoint.orphans(root)] == [[]]  # room for what is left to say


def test_what_goes_wrong_is_raised_at_the_next_step(build, monkeypatch):
    monkeypatch.setattr(saver, "write_fragments", lambda copy, folder: json.loads("{"))
    writer = build()
    writer.start(1, {}, loss=None)
    with pytest.raises(json.JSONDecodeError):
        wait_for(lambda: writer.is_written)


def test_storage_that_does_not_answer_is_named(build, gate):
    writer = build(timeout_s=0.05)
    writer.start(4, {}, loss=None)
    with pytest.raises(RetryableError, match=r"step 4 was not written within train.timeout_s=0.05 s"):
        writer.commit()
    gate.set()


def test_a_folder_that_another_run_has_gets_no_checkpoint(build, tmp_path):
    held = Held()
    writer = build(held)
    writer.start(1, {}, loss=None)
    held.lost_to = "pid 7 on elsewhere"
    with pytest.raises(Lost):
        writer.commit()
    assert checkpoint.newest_verified(tmp_path / "checkpoints") is None
