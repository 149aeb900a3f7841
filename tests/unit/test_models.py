import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from ray_kd import models
from ray_kd.errors import ConfigError
from ray_kd.models.rows import real_tokens
from tests.tiny import VOCAB_SIZE, tiny_llama, tiny_tokenizer

BASE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ARCHITECTURES = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Gemma2": {"head_dim": 8, "final_logit_softcapping": 2.0, "sliding_window": 4},
    "Gemma3Text": {"head_dim": 8, "sliding_window": 4},
    "GPTNeoX": {},
    "Phi": {},
    "Granite": {"logits_scaling": 3.0},
    "Cohere": {},
    "SmolLM3": {},
    "Qwen3Moe": EXPERTS,
}
PLAIN_HEADS = {"Llama", "Qwen2", "Qwen3", "Gemma3Text", "GPTNeoX", "Phi", "SmolLM3", "Qwen3Moe"}
LEAKING = {
    "OPT": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "Bloom": {"n_layer": 3, "n_head": 4},
    "Mamba": {},
    "GptOss": {"head_dim": 8, **EXPERTS},  # transformers 5.23 builds its mask without position_ids
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama"), layers=4)


def random_model(name: str, options: dict) -> torch.nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**BASE, **options})
    return AutoModelForCausalLM.from_config(config).eval()


# Packed documents


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_packed_documents_equal_each_document_alone(name: str, attention: str) -> None:
    model = random_model(name, ARCHITECTURES[name])
    if attention == "sdpa" and not model._supports_sdpa:
        pytest.skip("this architecture caps its attention logits, which sdpa cannot")
    model.set_attn_implementation(attention)
    models.check_architecture(model)
    head = models.head_of(model)
    rows = [[5, 9, 7], [12, 4, 5]]  # three documents, then padding up to 24
    generator = torch.Generator().manual_seed(1)
    documents = [[torch.randint(3, 97, (length,), generator=generator) for length in row] for row in rows]
    padding = [24 - sum(row) for row in rows]
    ids = torch.stack(
        [torch.cat([*row, torch.zeros(pad, dtype=torch.long)]) for row, pad in zip(documents, padding, strict=True)]
    )
    positions = torch.stack(
        [torch.cat([torch.arange(length) for length in [*row, pad]]) for row, pad in zip(rows, padding, strict=True)]
    )
    for batch in (slice(0, 1), slice(0, 2)):
        packed = models.decoder_hidden(model, ids[batch].int(), positions[batch].int())
        for row, hidden in zip(documents[batch], packed, strict=True):
            start = 0
            for document in row:
                alone = model(input_ids=document[None], use_cache=False).logits[0]
                ours = head.logits(hidden[start : start + len(document)])
                torch.testing.assert_close(ours, alone.float(), atol=1e-5, rtol=1e-5)
                start += len(document)


@pytest.mark.parametrize("name", LEAKING)
def test_architectures_that_mix_packed_documents_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="packed documents see each other"):
        models.check_architecture(random_model(name, LEAKING[name]))


def test_a_head_with_an_unknown_multiplier_is_refused() -> None:
    model = random_model("Llama", {})
    model.lm_head.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(ConfigError, match=r"lm_head\(hidden\)"):
        models.check_architecture(model)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_head_kept_apart_makes_the_same_logits(name: str, tmp_path: Path) -> None:
    head = models.head_of(random_model(name, ARCHITECTURES[name]))
    assert models.head_shape(tmp_path / "head") is None
    models.save_head(head, tmp_path / "head")
    loaded, hidden = models.load_head(str(tmp_path / "head")), torch.randn(5, head.width)
    assert torch.equal(loaded.logits(hidden), head.logits(hidden))
    assert models.head_shape(tmp_path / "head") == models.HeadShape(head.vocab_size, head.width, "float32")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_students_need_a_plain_head(name: str) -> None:
    model = random_model(name, ARCHITECTURES[name])
    if name in PLAIN_HEADS:
        models.require_plain_head(model.config)
    else:
        with pytest.raises(ConfigError, match=f"model_type {model.config.model_type} (caps|scales) its logits"):
            models.require_plain_head(model.config)


