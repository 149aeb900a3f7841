"""Every loss on features on disk: documented options, nothing to learn of itself, sums that add up."""

import pickle
from dataclasses import asdict

import numpy as np
import pytest
import torch

from ray_kd import plugins
from ray_kd.errors import ConfigError
from ray_kd.losses.feature_batch import FeatureBatch
from ray_kd.losses.layer_map import ModelShape
from ray_kd.payloads import FeatureSpec
from tests.reference import feature_rows

GROUP, KEY = "losses.features", "loss.terms[0]"
KINDS = plugins.available(GROUP)
SHAPE = ModelShape(4, 5, 2)


def resolved(kind, **options):
    module, config = plugins.options(GROUP, {"kind": kind, **options}, KEY)
    return module.resolve(config, SHAPE, SHAPE, 11, KEY)


def features(term):
    """Whole features of the layers that a term takes of the student."""
    generator = torch.Generator().manual_seed(0)
    hidden = feature_rows.states(generator, len(term.hidden_layers), SHAPE.width)
    return hidden, feature_rows.maps(generator, len(term.attention_layers), SHAPE.num_heads)


def batch_of(term, hidden, maps, used=slice(None)):
    labels, positions = feature_rows.rows()
    rows = np.arange(len(labels))[used]
    payloads = feature_rows.payloads(term.asks, hidden, maps, labels, positions)
    return FeatureBatch.of(
        term.asks, [payloads[row] for row in rows], labels, positions, rows, width=SHAPE.width, num_heads=2
    )


def test_the_losses_of_the_design_are_found():
    assert set(KINDS) >= {"hidden_state", "attention"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_option_has_a_sentence_and_none_is_a_weight(kind):
    (fields,) = (fields for name, sentence, fields in plugins.describe_kinds(GROUP) if name == kind and sentence)
    assert all(field.sentence for field in fields)
    _, config = plugins.options(GROUP, kind, KEY)
    assert {field.name for field in fields} == asdict(config).keys()
    assert "weight" not in asdict(config)


@pytest.mark.parametrize("kind", KINDS)
def test_a_term_asks_for_what_it_takes_and_travels(kind):
    term = resolved(kind)
    assert bool(term.hidden_layers) != bool(term.attention_layers)
    assert bool(term.asks.hidden_layers) == bool(term.hidden_layers)
    assert bool(term.asks.attention_layers) == bool(term.attention_layers)
    assert term.asks.union(FeatureSpec()) == term.asks
    assert pickle.loads(pickle.dumps(term)) == term
    assert term.projectors is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", ["targets", "attention"])
def test_the_teacher_itself_has_nothing_to_learn(kind, mask):
    term = resolved(kind, layers=[1, -1], teacher_layers=[1, -1], mask=mask)
    hidden, maps = features(term)
    own = [one.clone().requires_grad_() for one in (*hidden, *maps)]
    loss = term(own, batch_of(term, hidden, maps))
    torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-12)
    for grad in torch.autograd.grad(loss, own):
        torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_counted_places_has_a_gradient(kind):
    """And each row adds its own sum and count, however they are put together."""
    term = resolved(kind)
    hidden, maps = features(term)
    given = torch.Generator().manual_seed(1)
    own = [torch.rand(one.shape, generator=given, dtype=torch.float64).requires_grad_() for one in (*hidden, *maps)]
    whole = batch_of(term, hidden, maps)
    loss = term(own, whole)
    alone = [batch_of(term, hidden, maps, [row]) for row in range(3)]
    torch.testing.assert_close(sum(term(own, one) for one in alone), loss)
    assert sum(term.count(one) for one in alone) == term.count(whole) > 0
    places = (whole.tokens or whole.pairs)["targets"].student
    for grad in torch.autograd.grad(loss, own):
        entries = grad.flatten(0, 1) if term.hidden_layers else grad.movedim(1, -1).flatten(0, 2)
        is_counted = torch.zeros(len(entries), dtype=torch.bool)
        is_counted[places] = True
        assert (entries[~is_counted] == 0).all()
        assert (entries[is_counted] != 0).any()


@pytest.mark.parametrize("kind", KINDS)
def test_another_device_has_the_same_batch(kind):
    term = resolved(kind)
    moved = batch_of(term, *features(term)).to("meta")
    assert {moved.hidden.device.type, moved.attention.device.type} == {"meta"}
    own = [one.to("meta") for side in features(term) for one in side]
    assert term(own, moved).shape == ()


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_option_is_refused_by_name(kind):
    with pytest.raises(ConfigError, match=rf"^loss.terms\[0\]: unknown option 'layer' of kind '{kind}'; did you mean"):
        resolved(kind, layer=[1])
