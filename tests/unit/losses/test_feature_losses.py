"""Losses on hidden states and attention: values and gradients of their slow twins, whatever a batch is cut into."""

import pickle

import numpy as np
import pytest
import torch

from ray_kd.losses.feature_batch import FeatureBatch
from ray_kd.losses.features import attention, hidden_state
from ray_kd.losses.layer_map import ModelShape
from ray_kd.payloads import Features, FeatureSpec
from tests.reference import feature_losses, feature_rows

STUDENT, TEACHER = ModelShape(4, 3, 2), ModelShape(8, 5, 2)
KEY = "loss.terms[2]"


def batch_of(spec, hidden, maps, chosen=slice(None), width=TEACHER.width, num_heads=TEACHER.num_heads):
    """Through the wire. hidden, maps: whole, of the layers of the spec; chosen: rows that have a payload."""
    labels, positions = feature_rows.rows()
    used = np.arange(len(labels))[chosen]
    sent = feature_rows.payloads(spec, hidden, maps, labels, positions)
    payloads = [Features.decode(sent[row].encode()) for row in used]
    return FeatureBatch.of(spec, payloads, labels, positions, used, width=width, num_heads=num_heads)


def lists(chosen=slice(None)):
    labels, positions = feature_rows.rows()
    return labels[chosen].tolist(), positions[chosen].tolist()


def leaves(tensors):
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def grads(loss, tensors):
    return torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("measure", ["mse", "cosine"])
