"""No name in a manifest or a listing, and no link, leads out of its folder: not to read, write, move or delete."""

import hashlib
import json
import os
import shutil
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ray_kd import checkpoint, cli, doctor, models, pipeline, run_folder, storage
from ray_kd.data import staging
from ray_kd.data.manifest import Manifest, is_intact
from ray_kd.data.prepared import PreparedData
from ray_kd.doctor.models import problem_of_model
from ray_kd.errors import ConfigError, DataError
from ray_kd.head import Head
from ray_kd.locks import driver_lock, writer_lock
from ray_kd.models import atomic_folder
from ray_kd.models.head_folder import load_head, save_head
from ray_kd.payloads import topk_logprobs
from ray_kd.teacher import deaths
from ray_kd.teacher.cache import Contents, open_cache
from ray_kd.teacher.engine import Request
from ray_kd.trainer import fragments
from tests.fake_prepared import write_prepared
from tests.fake_run import write_run
from tests.tiny import tiny_llama

OUTSIDE = ("../outside/x", "/etc/hostname", "a/../../outside/x", "..", "a\x00b", "a\nb", "", "a//b", "./a", "..\\x")


@pytest.fixture
def outside(tmp_path):
    """A folder beside those of the test, whose files are as they were afterwards."""
    folder = tmp_path / "outside"
    folder.mkdir()
    for name in ("x", "manifest.json", "kept.jsonl"):
        (folder / name).write_text("outside\n")

    def state() -> dict[str, tuple[str, int]]:
        return {path.name: (path.read_text(), path.stat().st_mtime_ns) for path in sorted(folder.iterdir())}

    before = state()
    yield folder
    assert state() == before


@pytest.mark.parametrize("name", OUTSIDE)
def test_what_is_no_path_inside(name):
    assert not storage.is_inside(name)


@pytest.mark.parametrize("name", ["a", "a/b.json", "rank00000.safetensors", "..a", "a..b/...c", "Daten größer.json"])
def test_what_is(name):
    assert storage.is_inside(name)


def rewritten(folder: Path, add: dict[str, dict]) -> None:
    path = folder / checkpoint.MANIFEST
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"files": manifest["files"] | add}))


def test_in_a_checkpoints_manifest(tmp_path, outside):
    run = write_run(tmp_path / "home")
    newest, before = reversed(checkpoint.folders(run / "checkpoints")[-2:])
    manifest, content = (newest / checkpoint.MANIFEST).read_text(), b"outside\n"
    for name in OUTSIDE:
        (newest / checkpoint.MANIFEST).write_text(manifest)
        rewritten(newest, {name: {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}})
        for read in (checkpoint.verify, checkpoint.read_state):
            with pytest.raises(checkpoint.CorruptCheckpoint, match="is no path inside the checkpoint"):
                read(newest)
        assert checkpoint.newest_verified(run / "checkpoints") == before
    doctor.examine(run, fix=True)
    assert (run / "checkpoints" / "damaged" / newest.name).is_dir()


@pytest.mark.parametrize("name", ["../../../../outside/x", "/etc/hostname"])
def test_in_a_checkpoints_own_list_of_files(tmp_path, outside, name):
    """The manifest is right, and what it vouches for names another place."""
    run = write_run(tmp_path / "home")
    newest = checkpoint.folders(run / "checkpoints")[-1]
    record = json.loads((newest / "rank00000.json").read_text())
    (newest / "rank00000.json").write_text(json.dumps(record | {"files": [name]}))
    with pytest.raises(ConfigError, match="is no path inside the checkpoint"):
        list(fragments.read_parameters(newest, prefix="student."))


@pytest.mark.parametrize("name", [*OUTSIDE, "inner/train-00000.parquet"])
def test_in_the_prepared_datas_manifest(tmp_path, outside, name):
    folder = write_prepared(tmp_path / "prepared", 10)
    manifest = json.loads((folder / "manifest.json").read_text())
    fingerprint = manifest["fingerprint"]
    for side in ("files", "eval_files"):
        entry = manifest["files"][0] | {"name": name}
        (folder / "manifest.json").write_text(json.dumps(manifest | {side: [entry]}))
        with pytest.raises(DataError, match=r"is no name of a file in its folder") as refused:
            PreparedData(folder)
        assert "\n" not in str(refused.value)
        assert "\x00" not in str(refused.value)
        assert not is_intact(folder, fingerprint)


def test_a_link_in_the_prepared_data(tmp_path, outside):
    folder = write_prepared(tmp_path / "prepared", 10)
    file = folder / "train-00000.parquet"
    shutil.move(file, tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    prepared = PreparedData(folder)
    with pytest.raises(DataError, match="is a link"):
        prepared.read_rows(np.arange(2))
    with pytest.raises(DataError, match="is not what its manifest says"):
        prepared.verify()
    assert not is_intact(folder, prepared.manifest.fingerprint), "a start prepares it again"


@pytest.mark.parametrize("name", ["../outside/model.safetensors", "/model.safetensors", "a\x00b.safetensors"])
def test_in_the_index_of_a_model(tmp_path, name):
    """final/ is such a folder."""
    folder = tiny_llama(tmp_path / "final")
    (tmp_path / "outside").mkdir()
    shutil.copy(folder / "model.safetensors", tmp_path / "outside")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"w": name}}))
    with pytest.raises(ConfigError, match="lacks 1 of 1 shards"):
        models.check_model(str(folder), None, "student")
    assert "which is no path inside the folder" in (problem_of_model(folder) or "")


