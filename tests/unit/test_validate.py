"""Validation as functions: the combinations that pass, what is only warned about, and the range of every number."""

import json
import logging
import shutil

import pytest

from ray_kd import config
from ray_kd.errors import ConfigError
from ray_kd.validate import check_data, validate
from tests.reference.kd_batch import kinds
from tests.tiny import tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("validate")
    tiny_llama(folder / "teacher", layers=4, seed=1)
    tiny_llama(folder / "student", layers=2, seed=2)
    (folder / "train.jsonl").write_text("{}\n")
    return folder


@pytest.fixture
def load(workplace):
    """The config with overrides."""

    def loaded(*overrides):
        base = [f"run.dir={workplace}/run", f"data.source={{kind: jsonl, paths: [{workplace}/train.jsonl]}}",
                f"teacher.model={workplace}/teacher", "teacher.top_k=16",
                f"student.model={workplace}/student"]  # fmt: skip
        return config.load(None, [*base, *overrides])

    return loaded


@pytest.fixture
def warnings(caplog):
    """What was warned about so far."""
    with caplog.at_level(logging.WARNING, logger="ray_kd"):
        yield lambda: [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_what_is_right_passes_in_silence(load, warnings):
    learned = validate(load())
    assert (learned.teacher.num_hidden_layers, learned.student.num_hidden_layers) == (4, 2)
    assert warnings() == []


@pytest.mark.parametrize(
    "widths", ["intermediate_size=100", "hidden_size=32", "num_attention_heads=2", "num_key_value_heads=2"]
)
def test_a_narrower_student_passes(load, warnings, widths):
    narrower = ("student.model=null", "student.init.layers=2", f"student.init.{widths}")
    assert validate(load(*narrower, "student.init.calibration_rows=4")).student is None
    assert warnings() == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("intermediate_size=129", r"^student\.init\.intermediate_size is 129: allowed is 1 to the teacher's 128$"),
        ("num_attention_heads=3", r"^student\.init\.num_attention_heads is 3: allowed is 2 \| 4 with 2 KV heads"),
        ("hidden_size=many", r"student\.init\.hidden_size.*'many'"),
        ("calibration_rows=0", r"^student\.init\.calibration_rows is 0: allowed is 1 or more$"),
    ],
)
def test_widths_that_cannot_be_are_one_line(load, override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        validate(load("student.model=null", "student.init.layers=2", f"student.init.{override}"))
    assert "\n" not in str(caught.value)


def test_calibration_rows_are_for_what_is_measured(load, warnings):
    validate(load("student.model=null", "student.init={layers: [0, 1], calibration_rows: 4}"))
    assert warnings() == ["student.init.calibration_rows has no effect: the layers are listed and keep their widths"]


@pytest.mark.parametrize("layers", ["1", "4", "[0]", "[1,3]"])
def test_a_student_of_the_teachers_layers_passes(load, warnings, layers):
    assert validate(load("student.model=null", f"student.init.layers={layers}")).student is None
    assert warnings() == []


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("teacher.cache.path=/somewhere", "teacher.cache.mode is disabled"),
        ("teacher.revision=main", "teacher.model is a folder"),
        ("student.revision=main", "student.model is a folder"),
    ],
)
def test_a_setting_without_effect_is_one_warning(load, warnings, override, reason):
    validate(load(override))
    assert warnings() == [f"{override.split('=')[0]} has no effect: {reason}"]


def several(workplace, *others, **second):
    """The override with the workplace's teacher first and a second one."""
    model = {"model": f"{workplace}/teacher"}
    return f"teachers={json.dumps([model, model | {'name': 'two'} | second, *others])}"


def test_several_teachers_pass_in_silence(load, workplace, warnings):
    validate(load(several(workplace, engine={"kind": "http", "url": "http://127.0.0.1:1"})))
    validate(load(several(workplace, rows=["code"]), "data.route_by=domain"))
    assert warnings() == []
    validate(load(several(workplace), "data.route_by=domain"))
    assert warnings() == ["data.route_by has no effect: none of teachers has rows, so it only keeps its values apart"]
    validate(load("teachers=[]", "data.route_by=domain"))
    assert len(warnings()) == 2
    validate(load(several(workplace, revision="v2", engine={"kind": "http", "url": "http://h"}, dtype="bfloat16")))
    assert warnings()[2:] == [
        "teachers.two.dtype has no effect: teacher.engine 'http' loads no weights",
        "teachers.two.revision has no effect: teachers.two.model is a folder",
    ]
    shared = several(workplace, {"model": f"{workplace}/teacher", "name": "three", "rows": ["code"], "weight": 2})
    validate(load(shared, "data.route_by=domain"))
    assert len(warnings()) == 4
    alone = {"model": f"{workplace}/teacher", "name": "alone", "weight": 2, "rows": ["code"]}
    first = {"model": f"{workplace}/teacher", "rows": ["prose"]}
    validate(load(f"teachers={json.dumps([first, alone])}", "data.route_by=domain"))
    assert warnings()[4:] == ["teachers.alone.weight has no effect: no other teacher answers its rows"]


