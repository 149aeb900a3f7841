"""What of a student trains: adapters against their formulas, frozen parts, and the folders that come out of them."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, Qwen3Config, Qwen3ForCausalLM

from ray_kd import config, models, results
from ray_kd.config import Lora
from ray_kd.errors import ConfigError
from ray_kd.losses.terms import Factors
from ray_kd.trainer import loop
from ray_kd.trainer.step import DistillModule, Scale
from tests.fake_run import save, write_run
from tests.reference.lora import adapted_weight
from tests.tiny import tiny_llama

LORA = {"lora": Lora(r=4, alpha=6), "dora": Lora(r=4, alpha=6, use_dora=True)}
IDS = torch.arange(10, 26).view(2, 8)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Students of two layers: whether head and embeddings are tied -> folder."""
    folder = tmp_path_factory.mktemp("trainable")
    return {tie: tiny_llama(folder / f"tied-{tie}", hidden=32, tie=tie) for tie in (True, False)}


def randomised(model: torch.nn.Module, seed: int = 5) -> torch.nn.Module:
    """The model as training might leave it: every parameter that trains is moved."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


def trained_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def frozen_of(model: torch.nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if not p.requires_grad}


# Adapters


@pytest.mark.parametrize("kind", LORA)
def test_adapters_are_their_formula_in_value_and_gradient(paths, kind):
    plain = models.load_causal_lm(str(paths[False])).double()
    base = {name: p.detach().clone() for name, p in plain.named_parameters()}
    adapted = randomised(models.choose_trainable(models.load_causal_lm(str(paths[False])).double(), LORA[kind], []))
    weight_of_logits = torch.randn(2, 8, 259, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (adapted(input_ids=IDS).logits * weight_of_logits).sum().backward()

    leaves = {name: p.requires_grad_() for name, p in trained_of(adapted).items()}
    weights = {}
    for name, weight in base.items():
        place = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{place}.lora_A.default.weight" in leaves:
            magnitude = leaves.get(f"{place}.lora_magnitude_vector.default.weight")
            a, b = (leaves[f"{place}.lora_{part}.default.weight"] for part in "AB")
            weights[name] = adapted_weight(weight, a, b, scale=6.0 / 4, magnitude=magnitude)
    assert len(weights) == 2 * 7  # layers x (4 of attention + 3 of the MLP)
    logits = torch.func.functional_call(plain, weights, kwargs={"input_ids": IDS}).logits
    torch.testing.assert_close(adapted(input_ids=IDS).logits, logits, rtol=1e-10, atol=1e-12)
    (logits * weight_of_logits).sum().backward()
    for name, p in adapted.named_parameters():
        assert p.requires_grad == (name in leaves)
        if p.requires_grad:
            torch.testing.assert_close(p.grad, leaves[name].grad, rtol=1e-8, atol=1e-10)

    merged = models.merge_adapters(adapted)
    for name, p in merged.named_parameters():
        torch.testing.assert_close(p, weights.get(name, base[name]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", LORA)
def test_adapters_begin_as_the_base_and_the_same_from_any_random_state(paths, kind):
    plain = models.load_causal_lm(str(paths[True]))
    before = plain(input_ids=IDS).logits
    states = []
    for state in (1, 2):
        torch.manual_seed(state)
        adapted = models.choose_trainable(models.load_causal_lm(str(paths[True])), LORA[kind], [], seed=9)
        drawn = torch.rand(())
        torch.manual_seed(state)
        assert drawn == torch.rand(())
        states.append(trained_of(adapted))
    torch.testing.assert_close(adapted(input_ids=IDS).logits, before, rtol=1e-5, atol=1e-5)
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    other = models.choose_trainable(models.load_causal_lm(str(paths[True])), LORA[kind], [], seed=8)
    assert any(not torch.equal(p, states[0][name]) for name, p in trained_of(other).items())


def test_decoder_and_head_are_reached_through_the_wrapper(paths):
    adapted = randomised(models.choose_trainable(models.load_causal_lm(str(paths[False])), LORA["lora"], []))
    positions = torch.arange(8).expand(2, 8)
    hidden = models.decoder_hidden(adapted, IDS, positions)
    torch.testing.assert_close(models.head_of(adapted).logits(hidden), adapted(input_ids=IDS).logits)
    assert not models.base_causal_lm(adapted).get_output_embeddings().weight.requires_grad


def test_only_the_named_layers_get_adapters(paths):
    lora = Lora(r=2, target_modules=["q_proj", "layers.1.mlp.up_proj"])
    adapted = models.choose_trainable(models.load_causal_lm(str(paths[True])), lora, [])
    places = {name.split(".lora_")[0].removeprefix("base_model.model.model.layers.") for name in trained_of(adapted)}
    assert places == {"0.self_attn.q_proj", "1.self_attn.q_proj", "1.mlp.up_proj"}


@pytest.mark.parametrize(("lora", "sizes"), [(Lora(r=2, target_modules=["q_proj"]), 2 * 2 * (32 + 32)), (None, 0)])
def test_what_would_train_is_known_from_the_config(lora, sizes):
    """With an architecture of other linear layers than Llama's; nothing is allocated."""
    wide = Qwen3Config(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=False,
    )  # fmt: skip
    total = sum(p.numel() for p in Qwen3ForCausalLM(wide).parameters())
    freeze = [] if lora else ["embeddings", "layers.0-1", "head"]
    trained, of = models.check_trainable(wide, lora, freeze)
    assert (trained, of) == (sizes or 32, total)  # the final norm