def test_a_wrapper_with_get_base_model_is_looked_through(llama: Path) -> None:
    class Wrapper(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def get_base_model(self) -> torch.nn.Module:
            return self.inner

    model = models.load_causal_lm(str(llama))
    ids, positions = torch.arange(6)[None], torch.arange(6)[None]
    wrapped = models.decoder_hidden(Wrapper(model), ids, positions)
    torch.testing.assert_close(wrapped, models.decoder_hidden(model, ids, positions))
    assert models.head_of(Wrapper(model)).weight.data_ptr() == model.lm_head.weight.data_ptr()


# Loading


def test_loading_is_eval_mode_in_the_dtype_asked_for(llama: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert models.load_causal_lm(str(llama)).dtype == torch.float32
    model = models.load_causal_lm(str(llama), dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert model.config._attn_implementation == "sdpa"
    assert capfd.readouterr().err == ""
    with pytest.raises(ConfigError, match="dtype 'int8' is unknown; allowed: auto, float32"):
        models.load_causal_lm(str(llama), dtype="int8")


def test_missing_weights_are_refused_instead_of_made_up(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "longer")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    with pytest.raises(ConfigError, match=r"9 weights are missing or of another shape, first model\.layers\.4"):
        models.load_causal_lm(str(folder))


def test_liger_needs_cuda(llama: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this is about a machine without CUDA")
    assert models.apply_liger(models.load_causal_lm(str(llama))) is False


# What is refused before anything heavy


def damage(folder: Path, how: str) -> None:
    weights = folder / "model.safetensors"
    if how == "bin":
        weights.rename(folder / "pytorch_model.bin")
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "adapter":
        (folder / "config.json").rename(folder / "adapter_config.json")
    elif how == "bad json":
        (folder / "config.json").write_text("{")
    elif how == "shards":
        index = {"metadata": {}, "weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | json.loads(how)))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("bin", r"is a model folder without safetensors \(found pytorch_model.bin\)"),
        ("truncated", "is truncated or not safetensors"),
        ("no config", r"has no config.json \(found"),
        ("adapter", "PEFT adapter: merge it"),
        ("bad json", "config.json cannot be used"),
        ("shards", "lacks 1 of 2 shards, first 'model-00002-of-00002.safetensors'"),
        ('{"architectures": ["LlamaForSequenceClassification"]}', "not a decoder-only language model"),
        ('{"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}', "not a decoder-only language model"),
        ('{"model_type": "made_up"}', "config.json cannot be used"),
        ('{"num_attention_heads": 9, "hidden_size": 512, "head_dim": null}', "config.json cannot be used"),
        ('{"quantization_config": {"quant_method": "gguf"}}', "is quantised and cannot be trained"),
    ],
)
def test_unusable_folders_are_refused_in_one_line(llama: Path, tmp_path: Path, how: str, message: str) -> None:
    folder = shutil.copytree(llama, tmp_path / "model")
    damage(folder, how)
    with pytest.raises(ConfigError, match=message) as caught:
        models.check_model(str(folder), None, "student")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 64


def test_missing_paths_are_told_from_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for path in (str(tmp_path / "nothing"), "./nothing", "../nothing", "runs/nothing", "a/b/c", "~/nothing-here"):
        with pytest.raises(ConfigError, match="does not exist"):
            models.check_model(path, None, "teacher")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match="is a file, not a model folder; convert it"):
        models.check_model("model.gguf", None, "teacher")


def test_hub_problems_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="not a local folder, and the hub cannot be reached") as caught:
        models.check_model("nobody/no-such-model", None, "teacher")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="neither a local folder nor a hub model"):
        models.check_model("no such name", None, "teacher")
    assert models.licence_of("nobody/no-such-model") == "unknown"


def test_a_good_folder_gives_its_config(llama: Path) -> None:
    assert models.check_model(str(llama), None, "student").vocab_size == VOCAB_SIZE