@pytest.mark.parametrize(
    ("second", "overrides", "message"),
    [
        ({"name": "teacher"}, [], r"teachers\[0\].name is 'teacher': allowed is a name that no other teacher has"),
        ({"name": "a/b"}, [], r"teachers\[1\].name is 'a/b': allowed is letters"),
        ({"weight": 0}, [], r"teachers\[1\].weight is 0.0: allowed is a positive number"),
        ({"rows": ["code"]}, [], r"teachers\[1\].rows is \['code'\]: allowed is null until data.route_by"),
        ({"rows": []}, [], r"teachers\[1\].rows is \[\]: allowed is a list of values, or null"),
        ({"dtype": "int8"}, [], "teachers: 'two': teacher.dtype is 'int8': allowed is auto"),
        ({"pool": {"min_actors": 3}}, [], "teachers: 'two': teacher.pool.max_actors is 1: allowed is"),
        ({"engine": {"kind": "none"}}, [], "unknown kind 'none'"),
        ({"engine": "vllm"}, ["loss.temperature=2"], "teachers: 'two': loss.temperature is 2.0.*'hf'.* would do"),
        ({"model": "/no/such"}, [], "'/no/such'"),
        ({}, ["teacher.payload=hidden_states"], "teacher.payload is 'hidden_states': allowed is topk_logprobs with"),
        (
            {},
            ["teacher.selection=sample", "loss.tail=drop"],
            "teacher.selection is 'sample': allowed is topk with teachers",
        ),
    ],
)
def test_what_several_teachers_cannot_be_is_one_line(load, workplace, second, overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        validate(load(several(workplace, **second), *overrides))
    assert "\n" not in str(caught.value)


def test_heads_of_other_sizes_are_allowed_by_name(load, workplace, tmp_path, warnings):
    wide = tiny_llama(tmp_path / "wide", layers=1, vocab=300)
    for wider in (f"teacher.model={wide}", f"student.model={wide}"):
        with pytest.raises(ConfigError, match=r"rows and .*, for the same 259 ids of tokens: .* allowed is shared"):
            validate(load(wider))
        assert validate(load(wider, "teacher.vocabulary=shared")).vocab_size == 259
    validate(load("teacher.vocabulary=shared", several(workplace, model=str(wide))))
    assert warnings() == []
    with pytest.raises(
        ConfigError, match=r"^teacher.top_k is 260: allowed is at most the teacher's vocabulary of 259$"
    ):
        validate(load(f"teacher.model={wide}", "teacher.vocabulary=shared", "teacher.top_k=260"))
    with pytest.raises(ConfigError, match=r"^teacher.vocabulary is 'padded': allowed is strict \| shared$"):
        validate(load("teacher.vocabulary=padded"))
    assert validate(load("teacher.vocabulary=shared")).vocab_size == 259
    assert warnings() == ["teacher.vocabulary has no effect: all heads have one row for each of the 259 ids"]


def test_teachers_mean_the_same_tokens(load, workplace, tmp_path):
    tiny_llama(tmp_path / "wide", layers=1, vocab=300)
    with pytest.raises(ConfigError, match="'two' has a vocabulary of 300: allowed is that of 'teacher', 259"):
        validate(load(several(workplace, model=str(tmp_path / "wide"))))
    shutil.copytree(workplace / "teacher", tmp_path / "renamed")
    tokenizer = tmp_path / "renamed" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"a":', '"§":'))
    with pytest.raises(ConfigError, match="teacher 'teacher' and teacher 'two' have different vocabularies"):
        validate(load(several(workplace, model=str(tmp_path / "renamed"))))


@pytest.mark.parametrize(
    ("engine", "takes_it"), [("hf", True), ("fake", False), ("vllm", False), ("{kind: http, url: http://h}", False)]
)
def test_tokens_of_a_batch_are_for_an_engine_that_counts_them(load, warnings, engine, takes_it):
    validate(load(f"teacher.engine={engine}", "teacher.batch_tokens=4096", "cluster.address=10.0.0.1:6379"))
    kind = "http" if "http" in engine else engine
    assert warnings() == (
        [] if takes_it else [f"teacher.batch_tokens has no effect: teacher.engine '{kind}' does not take it"]
    )


def test_a_copy_is_split_over_the_gpus_of_its_actor(load):
    """On a cluster: this machine has none."""
    vllm = ("cluster.address=10.0.0.1:6379", "teacher.engine=vllm")
    for right in (("num_gpus=2", 2), ("num_gpus=1", 1), ("num_gpus=0.5", 1)):
        validate(load(*vllm, f"teacher.pool.{right[0]}", f"teacher.engine.tensor_parallel_size={right[1]}"))
    validate(load("cluster.address=10.0.0.1:6379", "teacher.pool.num_gpus=2"))
    for size, message in (
        (1, r"^teacher\.engine\.tensor_parallel_size is 1: allowed is 2 \(teacher\.pool\.num_gpus / pipeline"),
        (4, r"^teacher\.engine\.tensor_parallel_size is 4: allowed is 2 "),
    ):
        with pytest.raises(ConfigError, match=message):
            validate(load(*vllm, "teacher.pool.num_gpus=2", f"teacher.engine.tensor_parallel_size={size}"))
    with pytest.raises(ConfigError, match=r"tensor_parallel_size is 2: allowed is 1 "):
        validate(load(*vllm, "teacher.pool.num_gpus=1", "teacher.engine.tensor_parallel_size=2"))
    staged = "teacher.engine={kind: vllm, tensor_parallel_size: 1, options: {pipeline_parallel_size: 2}}"
    validate(load(*vllm, staged, "teacher.pool.num_gpus=2"))
    with pytest.raises(
        ConfigError, match=r"^teacher\.pool\.num_gpus is 1\.5: allowed is a fraction up to 1, or a whole"
    ):
        validate(load("cluster.address=10.0.0.1:6379", "teacher.pool.num_gpus=1.5"))


def test_a_vllm_that_is_not_here_or_takes_more_than_its_share_is_named(load, monkeypatch, warnings):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"teacher.engine is 'vllm' and vllm is not installed here: pip install"):
        validate(load("teacher.engine=vllm"))
    on_cluster = ("teacher.engine=vllm", "cluster.address=10.0.0.1:6379", "train.gpus_per_worker=0.6")
    validate(load(*on_cluster, "teacher.pool.num_gpus=0.4", "teacher.engine.gpu_memory_utilization=0.4"))
    assert warnings() == []
    validate(load(*on_cluster, "teacher.pool.num_gpus=0.4"))
    assert warnings() == [
        "teacher.engine.gpu_memory_utilization=0.9 is more of the GPU than teacher.pool.num_gpus=0.4: what shares it "
        "may find no memory"
    ]