def test_an_architecture_of_other_names_is_asked_for_its_own():
    """GPT-2: its linear layers are transposed, its layers are not called so."""
    gpt2 = GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=2)
    trained, _ = models.check_trainable(gpt2, Lora(r=2, target_modules=["c_attn"]), [])
    assert trained == 2 * 2 * (32 + 3 * 32)
    with pytest.raises(ConfigError, match=r"'q_proj', which matches nothing in GPT2.*: c_attn, c_fc, c_proj$"):
        models.check_trainable(gpt2, Lora(r=2, target_modules=["q_proj"]), [])
    with pytest.raises(ConfigError, match=r"'layers\.0', and GPT2LMHeadModel has no list of decoder layers"):
        models.check_trainable(gpt2, None, ["layers.0"])
    assert models.check_trainable(gpt2, None, ["transformer.h.0.*"])[0] > 0


# Frozen parts

LAYER_1 = {
    "model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight",
    "model.layers.1.self_attn.v_proj.weight", "model.layers.1.self_attn.o_proj.weight",
    "model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight",
    "model.layers.1.input_layernorm.weight", "model.layers.1.post_attention_layernorm.weight",
}  # fmt: skip


@pytest.mark.parametrize(
    ("freeze", "expected"),
    [
        (["embeddings"], {"model.embed_tokens.weight"}),
        (["head"], {"lm_head.weight"}),
        (["layers.1"], LAYER_1),
        (["layers.0-1", "head"], LAYER_1 | {name.replace("1", "0", 1) for name in LAYER_1} | {"lm_head.weight"}),
        (["*.mlp.up_proj.*"], {f"model.layers.{i}.mlp.up_proj.weight" for i in range(2)}),
        (["model.norm.weight", "layers.1-1"], LAYER_1 | {"model.norm.weight"}),
    ],
    ids=str,
)
def test_frozen_is_what_is_named(paths, freeze, expected):
    model = models.choose_trainable(models.load_causal_lm(str(paths[False])), None, freeze)
    assert frozen_of(model) == expected


def test_a_tied_head_is_frozen_with_the_embeddings(paths):
    model = models.load_causal_lm(str(paths[True]))
    for freeze in (["embeddings"], ["head"], ["*embed*"]):
        with pytest.raises(ConfigError, match="head is its embeddings") as caught:
            models.choose_trainable(model, None, freeze)
        assert "\n" not in str(caught.value)
    assert frozen_of(models.choose_trainable(model, None, ["head", "embeddings"])) == {"model.embed_tokens.weight"}


@pytest.mark.parametrize(
    ("lora", "freeze", "message"),
    [
        (None, ["layers.2"], "'layers.2': allowed is layers.0 to layers.1, or layers.FIRST-LAST"),
        (None, ["layers.1-0"], "'layers.1-0': allowed is"),
        (None, ["head", "nothing.*"], r"'nothing\.\*', which matches nothing in LlamaForCausalLM"),
        (None, ["model.*", "head"], "which is all of the student"),
        (Lora(r=1, target_modules=["query"]), [], "'query', which matches nothing in LlamaForCausalLM.*q_proj"),
        (Lora(r=1, target_modules=["lm_head"]), [], "'lm_head', the head: it stays frozen"),
        (Lora(r=1, target_modules=["q_proj", "embed_tokens"]), [], "'embed_tokens', a Embedding"),
    ],
)
def test_what_the_student_does_not_have_is_refused_from_its_config_and_when_it_is_loaded(paths, lora, freeze, message):
    with pytest.raises(ConfigError, match=message) as early:
        models.check_trainable(AutoConfig.from_pretrained(paths[False]), lora, freeze)
    with pytest.raises(ConfigError) as late:
        models.choose_trainable(models.load_causal_lm(str(paths[False])), lora, freeze)
    assert str(early.value) == str(late.value)
    assert "\n" not in str(late.value)


# The loss


