"""The run folder: what identifies a run, what is free to change, and files that are whole or not there."""

import dataclasses
import errno
import json
import os

import pytest

from ray_kd import config, run_folder, storage
from ray_kd.errors import ConfigError, StorageFull

CONTENT = {"prepared data": "d" * 64, "teacher weights": "sha256:1", "student weights": "sha256:2"}
BASE = {
    "run": {"dir": "SET"},
    "data": {"source": {"kind": "jsonl", "paths": ["train.jsonl"]}},
    "teacher": {"model": "teacher"},
    "student": {"model": "student"},
}


@pytest.fixture
def load(tmp_path):
    """The config of the run tmp_path/run with overrides."""

    def loaded(*overrides):
        path = tmp_path / "config.yaml"
        path.write_text(json.dumps(BASE))
        return config.load(path, [f"run.dir={tmp_path}/run", *overrides])

    return loaded


@pytest.fixture
def folder(tmp_path, load):
    """A run that was started."""
    folder = tmp_path / "run"
    run_folder.create(folder)
    run_folder.record(folder, load(), CONTENT)
    return folder


def test_a_run_from_before_terms_is_another_run(folder, load):
    document = json.loads((folder / "run.json").read_text())
    del document["settings"]["loss.terms"]
    document["settings"] |= {"loss.kd_weight": 1.0, "loss.ce_weight": 0.5}
    (folder / "run.json").write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=r"its loss\.terms is .*loss\.kd_weight and loss\.ce_weight"):
        run_folder.check_identity(folder, load())


def test_a_run_from_before_payloads_sent_the_top_k(folder, load):
    """Its run.json lacks the key, and what it did is known all the same."""
    document = json.loads((folder / "run.json").read_text())
    for key in ("data.route_by", "teacher.payload", "teacher.wire", "teacher.selection", "eval.kl", "student.lora",
                "student.freeze"):  # fmt: skip
        del document["settings"][key]
    (folder / "run.json").write_text(json.dumps(document))
    run_folder.check_identity(folder, load("eval.kl=topk"))  # nobody knows
    overrides = ("teacher.payload=hidden_states", "teacher.wire=compact", "teacher.selection=sample")
    for override in (*overrides, "data.route_by=domain", "student.lora={r: 8}", "student.freeze=[head]"):
        with pytest.raises(ConfigError, match=f"its {override.split('=')[0]} is "):
            run_folder.check_identity(folder, load(override))


def test_what_has_no_effect_beside_hidden_states_is_no_identity(tmp_path, load):
    dense = ("teacher.payload=hidden_states", "loss.tail=drop")
    run_folder.create(tmp_path / "run")
    run_folder.record(tmp_path / "run", load(*dense), CONTENT)
    run_folder.check_identity(tmp_path / "run", load("teacher.payload=hidden_states", "teacher.top_k=32"))
    with pytest.raises(ConfigError, match="holds another run: its "):
        run_folder.check_identity(tmp_path / "run", load("loss.tail=drop"))
    with pytest.raises(ConfigError, match="holds another run: its "):
        run_folder.check_identity(tmp_path / "run", load(*dense, "eval.kl=topk"))


IDENTITY = [
    "eval.kl=topk",
    "eval.max_rows=8",
    "run.seed=1",
    "data.format=text",
    "data.eval_fraction=0.1",
    "data.route_by=domain",
    "data.sequence_length=64",
    "teacher.revision=v2",
    "teacher.engine=fake",
    "teacher.top_k=8",
    "teacher.payload=hidden_states",
    "teacher.selection=sample",
    "teacher.vocabulary=shared",
    "teacher.dtype=bfloat16",
    "teacher.wire=compact",
    "student.revision=v2",
    "student.init={layers: 2}",
    "student.lora={r: 8}",
    "student.freeze=[head]",
    "student.dtype=bfloat16",
    "loss.divergence={kind: jsd, beta: 0.3}",
    "loss.tail=renormalize",
    "loss.temperature=2.0",
    "loss.terms=[{kind: kd, weight: 0.5}]",
    "train.global_batch_size=16",
    "train.epochs=2",
    "train.max_steps=7",
    "train.learning_rate=0.1",
    "train.schedule=linear",
    "train.warmup_steps=3",
    "train.weight_decay=0.1",
    "train.max_grad_norm=0.5",
]