def test_a_worker_may_share_its_gpu_with_teachers_but_not_with_another_worker(load):
    cluster = "cluster.address=10.0.0.1:6379"
    validate(load(cluster, "train.gpus_per_worker=0.4", "teacher.pool.num_gpus=0.3", "teacher.pool.max_actors=2"))
    two = ("train.num_workers=2", "train.global_batch_size=8")
    validate(load(cluster, *two, "train.gpus_per_worker=0.6"))
    with pytest.raises(
        ConfigError, match=r"^train.gpus_per_worker is 0.5: allowed is 0, or above 0.5 with train.num_w"
    ):
        validate(load(cluster, *two, "train.gpus_per_worker=0.5"))
    with pytest.raises(ConfigError, match=r"^train.gpus_per_worker is 1.5: allowed is 0 to 1"):
        validate(load(cluster, "train.gpus_per_worker=1.5"))


def test_every_number_of_a_range_of_workers_has_a_whole_part_of_the_batch(load, warnings):
    cluster = "cluster.address=10.0.0.1:6379"
    validate(load(cluster, "train.num_workers=[1,4]", "train.global_batch_size=24", "train.micro_batch_size=2"))
    with pytest.raises(ConfigError) as error:
        validate(load(cluster, "train.num_workers=[2,6]", "train.global_batch_size=16", "train.micro_batch_size=2"))
    assert str(error.value) == (
        "train.num_workers is [2, 6]: allowed is a range of which every number divides global_batch_size / "
        "micro_batch_size = 8, since Ray may start any of them; 3, 5, 6 do not"
    )
    assert warnings() == []
    validate(load("train.num_workers=[1,2]"))
    assert warnings() == ["the range of train.num_workers has no effect: a local Ray always has room for the most"]


def test_how_often_to_look_for_room_is_for_a_range_of_workers(load, warnings):
    validate(load("train.resize_every_s=5"))
    assert warnings() == ["train.resize_every_s has no effect: train.num_workers is one number"]


def test_tiles_of_no_token_are_refused(load):
    for value in (0, -4):
        with pytest.raises(ConfigError, match=rf"teacher\.engine\.chunk_size is {value}: allowed is 1 or more"):
            validate(load(f"teacher.engine={{kind: hf, chunk_size: {value}}}"))


@pytest.mark.parametrize("value", ["gpus", "cpu", "3", "{}", "{model: gpu}", "{model: -1}", "[0, 1]"])
def test_a_device_map_is_a_word_of_accelerates_or_a_mapping(load, value):
    with pytest.raises(ConfigError, match=r"^teacher\.engine\.device_map is .*: allowed is auto \| .*") as error:
        validate(load(f"teacher.engine={{kind: hf, device_map: {value}}}"))
    assert "\n" not in str(error.value)
    for right in ("null", "auto", "sequential", "{'': 0}", "{model.embed_tokens: cpu, model.layers: 'cuda:1'}"):
        validate(load(f"teacher.engine={{kind: hf, device_map: {right}}}"))