def test_links_in_place_of_checkpoints(tmp_path, outside):
    """Passed over, moved aside, rotated away or swept: each time the link, and not what it leads to."""
    run = write_run(tmp_path / "home")
    root = run / "checkpoints"
    *_, before, newest = checkpoint.folders(root)
    elsewhere = tmp_path / "elsewhere" / newest.name
    shutil.move(newest, elsewhere)
    newest.symlink_to(elsewhere)
    files = sorted(os.listdir(elsewhere))
    with pytest.raises(checkpoint.CorruptCheckpoint, match="is a link"):
        checkpoint.verify(newest)
    assert checkpoint.newest_verified(root) == before
    (root / ".tmp-step_00000009").symlink_to(outside)
    (root / "step_00000007").symlink_to(outside / "nothing")
    step_8 = root / "step_00000008"
    step_8.symlink_to(outside)  # its manifest.json is there
    assert checkpoint.sweep(root) == [".tmp-step_00000009", "step_00000007"]
    assert checkpoint.rotate(root, newest=5, keep_last=2) == [2, 8]
    assert checkpoint.recover(root) == before
    assert (root / "damaged" / newest.name).is_symlink()
    assert sorted(os.listdir(elsewhere)) == files


def test_a_link_inside_a_checkpoint(tmp_path, outside):
    run = write_run(tmp_path / "home")
    newest = checkpoint.folders(run / "checkpoints")[-1]
    for name in ("rank00000.safetensors", "manifest.json"):
        shutil.move(newest / name, tmp_path / name)
        (newest / name).symlink_to(tmp_path / name)
        with pytest.raises(checkpoint.CorruptCheckpoint, match=name):
            checkpoint.verify(newest)


def test_a_new_checkpoint_is_not_written_through_a_link(tmp_path, outside):
    root = tmp_path / "checkpoints"
    root.mkdir()
    (root / ".tmp-step_00000003").symlink_to(outside)
    tmp = checkpoint.begin(root, 3)
    (tmp / "x").write_text("mine")
    assert not tmp.is_symlink()
    (root / "step_00000003").symlink_to(outside)
    checkpoint.commit(tmp, root, 3, next_slot=0, state={})
    checkpoint.verify(root / "step_00000003")


@pytest.mark.parametrize("name", [".driver.lock", ".writers.lock", "driver.log", "quarantine.jsonl", "attempts.jsonl"])
def test_nothing_is_written_through_a_link_in_the_run_folder(tmp_path, outside, name):
    run = write_run(tmp_path / "home", last=2)
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(outside / "kept.jsonl")
    writes = {
        ".driver.lock": lambda: driver_lock(run).__enter__(),
        ".writers.lock": lambda: writer_lock(run).__enter__(),
        "driver.log": lambda: cli._RunLog(run / name),
    }
    with pytest.raises(ConfigError, match=rf"'{run / name}' is a link: nothing is written through it"):
        writes.get(name, lambda: storage.append_text(run / name, "{}\n"))()


def test_a_link_that_comes_after_the_look_is_not_followed(tmp_path, outside, monkeypatch):
    (tmp_path / "link").symlink_to(outside / "x")
    monkeypatch.setattr(Path, "is_symlink", lambda _: False)
    with pytest.raises(OSError, match="symbolic link"):
        storage.append_text(tmp_path / "link", "more\n")


def test_the_doctor_mends_the_run_folder_and_nothing_else(tmp_path, outside):
    """Each file and folder that --fix writes, removes or moves, as a link out of the run folder."""
    write_run(tmp_path / "home", last=5)
    for number, name in enumerate(["config.yaml", "run.json", "summary.json", "metrics.jsonl", "quarantine.jsonl",
                                   "attempts.jsonl", "damaged.jsonl", "teacher/actor-00001.jsonl"]):  # fmt: skip
        run = shutil.copytree(tmp_path / "home", tmp_path / f"home-{number}") / "run"
        (run / "metrics.jsonl").open("a").write("no line of ours\n")
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(outside / "kept.jsonl")
        assert cli.main("doctor", [str(run), "--fix"]) in (0, ConfigError.exit_code, DataError.exit_code), name
    run = tmp_path / "home" / "run"
    for name in (".config.yaml-1.tmp", ".final.partial-1", ".probe-1"):
        (run / name).symlink_to(outside)
    (run / "checkpoints" / ".tmp-step_00000009").symlink_to(outside)
    shutil.rmtree(run / "final")
    (run / "final").symlink_to(outside)
    assert cli.main("doctor", [str(run), "--fix"]) in (0, DataError.exit_code)
    assert not (run / ".probe-1").is_symlink()