FREE = [
    "train.deepspeed={wall_clock_breakdown: false}",
    "data.prepared_dir=elsewhere",
    "data.license=MIT",
    "run.trackers=[tensorboard]",
    "data.max_bad_fraction=0.5",
    "teacher.batch_size=2",
    "teacher.batch_tokens=2048",
    "teacher.run_ahead_rows=8",
    "teacher.max_bytes_per_token=9000",
    "teacher.threads=1",
    "teacher.timeout_s=60",
    "teacher.pool.max_actors=3",
    "teacher.cache.path=elsewhere",
    "student.gradient_checkpointing=true",
    "student.liger=never",
    "loss.chunk_size=32",
    "train.num_workers=2",
    "train.num_workers=[1,2]",
    "train.resize_every_s=5",
    "train.cpus_per_worker=1",
    "train.gpus_per_worker=1",
    "train.label_selector={pool: a}",
    "train.zero_stage=3",
    "train.micro_batch_size=2",
    "train.checkpoint_every=5",
    "train.keep_checkpoints=1",
    "train.keep_best=false",
    "train.async_checkpoints=false",
    "train.eval_every=5",
    "train.log_every=5",
    "train.max_bad_steps=0",
    "train.max_failures=0",
    "train.threads_per_worker=1",
    "train.timeout_s=60",
    "eval.batch_size=1",
    "eval.prompts=[hello]",
    "eval.max_new_tokens=4",
    "cluster.address=auto",
    "cluster.dashboard=true",
    "cluster.insecure=true",
    "cluster.wait_s=1",
]

BY_CONTENT = ["data.source", "data.eval_source", "teacher.model", "student.model"]


def test_every_key_is_identity_or_free_or_compared_by_content():
    """A new key of the config has to be put into one of the lists."""
    listed = {override.split("=")[0] for override in IDENTITY + FREE} | set(BY_CONTENT)
    listed |= {"run.dir", "teacher.pool", "teacher.cache", "teachers", "teachers[]"}  # with every key below them
    keys = [key for key, _ in config.describe()]
    assert [key for key in keys if key not in listed and key.rpartition(".")[0] not in listed] == []


def test_of_several_teachers_all_but_names_pools_and_paths_is_identity(tmp_path, load):
    def config_of(**second):
        teachers = json.dumps([{"model": "teacher"}, {"model": "other", "weight": 2.0} | second])
        return load(f"teachers={teachers}")

    run_folder.create(tmp_path / "run")
    run_folder.record(tmp_path / "run", config_of(), CONTENT)
    for free in ({"name": "moved"}, {"model": "moved"}, {"pool": {"max_actors": 3}}, {"batch_size": 1}):
        run_folder.check_identity(tmp_path / "run", config_of(**free))
    assert run_folder.has_moved(tmp_path / "run", config_of(model="moved"))
    assert not run_folder.has_moved(tmp_path / "run", config_of())
    for fixed in ({"weight": 1.0}, {"rows": ["a"]}, {"dtype": "bfloat16"}, {"engine": "vllm"}, {"revision": "v2"}):
        with pytest.raises(ConfigError, match="holds another run: its teachers is "):
            run_folder.check_identity(tmp_path / "run", config_of(**fixed))
    with pytest.raises(ConfigError, match="holds another run: its teachers is "):
        run_folder.check_identity(tmp_path / "run", load())


@pytest.mark.parametrize("override", IDENTITY)
def test_what_makes_the_run_is_refused_by_name(folder, load, override):
    key = override.split("=")[0]
    with pytest.raises(ConfigError, match=rf"^run.dir '{folder}' holds another run: its {key} is .*, now .*") as error:
        run_folder.check_identity(folder, load(override))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("override", FREE)
def test_the_rest_is_free(folder, load, override):
    run_folder.check_identity(folder, load(override))


def test_a_teachers_server_may_move_but_not_become_another_model(tmp_path, load):
    here = "teacher.engine={kind: http, url: http://127.0.0.1:8000, served_model: big}"
    run_folder.record(tmp_path, load(here), CONTENT)
    run_folder.check_identity(
        tmp_path, load(here, "teacher.engine.url=https://elsewhere", "teacher.engine.timeout_s=9")
    )
    with pytest.raises(ConfigError, match=r"its teacher\.engine is .*big.*, now .*other"):
        run_folder.check_identity(tmp_path, load(here, "teacher.engine.served_model=other"))


def test_where_a_teachers_layers_are_is_free(folder, load):
    run_folder.check_identity(folder, load("teacher.engine={kind: hf, device_map: auto}"))
    with pytest.raises(ConfigError, match=r"its teacher\.engine is "):
        run_folder.check_identity(folder, load("teacher.engine={kind: hf, chunk_size: 64}"))


def test_a_run_from_before_students_were_cut_is_the_same_run(tmp_path, load):
    init = "student.init={layers: 2}"
    run_folder.record(tmp_path, load(init), CONTENT)
    recorded = json.loads((tmp_path / "run.json").read_text())
    assert recorded["settings"]["student.init"] == {"layers": 2, "select": "block_influence"}
    run_folder.check_identity(tmp_path, load(init))
    for narrower in ("hidden_size=8", "calibration_rows=4"):
        with pytest.raises(ConfigError, match=r"holds another run: its student\.init is "):
            run_folder.check_identity(tmp_path, load(init, f"student.init.{narrower}"))


