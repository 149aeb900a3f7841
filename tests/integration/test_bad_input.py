"""Bad input through the jobs: refused with one line and exit code 64 or 65, quarantined, or accepted with a warning.

What is refused before Ray is waited for runs in this process, where coming so far would fail the test.
"""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import ray
import transformers
import yaml
from safetensors.numpy import load_file, save_file

import ray_kd.pipeline  # noqa: F401 # imported before stderr is captured: deepspeed writes there when it is imported
from ray_kd import cli, config, models, run_folder
from ray_kd.data.plan import plan_preparation
from ray_kd.locks import driver_lock
from tests.tiny import VOCAB_SIZE, tiny_llama, tiny_tokenizer

REPOSITORY = Path(__file__).parents[2]
LEFT_BY_A_REFUSAL = {"driver.log", ".driver.lock", ".writers.lock"}
USER, ASSISTANT = {"role": "user", "content": "say it"}, {"role": "assistant", "content": "it is said"}
GOOD = {"messages": [USER, ASSISTANT]}


def random_model(folder, name, **options):
    """A tiny model of any architecture, with the tiny tokenizer."""
    config = getattr(transformers, f"{name}Config")(
        vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=2, **options,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder of models and data: usable ones, and each kind that is not."""
    folder = tmp_path_factory.mktemp("bad-input")
    teacher = tiny_llama(folder / "teacher", layers=4, seed=1)
    tiny_llama(folder / "student", layers=2, seed=2)
    tiny_llama(folder / "untied", layers=1, tie=False)
    tiny_llama(folder / "small", layers=1, vocab=259 - 9)
    tiny_llama(folder / "padded", layers=4, vocab=300)
    shutil.copytree(teacher, folder / "pickled")
    (folder / "pickled" / "model.safetensors").rename(folder / "pickled" / "pytorch_model.bin")
    shutil.copytree(teacher, folder / "other-words")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["first", "second"])
    tokenizer.save_pretrained(folder / "other-words")
    random_model(folder / "capped", "Gemma2", head_dim=16, final_logit_softcapping=2.0)
    (folder / "train.jsonl").write_text(json.dumps(GOOD) + "\n")
    (folder / "packed.jsonl.gz").write_bytes(b"\x1f\x8b rest")
    (folder / "empty").mkdir()
    (folder / "file").write_text("a regular file")
    (folder / "list.yaml").write_text("- a\n- b\n")
    (folder / "broken.yaml").write_text("run: [")
    return folder


@pytest.fixture
def in_process(workplace, tmp_path, monkeypatch, capsys):
    """Run a job here and return (exit code, lines of stderr); the config's run.dir is tmp_path/run."""
    content = {
        "run": {"dir": str(tmp_path / "run")},
        "data": {"source": {"kind": "jsonl", "paths": [str(workplace / "train.jsonl")]}},
        "teacher": {"model": str(workplace / "teacher"), "top_k": 16},
        "student": {"model": str(workplace / "student")},
        "train": {"max_steps": 5},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("Ray was started"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    logger = logging.getLogger("ray_kd")
    before = (logger.level, logger.propagate, list(logger.handlers))

    def run(*overrides, job="distill", arguments=None):
        arguments = arguments if arguments is not None else [tmp_path / "config.yaml", *overrides]
        try:
            exit_code = cli.main(job, [str(argument) for argument in arguments])
        except SystemExit as left:  # argparse
            exit_code = left.code
        return exit_code, capsys.readouterr().err.splitlines()

    yield run
    for handler in set(logger.handlers) - set(before[2]):
        logger.removeHandler(handler)
        handler.close()
    logger.level, logger.propagate, logger.handlers[:] = before


@pytest.fixture
def refused(in_process):
    """Run a job here and check that it ends with 64 and one line that holds every given text."""

    def run(*overrides, says=(), **given):
        exit_code, lines = in_process(*overrides, **given)
        assert exit_code == 64, lines
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        for text in says:
            assert text in lines[0]
        return lines[0]

    return run


REFUSED = {
    "config file missing": (["CONFIG:{w}/none.yaml"], ["config file '{w}/none.yaml' does not exist"]),
    "config file is a folder": (["CONFIG:{w}"], ["config file '{w}' is a folder"]),
    "config file is no mapping": (["CONFIG:{w}/list.yaml"], ["list.yaml", "must hold a mapping"]),
    "config file is no YAML": (["CONFIG:{w}/broken.yaml"], ["broken.yaml", "not valid YAML"]),
    "data path missing": (["data.source.paths=[{w}/none.jsonl]"], ["'{w}/none.jsonl' does not exist"]),
    "data pattern matches nothing": (["data.source.paths=['{w}/*.none']"], ["{w}/*.none"]),
    "data folder empty": (["data.source.paths=[{w}/empty]"], ["{w}/empty", "holds no files"]),
    "data paths empty": (["data.source.paths=[]"], ["data paths are empty"]),
    "eval data path missing": (
        ["data.eval_source={{kind: text, paths: [{w}/none.txt]}}"], ["'{w}/none.txt' does not exist"],
    ),
    "data compressed": (["data.source.paths=[{w}/packed.jsonl.gz]"], ["packed.jsonl.gz", "decompress it first"]),
    "data not Parquet": (
        ["data.source={{kind: parquet, paths: [{w}/train.jsonl]}}"], ["{w}/train.jsonl", "not a Parquet file"],
    ),
    "data eval twice": (
        ["data.eval_fraction=0.5", "data.eval_source={{kind: jsonl, paths: [{w}/train.jsonl]}}"],
        ["data.eval_source and data.eval_fraction"],
    ),
    "prepared_dir of no store": (["data.prepared_dir=nowhere://p"], ["data.prepared_dir is 'nowhere://p'", "URI of s3://"]),
    "teacher path missing": (["teacher.model={w}/none"], ["teacher.model: '{w}/none' does not exist"]),
    "student path missing": (["student.model={w}/none"], ["student.model: '{w}/none' does not exist"]),
    "teacher a file": (["teacher.model={w}/file"], ["teacher.model: '{w}/file' is a file"]),
    "teacher without safetensors": (
        ["teacher.model={w}/pickled"], ["teacher.model: '{w}/pickled'", "without safetensors", "pytorch_model.bin"],
    ),
    "student without safetensors": (
        ["student.model={w}/pickled"], ["student.model: '{w}/pickled'", "without safetensors", "pytorch_model.bin"],
    ),
    "model folder empty": (["student.model={w}/empty"], ["student.model: '{w}/empty' has no config.json"]),
    "student caps its logits": (["student.model={w}/capped"], ["model_type gemma2 caps its logits", "plain lm_head"]),
    "student made of a teacher that does": (
        ["student.model=null", "student.init.layers=1", "teacher.model={w}/capped"], ["gemma2 caps its logits at 2.0"],
    ),
    "k larger than the vocabulary": (["teacher.top_k=260"], ["teacher.top_k is 260", "vocabulary of 259"]),
    "vocabularies differ": (
        ["student.model={w}/other-words"], ["259 and 261 tokens", "2 ids differ", "259: None / 'first'"],
    ),
    "student head too small": (["student.model={w}/small"], ["259 ids", "250"]),
    "wrong type": (["train.max_steps=many"], ["train.max_steps", "'many'", "is no integer"]),
    "wrong type of a section": (["train=3"], ["train"]),
    "unknown key": (["train.lerning_rate=1"], ["'train.lerning_rate'", "did you mean 'train.learning_rate'"]),
    "unknown section": (["teachr.model=x"], ["'teachr'", "did you mean 'teacher'"]),
    "override without a value": (["train.max_steps"], ["'train.max_steps' is not key=value"]),
    "unknown source": (["data.source.kind=jsonll"], ["data.source: unknown kind 'jsonll'", "'jsonl'", "parquet"]),
    "unknown format": (["data.format=chat"], ["data.format: unknown kind 'chat'", "messages"]),
    "unknown engine": (["teacher.engine=gguf"], ["teacher.engine: unknown kind 'gguf'", "Available: ", "hf"]),
    "unknown divergence": (["loss.divergence=kl"], ["loss.divergence: unknown kind 'kl'", "forward_kl"]),
    "unknown plug-in option": (
        ["loss.divergence={{kind: jsd, betta: 0.1}}"], ["loss.divergence", "'betta'", "did you mean 'beta'"],
    ),
    "plug-in option out of range": (["loss.divergence={{kind: jsd, beta: 2}}"], ["jsd", "beta=2.0", "(0, 1)"]),
    "plug-in module of something else": (["data.source.kind=os.path"], ["data.source: kind 'os.path'", "no Config"]),
    "plug-in without a kind": (["data.eval_source={{paths: [x]}}"], ["data.eval_source.kind is missing", "jsonl"]),
    "source a number": (["data.source=3"], ["data.source is 3", "jsonl"]),
    "source null": (["data.source=null"], ["data.source is None", "jsonl"]),
    "source a list": (["data.source=[a]"], ["data.source=[a]"]),
    "format null": (["data.format=null"], ["data.format is None", "messages"]),
    "engine null": (["teacher.engine=null"], ["teacher.engine is None", "hf"]),
    "run.dir below a file": (["run.dir={w}/file/run"], ["run.dir '{w}/file/run' cannot be written"]),
    "run.dir a file": (["run.dir={w}/file"], ["run.dir '{w}/file' cannot be written"]),
    "data path a URI": (["data.source.paths=[s3://b/x.jsonl]"], ["data.source: data path 's3://b/x.jsonl' is a URI"]),
    "run.dir one slash short": (["run.dir=s3:/bucket/run"], ["did you mean 's3://bucket/run'"]),
    "cluster by Ray Client": (["cluster.address=ray://a:10001"], ["RAY_ADDRESS) is 'ray://a:10001'", "host:port"]),
    "run.dir of no store": (["run.dir=nowhere://run"], ["run.dir is 'nowhere://run'", "URI of s3://"]),
    "run.dir of a missing package": (["run.dir=gs://bucket/run"], ["run.dir is 'gs://bucket/run'", "package", "gcsfs"]),
    # More than any machine has, so that the test means the same on one with GPUs.
    "worker GPUs absent": (
        ["train.gpus_per_worker=1", "train.num_workers=64", "train.global_batch_size=64"],
        ["train.gpus_per_worker=1 x 64 workers", "64 GPUs", "this machine has"],
    ),
    "GPUs a worker": (["train.gpus_per_worker=2"], ["train.gpus_per_worker is 2", "0 to 1"]),
    "teacher GPUs absent": (
        ["teacher.pool.num_gpus=64"], ["teacher.pool.num_gpus=64", "64 GPUs", "this machine has"],
    ),
    "batch not a multiple": (
        ["train.global_batch_size=6", "train.num_workers=2", "train.micro_batch_size=2"],
        ["train.global_batch_size is 6", "a multiple of num_workers x micro_batch_size = 4"],
    ),
    "neither model nor init": (["student.model=null"], ["student.model and student.init: neither is set"]),
    "both model and init": (["student.init.layers=2"], ["student.model and student.init: both are set"]),
    "too many layers": (["student.model=null", "student.init.layers=5"], ["student.init.layers is 5", "1 to 4"]),
    "no layers": (["student.model=null", "student.init.layers=0"], ["student.init.layers is 0", "1 to 4"]),
    "a layer out of range": (
        ["student.model=null", "student.init.layers=[0,4]"], ["student.init.layers is [0, 4]", "0 to 3"],
    ),
    "layers out of order": (
        ["student.model=null", "student.init.layers=[2,1]"], ["student.init.layers [2, 1]", "increasing order"],
    ),
    "adapters of no rank": (["student.lora.r=0"], ["student.lora.r is 0", "1 or more"]),
    "DoRA without LoRA": (["student.lora.use_dora=true"], ["student.lora.r is missing"]),
    "adapters that scale to nothing": (["student.lora={{r: 8, alpha: 0}}"], ["student.lora.alpha is 0", "1 or more"]),
    "adapters that drop all": (["student.lora={{r: 8, dropout: 1}}"], ["student.lora.dropout is 1.0", "below 1"]),
    "adapters on a number": (["student.lora={{r: 8, target_modules: 3}}"], ["target_modules is 3", "all-linear"]),
    "adapters on an empty list": (["student.lora={{r: 8, target_modules: []}}"], ["target_modules is []", "[q_proj"]),
    "adapters on nothing": (
        ["student.lora={{r: 8, target_modules: [q_proj, v_prj]}}"],
        ["target_modules has 'v_prj', which matches nothing in LlamaForCausalLM", "did you mean 'v_proj'", "up_proj"],
    ),
    "adapters on the head": (["student.lora={{r: 8, target_modules: [lm_head]}}"], ["'lm_head', the head", "q_proj"]),
    "adapters on no linear layer": (
        ["student.lora={{r: 8, target_modules: [self_attn]}}"], ["'self_attn', a LlamaAttention", "q_proj"],
    ),
    "adapters on nothing of the teacher's layers": (
        ["student.model=null", "student.init.layers=1", "student.lora={{r: 8, target_modules: [3.mlp.up_proj]}}"],
        ["'3.mlp.up_proj', which matches nothing"],
    ),
    "adapters and frozen parts": (
        ["student.lora.r=8", "student.freeze=[head]"], ["student.freeze is ['head']: allowed is [] with student.lora"],
    ),
    "a frozen part that is none": (
        ["student.freeze=[embedings]"], ["student.freeze has 'embedings', which matches nothing", "embeddings, head"],
    ),
    "frozen layers out of range": (["student.freeze=[layers.1-2]"], ["'layers.1-2'", "layers.0 to layers.1"]),
    "frozen layers of the teacher's": (
        ["student.model=null", "student.init.layers=[0,2,3]", "student.freeze=[layers.3]"],
        ["'layers.3'", "layers.0 to layers.2"],
    ),
    "a frozen head that is the embeddings": (["student.freeze=[head]"], ["student.freeze is ['head']", "tied", "both"]),
    "everything frozen": (["student.freeze=['*']", "student.model={w}/untied"], ["all of the student"]),
    "a student wider than its teacher": (
        ["student.model=null", "student.init={{layers: 2, intermediate_size: 1000}}"],
        ["student.init.intermediate_size is 1000", "1 to the teacher's 128"],
    ),
    "heads that do not go evenly to KV heads": (
        ["student.model=null", "student.init={{layers: 2, num_attention_heads: 3}}"],
        ["student.init.num_attention_heads is 3", "2 | 4 with 2 KV heads"],
    ),
    "widths of an unknown architecture": (
        ["student.model=null", "student.init={{layers: 1, hidden_size: 8}}", "teacher.model={w}/capped"],
        ["model_type 'gemma2'", "llama | mistral | qwen2 | qwen3"],
    ),
    "heads of different sizes": (
        ["teacher.model={w}/padded"], ["300 rows", "259", "teacher.vocabulary is 'strict'", "shared"],
    ),
    "an unknown vocabulary": (["teacher.vocabulary=padded"], ["teacher.vocabulary is 'padded'", "strict | shared"]),
    "reverse KL drops the tail": (
        ["loss.divergence=reverse_kl", "loss.tail=drop"], ["loss.tail: 'drop'", "'reverse_kl'", "bucket, renormalize"],
    ),
    "no loss": (["loss.terms.0.weight=0"], ["loss.terms: all weights are 0: nothing would be trained"]),
    "no term": (["loss.terms=[]"], ["loss.terms: it is empty: nothing would be trained"]),
    "unknown term": (
        ["loss.terms=[kd, hiden_state]"],
        ["loss.terms[1]: unknown kind 'hiden_state'; did you mean 'hidden_state'?", "kd, ce, attention, hidden_state"],
    ),
    "features that are not sent": (
        ["loss.terms=[kd, hidden_state]"],
        ["loss.terms[1] is of kind 'hidden_state'", "teacher.payload=features (it is 'topk_logprobs')"],
    ),
    "features that nobody needs": (["teacher.payload=features"], ["teacher.payload is 'features' and no term"]),
    "temperature changes under a tail": (
        ["loss.temperature={{schedule: linear, start: 4, end: 1, steps: 10}}"],
        ["loss.temperature is a schedule", "loss.tail=renormalize (it is 'bucket') or teacher.payload=hidden_states"],
    ),
    "layer out of range": (
        ["teacher.payload=features", "loss.terms=[{{kind: hidden_state, layers: [3]}}]"], ["loss.terms[0]", "3", "2"],
    ),
    "link too slow": (["teacher.max_bytes_per_token=10"], ["teacher.max_bytes_per_token is 10", "a smaller"]),
    "cache off": (["teacher.cache.mode=off"], ["teacher.cache.mode is 'False'", "disabled", "bare off as false"]),
    "zero_stage": (["train.zero_stage=4"], ["train.zero_stage is 4", "0 | 1 | 2 | 3"]),
    "learning rate not a number": (["train.learning_rate=nan"], ["train.learning_rate is nan", "positive"]),
    "no configuration": (["NONE"], ["required: config"]),
    "unknown option": (["--dry-run"], ["--dry-run", "--help"]),
}  # fmt: skip


@pytest.mark.parametrize(("overrides", "says"), REFUSED.values(), ids=REFUSED.keys())
def test_is_refused_before_ray_with_one_line(refused, workplace, tmp_path, overrides, says):
    overrides = [override.format(w=workplace) for override in overrides]
    says = [text.format(w=workplace) for text in says]
    if overrides[0].startswith("CONFIG:"):
        refused(arguments=[overrides[0].removeprefix("CONFIG:")], says=says)
    elif overrides == ["NONE"]:
        refused(arguments=[], says=says)
    else:
        refused(*overrides, says=says)
    assert {path.name for path in tmp_path.glob("run/*")} <= LEFT_BY_A_REFUSAL


def test_off_in_yaml_is_explained(refused, tmp_path):
    with (tmp_path / "config.yaml").open("a") as file:
        file.write("loss: {tail: off}\n")
    refused(says=["loss.tail: unknown tail 'False'", "bucket, renormalize, drop"])


# A folder that holds a run already.


@pytest.fixture
def started(workplace, tmp_path, in_process):
    """The folder of a run of the config that got as far as training: identity, config, and something to lose."""
    loaded = config.load(tmp_path / "config.yaml")
    plan = plan_preparation(loaded.data, loaded.teacher.model, None, loaded.run.seed)
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    content = {
        "prepared data": plan.fingerprint,
        "teacher weights": models.model_identity(loaded.teacher.model),
        "student weights": models.model_identity(loaded.student.model),
    }
    run_folder.record(folder, loaded, content)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    (folder / "quarantine.jsonl").write_text('{"file": "row", "line": 7, "reason": "refused by the teacher"}\n')
    return folder


def finish(folder):
    summary = {"exit_code": 0, "steps": 5, "tokens": 1, "tokens_per_second": 1.0, "teacher_wait_fraction": 0.0}
    rows = {"restarts": 0, "rows_consumed": 1, "rows_planned": 1, "rows_missing": 0, "rows_duplicated": 0}
    run_folder.write_json(folder / "summary.json", summary | rows | {"rows_quarantined": 0, "eval": None})
    (folder / "final").mkdir()
    (folder / "final" / "config.json").write_text("{}")
    (folder / "report.html").write_text("")


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.name not in LEFT_BY_A_REFUSAL}  # fmt: skip


ANOTHER_RUN = {
    "seed": ("run.seed=1", "run.seed is 0, now 1"),
    "divergence": ("loss.divergence=jsd", "loss.divergence"),
    "tail": ("loss.tail=renormalize", 'loss.tail is "bucket", now "renormalize"'),
    "temperature": ("loss.temperature=2", "loss.temperature is 1.0, now 2.0"),
    "global batch": ("train.global_batch_size=4", "train.global_batch_size is 8, now 4"),
    "learning rate": ("train.learning_rate=0.1", "train.learning_rate is 0.0002, now 0.1"),
    "schedule": ("train.schedule=linear", "train.schedule"),
    "steps": ("train.max_steps=6", "train.max_steps is 5, now 6"),
    "epochs": ("train.epochs=2", "train.epochs is 1, now 2"),
    "sequence length": ("data.sequence_length=64", "data.sequence_length is 512, now 64"),
    "format": ("data.format=text", "data.format"),
    "top_k": ("teacher.top_k=8", "teacher.top_k is 16, now 8"),
    "student's type": ("student.dtype=bfloat16", "student.dtype"),
}


@pytest.mark.parametrize("is_finished", [False, True], ids=["unfinished", "finished"])
@pytest.mark.parametrize(("override", "says"), ANOTHER_RUN.values(), ids=ANOTHER_RUN.keys())
def test_the_folder_of_another_run_is_refused_by_key(refused, started, override, says, is_finished):
    if is_finished:
        finish(started)
    before = contents(started)
    refused(override, says=[f"run.dir '{started}' holds another run", says, "another run.dir"])
    assert contents(started) == before


def other_data(folder):
    (folder / "other.jsonl").write_text(json.dumps(GOOD | {"messages": [USER, ASSISTANT | {"content": "no"}]}))
    return f"data.source.paths=[{folder}/other.jsonl]"


def trained_on(folder, workplace, name):
    """A copy of a model with one weight changed, as after more training."""
    shutil.copytree(workplace / name, folder / f"other-{name}")
    path = folder / f"other-{name}" / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"] = weights["model.norm.weight"] + np.float32(0.5)
    save_file(weights, path, metadata={"format": "pt"})
    return f"{name}.model={path.parent}"


@pytest.mark.parametrize("is_finished", [False, True], ids=["unfinished", "finished"])
@pytest.mark.parametrize("what", ["prepared data", "teacher weights", "student weights"])
def test_other_data_or_weights_are_another_run(refused, started, workplace, tmp_path, what, is_finished):
    if is_finished:
        finish(started)
    before = contents(started)
    override = other_data(tmp_path) if what == "prepared data" else trained_on(tmp_path, workplace, what.split()[0])
    refused(override, says=[f"run.dir '{started}' holds another run: the {what} changed", "use another run.dir"])
    assert contents(started) == before


def test_data_that_changed_in_place_is_another_run(refused, started, workplace, tmp_path):
    path = workplace / "train.jsonl"
    before, kept = contents(started), path.read_text()
    try:
        path.write_text(kept + json.dumps({"messages": [USER, ASSISTANT | {"content": "more"}]}) + "\n")
        refused(says=["the prepared data changed"])
    finally:
        path.write_text(kept)
    assert contents(started) == before


@pytest.mark.parametrize(
    "override",
    ["train.zero_stage=3", "train.num_workers=2", "train.eval_every=7", "train.checkpoint_every=3",
     "teacher.pool.max_actors=2", "teacher.batch_size=1", "train.micro_batch_size=2", "loss.chunk_size=64"],
)  # fmt: skip
def test_free_settings_belong_to_no_run(in_process, started, override):
    finish(started)
    before = contents(started)
    assert in_process(override) == (0, [])
    assert contents(started) == before


def test_data_and_models_may_move(in_process, started, workplace, tmp_path):
    finish(started)
    for name in ("teacher", "student"):
        shutil.copytree(workplace / name, tmp_path / name)
    shutil.copy(workplace / "train.jsonl", tmp_path / "moved.jsonl")
    moved = [f"teacher.model={tmp_path}/teacher", f"student.model={tmp_path}/student"]
    assert in_process(*moved, f"data.source.paths=[{tmp_path}/moved.jsonl]") == (0, [])


def test_a_cluster_that_is_not_there_is_named_at_once(refused):
    refused("cluster.address=nonsense", says=["is 'nonsense': allowed is auto or host:port"])
    refused("cluster.address=127.0.0.1:9", says=["cannot reach the Ray cluster at cluster.address", "'127.0.0.1:9'"])


def test_a_wrong_value_is_not_called_another_run(refused, started):
    refused("train.learning_rate=0", says=["train.learning_rate is 0.0", "a positive number"])


def test_a_second_driver_is_refused(refused, started):
    before = contents(started)
    with driver_lock(started):
        refused(says=[f"run.dir '{started}' is being written by another run (pid ", "choose another run.dir"])
    assert contents(started) == before


def test_a_damaged_run_folder_is_not_our_bug(refused, started):
    (started / "run.json").write_text('{"settings": {')
    before = contents(started)
    refused(says=[f"'{started}/run.json' is damaged", "another run.dir"])
    assert contents(started) == before


# The jobs on what a run leaves.


@pytest.mark.parametrize("job", ["evaluate", "export"])
def test_what_is_no_run_folder_is_refused(refused, tmp_path, job):
    out = [tmp_path / "out"] if job == "export" else []
    refused(
        job=job, arguments=[tmp_path / "none", *out], says=[f"'{tmp_path}/none' is not a run folder", "config.yaml"]
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], ["required: out_dir"]),
        (["{t}/config.yaml"], ["'{t}/config.yaml' exists already"]),
        (["{w}/file/out"], ["'{w}/file/out' cannot be written"]),
        (["{t}/out"], ["has no checkpoint yet"]),
        (["{t}/out", "--step", "9"], ["no checkpoint of step 9", "it has none"]),
        (["{t}/out", "--step", "last"], ["--step", "'last'"]),
        (["{t}/out", "--dtype", "int8"], ["--dtype", "'int8'", "bfloat16"]),
    ],
    ids=["no out_dir", "out_dir exists", "out_dir unwritable", "no checkpoint", "no such step", "step", "dtype"],
)
def test_export_refuses(refused, started, workplace, tmp_path, arguments, says):
    places = {"t": tmp_path, "w": workplace}
    before = contents(started)
    refused(job="export", arguments=[started, *(argument.format(**places) for argument in arguments)],
            says=[text.format(**places) for text in says])  # fmt: skip
    assert contents(started) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "{w}/none"], ["'{w}/none' does not exist"]),
        (["--max-rows", "-1"], ["--max-rows", "-1"]),
        (["--max-rows", "few"], ["--max-rows", "'few'"]),
    ],
    ids=["model missing", "max-rows negative", "max-rows no number"],
)
def test_evaluate_refuses(refused, started, workplace, arguments, says):
    refused(job="evaluate", arguments=[started, *(argument.format(w=workplace) for argument in arguments)],
            says=[text.format(w=workplace) for text in says])  # fmt: skip