@pytest.mark.parametrize("mask", ["targets", "attention"])
@pytest.mark.parametrize("is_projected", [False, True])
def test_hidden_states_have_the_value_and_the_gradient_of_the_twin(measure, mask, is_projected):
    generator = torch.Generator().manual_seed(0)
    student = feature_rows.states(generator, 2, STUDENT.width if is_projected else TEACHER.width)
    teacher = feature_rows.states(generator, 2, TEACHER.width)
    shape = STUDENT if is_projected else ModelShape(4, TEACHER.width, 2)
    options = {"projector": "linear"} if is_projected else {}
    config = hidden_state.Config(measure=measure, layers=[-1, 1], mask=mask, **options)
    term = hidden_state.resolve(config, shape, TEACHER, 11, KEY)
    assert term.hidden_layers == (4, 1)
    assert term.asks == FeatureSpec((2, 8), mask)
    batch = batch_of(term.asks, teacher[::-1], [])

    made = term.projectors.make(seed=3).double() if is_projected else None
    weights = [linear.weight for linear in made] if made is not None else []
    own, twins = leaves(student), leaves(student)
    twin_weights = leaves(weights)
    loss = term(own, batch, made)
    expected, count = feature_losses.hidden_state(
        twins, teacher, *lists(), mask, measure, twin_weights if is_projected else None
    )
    assert term.count(batch) == count > 0
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    found, wanted = grads(loss, own + weights), grads(expected, twins + twin_weights)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("mask", ["targets", "attention"])
@pytest.mark.parametrize("heads", ["match", "mean"])
@pytest.mark.parametrize(("measure", "normalize_rows"), [("mse", False), ("mse", True), ("kl", None), ("kl", True)])
def test_attention_has_the_value_and_the_gradient_of_the_twin(measure, normalize_rows, heads, mask):
    generator = torch.Generator().manual_seed(0)
    shape = ModelShape(4, 3, 2 if heads == "match" else 3)
    student, teacher = (feature_rows.maps(generator, 2, heads) for heads in (shape.num_heads, TEACHER.num_heads))
    student[0][0, 0, 3, 2:4] = 0.0  # below the floor, as behind a sliding window
    if heads == "mean":  # what float16 has of the mean
        teacher = [one.mean(1, keepdim=True).half().double().expand_as(one) for one in teacher]
    config = attention.Config(measure=measure, layers=[0, 2], mask=mask, heads=heads, normalize_rows=normalize_rows)
    term = attention.resolve(config, shape, TEACHER, 11, KEY)
    assert term.attention_layers == (0, 2)
    assert term.asks == FeatureSpec((), "targets", (1, 5), mask, heads == "mean")
    batch = batch_of(term.asks, [], teacher)

    own, twins = leaves(student), leaves(student)
    is_normalised = measure == "kl" or bool(normalize_rows)
    loss = term(own, batch)
    expected, count = feature_losses.attention(twins, teacher, *lists(), mask, measure, heads, is_normalised)
    assert term.count(batch) == count > 0
    assert loss > 0
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for ours, theirs in zip(grads(loss, own), grads(expected, twins), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


def all_terms(mask):
    """Of each measure, with widths that differ and heads that are averaged; and the student's features for each."""
    generator = torch.Generator().manual_seed(1)
    for measure in ("mse", "cosine"):
        config = hidden_state.Config(measure=measure, layers=[2], mask=mask, projector="linear")
        yield hidden_state.resolve(config, STUDENT, TEACHER, 11, KEY), feature_rows.states(generator, 1, STUDENT.width)
    for measure in ("mse", "kl"):
        config = attention.Config(measure=measure, layers=[2], mask=mask, heads="mean")
        shape = ModelShape(4, 3, 3)
        yield attention.resolve(config, shape, TEACHER, 11, KEY), feature_rows.maps(generator, 1, 3)


def projectors_of(term):
    return None if term.projectors is None else term.projectors.make(0).double()


def test_targets_are_found_in_what_another_term_made_the_teacher_send():
    """All positions, all heads and more layers: the union of what terms ask for serves each of them."""
    generator = torch.Generator().manual_seed(0)
    hidden, maps = feature_rows.states(generator, 3, TEACHER.width), feature_rows.maps(generator, 3, 2)
    maps = [one.mean(1, keepdim=True).half().double().expand_as(one) for one in maps]  # the mean is on float16's grid
    wide = FeatureSpec((0, 4, 6), "attention", (0, 5, 7), "attention", mean_over_heads=False)
    for mask in ("targets", "attention"):
        for term, student in all_terms(mask):
            assert wide.union(term.asks) == wide
            alone = batch_of(term.asks, hidden[1:2] * len(term.hidden_layers), maps[1:2] * len(term.attention_layers))
            shared = batch_of(wide, hidden, maps)
            made = projectors_of(term)
            assert term.count(alone) == term.count(shared)
            torch.testing.assert_close(term(student, shared, made), term(student, alone, made), rtol=1e-12, atol=0)


@pytest.mark.parametrize("mask", ["targets", "attention"])
def test_sums_and_counts_of_parts_are_those_of_the_whole(mask):
    """However ranks and micro-batches cut the global batch; a row without a payload counts for nothing."""
    generator = torch.Generator().manual_seed(0)
    hidden, maps = feature_rows.states(generator, 1, TEACHER.width), feature_rows.maps(generator, 1, 2)
    for term, student in all_terms(mask):
        made = projectors_of(term)
        given = hidden * len(term.hidden_layers), maps * len(term.attention_layers)
        whole, *parts = [
            (term(student, batch, made), term.count(batch))
            for batch in (batch_of(term.asks, *given, chosen) for chosen in (slice(None), [0, 2], [1]))
        ]
        torch.testing.assert_close(parts[0][0] + parts[1][0], whole[0], rtol=1e-12, atol=0)
        assert parts[0][1] + parts[1][1] == whole[1]
        assert parts[1][1] > 0


@pytest.mark.parametrize("mask", ["targets", "attention"])
def test_padding_changes_nothing(mask):
    """A row as it is, and with five tokens of padding behind it whose features are anything."""
    generator = torch.Generator().manual_seed(0)
    labels, positions = (column[2:] for column in feature_rows.rows())
    padded = (
        np.pad(labels, ((0, 0), (0, 5)), constant_values=-100),
        np.concatenate([positions, np.arange(5, dtype=np.int32)[None]], axis=1),
    )
    for term, _ in all_terms(mask):
        if term.hidden_layers:
            student, teacher = (torch.randn(1, 16, n, generator=generator).double() for n in (3, 5))
            cut_student, cut_teacher = student[:, :11], teacher[:, :11]
        else:
            student, teacher = (torch.rand(1, n, 16, 16, generator=generator).double() for n in (3, 2))
            cut_student, cut_teacher = student[..., :11, :11], teacher[..., :11, :11]
        found = []
        for own, other, columns in ((cut_student, cut_teacher, (labels, positions)), (student, teacher, padded)):
            given = ([other], []) if term.hidden_layers else ([], [other])
            payloads = feature_rows.payloads(term.asks, *given, *columns)
            batch = FeatureBatch.of(term.asks, payloads, *columns, np.arange(1), width=5, num_heads=2)
            found.append((term([own], batch, projectors_of(term)), term.count(batch)))
        assert found[0][1] == found[1][1]
        torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("mask", ["targets", "attention"])
def test_nobody_valid_is_zero_with_a_gradient_of_zeros(mask):
    for term, student in all_terms(mask):
        nobody = np.empty(0, np.int64)
        batch = FeatureBatch.of(term.asks, [], *feature_rows.rows(), nobody, width=TEACHER.width, num_heads=2)
        assert term.count(batch) == 0
        made = projectors_of(term)
        trained = leaves(student) + ([] if made is None else list(made.parameters()))
        loss = term(trained[:1], batch, made)
        assert loss == 0
        for grad in grads(loss, trained):
            assert (grad == 0).all()


def test_gradients_are_those_of_finite_differences():
    generator = torch.Generator().manual_seed(0)
    hidden, maps = feature_rows.states(generator, 1, TEACHER.width), feature_rows.maps(generator, 1, 2)
    for term, student in all_terms("targets"):
        batch = batch_of(term.asks, hidden * len(term.hidden_layers), maps * len(term.attention_layers), [1])
        made = projectors_of(term)

        def loss(own, term=term, batch=batch, made=made):
            return term([own], batch, made)

        assert torch.autograd.gradcheck(loss, leaves(student))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_are_float32_for_a_student_of_less(dtype):
    generator = torch.Generator().manual_seed(0)
    hidden, maps = feature_rows.states(generator, 1, TEACHER.width), feature_rows.maps(generator, 1, 2)
    for term, student in all_terms("targets"):
        batch = batch_of(term.asks, hidden * len(term.hidden_layers), maps * len(term.attention_layers))
        made, exact = (
            None if term.projectors is None else term.projectors.make(0).to(d) for d in (dtype, torch.double)
        )
        rounded = [one.to(dtype) for one in student]
        loss = term(rounded, batch, made)
        assert loss.dtype == torch.float32
        expected = term([one.double() for one in rounded], batch, exact)
        torch.testing.assert_close(loss.double(), expected, rtol=2e-2 if term.projectors else 1e-4, atol=0)


def test_the_cosine_of_a_zero_state_is_none_and_its_gradient_is_finite():
    config = hidden_state.Config(measure="cosine")
    term = hidden_state.resolve(config, ModelShape(4, 5, 2), TEACHER, 11, KEY)
    zeros = [torch.zeros(3, 11, 5, dtype=torch.float64)]
    batch = batch_of(term.asks, zeros, [])
    (own,) = leaves(zeros)
    loss = term([own], batch)
    assert loss == term.count(batch)
    assert torch.isfinite(grads(loss, [own])[0]).all()


def test_a_payload_of_other_positions_or_features_is_a_bug():
    spec = FeatureSpec((1,), "targets", (0,), "targets")
    generator = torch.Generator().manual_seed(0)
    hidden, maps = feature_rows.states(generator, 1, 5), feature_rows.maps(generator, 1, 2)
    labels, positions = feature_rows.rows()
    sent = feature_rows.payloads(spec, hidden, maps, labels, positions)
    with pytest.raises(AssertionError, match="alignment is broken"):
        FeatureBatch.of(spec, sent[:1], labels, positions, np.array([1]), width=5, num_heads=2)
    with pytest.raises(AssertionError, match=r"payload of .* for "):
        FeatureBatch.of(FeatureSpec((1,)), sent[:1], labels, positions, np.array([0]), width=5, num_heads=2)


def test_projectors_are_those_of_a_seed_and_leave_the_random_state():
    term = hidden_state.resolve(
        hidden_state.Config(layers=[1, 2], projector="linear", projector_learning_rate=1e-3), STUDENT, TEACHER, 11, KEY
    )
    assert term.projectors.learning_rate == 1e-3
    before = torch.random.get_rng_state()
    one, same, other = (term.projectors.make(seed) for seed in (5, 5, 6))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [tuple(linear.weight.shape) for linear in one] == [(5, 3)] * 2
    assert all(linear.bias is None and linear.weight.dtype == torch.float32 for linear in one)
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one[0].weight, other[0].weight)
    assert not torch.equal(one[0].weight, one[1].weight)
    wide = hidden_state.Projectors(1, 400, 300, None).make(0)[0].weight
    assert wide.std().item() == pytest.approx(1 / 20, rel=0.02)


def test_terms_travel_between_processes():
    for mask in ("targets", "attention"):
        for term, _ in all_terms(mask):
            assert pickle.loads(pickle.dumps(term)) == term