def test_a_new_folder_belongs_to_no_run_yet(tmp_path, load):
    run_folder.check_identity(tmp_path / "new", load())
    run_folder.check_content(tmp_path / "new", CONTENT)
    assert not run_folder.has_moved(tmp_path / "new", load())


@pytest.mark.parametrize("name", CONTENT)
def test_changed_content_is_refused_by_name(folder, name):
    run_folder.check_content(folder, CONTENT)
    with pytest.raises(ConfigError, match=rf"holds another run: the {name} changed .*, now \"other\""):
        run_folder.check_content(folder, CONTENT | {name: "other"})
    assert run_folder.content_of(folder) == CONTENT


def test_paths_may_move_and_are_then_compared_by_content(folder, load):
    assert not run_folder.has_moved(folder, load("train.zero_stage=3"))
    for override in ("teacher.model=elsewhere", "student.model=elsewhere", "data.source.paths=[elsewhere]"):
        moved = load(override)
        run_folder.check_identity(folder, moved)
        assert run_folder.has_moved(folder, moved)


def test_the_identity_is_kept_and_the_config_is_the_newest(folder, load):
    before = (folder / "run.json").read_bytes()
    newest = load("train.zero_stage=3")
    run_folder.record(folder, newest, CONTENT)
    assert (folder / "run.json").read_bytes() == before
    assert config.load(folder / "config.yaml") == newest
    assert not list(folder.glob(".*"))


def test_an_identity_survives_json(folder, load):
    """Floats, lists and nulls compare equal after the file."""
    run_folder.check_identity(folder, load())
    assert json.loads((folder / "run.json").read_text())["settings"] == run_folder.identity(load())


def test_a_damaged_file_is_named(folder, load):
    for name in ("run.json", "summary.json"):
        (folder / name).write_text("{")
    with pytest.raises(ConfigError, match=r"run\.json' is damaged"):
        run_folder.check_identity(folder, load())
    with pytest.raises(ConfigError, match=r"summary\.json' is damaged"):
        run_folder.finished_summary(folder)


def test_a_run_that_never_started_has_no_content(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no run: it has no run\.json"):
        run_folder.content_of(tmp_path)


def test_finished_needs_the_exit_code_and_the_student(folder):
    assert run_folder.finished_summary(folder) is None
    run_folder.write_json(folder / "summary.json", {"exit_code": 75})
    (folder / "final").mkdir()
    (folder / "final" / "config.json").write_text("{}")
    assert run_folder.finished_summary(folder) is None
    run_folder.write_json(folder / "summary.json", {"exit_code": 0})
    assert run_folder.finished_summary(folder) == {"exit_code": 0}
    (folder / "final" / "config.json").unlink()
    assert run_folder.finished_summary(folder) is None


def test_the_folder_is_made_and_proved(tmp_path):
    folder = tmp_path / "deep" / "run"
    run_folder.create(folder)
    run_folder.create(folder)
    assert os.listdir(folder) == []
    (tmp_path / "file").write_text("")
    for bad in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ConfigError, match=f"run.dir '{bad}' cannot be written"):
            run_folder.create(bad)


def test_a_full_disk_is_no_mistake_of_the_user(tmp_path, monkeypatch):
    def is_full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("pathlib.Path.write_text", is_full)
    with pytest.raises(StorageFull), storage.store_errors():
        run_folder.create(tmp_path)


def test_run_dir_is_a_path_or_a_uri(load, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    loaded = load()
    loaded = dataclasses.replace(loaded, run=dataclasses.replace(loaded.run, dir=f"file://{tmp_path}/run"))
    assert run_folder.run_dir(loaded) == tmp_path / "run"
    assert run_folder.run_dir(load("run.dir=~/run")) == tmp_path / "run"
    assert str(run_folder.run_dir(load("run.dir=s3://bucket/run"))) == "s3://bucket/run"
    assert str(run_folder.prepared_dir(load("run.dir=s3://bucket/run"))) == "s3://bucket/prepared"
    with pytest.raises(ConfigError, match=r"run\.dir is 'nowhere://run': allowed is a path, or a URI of s3://"):
        run_folder.run_dir(load("run.dir=nowhere://run"))


def test_prepared_data_lies_beside_the_run_unless_told(load, tmp_path):
    assert run_folder.prepared_dir(load()) == tmp_path / "prepared"
    assert run_folder.prepared_dir(load(f"data.prepared_dir={tmp_path}/there")) == tmp_path / "there"


def test_json_is_written_whole_or_not_at_all(tmp_path):
    run_folder.write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        run_folder.write_json(tmp_path / "a.json", {"x": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}