class Produced(TorchDispatchMode):
    """Counts the tensors of a shape that operations make, views of what was there left out."""

    def __init__(self, like: torch.Tensor) -> None:
        super().__init__()
        self.like, self.count = like, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            is_new = isinstance(tensor, torch.Tensor) and tensor.data_ptr() != self.like.data_ptr()
            self.count += is_new and tensor.shape == self.like.shape
        return out


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("what", ["everything", "lora", "frozen"])
def test_no_gradient_of_a_frozen_head_is_computed(paths, what, tie):
    """No tensor of its shape is ever made, in forward or backward; with a head that trains one is."""
    student = models.choose_trainable(
        models.load_causal_lm(str(paths[tie])),
        LORA["lora"] if what == "lora" else None,
        ["embeddings", "head"] if what == "frozen" else [],
    )
    head = models.base_causal_lm(student).get_output_embeddings().weight
    is_target = torch.arange(16) % 3 > 0
    teacher = {"teacher_ids": torch.arange(30).view(10, 3), "teacher_logprobs": torch.full((10, 3), -2.0)}
    batch = SimpleNamespace(targets=is_target, labels=IDS.flatten()[is_target], teacher=teacher)
    module = DistillModule(student, {})
    scale = Scale(num_valid_tokens=10, factors=Factors(1.0, {"kd": 1.0, "ce": 0.5}))
    with Produced(head) as produced:
        module(IDS, torch.arange(8).expand(2, 8), batch, scale).backward()
    assert (produced.count > 0) == (what == "everything")
    assert (head.grad is not None) == (what == "everything")
    assert all(bool(p.grad.any()) for name, p in student.named_parameters() if name.endswith("lora_B.default.weight"))


# What comes out


def make_run(home: Path, *overrides: str) -> tuple[config.RunConfig, torch.nn.Module]:
    """A run in home/run that trained a part of its student, and the student it has in its newest checkpoint."""
    run = write_run(home)
    loaded = config.load(run / "config.yaml", list(overrides))
    path = str(home / "student")
    student = models.choose_trainable(models.load_causal_lm(path), loaded.student.lora, loaded.student.freeze)
    randomised(student)
    base = {"student_path": path, "student_identity": models.model_identity(path)}
    save(run, 9, {"metrics": {}} | base, trained_of(student))
    return loaded, student


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_final_is_the_merged_model_and_adapter_is_the_adapter(tmp_path, use_dora):
    loaded, student = make_run(tmp_path, "student.lora={r: 4, target_modules: [v_proj, up_proj, q_proj]}",
                               f"student.lora.use_dora={use_dora}")  # fmt: skip
    out = tmp_path / "out"
    assert results.export(loaded, out) == 9
    expected = student(input_ids=IDS).logits
    final, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(final(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
    assert not [name for name in load_file(out / "model.safetensors") if "lora" in name]

    base = models.load_causal_lm(str(tmp_path / "student"))
    assert not torch.allclose(base(input_ids=IDS).logits, expected, rtol=1e-2, atol=1e-2)
    read = PeftModel.from_pretrained(base, out / "adapter")
    torch.testing.assert_close(read(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-6)
    described = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert described["target_modules"] == ["q_proj", "up_proj", "v_proj"]
    assert described["base_model_name_or_path"] == str(tmp_path / "student")
    assert sorted(path.name for path in (out / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    modes = {(out / name).stat().st_mode for name in ("config.json", "adapter/adapter_model.safetensors")}
    assert len(modes) == 1
    assert f"trained: {'DoRA' if use_dora else 'LoRA'} adapters of rank 4" in (out / "README.md").read_text()


def test_final_has_the_frozen_parts_of_the_base(tmp_path):
    loaded, student = make_run(tmp_path, "student.freeze=[embeddings, head, layers.0]")
    results.export(loaded, tmp_path / "out")
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = dict(student.named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in final.named_parameters())
    base = load_file(tmp_path / "student" / "model.safetensors")
    kept = {name for name, p in final.named_parameters() if torch.equal(p, base[name])}
    assert kept == frozen_of(student)
    assert not (tmp_path / "out" / "adapter").exists()
    assert "not trained: embeddings, head, layers.0" in (tmp_path / "out" / "README.md").read_text()


def test_a_base_that_is_another_model_now_is_refused(tmp_path):
    loaded, _ = make_run(tmp_path, "student.lora.r=4")
    tiny_llama(tmp_path / "student", hidden=32, seed=77)
    with pytest.raises(ConfigError, match="is not the model that the student was trained on") as caught:
        results.export(loaded, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_going_on_from_another_base_is_refused(tmp_path):
    """Before the state of the optimizer is touched."""
    make_run(tmp_path, "student.lora.r=4")
    spec = SimpleNamespace(run_dir=str(tmp_path / "run"), student_path="moved", student_identity="sha256:another")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(ConfigError, match="'moved' is not the model that the checkpoint's student was trained on"):
            loop._restore(spec, SimpleNamespace(module=None), rank=0)
    finally:
        dist.destroy_process_group()


def test_a_checkpoint_of_other_adapters_is_refused(paths):
    student = models.choose_trainable(models.load_causal_lm(str(paths[True])), LORA["lora"], [])
    given = list(trained_of(student).items())
    models.load_trained(student, given)
    with pytest.raises(ConfigError, match=r"lacks 1 parameters that train, first .*lora_"):
        models.load_trained(student, given[:-1])
    with pytest.raises(ConfigError, match=r"has model.norm.weight \[3\], which does not train"):
        models.load_trained(student, [*given, ("model.norm.weight", torch.zeros(3))])
    with pytest.raises(ConfigError, match="does not train in this student"):
        models.load_trained(student, [(given[0][0], torch.zeros(3))])