# The same through the real scripts.


@pytest.mark.parametrize(
    ("arguments", "says", "progress"),
    [
        ([], "required: config", ""),
        (["{t}/none.yaml"], "config file '{t}/none.yaml' does not exist", ""),
        (["{t}/config.yaml", "teacher.model={t}/none"], "teacher.model: '{t}/none' does not exist",
         "checking the config and the models\nstarting a local Ray\n"),
    ],
    ids=["no arguments", "no config", "no teacher"],
)  # fmt: skip
def test_the_script_says_one_line_and_returns_64(in_process, tmp_path, ray_environment, arguments, says, progress):
    done = subprocess.run(
        [sys.executable, REPOSITORY / "jobs" / "distill.py", *(argument.format(t=tmp_path) for argument in arguments)],
        env=ray_environment, capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 64
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert [line for line in done.stderr.splitlines() if "error" in line.lower() or "Traceback" in line] == (
        done.stderr.splitlines()[-1:]
    )
    assert says.format(t=tmp_path) in done.stderr
    assert done.stdout == progress


# Records, on the session's Ray.

REASONS = {
    2: "not JSON",
    3: "field 'messages' is missing",
    4: "nothing to train on: no assistant message",
    5: "not UTF-8",
    6: "not a JSON object but list",
    7: "message 2 (assistant) has no text",
}


def write_records(path):
    """25 good records, two of them repeated and one long, with a bad one of each kind in lines 2 to 7."""
    good = [json.dumps({"messages": [USER, {"role": "assistant", "content": f"number {i}, " * (1 + i % 4)}]}).encode()
            for i in range(22)]  # fmt: skip
    long = json.dumps({"messages": [USER, {"role": "assistant", "content": "on and on " * 60}]}).encode()
    bad = [
        b'{"messages": [{"role": "us',
        b'{"text": "a record of another format"}',
        json.dumps({"messages": [USER]}).encode(),
        b'{"messages": "\xff\xfe"}',
        b"[1, 2]",
        json.dumps({"messages": [USER, ASSISTANT | {"content": " "}]}).encode(),
    ]
    lines = [good[0], *bad, *good[1:], good[3], good[4], long]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return len(lines)


def run_on(jobs, job, name, *overrides):
    """Run a job of the run `name` on the session's Ray."""
    address = f"cluster.address={jobs.address}"
    return jobs.run(job, str(jobs.config(name)), f"run.dir={jobs.run_dir(name)}", address, *overrides)


def error_lines(job):
    return [line for line in job.stderr.splitlines() if line.startswith("error: ")]


@pytest.fixture(scope="module")
def bad_records(jobs):
    """The overrides that read them with room for the six bad ones, how many records there are, and where."""
    path = jobs.folder / "bad-records.jsonl"
    records = write_records(path)
    return [f"data.source.paths=[{path}]", "data.max_bad_fraction=0.2", "data.eval_fraction=0"], records, path


@pytest.mark.ray
def test_bad_records_are_quarantined_and_the_rest_is_prepared(jobs, bad_records):
    overrides, records, path = bad_records
    done = run_on(jobs, "prepare_data", "prepared-only", *overrides)
    assert done.exit_code == 0, done.stderr
    assert f"6 of {records} records quarantined" in done.stdout
    assert done.stdout.count("warning: ") == 1
    assert "warning: data: 2 documents repeat an earlier one; they are kept" in done.stdout
    prepared = Path(done.stdout.strip().splitlines()[-1].removeprefix("prepared: "))
    listed = [json.loads(line) for line in (prepared / "quarantine.jsonl").read_text().splitlines()]
    assert [entry["line"] for entry in listed] == list(REASONS)
    for entry in listed:
        assert entry["file"] == str(path)
        assert entry["reason"].startswith(REASONS[entry["line"]])
    manifest = json.loads((prepared / "manifest.json").read_text())
    assert manifest["documents"] == records - 6
    assert manifest["split_documents"] == 1
    assert manifest["dropped_tokens"] == 0
    assert manifest["duplicates"] == 2


@pytest.fixture(scope="module")
def distilled(jobs, bad_records):
    """A finished run of two steps on the data with bad records."""
    return jobs.distill("quarantine", *bad_records[0], "train.max_steps=2")


@pytest.mark.ray
def test_a_run_goes_on_past_bad_records(distilled, bad_records):
    assert distilled.exit_code == 0, distilled.stderr
    assert error_lines(distilled) == []
    listed = [json.loads(line) for line in (distilled.run_dir / "quarantine.jsonl").read_text().splitlines()]
    assert {entry["line"]: entry["reason"].startswith(REASONS[entry["line"]]) for entry in listed} == dict.fromkeys(
        REASONS, True
    )
    assert {entry["file"] for entry in listed} == {str(bad_records[2])}
    assert distilled.summary["records_quarantined"] == 6
    assert distilled.summary["rows_quarantined"] == 0
    assert distilled.summary["steps"] == 2


@pytest.mark.ray
def test_a_finished_run_is_left_alone(jobs, distilled, bad_records, in_process, refused):
    config_path = distilled.run_dir / "config.yaml"
    before = contents(distilled.run_dir)
    assert in_process(arguments=[config_path]) == (0, [])
    refused(arguments=[config_path, "loss.temperature=2"], says=["loss.temperature is 1.0, now 2.0"])
    refused(arguments=[config_path, f"teacher.model={jobs.student}"], says=["the teacher weights changed"])
    refused(arguments=[distilled.run_dir, jobs.folder / "out", "--step", "9"], job="export",
            says=["no checkpoint of step 9: it has [2]"])  # fmt: skip
    refused(arguments=[distilled.run_dir, distilled.run_dir / "final"], job="export", says=["exists already"])
    assert contents(distilled.run_dir) == before


@pytest.mark.ray
def test_too_many_bad_records_stop_the_run_with_65(jobs, bad_records):
    overrides, records, path = bad_records
    done = jobs.distill("too-many", *overrides, "data.max_bad_fraction=0.1", "data.sequence_length=64")
    assert done.exit_code == 65
    assert len(error_lines(done)) == 1
    line = error_lines(done)[0]
    assert f"6 of {records} records (19.4%) cannot be used, more than data.max_bad_fraction=0.1" in line
    assert f"{path}:2: not JSON" in line
    listed = done.run_dir / "quarantine.jsonl"
    assert line.endswith(f"all are listed in {listed}")
    assert len(listed.read_text().splitlines()) == 6
    assert done.summary["exit_code"] == 65


@pytest.mark.ray
@pytest.mark.extended
def test_what_only_a_worker_can_find_out_ends_the_run_at_once(jobs):
    """A student that lets packed documents see each other: measured on its weights, and not tried again."""
    folder = random_model(jobs.folder / "mamba", "Mamba")
    done = jobs.distill("mamba", f"student.model={folder}", "train.max_failures=9")
    assert done.exit_code == 64
    assert error_lines(done) == [
        "error: MambaForCausalLM lets packed documents see each other (it ignores position_ids); it cannot be used"
    ]
    assert done.summary["exit_code"] == 64
    assert done.summary["steps"] == 0


@pytest.mark.ray
def test_nothing_usable_stops_with_65(jobs):
    path = jobs.folder / "nothing.jsonl"
    path.write_text('{"text": "another format"}\n')
    done = run_on(jobs, "prepare_data", "nothing", f"data.source.paths=[{path}]", "data.max_bad_fraction=1")
    assert done.exit_code == 65
    assert len(error_lines(done)) == 1
    assert "1 of 1 records (100.0%) cannot be used; the first" in error_lines(done)[0]