def test_a_teacher_on_a_server_needs_no_weights_here(load, workplace, tmp_path, warnings):
    shutil.copytree(workplace / "teacher", tmp_path / "teacher", ignore=shutil.ignore_patterns("*.safetensors"))
    http = ("teacher.engine={kind: http, url: http://127.0.0.1:8000}", f"teacher.model={tmp_path}/teacher")
    assert validate(load(*http)).teacher.num_hidden_layers == 4
    assert warnings() == []
    validate(load(*http, "teacher.dtype=bfloat16"))
    assert warnings() == ["teacher.dtype has no effect: teacher.engine 'http' loads no weights"]
    for needs_them in (http[1:], (*http, "student.model=null", "student.init.layers=1")):
        with pytest.raises(ConfigError, match="is a model folder without safetensors"):
            validate(load(*needs_them))


def test_the_dashboard_of_a_cluster_that_is_joined_is_its_own(load, warnings):
    validate(load("cluster.dashboard=true"))
    assert warnings() == []
    validate(load("cluster.dashboard=true", "cluster.address=10.0.0.1:6379"))
    assert warnings() == ["cluster.dashboard has no effect: the cluster has its own"]


def test_the_whole_vocabulary_is_a_top_k(load):
    validate(load("teacher.top_k=259"))


def test_teacher_and_student_the_same_is_one_warning(load, workplace, warnings):
    validate(load(f"student.model={workplace}/teacher"))
    assert warnings() == ["teacher and student are the same model: the distillation loss starts at 0"]


def test_a_copy_of_the_teacher_is_the_teacher(load, workplace, tmp_path, warnings):
    shutil.copytree(workplace / "teacher", tmp_path / "copy")
    validate(load(f"student.model={tmp_path}/copy"))
    assert len(warnings()) == 1


def test_another_role_of_the_same_token_is_one_warning(load, workplace, tmp_path, warnings):
    shutil.copytree(workplace / "student", tmp_path / "base")
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(tmp_path / "base")
    validate(load(f"student.model={tmp_path}/base"))
    assert warnings() == ["eos_token is '<|im_end|>' for the teacher and '<|endoftext|>' for the student"]


def test_longer_rows_than_positions_are_warned_about(load, warnings):
    validate(load("data.sequence_length=5000"))
    assert warnings() == [
        "data.sequence_length=5000 is more than the teacher's 4096 positions",
        "data.sequence_length=5000 is more than the student's 4096 positions",
    ]


@pytest.mark.parametrize(
    ("key", "wrong", "right"),
    [
        ("data.sequence_length", "1", "2"),
        ("data.eval_fraction", "1.0", "0.99"),
        ("data.eval_fraction", "-0.1", "0"),
        ("data.max_bad_fraction", "1.1", "1.0"),
        ("teacher.top_k", "0", "1"),
        ("teacher.selection", "random", "topk"),
        ("teacher.batch_size", "0", "1"),
        ("teacher.batch_tokens", "0", "1"),
        ("teacher.run_ahead_rows", "0", "1"),
        ("teacher.threads", "0", "null"),
        ("teacher.dtype", "int8", "bfloat16"),
        ("teacher.pool.min_actors", "0", "1"),
        ("teacher.pool.max_actors", "0", "2"),
        ("teacher.pool.num_cpus", "0", "0.1"),
        ("teacher.pool.num_gpus", "-1", "0"),
        ("student.dtype", "auto", "float32"),
        ("student.liger", "always", "never"),
        ("loss.chunk_size", "0", "1"),
        ("loss.temperature", "0", "0.5"),
        ("teacher.max_bytes_per_token", "0", "4096"),
        ("train.num_workers", "0", "2"),
        ("train.num_workers", "[0,2]", "[1,2]"),
        ("train.num_workers", "[4,2]", "[2,2]"),
        ("train.num_workers", "[1]", "1"),
        ("train.num_workers", "[1,2,4]", "4"),
        ("train.num_workers", "1.5", "8"),
        ("train.num_workers", "two", "2"),
        ("train.num_workers", "true", "2"),
        ("train.resize_every_s", "0", "0.5"),
        ("train.cpus_per_worker", "0", "0.1"),
        ("train.gpus_per_worker", "-1", "0"),
        ("train.zero_stage", "-1", "3"),
        ("train.micro_batch_size", "0", "8"),
        ("train.global_batch_size", "0", "1"),
        ("train.epochs", "0", "1"),
        ("train.max_steps", "0", "null"),
        ("train.learning_rate", "0", "1.0e-9"),
        ("train.learning_rate", ".inf", "1"),
        ("train.schedule", "cos", "cosine"),
        ("train.warmup_steps", "-1", "0"),
        ("train.weight_decay", "-1", "0"),
        ("train.weight_decay", ".nan", "0.1"),
        ("train.max_grad_norm", "-1", "0"),
        ("train.checkpoint_every", "-1", "0"),
        ("train.keep_checkpoints", "0", "1"),
        ("train.eval_every", "-1", "0"),
        ("train.log_every", "0", "1"),
        ("train.max_bad_steps", "-1", "0"),
        ("train.max_failures", "-1", "0"),
        ("train.threads_per_worker", "0", "1"),
        ("train.timeout_s", "0", "1"),
        ("eval.max_rows", "-1", "0"),
        ("eval.batch_size", "0", "1"),
        ("eval.max_new_tokens", "0", "1"),
        ("cluster.wait_s", "-1", "0"),
        ("run.seed", "-1", "0"),
    ],
)
def test_every_number_and_choice_has_its_range(load, key, wrong, right):
    with pytest.raises(ConfigError, match=rf"^{key}\b") as error:
        validate(load(f"{key}={wrong}"))
    assert "\n" not in str(error.value)
    validate(load(f"{key}={right}"))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("bf16.check_grad_overflow=false", "is False: allowed is true (a NaN gradient would reach the weights)"),
        ("bf16.enabled=true", "is True: allowed is to leave it to student.dtype"),
        ("gradient_clipping=0.5", "is 0.5: allowed is to leave it to train.max_grad_norm"),
        ("gradient_allreduce_op=sum", "is 'sum': allowed is mean (the loss is scaled for it)"),
        ("zero_optimization.stage=1", "is 1: allowed is to leave it to train.zero_stage"),
        ("zero_optimization.round_robin_gradients=true", "is True: allowed is false (checkpoints do not cover it)"),
        (
            "zero_optimization.offload_optimizer.device=nvme",
            "is 'nvme': allowed is none | cpu (checkpoints do not cover it)",
        ),
        ("zero_optimization=3", "is 3: allowed is a mapping of its options"),
        (
            "zero_optimization.reduce_bucket_size=auto",
            "is 'auto': allowed is a whole number of elements, 1 or more",
        ),
        ("tensor_parallel={autotp_size: 2}", "is {'autotp_size': 2}: allowed is null (checkpoints do not cover it)"),
    ],
)
def test_deepspeed_entries_that_break_a_run_are_named(load, entry, message):
    with pytest.raises(ConfigError) as error:
        validate(load(f"train.deepspeed.{entry}"))
    assert str(error.value) == f"train.deepspeed.{entry.split('=')[0]} {message}"


