"""A pickle, named like a file that is read or put beside it, is never loaded; who reads there says what is wrong.

The payload writes a canary when it is unpickled.
"""

import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ray_kd import checkpoint, cli, doctor, models, pipeline, run_folder
from ray_kd.data.manifest import is_intact
from ray_kd.data.prepared import PreparedData
from ray_kd.errors import ConfigError, DataError
from ray_kd.head import Head
from ray_kd.models.head_folder import load_head, save_head
from ray_kd.payloads import HiddenStates, TopKLogprobs, topk_logprobs
from ray_kd.teacher.cache import Contents, open_cache
from ray_kd.teacher.engine import Request
from ray_kd.trainer import fragments, rng
from tests.fake_prepared import write_prepared
from tests.fake_run import ORDER, write_run
from tests.tiny import tiny_llama
from tests.unit.security.payload import pickled

BESIDE = ("pytorch_model.bin", "optimizer.pt", "training_args.bin", "data.pkl", "model.ckpt", "rng_state.pth")


@pytest.fixture
def canary(tmp_path):
    """Where the payload writes; after the test nothing is there."""
    target = tmp_path / "canary"
    yield target
    assert not target.exists()


@pytest.fixture
def payload(canary) -> bytes:
    return pickled(canary)


def test_the_payload_works(tmp_path):
    pickle.loads(pickled(tmp_path / "other"))
    torch_file = tmp_path / "weights.bin"
    torch_file.write_bytes(pickled(tmp_path / "other"))
    assert (tmp_path / "other").read_text() == "a pickle was loaded"


def rehash(folder: Path) -> None:
    """As one who can write there would: the manifest is of the files again."""
    path = folder / checkpoint.MANIFEST
    manifest = json.loads(path.read_text())
    files = {
        str(file.relative_to(folder)): {
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "size": file.stat().st_size
        }
        for file in folder.rglob("*") if file.is_file() and file != path
    }  # fmt: skip
    path.write_text(json.dumps(manifest | {"files": files}))


@pytest.mark.parametrize("name", ["rank00000.safetensors", "rank00000.rng.safetensors", "state.json", "data.pkl"])
@pytest.mark.parametrize("is_rehashed", [False, True])
def test_in_a_checkpoint(tmp_path, canary, payload, name, is_rehashed, capsys):
    run = write_run(tmp_path)
    newest = checkpoint.newest_verified(run / "checkpoints")
    assert newest is not None
    (newest / name).write_bytes(payload)
    if is_rehashed:
        rehash(newest)
        checkpoint.verify(newest)
    else:
        with pytest.raises(checkpoint.CorruptCheckpoint, match=name):
            checkpoint.verify(newest)
        assert checkpoint.newest_verified(run / "checkpoints") != newest, "the one before it is taken"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.load", None)  # whoever calls it fails
        code = cli.main("export", [str(run), str(tmp_path / "out"), "--step", str(checkpoint.step_of(newest))])
    said = capsys.readouterr().err
    is_read = name in ("rank00000.safetensors", "state.json")
    refused = checkpoint.CorruptCheckpoint if is_rehashed else ConfigError  # it is not one of the verified ones
    assert code == (0 if is_rehashed and not is_read else refused.exit_code)
    assert (is_rehashed and not is_read) or name in said
    if not is_rehashed or is_read:
        assert "Traceback" not in said
        assert sum(line.startswith("error: ") for line in said.splitlines()) == 1
    if name == "rank00000.rng.safetensors" and is_rehashed:
        with pytest.raises(checkpoint.CorruptCheckpoint, match="is no safetensors file"):
            rng.load_rng(newest, 0)
    doctor.examine(run, fix=True)


def test_fragments_of_a_pickle(tmp_path, canary, payload):
    run = write_run(tmp_path)
    newest = checkpoint.newest_verified(run / "checkpoints")
    assert newest is not None
    for file in newest.glob("*.safetensors"):
        file.write_bytes(payload)
    with pytest.raises(checkpoint.CorruptCheckpoint, match=r"rank00000\.safetensors.*is no safetensors file"):
        list(fragments.read_parameters(newest, prefix="student."))


@pytest.mark.parametrize("name", BESIDE)
def test_beside_the_weights_of_a_model(tmp_path, canary, payload, name):
    folder = tiny_llama(tmp_path / "model")
    before = load_file(folder / "model.safetensors")
    (folder / name).write_bytes(payload)
    (folder / "custom_generate").mkdir()
    models.check_model(str(folder), None, "student")
    loaded = models.load_causal_lm(str(folder)).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in before.items())
    models.load_tokenizer(str(folder))
    models.model_identity(str(folder))