def test_a_start_sweeps_links_and_nothing_behind_them(tmp_path, outside):
    run = write_run(tmp_path / "home", last=2)
    names = (".config.yaml-1.tmp", ".final.partial-1", "checkpoint_manager_snapshot.json")
    for name in names:
        (run / name).symlink_to(outside if name.startswith(".f") else outside / "x")
    pipeline._sweep(run)
    assert not [name for name in names if (run / name).is_symlink()]
    run_folder.record(run, pipeline.configuration.load(run / "config.yaml"), {})
    (run / "teacher_deaths").mkdir()
    (run / "teacher_deaths" / "earlier").symlink_to(outside)
    deaths.begin(run)


def test_a_folder_that_replaces_a_link(tmp_path, outside):
    """final/, a student made of the teacher, and prepared data are put in the place of what was there."""
    (tmp_path / "final").symlink_to(outside)
    (tmp_path / ".final.partial-old").symlink_to(outside)
    os.utime(tmp_path / ".final.partial-old", (0, 0), follow_symlinks=False)
    with atomic_folder(tmp_path / "final") as draft:
        (draft / "a").write_text("new")
    assert [path.name for path in (tmp_path / "final").iterdir()] == ["a"]
    (tmp_path / "prepared").symlink_to(outside)
    with staging.staging(tmp_path) as folder:
        folder.mkdir(exist_ok=True)
        (folder / "manifest.json").write_text("new")
        staging.commit(folder, tmp_path / "prepared", is_whole=lambda _: False)
    assert not (tmp_path / "prepared").is_symlink()


def test_links_in_the_cache(tmp_path, outside, caplog):
    asked = Contents.of(
        Request(top_k=8), data="d" * 64, num_rows=4, tokenizer="tok", model="big", revision=None, teacher="a" * 64,
        dtype="auto", engine='{"kind": "hf"}', wire="plain",
    )  # fmt: skip
    cache = open_cache(tmp_path / "cache", asked, "write_through", False)
    answer = topk_logprobs.example(5, np.random.default_rng(0), top_k=8).encode()
    cache.add([0], [answer], name="good")
    shutil.move(cache.folder / "rows-good.parquet", tmp_path / "elsewhere.parquet")
    (cache.folder / "rows-good.parquet").symlink_to(tmp_path / "elsewhere.parquet")
    again = open_cache(tmp_path / "cache", asked, "write_through", False)
    assert again.read([0]) == [None]
    assert "rows-good.parquet' is damaged and left out: it is a link" in caplog.text
    again.merge()
    assert (tmp_path / "elsewhere.parquet").exists()


def test_a_link_in_the_teachers_head(tmp_path):
    folder = tmp_path / "teacher_head"
    save_head(Head(torch.ones(8, 4)), folder)
    save_file({"weight": torch.zeros(8, 4)}, tmp_path / "other.safetensors")
    (folder / "head.safetensors").unlink()
    (folder / "head.safetensors").symlink_to(tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match=r"head\.safetensors' is a link: remove"):
        load_head(str(folder))


@pytest.mark.parametrize("name", ["../../outside/x", "a/../../../x", "a\\b", "../" * 8 + "etc/x", "/x"])
def test_in_the_listing_of_a_store(object_store, tmp_path, monkeypatch, outside, name):
    """Keys are any text: none is joined to a local folder, or taken along when one is moved or removed."""
    import boto3

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    key = uuid.uuid4().hex
    client = boto3.client("s3")
    client.put_object(Bucket="runs", Key=f"{key}/good", Body=b"1")
    client.put_object(Bucket="runs", Key=f"{key}/{name}", Body=b"2")
    folder = storage.path(f"{object_store.uri}/{key}")
    before = sorted(path for path in tmp_path.rglob("*") if "scratch" not in path.parts)
    for act in (storage.sizes, storage.fetch, storage.remove, lambda f: storage.move_folder(f, f.parent / "other")):
        with pytest.raises(ConfigError, match="which is no path inside of it: remove it") as refused:
            act(folder)
        assert "\n" not in str(refused.value)
    assert sorted(path for path in tmp_path.rglob("*") if "scratch" not in path.parts) == before
    listed = client.list_objects_v2(Bucket="runs", Prefix=key)["Contents"]
    assert {entry["Key"] for entry in listed} == {f"{key}/good", f"{key}/{name}"}


def test_a_manifest_in_a_store(object_store, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = storage.path(f"{object_store.uri}/{uuid.uuid4().hex}")
    local = write_prepared(tmp_path / "prepared", 10)
    text = (local / "manifest.json").read_text().replace("train-00000.parquet", "../train-00000.parquet")
    (folder / "manifest.json").write_text(text)
    with pytest.raises(DataError, match="is no name of a file in its folder"):
        Manifest.read(folder)