# Identity


def test_identity_follows_content_only(llama: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(llama, tmp_path / "copy")
    assert models.model_identity(str(copy)) == models.model_identity(str(llama))
    retrained = tiny_llama(tmp_path / "retrained", layers=4, seed=1)
    assert models.model_identity(str(retrained)) != models.model_identity(str(llama))
    other_config = json.loads((copy / "config.json").read_text()) | {"rms_norm_eps": 1e-5}
    (copy / "config.json").write_text(json.dumps(other_config))
    assert models.model_identity(str(copy)) != models.model_identity(str(llama))


def test_licence_comes_from_the_card(tmp_path: Path) -> None:
    assert models.licence_of(str(tmp_path)) == "unknown"
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\ntags: [a]\n---\n# Model\n")
    assert models.licence_of(str(tmp_path)) == "apache-2.0"


# Vocabularies


def test_vocabularies_must_agree() -> None:
    teacher, student = tiny_tokenizer(), tiny_tokenizer()
    for rows in ((320, VOCAB_SIZE), (VOCAB_SIZE, 320)):
        with pytest.raises(
            ConfigError,
            match=f"teacher's head has {rows[0]} rows and the student's {rows[1]}, for the same 259 ids of tokens: "
            "teacher.vocabulary is 'strict', allowed is shared",
        ):
            models.compare_vocabularies(teacher, student, *rows)
        assert models.compare_vocabularies(teacher, student, *rows, vocabulary="shared") == []
    for vocabulary in ("strict", "shared"):
        with pytest.raises(ConfigError, match="tokenizer has 259 ids and the student's head only 200 rows"):
            models.compare_vocabularies(teacher, student, 259, 200, vocabulary=vocabulary)
        with pytest.raises(ConfigError, match="tokenizer has 259 ids and the teacher's head only 200 rows"):
            models.compare_vocabularies(teacher, student, 200, 259, vocabulary=vocabulary)
    student.eos_token = "<|endoftext|>"
    assert models.compare_vocabularies(teacher, student, 259, 259) == [
        "eos_token is '<|im_end|>' for the teacher and '<|endoftext|>' for the student"
    ]
    student.add_special_tokens({"additional_special_tokens": ["<think>"]})
    with pytest.raises(
        ConfigError, match=r"\(259 and 260 tokens; 1 ids differ, teacher / student 259: None / '<think>'"
    ):
        models.compare_vocabularies(teacher, student, 320, 320)


# Students from the teacher's layers


@torch.no_grad()
def test_block_influence_is_one_minus_cos_over_real_tokens(llama: Path) -> None:
    model = models.load_causal_lm(str(llama))
    generator = np.random.default_rng(0)
    ids = generator.integers(3, VOCAB_SIZE, (3, 20), dtype=np.int32)
    positions = np.tile(np.concatenate([np.arange(12), np.arange(8)]).astype(np.int32), (3, 1))
    ids[0, 12:] = 2  # the first row ends in padding
    scores = models.block_influence(model, ids, positions, batch_size=2)
    assert len(model.model.layers[0]._forward_hooks) == 0

    output = model.model(
        input_ids=torch.from_numpy(ids).long(),
        position_ids=torch.from_numpy(positions).long(),
        attention_mask=None,
        use_cache=False,
        output_hidden_states=True,
    )
    # transformers' last hidden state is after the final norm, so the last layer is checked by its range alone.
    hidden = [h.double() for h in output.hidden_states]
    real = np.ones((3, 20), dtype=bool)
    real[0, 12:] = False
    for layer in range(3):
        a, b = hidden[layer][torch.from_numpy(real)], hidden[layer + 1][torch.from_numpy(real)]
        cosine = (a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)
        assert scores[layer] == pytest.approx(float((1 - cosine).mean()), abs=1e-6)
    assert 0 < scores[3] < 2


def test_padding_is_a_last_document_of_one_id() -> None:
    ids = np.array([[5, 6, 7, 2, 2, 2], [5, 6, 7, 8, 2, 2], [2, 2, 2, 2, 2, 2], [5, 6, 5, 6, 5, 2]])
    positions = np.array([[0, 1, 2, 0, 1, 2], [0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]])
    assert real_tokens(ids, positions).tolist() == [
        [True] * 3 + [False] * 3,
        [True] * 6,
        [False] * 6,
        [True] * 6,
    ]


def test_choose_layers_keeps_the_best_and_the_last() -> None:
    scores = np.array([0.9, 0.1, 0.5, 0.4, 0.0])
    assert models.choose_layers(scores, 3) == [0, 2, 4]
    assert models.choose_layers(scores, 1) == [4]
    assert models.choose_layers(scores, 5) == [0, 1, 2, 3, 4]
    for count in (0, 6):
        with pytest.raises(ConfigError, match=f"is {count}; the teacher has 5 layers, allowed: 1 to 5"):
            models.choose_layers(scores, count)


@pytest.mark.parametrize("layers", [[], [0, 4], [-1, 2], [0, 0, 1], [2, 1], [0, True], [0, 1.0], ["0"]])
def test_bad_layer_lists_name_the_allowed_range(llama: Path, tmp_path: Path, layers: list) -> None:
    with pytest.raises(ConfigError, match="the teacher has 4 layers, allowed: different indices from 0 to 3"):
        models.init_from_layers(str(llama), layers, str(tmp_path / "student"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - {"Granite", "Cohere"}))
@torch.no_grad()
def test_all_layers_give_the_teacher_and_some_give_those(name: str, tmp_path: Path) -> None:
    teacher_path = tmp_path / "teacher"
    teacher = random_model(name, ARCHITECTURES[name])
    teacher.save_pretrained(teacher_path)
    tiny_tokenizer(teacher_path)
    ids = torch.arange(3, 20)[None]

    models.init_from_layers(str(teacher_path), [0, 1, 2], str(tmp_path / "all"))
    same = models.load_causal_lm(str(tmp_path / "all"))
    torch.testing.assert_close(same(ids).logits, teacher(ids).logits)

    models.init_from_layers(str(teacher_path), [0, 2], str(tmp_path / "some"))
    student = models.load_causal_lm(str(tmp_path / "some"))
    assert student.config.num_hidden_layers == 2
    kept = models.decoder_of(student).layers
    if hasattr(kept[1], "self_attn") and hasattr(kept[1].self_attn, "layer_idx"):
        assert [layer.self_attn.layer_idx for layer in kept] == [0, 1]
    if hasattr(teacher.config, "layer_types"):
        assert student.config.layer_types == [teacher.config.layer_types[i] for i in (0, 2)]
    for ours, theirs in zip(kept[1].parameters(), models.decoder_of(teacher).layers[2].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    # Generating goes through the cache, where a stale layer_idx would show.
    assert student.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False).shape[1] > 17


def test_the_student_folder_is_complete_and_in_the_dtype(llama: Path, tmp_path: Path) -> None:
    models.init_from_layers(str(llama), [1, 3], str(tmp_path / "student"), dtype="bfloat16")
    names = {path.name for path in (tmp_path / "student").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= names
    assert {path.name for path in tmp_path.iterdir()} == {"student"}
    assert (tmp_path / "student" / "model.safetensors").stat().st_mode & 0o444 == 0o444
    assert models.load_causal_lm(str(tmp_path / "student")).dtype == torch.bfloat16
    ours, theirs = (models.load_tokenizer(str(path)) for path in (tmp_path / "student", llama))
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.chat_template == theirs.chat_template


def test_an_atomic_folder_is_complete_or_absent(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "folder"

    def fail_halfway() -> None:
        with models.atomic_folder(target) as partial:
            (partial / "a").write_text("half")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        fail_halfway()
    assert list((tmp_path / "deep").iterdir()) == []
    for content in ("one", "two"):
        with models.atomic_folder(target) as partial:
            (partial / "a").write_text(content)
        assert (target / "a").read_text() == content
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["folder"]
