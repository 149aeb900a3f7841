"""From a teacher's forward over the wire to the loss: what the student learns from stands at the same tokens on both
sides. Two models, packed rows with prompts and padding, against slow twins on whole forwards of documents alone."""

import numpy as np
import pytest
import torch

from ray_kd import models, plugins, schema
from ray_kd.losses.feature_batch import FeatureBatch
from ray_kd.losses.layer_map import ModelShape
from ray_kd.payloads import FEATURES, Features
from ray_kd.teacher.engine import Request
from ray_kd.teacher.engines import hf
from tests.reference import feature_losses
from tests.tiny import VOCAB_SIZE, tiny_llama

LENGTHS = ((7, 5, 4), (16,), (3, 9, 4))
T = 16
TERMS = [
    {"kind": "hidden_state", "layers": [0, -1], "projector": "linear"},
    {"kind": "hidden_state", "layers": [1], "measure": "cosine", "mask": "attention", "projector": "linear"},
    {"kind": "attention", "layers": [-1], "mask": "attention"},
    {"kind": "attention", "layers": [0], "measure": "kl", "heads": "mean"},
]


@pytest.fixture(scope="module")
def rows():
    """Prompts of two tokens; the last documents of rows 0 and 2 are padding."""
    rng = np.random.default_rng(0)
    ids = rng.integers(3, VOCAB_SIZE, (len(LENGTHS), T)).astype(np.int32)
    positions = np.array([[p for length in lengths for p in range(length)] for lengths in LENGTHS], np.int32)
    labels = np.where(positions < 2, schema.IGNORED_LABEL, ids).astype(np.int32)
    labels[[0, 2], 12:] = schema.IGNORED_LABEL
    return {"row_id": np.arange(3), "input_ids": ids, "labels": labels, "position_ids": positions}


def whole(model, rows, num_layers):
    """Hidden states and attention of all layers [B, T, D] and [B, h, T, T] in float64, one document at a time."""
    base = model.double()
    hidden = [torch.zeros(3, T, model.config.hidden_size).double() for _ in range(num_layers + 1)]
    maps = [torch.zeros(3, model.config.num_attention_heads, T, T).double() for _ in range(num_layers)]
    for row, lengths in enumerate(LENGTHS):
        starts = np.cumsum(lengths) - lengths
        for start, length in zip(starts, lengths, strict=True):
            own = slice(start, start + length)
            ids = torch.from_numpy(rows["input_ids"][row, own]).long()[None]
            with torch.no_grad():
                out = base(ids, use_cache=False, output_hidden_states=True, output_attentions=True)
            for layer, states in enumerate(out.hidden_states):
                hidden[layer][row, own] = states[0]
            for layer, found in enumerate(out.attentions):
                maps[layer][row, :, own, own] = found[0]
    return hidden, maps


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0)])
def test_the_loss_over_the_wire_is_that_of_whole_forwards(tmp_path, rows, order):
    teacher_path = str(tiny_llama(tmp_path / "teacher", layers=4, hidden=64, seed=1))
    student_path = str(tiny_llama(tmp_path / "student", layers=2, hidden=32, seed=2))
    student = models.load_causal_lm(student_path, attn_implementation="eager")
    teacher = models.load_causal_lm(teacher_path, attn_implementation="eager")
    shapes = ModelShape.of(student.config), ModelShape.of(teacher.config)
    terms = []
    for place, value in enumerate(TERMS):
        key = f"loss.terms[{place}]"
        module, config = plugins.options("losses.features", value, key)
        terms.append(module.resolve(config, *shapes, T, key))
    spec = terms[0].asks
    for term in terms[1:]:
        spec = spec.union(term.asks)

    engine = hf.Engine(hf.Config(), model=teacher_path, batch_size=2, returns_attention=True)
    chosen = {name: column[list(order)] for name, column in rows.items()}
    answers = engine.annotate(chosen, Request(FEATURES, top_k=4, features=spec))
    payloads = [Features.decode(answer.encode("compact")) for answer in answers]
    columns = chosen["labels"], chosen["position_ids"]
    batch = FeatureBatch.of(spec, payloads, *columns, np.arange(len(order)), width=64, num_heads=4)
    ids, positions = (torch.from_numpy(chosen[name]) for name in ("input_ids", "position_ids"))

    of_student, of_teacher = whole(student, rows, 2), whole(teacher, rows, 4)
    lists = [column.tolist() for column in columns]
    for value, term in zip(TERMS, terms, strict=True):
        outputs = models.decoder_outputs(student, ids, positions, term.hidden_layers, term.attention_layers)
        made = None if term.projectors is None else term.projectors.make(0).double()
        with torch.no_grad():
            loss = term(outputs.hidden or outputs.attentions, batch, made)
        side = 0 if term.hidden_layers else 1
        own = [of_student[side][layer][list(order)] for layer in (*term.hidden_layers, *term.attention_layers)]
        others = [of_teacher[side][layer][list(order)] for layer in term.map.teacher]
        mask, measure = value.get("mask", "targets"), value.get("measure", "mse")
        if term.hidden_layers:
            weights = [linear.weight.detach() for linear in made]
            expected, count = feature_losses.hidden_state(own, others, *lists, mask, measure, weights)
        else:
            heads = value.get("heads", "match")
            expected, count = feature_losses.attention(own, others, *lists, mask, measure, heads, measure == "kl")
        assert term.count(batch) == count > 0
        torch.testing.assert_close(loss, expected, rtol=5e-3, atol=0)