@pytest.mark.parametrize("what", ["teacher", "student"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "pytorch_model.bin.index.json"])
def test_in_place_of_the_weights_of_a_model(tmp_path, canary, payload, what, name):
    folder = tiny_llama(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(payload)
    why = "is truncated or not safetensors" if name == "model.safetensors" else "is a model folder without safetensors"
    with pytest.raises(ConfigError, match=rf"^{what}\.model: '{folder}.*{why}[^\n]*$"):
        models.check_model(str(folder), None, what)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        models.load_causal_lm(str(folder))


def test_in_final(tmp_path, canary, payload, capsys):
    run = write_run(tmp_path)
    (run / "final" / "model.safetensors").write_bytes(payload)
    report = doctor.examine(run)
    assert [finding.state for finding in report.findings if finding.check == "final"] == [doctor.BROKEN]
    assert cli.main("evaluate", [str(run), "--model", str(run / "final")]) == ConfigError.exit_code
    assert "is truncated or not safetensors" in capsys.readouterr().err
    doctor.examine(run, fix=True)
    assert (run / "final.damaged" / "model.safetensors").read_bytes() == payload


def test_in_the_teachers_head(tmp_path, canary, payload):
    folder = tmp_path / "teacher_head"
    save_head(Head(torch.ones(8, 4)), folder)
    (folder / "head.pt").write_bytes(payload)
    assert load_head(str(folder)).weight.shape == (8, 4)
    (folder / "head.safetensors").write_bytes(payload)
    with pytest.raises(ConfigError, match=r"head\.safetensors' is no safetensors file .*: remove '.*teacher_head'"):
        load_head(str(folder))


def test_in_the_prepared_data(tmp_path, canary, payload):
    folder = write_prepared(tmp_path / "prepared", 10)
    (folder / "train-00000.pkl").write_bytes(payload)
    prepared = PreparedData(folder)
    prepared.verify()
    assert prepared.read_rows(np.arange(3)).num_rows == 3
    (folder / "train-00000.parquet").write_bytes(payload)
    assert not is_intact(folder, prepared.manifest.fingerprint), "a start prepares it again"
    with pytest.raises(DataError, match=r"train-00000\.parquet' is not what its manifest says"):
        PreparedData(folder).verify()
    with pytest.raises(DataError, match=r"train-00000\.parquet' cannot be read .*remove '"):
        PreparedData(folder).read_rows(np.arange(3))
    (folder / "manifest.json").write_bytes(payload)
    with pytest.raises(DataError, match=r"has no readable manifest\.json"):
        PreparedData(folder)


def test_in_the_cache(tmp_path, canary, payload, caplog):
    asked = Contents.of(
        Request(top_k=8), data="d" * 64, num_rows=4, tokenizer="tok", model="big", revision=None, teacher="a" * 64,
        dtype="auto", engine='{"kind": "hf"}', wire="plain",
    )  # fmt: skip
    cache = open_cache(tmp_path, asked, "write_through", False)
    answer = topk_logprobs.example(5, np.random.default_rng(0), top_k=8).encode()
    cache.add([0, 1], [answer, answer])
    cache.add([2], [payload])  # where a payload of the wire should be
    for name in ("rows-evil.parquet", "rows-evil.pkl", "manifest.pkl", "data.pickle"):
        (cache.folder / name).write_bytes(payload)
    again = open_cache(tmp_path, asked, "write_through", False)
    assert again.read([0, 1, 2, 3]) == [answer, answer, None, None]
    assert "rows-evil.parquet' is damaged and left out" in caplog.text
    assert "rows-evil.parquet" in {path.name for path in (cache.folder / "damaged").iterdir()}
    again.merge()
    (cache.folder / "manifest.json").write_bytes(payload)
    with pytest.raises(ConfigError, match="is no manifest of a teacher cache"):
        open_cache(tmp_path, asked, "read", False)


@pytest.mark.parametrize("kind", [TopKLogprobs, HiddenStates])
def test_on_the_wire(canary, payload, kind):
    for content in (payload, topk_logprobs.example(5, np.random.default_rng(0), top_k=8).encode()[:20] + payload):
        with pytest.raises((ValueError, DataError)):
            kind.decode(content)


def test_ray_trains_list_of_checkpoints_is_removed_unread(tmp_path, canary, payload):
    run = write_run(tmp_path, last=2)
    names = ("checkpoint_manager_snapshot.json", ".checkpoint_manager_snapshot.json.1.tmp")
    for name in names:
        (run / name).write_bytes(payload)
    pipeline._sweep(run)
    assert not [name for name in names if (run / name).exists()]


@pytest.mark.parametrize("name", [run_folder.IDENTITY, run_folder.CONFIG, run_folder.SUMMARY, "metrics.jsonl",
                                  "quarantine.jsonl", "attempts.jsonl", "teacher/actor-00001.jsonl"])  # fmt: skip
def test_in_the_files_of_a_run(tmp_path, canary, payload, name, capsys):
    run = write_run(tmp_path, last=ORDER.num_steps)
    (run / name).write_bytes(payload)
    assert cli.main("doctor", [str(run), "--fix"]) in (0, DataError.exit_code)
    assert name.split("/")[-1].split(".")[0] in capsys.readouterr().out