def test_other_deepspeed_entries_pass(load, warnings):
    entries = "{bf16: {check_grad_overflow: true}, fp16: {initial_scale_power: 8}, wall_clock_breakdown: false}"
    validate(load(f"train.deepspeed={entries}", "train.deepspeed.zero_optimization.reduce_bucket_size=1000"))
    assert warnings() == []


def test_the_largest_pool_is_not_below_the_smallest(load):
    with pytest.raises(ConfigError, match=r"max_actors is 2: allowed is teacher\.pool\.min_actors=3 or more"):
        validate(load("teacher.pool.min_actors=3", "teacher.pool.max_actors=2"))


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "drop"])
@pytest.mark.parametrize("divergence", kinds())
def test_dropping_the_tail_is_for_divergences_that_keep_an_optimum(load, divergence, tail):
    given = load(f"loss.divergence={divergence}", f"loss.tail={tail}")
    if tail != "drop" or divergence in ("forward_kl", "skew_forward_kl", "total_variation", "alpha_divergence"):
        validate(given)
        return
    with pytest.raises(ConfigError, match=rf"^loss\.tail: 'drop' is ill-posed with the divergence '{divergence}'"):
        validate(given)


def test_draws_are_for_forward_kl_without_a_tail(load):
    validate(load("teacher.selection=sample", "loss.tail=drop"))
    for override, seen in (
        ("loss.tail=bucket", "loss.divergence=forward_kl and loss.tail=bucket"),
        ("loss.tail=renormalize", "loss.divergence=forward_kl and loss.tail=renormalize"),
        ("loss.divergence=jsd", "loss.divergence=jsd and loss.tail=bucket"),
    ):
        with pytest.raises(ConfigError, match=rf"^teacher\.selection is 'sample' with {seen}: allowed is .*") as error:
            validate(load("teacher.selection=sample", override))
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=r"^teacher\.top_k is 3000: allowed is 1 to 2048 draws"):
        validate(load("teacher.selection=sample", "loss.tail=drop", "teacher.top_k=3000"))


def test_an_engine_that_cannot_draw_is_refused(load, monkeypatch):
    from ray_kd.teacher.engines import hf

    monkeypatch.setattr(hf.Engine, "selections", frozenset({"topk"}))
    with pytest.raises(
        ConfigError, match=r"^teacher\.selection is 'sample': allowed is topk with teacher\.engine 'hf'$"
    ):
        validate(load("teacher.selection=sample", "loss.tail=drop"))


def test_an_engine_written_before_the_draws_selects_the_top_k(load, monkeypatch):
    from ray_kd.teacher.engines import hf

    monkeypatch.delattr(hf.Engine, "selections")
    validate(load())
    with pytest.raises(
        ConfigError, match=r"^teacher\.selection is 'sample': allowed is topk with teacher\.engine 'hf'$"
    ):
        validate(load("teacher.selection=sample", "loss.tail=drop"))


