"""The module that DeepSpeed wraps, with every kind of term: value and gradients of slow twins that share no code.

The twin runs each document alone through the whole model, so packing is part of what is compared.
"""

import itertools

import pytest
import torch

from ray_kd import schema
from ray_kd.losses.terms import Schedules, parse_terms
from ray_kd.trainer.step import DistillModule, Scale
from tests import fake_stream
from tests.reference import feature_losses
from tests.reference.kd_loss import kd_loss

STEP = 3
TEMPERATURE = 1.0
WEIGHTS = {"kd": 1.5, "ce": 0.5, "hidden_state_1": 0.3, "attention": 2.0, "hidden_state_2": 0.2}
LOSSES = {"hidden_state_1": "hidden_state_loss_1", "attention": "attention_loss",
          "hidden_state_2": "hidden_state_loss_2"}  # fmt: skip


def module(**options):
    built = DistillModule(
        fake_stream.student(), {"divergence": "forward_kl", "tail": "bucket", "chunk_size": 5, **options},
        features=fake_stream.terms(), seed=4,
    ).double()  # fmt: skip
    return built.train()


def scale_of(batches, **weights):
    factors = Schedules.of(parse_terms(fake_stream.TERMS), TEMPERATURE).at(STEP)
    counts = {name: sum(term.count(b.features) for b in batches) for name, term in fake_stream.terms().items()}
    return Scale(sum(len(b.labels) for b in batches), factors, counts)


def whole_outputs(model, rows):
    """Hidden states and attention of every layer, [B, T, H] and [B, h, T, T], from each document alone."""
    hidden = [[] for _ in range(fake_stream.STUDENT.num_layers + 1)]
    maps = [[] for _ in range(fake_stream.STUDENT.num_layers)]
    for ids, positions in zip(rows[schema.INPUT_IDS], rows[schema.POSITION_IDS], strict=True):
        starts = [*[t for t, position in enumerate(positions) if position == 0], len(ids)]
        parts = [
            model(input_ids=torch.tensor(ids[a:b][None].astype("int64")), output_hidden_states=True,
                  output_attentions=True, use_cache=False)
            for a, b in itertools.pairwise(starts)
        ]  # fmt: skip
        for layer, found in enumerate(hidden):
            found.append(torch.cat([part.hidden_states[layer][0] for part in parts]))
        for layer, found in enumerate(maps):
            heads = range(fake_stream.STUDENT.num_heads)
            found.append(
                torch.stack([torch.block_diag(*[part.attentions[layer][0, h] for part in parts]) for h in heads])
            )
    return [torch.stack(one) for one in hidden], [torch.stack(one) for one in maps]


def twin(model, projectors, seed, used):
    """(sums, counts) by term of some rows, straight from the definitions."""
    rows = {name: column[used] for name, column in fake_stream.rows(seed).items()}
    sent = [fake_stream.payloads(seed)[row] for row in used]
    labels, positions = rows[schema.LABELS].tolist(), rows[schema.POSITION_IDS].tolist()
    hidden, maps = whole_outputs(model, rows)
    spec = fake_stream.asked()
    t_hidden, t_maps = ([one[used] for one in side] for side in fake_stream.teacher(seed))
    t_hidden = dict(zip(spec.hidden_layers, t_hidden, strict=True))
    # What float16 has of the mean is what is sent.
    t_maps = [one.mean(1, keepdim=True).half().double() for one in t_maps]
    targets = [(row, t) for row in range(len(used)) for document in
               feature_losses.counted(labels[row], positions[row], "targets") for t in document]  # fmt: skip
    at_targets = torch.stack([hidden[-1][place] for place in targets])
    told = kd_loss(
        at_targets, model.lm_head.weight, torch.tensor([row for p in sent for row in p.topk.ids.tolist()]),
        torch.tensor([row for p in sent for row in p.topk.logprobs.tolist()], dtype=torch.float64),
        torch.tensor([labels[row][t + 1] for row, t in targets]), num_valid_tokens=1,
        kd_weight=WEIGHTS["kd"], ce_weight=WEIGHTS["ce"],
    )[0]  # fmt: skip
    terms = {
        # Student layers 1 and 2 of 2 learn from 2 and 4 of 4; 0 from 0.
        "hidden_state_1": feature_losses.hidden_state(
            [hidden[1], hidden[2]], [t_hidden[2], t_hidden[4]], labels, positions, "targets", "mse",
            projectors["hidden_state_1"],
        ),
        "attention": feature_losses.attention(
            [maps[0]], t_maps, labels, positions, "attention", "mse", "mean", False
        ),
        "hidden_state_2": feature_losses.hidden_state(
            [hidden[0]], [t_hidden[0]], labels, positions, "targets", "cosine", projectors["hidden_state_2"]
        ),
    }  # fmt: skip
    return (told, len(targets)), terms


