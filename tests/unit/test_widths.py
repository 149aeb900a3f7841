"""Students narrower than their teacher: the scores, the choice, and the model that is left."""

import json

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from ray_kd import models
from ray_kd.config import StudentInit
from ray_kd.errors import ConfigError
from ray_kd.models.widths import ARCHITECTURES
from tests.reference import importance as reference
from tests.tiny import tiny_tokenizer

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 6, "max_position_embeddings": 128, "initializer_range": 0.3,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
VARIANTS = {
    "llama": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "mistral": {"tie_word_embeddings": True, "sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": False},
}


def random_teacher(kind, **options):
    config = transformers.AutoConfig.for_model(kind, **(SIZES | VARIANTS[kind] | options))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():  # norms and biases begin as ones and zeros
            if parameter.dim() == 1:
                parameter.data += 0.2 * torch.randn_like(parameter)
    return model


@pytest.fixture(params=ARCHITECTURES)
def teacher(request, tmp_path):
    """A random model of each architecture and its folder."""
    return saved(random_teacher(request.param), tmp_path / "teacher")


def saved(model, folder):
    model.save_pretrained(folder)
    tiny_tokenizer(folder)
    return model, folder


@pytest.fixture(scope="module")
def rows():
    """Three rows of two documents; the last one ends in padding."""
    ids = np.random.default_rng(0).integers(3, 61, (3, 12)).astype(np.int32)
    ids[2, 8:] = 0
    positions = np.tile(np.concatenate([np.arange(8), np.arange(4)]).astype(np.int32), (3, 1))
    return ids, positions


def narrowed(model, folder, rows, out, layers=(0, 1, 2), **asked):
    """The student of these widths, as pipeline.py makes it."""
    widths = models.check_widths(model.config, asked)
    kept = models.choose_widths(model.config, models.width_importance(model, *rows), widths, layers)
    models.init_from_layers(str(folder), list(layers), str(out), kept=kept)
    return models.load_causal_lm(str(out)), kept


@torch.no_grad()
def logits(model, ids):
    return model(torch.from_numpy(ids).long(), use_cache=False).logits


def test_scores_are_those_of_the_formulas(teacher, rows):
    model, _ = teacher
    model = model.double()
    found = models.width_importance(model, *rows, batch_size=2)
    config = model.config.to_dict() | {"rope_theta": model.config.rope_parameters["rope_theta"], "head_dim": 6}
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    ids = rows[0].tolist()
    expected = reference.scores(weights, config, [[ids[0][:8], ids[0][8:]], [ids[1][:8], ids[1][8:]], [ids[2][:8]]])
    for kind in ("neurons", "heads", "channels"):  # transformers' norms and rotary angles are float32 in any model
        np.testing.assert_allclose(getattr(found, kind), expected[kind], rtol=3e-6, err_msg=kind)
    again = models.width_importance(model, *rows, batch_size=2)
    assert np.array_equal(found.heads, again.heads)
    assert np.array_equal(found.channels, again.channels)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_pruning_nothing_is_the_teacher_bit_by_bit(teacher, rows, tmp_path):
    model, folder = teacher
    asked = {name: SIZES[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads")}
    student, _ = narrowed(model, folder, rows, tmp_path / "student", **asked)
    ours, theirs = student.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert torch.equal(logits(student, rows[0]), logits(model, rows[0]))


def test_a_student_of_chosen_sizes_is_a_model_like_any_other(teacher, rows, tmp_path):
    model, folder = teacher
    asked = {"hidden_size": 20, "intermediate_size": 17, "num_attention_heads": 2, "num_key_value_heads": 2}
    student, _ = narrowed(model, folder, rows, tmp_path / "student", layers=(0, 2), **asked)
    written = json.loads((tmp_path / "student" / "config.json").read_text())
    assert {name: written[name] for name in asked} == asked
    assert (written["head_dim"], written["num_hidden_layers"]) == (6, 2)
    assert written["tie_word_embeddings"] == model.config.tie_word_embeddings
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "student").eval()
    assert torch.isfinite(logits(again, rows[0])).all()
    assert torch.equal(logits(again, rows[0]), logits(student, rows[0]))
    assert again.model.layers[1].self_attn.q_proj.weight.shape == (2 * 6, 20)
    assert again.model.layers[1].mlp.down_proj.weight.shape == (20, 17)
    models.check_architecture(again)  # packed documents apart, and the head a plain one
    ids = torch.from_numpy(rows[0][:1]).long()
    assert again.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False).shape[1] > 12