def test_hidden_states_need_the_model_here_and_evaluation_what_it_asks_for(load, monkeypatch):
    from ray_kd.teacher.engines import hf

    monkeypatch.setattr(hf.Engine, "provides", frozenset({"hidden_states"}))
    validate(load("teacher.payload=hidden_states"))
    with pytest.raises(
        ConfigError, match=r"^eval\.kl is 'topk': allowed is exact with teacher\.engine 'hf', which sends"
    ):
        validate(load("teacher.payload=hidden_states", "eval.kl=topk"))
    monkeypatch.setattr(hf.Engine, "is_local_model", False)
    monkeypatch.setattr(hf.Engine, "provides", frozenset({"topk_logprobs", "hidden_states"}))
    with pytest.raises(
        ConfigError, match=r"^teacher\.payload is 'hidden_states': allowed is topk_logprobs with teacher\.engine 'hf'$"
    ):
        validate(load("teacher.payload=hidden_states"))


def test_what_an_engine_cannot_do_names_one_that_can(load, monkeypatch):
    from ray_kd.teacher.engines import fake

    monkeypatch.setattr(fake.Engine, "any_temperature", False)
    validate(load("teacher.engine=fake"))
    with pytest.raises(
        ConfigError,
        match=r"^loss\.temperature is 2\.0: allowed is 1 with teacher\.engine 'fake'; teacher\.engine 'hf' would do$",
    ):
        validate(load("teacher.engine=fake", "loss.temperature=2"))


@pytest.mark.parametrize("divergence", [*kinds(), *kinds(of_logits=True)])
def test_hidden_states_take_every_divergence_and_no_tail(load, divergence):
    validate(load("teacher.payload=hidden_states", f"loss.divergence={divergence}", "loss.tail=drop"))