@pytest.mark.parametrize("weights", [(1, 1, 1), (1, 0, 1)], ids=["all", "one refused"])
def test_every_term_has_the_value_and_the_gradients_of_its_twin(weights):
    ours, seed = module(), 7
    batch = fake_stream.micro_batch(seed, weights)
    loss = ours(batch.input_ids, batch.position_ids, batch, scale_of([batch]))
    loss.backward()

    theirs = fake_stream.student()
    projectors = {
        name: [linear.weight.detach().clone().requires_grad_() for linear in made]
        for name, made in ours.projectors.items()
    }
    used = [row for row, weight in enumerate(weights) if weight]
    (told, num_targets), terms = twin(theirs, projectors, seed, used)
    expected = told / num_targets
    for name, (total, count) in terms.items():
        expected = expected + WEIGHTS[name] * total / count
        torch.testing.assert_close(ours.metrics[LOSSES[name]], (total / count).detach(), rtol=1e-9, atol=0)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    for name, parameter in theirs.named_parameters():
        grad = ours.student.get_parameter(name).grad
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-7, atol=1e-11, msg=name)
    for name, made in projectors.items():
        for linear, weight in zip(ours.projectors[name], made, strict=True):
            assert weight.grad.abs().max() > 0
            torch.testing.assert_close(linear.weight.grad, weight.grad, rtol=1e-7, atol=1e-12)


def test_micro_batches_add_up_to_the_global_batch():
    """Cut in three, one of one usable row and one of none: what each gives is over the counts of all."""
    ours, theirs = module(), fake_stream.student()
    cuts = [(1, (1, 1, 1)), (2, (0, 1, 0)), (3, (0, 0, 0))]
    batches = [fake_stream.micro_batch(seed, weights) for seed, weights in cuts]
    scale = scale_of(batches)
    losses = []
    for batch in batches:
        losses.append(ours(batch.input_ids, batch.position_ids, batch, scale))
        losses[-1].backward()
    assert losses[-1] == 0.0
    projectors = {name: [linear.weight for linear in made] for name, made in ours.projectors.items()}
    twins = [
        twin(theirs, projectors, seed, [row for row, weight in enumerate(weights) if weight])
        for seed, weights in cuts[:2]
    ]
    expected = sum(told for (told, _), _ in twins) / sum(num_targets for (_, num_targets), _ in twins)
    for name, weight in WEIGHTS.items():
        if name in LOSSES:
            sums, counts = zip(*(terms[name] for _, terms in twins), strict=True)
            expected = expected + weight * sum(sums) / sum(counts)
    torch.testing.assert_close(sum(losses), expected, rtol=1e-9, atol=0)
    wanted = torch.autograd.grad(expected, list(theirs.parameters()))
    for (name, _), grad in zip(theirs.named_parameters(), wanted, strict=True):
        torch.testing.assert_close(ours.student.get_parameter(name).grad, grad, rtol=1e-7, atol=1e-11, msg=name)


def test_gradient_checkpointing_changes_nothing():
    plain, checkpointed = module(), module()
    checkpointed.student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batch = fake_stream.micro_batch(5)
    losses = []
    for one in (plain, checkpointed):
        loss = one(batch.input_ids, batch.position_ids, batch, scale_of([batch]))
        loss.backward()
        losses.append(loss.detach())
    assert losses[0] == losses[1]
    for (name, one), other in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-15, msg=name)


def test_projectors_are_those_of_the_seed_and_have_their_own_rate():
    one, other = module(), module()
    for name, parameter in one.projectors.named_parameters():
        assert torch.equal(parameter, other.projectors.get_parameter(name))
    first, second = (one.projectors[name][0].weight for name in ("hidden_state_1", "hidden_state_2"))
    assert not torch.equal(first, second)
    assert one.learning_rates == {"projectors.hidden_state_1.": 3e-2}
    assert one.metric_names[-3:] == tuple(LOSSES.values())


def test_without_feature_terms_nothing_but_the_last_states_is_kept():
    plain = DistillModule(fake_stream.student(), {"divergence": "forward_kl"})
    assert (plain.metric_names, plain.learning_rates, list(plain.projectors.parameters())) == (
        ("loss", "kd_loss", "ce_loss", "teacher_topk_mass", "top1_agreement"), {}, [],
    )  # fmt: skip
