"""Hidden states and attention of chosen layers, over transformers' architectures; who gives none is refused by name."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from ray_kd import models
from ray_kd.errors import ConfigError
from tests.tiny import tiny_llama
from tests.unit.test_models import ARCHITECTURES, BASE

POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
TOKENS = torch.arange(3, 13)[None]


def built(name, options, implementation="eager"):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**BASE, **options})
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation).double().eval()


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "GPTNeoX", "Qwen3"])
def test_layers_are_those_of_transformers_and_of_documents_alone(name):
    model = built(name, ARCHITECTURES[name])
    models.check_attention_support(model.config, "loss.terms[0]")
    models.check_attentions(model)
    with torch.no_grad():
        found = models.decoder_outputs(model, TOKENS, POSITIONS, [3, 0, 1], [2, 0])
        assert torch.equal(found.last, models.decoder_hidden(model, TOKENS, POSITIONS))
        for own in (slice(0, 4), slice(4, 10)):
            alone = model(TOKENS[:, own], use_cache=False, output_hidden_states=True, output_attentions=True)
            for states, layer in zip(found.hidden, (3, 0, 1), strict=True):
                torch.testing.assert_close(states[:, own], alone.hidden_states[layer], rtol=1e-6, atol=1e-6)
            for maps, layer in zip(found.attentions, (2, 0), strict=True):
                torch.testing.assert_close(maps[:, :, own, own], alone.attentions[layer], rtol=1e-6, atol=1e-6)
    for maps in found.attentions:
        assert (maps[:, :, :4, 4:] == 0).all()
        assert (maps[:, :, 4:, :4] == 0).all()


def test_nothing_is_collected_that_was_not_asked_for():
    model = built("Llama", {})
    found = models.decoder_outputs(model, TOKENS, POSITIONS)
    assert (found.hidden, found.attentions) == ([], [])
    given = []
    model.model.register_forward_hook(lambda module, args, output: given.append(output))
    models.decoder_outputs(model, TOKENS, POSITIONS, [2])
    assert given[0].attentions is None
    assert [states is None for states in given[0].hidden_states] == [True, True, False, True]


def test_gradients_reach_the_model_through_states_and_maps():
    model = built("Llama", {})
    found = models.decoder_outputs(model, TOKENS, POSITIONS, [1], [2])
    (found.hidden[0].square().sum() + found.attentions[0].square().sum()).backward()
    assert model.model.embed_tokens.weight.grad.norm() > 0
    assert model.model.layers[2].self_attn.q_proj.weight.grad.norm() > 0
    assert model.model.layers[2].mlp.up_proj.weight.grad is None


@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_recomputing_layers_in_backward_changes_no_gradient(name):
    """Gradient checkpointing as the trainer asks for it: a map is made inside what is recomputed."""
    found = []
    for recomputes in (False, True):
        model = built(name, ARCHITECTURES[name]).train()
        if recomputes:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        outputs = models.decoder_outputs(model, TOKENS, POSITIONS, [1, 3], [0, 2])
        sum(one.square().sum() for one in (*outputs.hidden, *outputs.attentions, outputs.last)).backward()
        found.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    assert found[0].keys() == found[1].keys()
    for weight, grad in found[0].items():
        torch.testing.assert_close(found[1][weight], grad, rtol=1e-10, atol=1e-12)


def test_attention_that_is_not_eager_is_refused_by_name():
    model = built("Llama", {}, "sdpa")
    with pytest.raises(
        ConfigError, match=r"^LlamaForCausalLM with sdpa attention gives maps of 0 of its 3 layers: all"
    ) as error:
        models.check_attentions(model)
    assert "attn_implementation=eager" in str(error.value)
    assert "\n" not in str(error.value)


def test_maps_that_cross_documents_are_refused():
    model = built("Llama", {})
    own = model.model.layers[1].self_attn
    own.register_forward_hook(lambda module, args, output: (output[0], torch.full_like(output[1], 0.25)))
    with pytest.raises(ConfigError, match=r"what layer 1 gives as attention, \[1, 4, 4, 4\], is no map of documents"):
        models.check_attentions(model)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: transformers.RwkvConfig(), "model_type rwkv gives no attention maps"),
        (lambda: transformers.MambaConfig(), "model_type mamba has layers of linear_attention"),
        (lambda: transformers.Qwen3NextConfig(), "model_type qwen3_next has layers of linear_attention"),
    ],
)
def test_models_without_attention_everywhere_are_refused_by_their_config(config, message):
    with pytest.raises(ConfigError, match=rf"^loss.terms\[3\]: {message}: allowed is a model with attention in all"):
        models.check_attention_support(config(), "loss.terms[3]")


def test_the_implementation_can_be_asked_for_and_its_memory_is_known(tmp_path):
    path = str(tiny_llama(tmp_path))
    assert models.load_causal_lm(path).config._attn_implementation == "sdpa"
    model = models.load_causal_lm(path, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    found = model(TOKENS, use_cache=False, output_attentions=True).attentions
    expected = sum(maps.numel() * maps.itemsize for maps in found)
    assert models.attention_nbytes(model.config, num_rows=1, length=10, itemsize=4) == expected