def test_what_goes_with_hidden_states_is_said(load, caplog, monkeypatch):
    for override, message in (
        ("teacher.wire=compact", r"^teacher\.wire is 'compact': allowed is plain with teacher\.payload=hidden_states$"),
        (
            "teacher.selection=sample",
            r"^teacher\.selection is 'sample': allowed is topk with teacher\.payload=hidden_s",
        ),
        (
            "teacher.engine=fake",
            r"^teacher\.payload is 'hidden_states': allowed is features \| topk_logprobs with teacher\.engine 'fa",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            validate(load("teacher.payload=hidden_states", override))
    with pytest.raises(ConfigError, match=r"^teacher\.payload is 'logits': allowed is topk_log.* \| features$"):
        validate(load("teacher.payload=logits"))
    for kind in kinds(of_logits=True):
        with pytest.raises(ConfigError, match=f"'{kind}' compares whole logits.*teacher.payload=hidden_states"):
            validate(load(f"loss.divergence={kind}"))
    with pytest.raises(ConfigError, match=r"^loss\.tail is 'bin': allowed is bucket \| renormalize \| drop$"):
        validate(load("teacher.payload=hidden_states", "loss.tail=bin"))
    with pytest.raises(ConfigError, match=r"^teacher\.top_k is 1000: allowed is at most the teacher's vocabulary"):
        validate(load("teacher.payload=hidden_states", "eval.kl=topk", "teacher.top_k=1000"))
    with caplog.at_level(logging.WARNING):
        validate(load("teacher.payload=hidden_states", "loss.tail=drop"))
    assert "teacher.top_k has no effect: teacher.payload=hidden_states sends everything" in caplog.text
    with caplog.at_level(logging.WARNING):
        validate(load("teacher.payload=hidden_states", "loss.divergence=cosine", "loss.temperature=2"))
    assert "loss.temperature has no effect: a cosine" in caplog.text
    assert "loss.tail has no effect: teacher.payload=hidden_states leaves no tail" in caplog.text


def test_gpus_of_a_cluster_are_not_looked_for_here(load, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    many = ("train.gpus_per_worker=1", "train.num_workers=64", "train.global_batch_size=64")
    with pytest.raises(ConfigError, match=r"needs 65 GPUs .*train\.gpus_per_worker=1 x 64.*teacher\.pool\.num_gpus=1"):
        validate(load(*many, "teacher.pool.num_gpus=1"))
    validate(load(*many, "cluster.address=10.0.0.1:6379"))
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    validate(load("teacher.pool.num_gpus=64"))


def test_the_data_section_alone_needs_no_models(load):
    check_data(load("teacher.model=/nowhere", "student.model=/nowhere"))
    with pytest.raises(ConfigError, match=r"data.prepared_dir is 'nowhere://p': allowed is a path, or a URI"):
        check_data(load("data.prepared_dir=nowhere://p"))


FEATURES = "teacher.payload=features"
HIDDEN = '{"kind": "hidden_state"%s}'
ATTENTION = '{"kind": "attention"%s}'


def with_terms(*terms):
    return f"loss.terms={json.dumps(['kd', *map(json.loads, terms)])}"


@pytest.fixture(scope="module")
def students(workplace):
    """Students that differ from the teacher (width 64, 4 heads) in what their names say."""
    tiny_llama(workplace / "narrow", layers=2, hidden=32, seed=2)
    shutil.copytree(workplace / "student", workplace / "fewer-heads")
    path = workplace / "fewer-heads" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_attention_heads": 2, "head_dim": 32}))
    return workplace


def test_feature_terms_pass_and_say_what_they_cost(load, students, caplog):
    terms = with_terms(HIDDEN % ', "layers": [1, -1]', ATTENTION % ', "heads": "mean"')
    with caplog.at_level(logging.INFO, logger="ray_kd"):
        validate(load(FEATURES, terms, "data.sequence_length=128", "train.micro_batch_size=2"))
    said = [record.getMessage() for record in caplog.records]
    # 2 layers x 4 heads x 2 rows x 128^2 x 4 bytes; 64 of 16 log-probabilities, 2 layers of 64 channels, a mean map.
    assert "loss.terms[2]: the student's attention is eager, 1.0 MB of maps a micro-batch" in said
    assert f"teacher.payload=features takes up to {64 + 2 * 64 * 2 + 129} bytes a token" in said
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_what_widths_and_heads_need_passes_by_name(load, students):
    validate(load(FEATURES, with_terms(HIDDEN % ', "projector": "linear"'), f"student.model={students}/narrow"))
    validate(load(FEATURES, with_terms(ATTENTION % ', "heads": "mean"'), f"student.model={students}/fewer-heads"))
    init = ("student.model=null", "student.init.layers=3")
    validate(load(FEATURES, with_terms(HIDDEN % ', "layers": [3]', ATTENTION % ', "layers": [2]'), *init))
    with pytest.raises(ConfigError, match=r"^loss\.terms\[1\]\.layers.*4"):
        validate(load(FEATURES, with_terms(HIDDEN % ', "layers": [4]'), *init))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([with_terms(HIDDEN % ', "layers": [3]')], r"loss\.terms\[1\]\.layers.*3.*allowed"),
        ([with_terms(HIDDEN % ', "layers": [-4]')], r"loss\.terms\[1\]\.layers.*-4.*allowed"),
        ([with_terms(ATTENTION % ', "layers": [2]')], r"loss\.terms\[1\]\.layers.*2.*allowed"),
        (
            [with_terms(HIDDEN % ', "layers": [1], "teacher_layers": [5]')],
            r"loss\.terms\[1\]\.teacher_layers.*5.*allowed",
        ),
        ([with_terms(HIDDEN % ', "layers": [1, 2], "teacher_layers": [1]')], r"loss\.terms\[1\]\.teacher_layers"),
        ([with_terms(HIDDEN % ', "measure": "l1"')], r"loss\.terms\[1\]\.measure is 'l1': allowed is mse \| cosine"),
        (
            [with_terms(HIDDEN % ""), "student.model={w}/narrow"],
            r"loss\.terms\[1\]: .* width 32 .*64: allowed is equal widths, or loss\.terms\[1\]\.projector=linear",
        ),
        (
            [with_terms(ATTENTION % ""), "student.model={w}/fewer-heads"],
            r"loss\.terms\[1\]: .* 2 heads .*4: allowed is as many, or loss\.terms\[1\]\.heads=mean",
        ),
        (
            [with_terms(ATTENTION % ""), "data.sequence_length=2048"],
            r"data\.sequence_length is 2048: allowed is at most loss\.terms\[1\]\.max_sequence_length=1024",
        ),
        (
            [with_terms(HIDDEN % ""), "teacher.engine=vllm"],
            r"teacher\.payload is 'features': allowed is topk_logprobs with .*'vllm'; teacher\.engine 'hf' would do",
        ),
        (
            [with_terms(HIDDEN % ""), "teacher.payload=hidden_states"],
            r"loss\.terms\[1\] is of kind 'hidden_state', .* teacher\.payload=features \(it is 'hidden_states'\)",
        ),
        (["loss.terms=[kd, ce]"], r"teacher\.payload is 'features' and no term of loss\.terms needs it"),
        (
            [with_terms(HIDDEN % ""), 'teachers=[{{"model": "{w}/teacher"}}]'],
            r"teacher\.payload is 'features': allowed is topk_logprobs with teachers",
        ),
        (
            [with_terms(HIDDEN % ""), "teacher.max_bytes_per_token=191"],
            r"teacher\.max_bytes_per_token is 191 and .* up to 192 bytes .*: allowed is 192 or more, or fewer layers",
        ),
    ],
)
def test_feature_terms_that_do_not_fit_are_one_line_before_a_model_loads(load, students, overrides, message):
    with pytest.raises(ConfigError, match=rf"^{message}") as error:
        validate(load(FEATURES, *(override.replace("{w}", str(students)).replace("{{", "{").replace("}}", "}")
                                  for override in overrides)))  # fmt: skip
    assert "\n" not in str(error.value)


def test_attention_that_a_model_does_not_give_is_refused_by_its_config(load, monkeypatch):
    from transformers import LlamaForCausalLM

    assert "attentions" in LlamaForCausalLM._can_record_outputs
    monkeypatch.setattr(LlamaForCausalLM, "_can_record_outputs", {})
    with pytest.raises(ConfigError, match=r"^loss\.terms\[1\]: model_type llama gives no attention maps: allowed is"):
        validate(load(FEATURES, with_terms(ATTENTION % "")))
    validate(load(FEATURES, with_terms(HIDDEN % "")))


@pytest.mark.parametrize(
    ("overrides", "nbytes"),
    [
        ([], 64),  # 16 tokens of a vocabulary of 259
        (["teacher.top_k=32"], 128),
        (["teacher.payload=hidden_states"], 128),  # 64 channels
    ],
)
def test_the_bytes_of_a_token_are_held_to_the_link(load, caplog, overrides, nbytes):
    with caplog.at_level(logging.INFO, logger="ray_kd"):
        validate(load(*overrides, f"teacher.max_bytes_per_token={nbytes}"))
    assert f"takes up to {nbytes} bytes a token" in caplog.text
    with pytest.raises(ConfigError, match=rf"^teacher\.max_bytes_per_token is {nbytes - 1} .* up to {nbytes} bytes"):
        validate(load(*overrides, f"teacher.max_bytes_per_token={nbytes - 1}"))


def test_the_bytes_of_several_teachers_are_those_of_their_mixture(load, workplace, caplog):
    with caplog.at_level(logging.INFO, logger="ray_kd"):
        validate(load(several(workplace)))
        validate(load(several(workplace, rows=["code"]).replace("[{", '[{"rows": ["prose"], '), "data.route_by=domain"))
    assert [r.getMessage() for r in caplog.records if "bytes a token" in r.getMessage()] == [
        "teacher.payload=topk_logprobs takes up to 128 bytes a token",
        "teacher.payload=topk_logprobs takes up to 64 bytes a token",
    ]


WARMER = "{schedule: linear, start: 4.0, end: 1.0, steps: 10}"


def test_a_temperature_that_changes_needs_log_probabilities_that_can_be_rescaled(load, warnings):
    validate(load(f"loss.temperature={WARMER}", "loss.tail=renormalize"))
    validate(load(f"loss.temperature={WARMER}", "loss.tail=renormalize", "teacher.engine=fake"))
    assert warnings() == []
    validate(load(f"loss.temperature={WARMER}", "teacher.payload=hidden_states"))
    for tail in ("bucket", "drop"):
        with pytest.raises(ConfigError, match=rf"^loss\.temperature is a schedule, .* \(it is '{tail}'\)"):
            validate(load(f"loss.temperature={WARMER}", f"loss.tail={tail}"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loss.temperature={schedule: linear, start: 1, end: 0, steps: 3}", r"loss\.temperature is 0\.0: allowed is"),
        ("loss.temperature=warm", r"loss\.temperature is 'warm': allowed is a number"),
        ("loss.terms.0.weight=-1", r"loss\.terms\[0\]\.weight is -1: allowed is 0 or more"),
        ("loss.terms.0.weight=.inf", r"loss\.terms\[0\]\.weight is inf: allowed is a number"),
        ("loss.terms.0.weight={schedule: linear, start: 1, end: 2}", r"loss\.terms\[0\]\.weight\.steps is missing"),
    ],
)
def test_schedules_and_weights_are_checked_by_key(load, override, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        validate(load(override))


NEVER = "{schedule: linear, start: 0, end: 1, steps: 10, from_step: 50}"


def test_a_term_that_weighs_nothing_is_warned_about_and_all_of_them_refused(load, warnings):
    with_ce = "loss.terms=[{kind: kd}, {kind: ce, weight: WEIGHT}]"
    validate(load(with_ce.replace("WEIGHT", NEVER), "train.max_steps=51"))
    assert warnings() == []
    validate(load(with_ce.replace("WEIGHT", NEVER), "train.max_steps=50"))
    validate(load(with_ce.replace("WEIGHT", "0")))
    assert warnings() == ["loss.terms[1].weight is 0 at every step: the term has no effect"] * 2
    with pytest.raises(ConfigError, match=r"^loss\.terms: all weights are 0 at each of the run's 50 steps, so nothing"):
        validate(load(f"loss.terms=[{{kind: kd, weight: {NEVER}}}, {{kind: ce, weight: 0}}]", "train.max_steps=50"))


@pytest.mark.parametrize("has_float16", [True, False])
def test_float16_needs_a_cpu_that_has_it(load, warnings, monkeypatch, has_float16):
    monkeypatch.setattr("ray_kd.validate._cpu_has_float16", lambda: has_float16)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if has_float16:
        validate(load("student.dtype=float16"))
    else:
        with pytest.raises(ConfigError, match=r"^student\.dtype is 'float16': allowed is float32 \| bfloat16 with"):
            validate(load("student.dtype=float16"))
        validate(load("student.dtype=float16", "cluster.address=10.0.0.1:6379"))  # whose CPUs are not known here
    assert warnings() == ["student.dtype=float16 on CPU is slow and exists for tests; float32 or bfloat16 is better"]


def test_deepspeed_asks_the_same_of_a_cpu():
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    from ray_kd.validate import _cpu_has_float16

    assert _cpu_has_float16() == bool(CPU_Accelerator().is_fp16_supported())