@torch.no_grad()
def test_neurons_that_are_silent_go_and_the_output_stays(teacher, rows, tmp_path):
    model, _ = teacher
    silent = [{3, 11, 39}, {0, 1, 2}, {20, 21, 30}]
    for layer, dead in zip(model.model.layers, silent, strict=True):
        for name in ("weight", "bias"):
            if getattr(layer.mlp.up_proj, name) is not None:
                getattr(layer.mlp.up_proj, name)[sorted(dead)] = 0
    _, folder = saved(model, tmp_path / "crafted")
    student, kept = narrowed(model, folder, rows, tmp_path / "student", intermediate_size=37)
    assert [set(range(40)) - set(neurons.tolist()) for neurons in kept.neurons] == silent
    torch.testing.assert_close(logits(student, rows[0]), logits(model, rows[0]))


@torch.no_grad()
def test_groups_of_heads_that_say_nothing_go_and_the_output_stays(teacher, rows, tmp_path):
    model, _ = teacher
    silent = [{0, 2}, {2, 3}, {1, 3}]
    for layer, dead in zip(model.model.layers, silent, strict=True):
        values = layer.self_attn.v_proj
        for group in dead:
            values.weight[6 * group : 6 * group + 6] = 0
            if values.bias is not None:
                values.bias[6 * group : 6 * group + 6] = 0
    _, folder = saved(model, tmp_path / "crafted")
    student, kept = narrowed(model, folder, rows, tmp_path / "student", num_attention_heads=4, num_key_value_heads=2)
    assert [set(range(4)) - set(groups.tolist()) for groups in kept.groups] == silent
    torch.testing.assert_close(logits(student, rows[0]), logits(model, rows[0]))


@torch.no_grad()
def test_a_head_of_each_group_that_is_not_used_goes(teacher, rows, tmp_path):
    """Its values are those of its group, so only what o_proj makes of them could be nothing: chosen by importance."""
    model, folder = teacher
    found = models.width_importance(model, *rows)
    student, kept = narrowed(model, folder, rows, tmp_path / "student", num_attention_heads=4)
    for scores, heads, groups in zip(found.heads, kept.heads, kept.groups, strict=True):
        assert groups.tolist() == [0, 1, 2, 3]
        assert heads.tolist() == [2 * group + int(np.argmax(scores[2 * group : 2 * group + 2])) for group in range(4)]
    assert (student.config.num_attention_heads, student.config.num_key_value_heads) == (4, 4)
    # The same model with nothing read from the other heads.
    for layer, heads in zip(model.model.layers, kept.heads, strict=True):
        gone = sorted(set(range(8)) - set(heads.tolist()))
        layer.self_attn.o_proj.weight.view(32, 8, 6)[:, gone] = 0
    torch.testing.assert_close(logits(student, rows[0]), logits(model, rows[0]))


@torch.no_grad()
def test_channels_that_carry_nothing_go_and_the_output_stays(teacher, rows, tmp_path):
    """The norms make up for the mean square over fewer channels (eps, which they do not scale, is small beside it)."""
    model, _ = teacher
    silent = [0, 1, 5, 9, 17, 18, 30, 31]
    model.model.embed_tokens.weight[:, silent] = 0
    for layer in model.model.layers:
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            projection.weight[silent] = 0
            if projection.bias is not None:
                projection.bias[silent] = 0
    _, folder = saved(model, tmp_path / "crafted")
    student, kept = narrowed(model, folder, rows, tmp_path / "student", hidden_size=24)
    assert set(range(32)) - set(kept.channels.tolist()) == set(silent)
    torch.testing.assert_close(logits(student, rows[0]), logits(model, rows[0]), rtol=1e-4, atol=1e-4)


