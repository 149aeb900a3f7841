"""A plan against what it is about: real tiny models, encoded payloads, a checkpoint's files, counted FLOPs, engines."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from ray_kd import cli, cluster, config, models
from ray_kd.config import Lora, Student
from ray_kd.payloads import HiddenStates, topk_logprobs
from ray_kd.plan import Asked, describe, plan
from ray_kd.plan.activations import activations_of
from ray_kd.plan.memory import FREE_NBYTES, checkpoint_nbytes, worker_memory
from ray_kd.plan.placement import place
from ray_kd.plan.rates import Balance, Pool
from ray_kd.plan.scale import Workers, communicated, simulate
from ray_kd.plan.sizes import flops_of, size_of
from tests.tiny import tiny_llama
from tests.unit.plan.engines import CASES, LENGTH
from tests.unit.plan.engines import SIZES as ENGINE_SIZES

SIZES = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
RECIPES = sorted(Path("configs").glob("*.yaml"))


def model_config(kind="llama", **changed):
    return transformers.AutoConfig.for_model(kind, **SIZES | changed)


def loaded(*overrides, teacher="teacher", student="student"):
    return config.load(None, [
        "run.dir=run", "data.source={kind: jsonl, paths: [x]}", f"teacher.model={teacher}", f"student.model={student}",
        "data.sequence_length=32", "teacher.top_k=8", *overrides,
    ])  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {"teacher": tiny_llama(root / "teacher", layers=4), "student": tiny_llama(root / "student", layers=2)}


@pytest.mark.parametrize("kind", ["llama", "qwen3", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_the_model(kind, tied):
    made = model_config(kind, tie_word_embeddings=tied)
    real = transformers.AutoModelForCausalLM.from_config(made)
    size = size_of(made, "student")
    assert size.parameters == size.trained == sum(p.numel() for p in real.parameters())
    assert size.embeddings == 300 * 64 * (1 if tied else 2)


def test_what_trains_with_adapters_and_frozen_parts():
    made = model_config()
    real = models.choose_trainable(transformers.AutoModelForCausalLM.from_config(made), Lora(r=4), [])
    adapted, frozen = size_of(made, "student", Lora(r=4)), size_of(made, "student", freeze=["layers.0-1"])
    assert adapted.trained == adapted.beside == sum(p.numel() for p in real.parameters() if p.requires_grad)
    layer = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(made).model.layers[0].parameters())
    assert frozen.trained == frozen.parameters - 2 * layer


def test_a_mixture_of_experts_is_refused():
    with pytest.raises(config.ConfigError, match=r"student.model: model_type 'mixtral' has .* dense decoder"):
        size_of(model_config("mixtral", num_local_experts=4), "student")


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("lora", [None, Lora(r=4)])
def test_flops_are_those_that_are_counted(kind, lora):
    made, rows, length = model_config(kind, num_hidden_layers=8), 2, 32
    size = size_of(made, "student", lora)
    model = transformers.AutoModelForCausalLM.from_config(made, attn_implementation="eager")
    model = models.choose_trainable(model, lora, [])
    ids = torch.zeros(rows, length, dtype=torch.long)
    with FlopCounterMode(display=False) as forward:
        hidden = models.decoder_hidden(model, ids, torch.arange(length).expand(rows, length))
    with FlopCounterMode(display=False) as backward:
        hidden.sum().backward()
    found = flops_of(loaded(), size, size, targets=1.0, is_dense=False, is_sparse=False)
    assert forward.get_total_flops() / (rows * length) == pytest.approx(found.student_forward, rel=0.01)
    assert backward.get_total_flops() / (rows * length) == pytest.approx(found.student_backward, rel=0.03)
    assert found.loss == (3 if lora is None else 2) * 2 * 64 * 300


def test_activations_are_what_autograd_keeps():
    made = model_config(num_hidden_layers=5)
    model = transformers.AutoModelForCausalLM.from_config(made, attn_implementation="sdpa")
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage
        return tensor

    positions = torch.cat([torch.arange(16), torch.arange(16)]).expand(2, 32)  # packed: with a mask
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = models.decoder_hidden(model, torch.zeros(2, 32, dtype=torch.long), positions)
    assert hidden.requires_grad
    planned = activations_of(made, Student(), 2, 32, is_eager=False)
    assert planned.nbytes == pytest.approx(sum(s.nbytes() for s in saved.values()), rel=0.05)
    less = activations_of(made, Student(gradient_checkpointing=True), 2, 32, is_eager=False)
    assert less.nbytes < planned.nbytes / 5 < 2 * less.recomputed


def test_maps_that_attention_terms_look_at_stay_with_checkpointed_layers():
    made, rows, length = model_config(num_hidden_layers=5), 2, 64
    model = transformers.AutoModelForCausalLM.from_config(made, attn_implementation="eager").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    held = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage
        return tensor

    positions = torch.arange(length).expand(rows, length)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ids = torch.zeros(rows, length, dtype=torch.long)
        found = models.decoder_outputs(model, ids, positions, (), range(5))
    assert found.last.requires_grad
    for maps in found.attentions:
        keep(maps)
    planned = activations_of(made, Student(gradient_checkpointing=True), rows, length, is_eager=True)
    assert planned.nbytes == pytest.approx(sum(s.nbytes() for s in held.values()), rel=0.05)


def test_a_teacher_that_is_looked_at_holds_its_maps(folders):
    terms = ("teacher.payload=features", "loss.terms=[{kind: kd}, {kind: attention, heads: mean}]")
    plain, looked = (
        plan(loaded(*given, teacher=folders["teacher"], student=folders["student"]), Asked(rows=10)).teachers[0].memory
        for given in ((), terms)
    )
    made = transformers.AutoConfig.from_pretrained(folders["teacher"])
    maps = models.attention_nbytes(made, 4, 32, 4)  # teacher.batch_size rows
    assert maps <= looked.activations - plain.activations <= 2 * maps


def test_an_engine_that_reserves_its_gpu_leaves_the_rest(folders):
    parts = ("train.gpus_per_worker=0.4", "teacher.pool.num_gpus=0.6")
    # 0.6 of 24 GB leave 9.6, and 1.5 of them are for no tensor.
    for nbytes, fits in ((8e9, True), (8.2e9, False)):
        found = on_gpus(
            folders, *parts, "teacher.engine={kind: vllm, gpu_memory_utilization: 0.6}", student_device="L4"
        )
        assert found.teachers[0].memory.most == pytest.approx(14.4e9)
        worker = found.stages[2]
        assert found.fits(replace(worker, weights=worker.weights + nbytes - worker.most)) is fits
    cached = "teacher.engine={kind: vllm, options: {kv_cache_memory_bytes: 4000000000}}"
    assert 4e9 < on_gpus(folders, *parts, cached, student_device="L4").teachers[0].memory.most < 4.1e9


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    command = [sys.executable, "-m", "tests.unit.plan.engines", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("stage", "dtype"), CASES)
def test_states_are_the_tensors_of_an_engine(stage, dtype, engines):
    made = model_config(**ENGINE_SIZES)
    run = loaded(f"train.zero_stage={stage}", f"student.dtype={dtype}")
    activations = activations_of(made, run.student, 1, LENGTH, is_eager=False)
    planned = worker_memory(
        run, stage, 1, size_of(made, "student"), activations, loss_nbytes=0, evaluation_nbytes=0
    )  # fmt: skip
    states = planned.weights + planned.master + planned.moments + planned.gradients
    # DeepSpeed may hold a bucket between micro-batches, which is a large part of so small a model.
    assert states * 0.97 < engines[f"{stage} {dtype}"] < (states + planned.buffers) * 1.05


def test_a_checkpoint_is_as_large_as_its_files(engines):
    size = size_of(model_config(**ENGINE_SIZES), "student")
    assert checkpoint_nbytes(size) == pytest.approx(engines["checkpoint"], rel=0.01)


def test_bytes_are_those_of_encoded_payloads(folders):
    teacher, student = folders["teacher"], folders["student"]
    rng = np.random.default_rng(0)
    top = topk_logprobs.example(31, rng, top_k=8, vocab_size=259)
    found = plan(loaded(teacher=teacher, student=student), Asked(rows=10))
    assert found.row_nbytes - 12 * 32 == pytest.approx(len(top.encode()), rel=0.05)  # 31 of 32 positions at most
    assert found.nbytes_per_target * 31 + 32 == len(top.encode())
    dense = plan(loaded("teacher.payload=hidden_states", teacher=teacher, student=student), Asked(rows=10))
    assert dense.nbytes_per_target * 31 + 32 == len(HiddenStates(np.zeros((31, 64), np.uint16)).encode())
    assert dense.cache_nbytes == 10 * (32 * 128 + 32 + 8)


def test_the_balance_of_two_pools():
    balance = Balance(Pool(2, 1, 0.01), Pool(1, 1, 0.002), shared=0)  # 200 and 500 tokens/s
    assert balance.tokens_per_second == pytest.approx(200)
    assert balance.waiting == ("student", pytest.approx(0.6))
    assert balance.actors_per_worker == pytest.approx(5)
    shared = Balance(Pool(1, 1, 0.01), Pool(1, 1, 0.01), shared=1)
    assert shared.tokens_per_second == pytest.approx(50)
    assert shared.waiting == ("student", pytest.approx(0.5))
    half = Balance(Pool(2, 1, 0.01), Pool(1, 1, 0.01), shared=0.5)  # 200 tokens/s less half of the student's time
    assert half.tokens_per_second == pytest.approx(100)


def test_parts_are_packed_on_gpus():
    assert [gpu.teachers for gpu in place(0, 0.0, [(3, 0.5)])] == [[0, 0], [0]]
    assert [(gpu.has_worker, gpu.teachers) for gpu in place(2, 0.6, [(3, 0.4)])] == [
        (True, [0]), (True, [0]), (False, [0])
    ]  # fmt: skip
    assert len(place(3, 0.6, [(1, 2.0), (4, 0.0)])) == 5
    assert [gpu.has_worker for gpu in place(1, 0.6, [(1, 0.4)], apart=True)] == [True, False]


def on_gpus(folders, *overrides, teacher_device=None, student_device=None, **asked):
    parts = ("train.gpus_per_worker=0.6", "teacher.pool.num_gpus=0.4")
    run = loaded(*parts, *overrides, teacher=folders["teacher"], student=folders["student"])
    return plan(run, Asked(teacher_device=teacher_device, student_device=student_device, rows=80, **asked))


def test_one_name_stands_for_both_on_a_gpu_that_they_share(folders):
    plans = [
        on_gpus(folders, teacher_device=teacher, student_device=student)
        for teacher, student in (("L4", None), (None, "L4"), ("L4", "l4"))
    ]
    for found in plans:
        assert found.is_shared
        assert found.balance.is_shared
        assert found.teachers[0].device.name == found.student_device.name == "L4"
        assert found.gpu_hours == found.hours == plans[0].hours
        # The two together are more than the GPU, either alone is not.
        worker = found.stages[2]
        room = found.student_device.nbytes - FREE_NBYTES - found.teachers[0].memory.most
        assert found.fits(replace(worker, weights=worker.weights + room - worker.most - 1))
        assert not found.fits(replace(worker, weights=worker.weights + room - worker.most + 10**6))
    with pytest.raises(config.ConfigError, match="--teacher-device is 'L4' and --student-device is 'H100': allowed is"):
        on_gpus(folders, teacher_device="L4", student_device="H100")


def test_several_workers_share_their_gpus_with_teachers(folders):
    two = ("train.num_workers=2", "teacher.pool.max_actors=2")
    found, one = on_gpus(folders, *two), on_gpus(folders)
    assert found.is_shared
    assert len(found.gpus) == 2
    assert found.gpu_hours == pytest.approx(2 * found.hours) == pytest.approx(one.hours)


def test_actors_on_the_same_gpu_fit_together(folders):
    apart = ("train.gpus_per_worker=1", "teacher.pool.num_gpus=0.5", "teacher.pool.max_actors=8")
    found = on_gpus(folders, *apart)
    assert len(found.gpus) == 5
    assert found.teacher_fits(0)
    teacher = found.teachers[0]
    large = replace(teacher, memory=replace(teacher.memory, weights=0.6 * teacher.device.nbytes))
    assert large.memory.most < teacher.device.nbytes - FREE_NBYTES
    assert not replace(found, teachers=[large]).teacher_fits(0)


def test_memory_of_an_elastic_run_is_for_the_fewest_workers(folders):
    found = on_gpus(
        folders,
        "train.num_workers=[1,4]",
        "train.gpus_per_worker=1",
        "train.global_batch_size=12",
        "train.zero_stage=3",
    )
    alone = on_gpus(
        folders, "train.num_workers=1", "train.gpus_per_worker=1", "train.global_batch_size=12", "train.zero_stage=3"
    )
    assert found.stages == alone.stages
    assert "1 of them, the fewest of 1 to 4" in describe(found)


def test_flops_on_a_gpu_config_keep_its_gpu(folders):
    found = on_gpus(folders, flops=1e12)
    assert found.student_device.name == "H100"
    assert found.gpu_hours == found.hours
    assert found.fits(found.stages[0])


def test_the_simulation_splits_as_the_rates_are():
    workers = Workers(1.0, 10, 2, 2, stage=2, gradient_nbytes=0.0, peer_bandwidth=1.0)
    lines = simulate(workers, 3.0, 1, link=1e9, row_nbytes=100, length=5, block_rows=2, num_tokens=3600, counts=(8, 16))
    assert [(s.teacher_gpus, s.student_gpus) for s in lines] == [(6, 2), (12, 4)]
    assert (lines[1].tokens_per_second, lines[1].hours, lines[1].waiting) == (4, 0.25, 0)
    sent = Workers(1.0, 10, 2, 2, stage=3, gradient_nbytes=6.0, peer_bandwidth=1.0)
    assert communicated(sent, 4) == 6 * 6 * 3 / 4


def test_the_table_and_json_say_the_same(folders, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(
        "run: {dir: run}\ndata: {source: {kind: jsonl, paths: [x.jsonl]}, sequence_length: 32}\n"
        f"teacher: {{model: {folders['teacher']}, top_k: 8}}\nstudent: {{model: {folders['student']}}}\n"
    )
    command = [str(path), "--rows", "80", "--teacher-device", "l4", "--student-device", "RTX 4090", "--mfu", "0.5"]
    assert cli.main("plan", [*command, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert cli.main("plan", command) == 0
    text = capsys.readouterr().out
    student, teacher = document["balance"]["student"], document["balance"]["teacher"]
    assert student["tokens_per_second"] == pytest.approx(0.5 * 165.2e12 / document["flops"]["student"])
    assert teacher["tokens_per_second"] == pytest.approx(0.5 * 121e12 / document["flops"]["teacher"])
    assert document["work"]["steps"] == 10
    assert document["hours"] == pytest.approx(80 * 32 / document["balance"]["tokens_per_second"] / 3600)
    assert [stage["fits"] for stage in document["stages"]] == [True] * 4
    assert [line["gpus"] for line in document["simulated"]] == [8, 16, 64, 256, 1000]
    assert f"{document['student']['parameters']:,}" in text
    assert "ZeRO 2*" in text
    assert "simulated, not measured" in text


def test_a_measured_plan_has_rates(folders):
    measured = plan(loaded(teacher=folders["teacher"], student=folders["student"]), Asked(is_measured=True, rows=8))
    assert measured.balance is not None
    assert measured.balance.is_shared
    assert measured.hours is not None
    assert measured.simulated == []


def test_a_measured_plan_counts_frozen_layers(tmp_path, monkeypatch):
    """Clocked by FLOPs, so that no other process on the machine is measured."""
    sizes = {"num_hidden_layers": 6, "tie_word_embeddings": False}
    model_config(**sizes).save_pretrained(tmp_path)

    def counted(run, rounds):
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops() / 1e9

    monkeypatch.setattr("ray_kd.plan.measure._seconds", counted)
    monkeypatch.setattr("ray_kd.plan.measure._RAY_CORES", 0)
    for freeze in ([], ["layers.0-4", "embeddings"], ["layers.0-4", "embeddings", "head"], ["layers.1-4"]):
        every_core = f"train.threads_per_worker={cluster.physical_cores()}"
        run = loaded(f"student.freeze=[{','.join(freeze)}]", every_core, teacher=tmp_path, student=tmp_path)
        found = plan(run, Asked(is_measured=True, rows=8))
        decoder = found.student.forward + found.student.backward  # the counter knows no fused attention of CPUs
        if not freeze:
            beside = found.balance.student.seconds_per_token - decoder / 1e9
        elif "head" not in freeze:
            left = found.balance.student.seconds_per_token - beside
            assert left == pytest.approx(decoder / 1e9, rel=0.1), freeze


def test_mistakes_are_one_line(folders, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(
        "run: {dir: run}\ndata: {source: {kind: jsonl, paths: [x.jsonl]}}\n"
        f"teacher: {{model: {folders['teacher']}}}\nstudent: {{model: {folders['student']}}}\n"
    )
    for arguments, message in (
        (["--teacher-device", "H1000"], "--teacher-device is 'H1000': allowed is H100 | H200"),
        (["--measure", "--flops", "1e12"], "--measure and --flops are both given"),
        (["--measure", "train.gpus_per_worker=1"], "which has no GPU"),
        (["teacher.model=no/such/model"], "teacher.model"),
        (["student.model=null"], "student.model and student.init"),
        (["student.model=null", "student.init.layers=99"], "student.init.layers is 99: allowed is 1 to"),
        (["teacher.top_k=99999999"], "teacher.top_k is 99999999: allowed is at most the teacher's vocabulary"),
    ):
        if "no GPU" in message and torch.cuda.is_available():
            continue
        assert cli.main("plan", [str(path), *arguments]) == 64
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    with pytest.raises(SystemExit) as left:
        cli.main("plan", [str(path), "--mfu", "1.5"])
    assert left.value.code == 64


def test_a_model_of_the_hub_that_cannot_be_reached_is_named(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    run = loaded(teacher="owner/teacher-that-is-not-there", student="owner/student")
    with pytest.raises(config.ConfigError, match=r"teacher.model 'owner/.*config.json does"):
        plan(run, Asked())


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_can_be_planned(recipe, tmp_path):
    from tests.unit.test_recipes import MODELS, config_of, load

    _, names = load(recipe)
    overrides = []
    for section, name in zip(("teacher", "student"), names, strict=True):
        if name is not None:
            made = config_of(name)
            assert name in MODELS
            made.save_pretrained(tmp_path / section)
            overrides.append(f"{section}.model={tmp_path / section}")
    found = plan(load(recipe, *overrides)[0], Asked(rows=10_000))
    assert "assumed" in describe(found)
    is_on_gpus = found.student_device.name != "CPU"
    assert (found.balance is not None) == is_on_gpus == bool(found.simulated)
    if is_on_gpus:  # each was sized for GPUs like these
        assert found.fits(found.stages[found.configured_stage])