def test_important_widths_keep_more_than_random_ones(rows, tmp_path):
    """A model trained on runs of successors: cut by importance it keeps more of what it learned than cut at random."""
    generator = torch.Generator().manual_seed(0)
    model = random_teacher("qwen3", initializer_range=0.05).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    positions = torch.arange(16).expand(16, 16)

    def batch():
        start, step = (torch.randint(0, n, (16, 1), generator=generator) for n in (58, 7))
        return 3 + (start + (step + 1) * positions) % 58

    for _ in range(150):
        ids = batch()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    _, folder = saved(model, tmp_path / "teacher")
    held_out, calibration = batch(), batch()
    measured = models.width_importance(model, calibration.numpy().astype(np.int32), positions.numpy().astype(np.int32))

    @torch.no_grad()
    def loss_of(scores, name):
        kept = models.choose_widths(model.config, scores, widths, range(3))
        models.init_from_layers(str(folder), [0, 1, 2], str(tmp_path / name), kept=kept)
        return float(models.load_causal_lm(str(tmp_path / name))(held_out, labels=held_out).loss)

    asked_of = {
        "neurons": {"intermediate_size": 20},
        "heads": {"num_attention_heads": 4, "num_key_value_heads": 2},
        "channels": {"hidden_size": 24},
    }
    rng = np.random.default_rng(0)
    for kind, asked in asked_of.items():
        widths = models.check_widths(model.config, asked)
        ours = loss_of(measured, kind)
        shuffled = []
        for draw in range(4):
            scores = {name: rng.permuted(getattr(measured, name), axis=-1) for name in ("neurons", "heads", "channels")}
            shuffled.append(loss_of(models.Importance(**scores), f"{kind}-{draw}"))
        assert ours < np.mean(shuffled), kind


def test_a_teacher_with_a_kv_head_a_query_head_gives_one_like_that():
    config = transformers.LlamaConfig(**(SIZES | {"num_key_value_heads": 8}))
    assert models.check_widths(config, {"num_attention_heads": 4}).num_key_value_heads == 4


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"intermediate_size": 41}, r"student\.init\.intermediate_size is 41: allowed is 1 to the teacher's 40"),
        ({"hidden_size": 0}, r"student\.init\.hidden_size is 0: allowed is 1 to the teacher's 32"),
        ({"num_key_value_heads": 5}, r"num_key_value_heads is 5: allowed is 1 to the teacher's 4"),
        ({"num_attention_heads": 6}, r"num_attention_heads is 6: allowed is 4 \| 8 with 4 KV heads"),
        ({"num_key_value_heads": 2}, r"num_attention_heads is 8: allowed is 2 \| 4 with 2 KV heads .* 2 query heads"),
        ({"num_attention_heads": 2}, r"num_attention_heads is 2: allowed is 4 \| 8 with 4 KV heads"),
        ({"hidden_size": 30}, r"hidden_size is 30: allowed is a multiple of the student's 8 query heads .* 24 \| 32$"),
    ],
)
def test_sizes_that_cannot_be_are_one_line(asked, message):
    with pytest.raises(ConfigError, match=message) as caught:
        models.check_widths(transformers.LlamaConfig(**SIZES), asked)
    assert "\n" not in str(caught.value)


def test_another_architecture_is_named():
    with pytest.raises(ConfigError, match=r"widths of model_type 'gemma2': allowed is llama \| mistral \| qwen2 \| qw"):
        models.check_widths(transformers.Gemma2Config(), {"hidden_size": 8})


def test_only_the_sizes_that_are_set_are_asked_for():
    assert models.asked_widths(StudentInit(layers=2)) == {}
    assert models.asked_widths(StudentInit(layers=2, hidden_size=8)) == {"hidden_size": 8}
