"""What the transformers engine sends through its decoder: rows cut after their last target, batches of any make; and
a model in several places, which here are the CPU and the disk."""

import sys

import numpy as np
import pytest
import torch

from ray_kd import models, schema
from ray_kd.config import Teacher
from ray_kd.errors import ConfigError
from ray_kd.payloads import FEATURES, HIDDEN_STATES, FeatureSpec
from ray_kd.teacher.engine import Request, RowError
from ray_kd.teacher.engines import hf
from ray_kd.teacher.stage import EngineSpec
from tests.reference.teacher_rows import row_logprobs
from tests.tiny import VOCAB_SIZE, tiny_llama

T = 48
DOCUMENTS = ([48], [20, 1, 2, 16], [3], [24, 24], [1, 30], [9, 4], [40])
"""Lengths of the documents of each row; what is left of T is padding."""
LENGTHS = [47, 38, 2, 0, 30, 1, 19]
"""Tokens up to each row's last target: row 3 has none, that of row 5 is its first token, those of row 6 end early."""

LENGTHS_OF_REAL = [48, 39, 3, 24, 31, 13, 40]
"""Tokens of each row before its padding: a last document without a label, which in row 3 is one that was to be one."""


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    """In float64, so that what is left of a difference is that of the fp32 log-probabilities."""
    return str(tiny_llama(tmp_path_factory.mktemp("teacher"), dtype=torch.float64))


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    ids = rng.integers(3, VOCAB_SIZE, (len(DOCUMENTS), T)).astype(np.int32)
    labels = ids.copy()
    positions = np.zeros((len(DOCUMENTS), T), np.int32)
    for row, lengths in enumerate(DOCUMENTS):
        positions[row] = np.concatenate([np.arange(n) for n in (*lengths, T - sum(lengths))])
        labels[row, sum(lengths) :] = schema.IGNORED_LABEL
    labels[0, :20] = labels[3] = labels[5, 2:] = labels[6, 20:] = schema.IGNORED_LABEL
    return {"row_id": np.arange(len(DOCUMENTS)), "input_ids": ids, "labels": labels, "position_ids": positions}


@pytest.fixture
def build(model_path):
    def built(batch_size=4, batch_tokens=None):
        return hf.Engine(hf.Config(), model=model_path, batch_size=batch_size, batch_tokens=batch_tokens)

    return built


def forwards(engine):
    """A list that gets (rows, tokens) of every forward of the decoder from now on."""
    shapes = []
    engine._model.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return shapes


@pytest.mark.parametrize(
    ("batch_size", "batch_tokens"), [(1, None), (3, None), (16, None), (4, 1), (4, 40), (1, 60), (4, 10**6)]
)
def test_cut_rows_have_the_answers_of_whole_rows_alone(build, model_path, rows, batch_size, batch_tokens):
    model = models.load_causal_lm(model_path)
    assert model.dtype == torch.float64
    answers = build(batch_size, batch_tokens).annotate(rows, Request(top_k=VOCAB_SIZE))
    for row, answer in enumerate(answers):
        columns = (torch.from_numpy(rows[name][row]).long() for name in ("input_ids", "labels", "position_ids"))
        expected = row_logprobs(model, *columns).numpy()
        found = np.zeros_like(expected)
        np.put_along_axis(found, answer.ids.astype(np.int64), answer.logprobs.astype(np.float64), axis=-1)
        np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
    assert [len(answer.ids) for answer in answers] == [28, 19 + 0 + 1 + 15, 2, 0, 29, 1, 19]


def test_batches_of_rows_are_in_order_and_as_long_as_their_longest(build, rows):
    engine = build(batch_size=2)
    shapes = forwards(engine)
    engine.annotate(rows, Request(top_k=4))
    assert shapes == [(2, 47), (2, 30), (2, 19)]  # rows 0 and 1, 2 and 4, 5 and 6
    assert (engine.stats.tokens, engine.stats.places) == (sum(LENGTHS), 2 * (47 + 30 + 19))


@pytest.mark.parametrize(
    ("batch_tokens", "expected"),
    [
        (80, [(1, 47), (2, 38), (3, 19)]),
        (37, [(1, 47), (1, 38), (1, 30), (1, 19), (2, 2)]),  # a row that is longer goes alone
        (10**6, [(6, 47)]),
    ],
)
def test_batches_by_tokens_are_full_and_longest_first(build, rows, batch_tokens, expected):
    engine = build(batch_tokens=batch_tokens)
    shapes = forwards(engine)
    engine.annotate(rows, Request(top_k=4))
    assert shapes == expected
    assert engine.stats.places == sum(num_rows * length for num_rows, length in expected)
    assert engine.stats.tokens == sum(LENGTHS)


def test_rows_without_a_target_need_no_forward(build, rows):
    for engine in (build(), build(batch_tokens=64)):
        shapes = forwards(engine)
        for request in (Request(top_k=4), Request(top_k=4, selection="sample"), Request(kind=HIDDEN_STATES)):
            (answer,) = engine.annotate({name: column[3:4] for name, column in rows.items()}, request)
            assert len(answer.bits if request.kind == HIDDEN_STATES else answer.ids) == 0
        assert shapes == []


@pytest.mark.parametrize("request_", [Request(top_k=16, selection="sample", seed=3), Request(kind=HIDDEN_STATES)])
def test_other_answers_reach_their_rows_too(build, rows, request_):
    expected = [answer.encode() for answer in build(batch_size=1).annotate(rows, request_)]
    assert len(set(expected)) == len(expected)
    assert [answer.encode() for answer in build(batch_tokens=80).annotate(rows, request_)] == expected


def test_the_configured_tokens_reach_the_engine(model_path, rows):
    teacher = Teacher(model=model_path, batch_tokens=80)
    engine = EngineSpec.of(teacher, threads=torch.get_num_threads()).build()
    shapes = forwards(engine)
    engine.annotate(rows, Request(top_k=4))
    assert shapes == [(1, 47), (2, 38), (3, 19)]
    teacher.engine = {"kind": "fake"}
    EngineSpec.of(teacher, threads=torch.get_num_threads()).build()  # which does not take them


FEATURES_ASKED = Request(FEATURES, top_k=4, features=FeatureSpec((1,), "targets", (0,), "attention"))


def test_attention_is_of_an_engine_that_was_built_for_it_and_its_memory_is_said_once(model_path, rows, caplog):
    spec = EngineSpec.of(Teacher(model=model_path, batch_size=2), threads=torch.get_num_threads())
    with pytest.raises(ValueError, match="built without eager attention"):
        spec.build().annotate(rows, FEATURES_ASKED)
    engine = spec.build(FEATURES_ASKED)
    assert engine._model.config._attn_implementation == "eager"
    with caplog.at_level("INFO", logger="ray_kd"):
        for _ in range(2):
            engine.annotate(rows, FEATURES_ASKED)
    # Two layers of four heads, two rows of 48 tokens, float64.
    nbytes = 2 * 4 * 2 * 48**2 * 8
    assert [record.message for record in caplog.records] == [
        f"eager attention makes {nbytes / 1e6:.1f} MB of maps in a forward of 2 x 48 tokens"
    ]
    assert spec.build(Request())._model.config._attn_implementation == "sdpa"


def test_rows_are_cut_after_the_last_position_that_a_feature_is_of(build, rows):
    engine = build(batch_size=2)
    shapes = forwards(engine)
    engine.annotate(rows, Request(FEATURES, top_k=4, features=FeatureSpec((2,), "targets")))
    assert shapes == [(2, 47), (2, 30), (2, 19)]  # as without features
    shapes.clear()
    engine.annotate(rows, Request(FEATURES, top_k=4, features=FeatureSpec((2,), "attention")))
    assert shapes == [(2, 48), (2, 24), (2, 31), (1, 40)]  # row 3 has no target, and tokens before its last document


def test_a_feature_that_is_not_finite_refuses_its_row_alone(build, rows, monkeypatch):
    engine = build(batch_size=16)
    bad = rows["input_ids"][2, 0]
    assert (rows["input_ids"] == bad).any(axis=1).sum() < len(rows["input_ids"])

    def spoil(layer, args, output):
        return output.masked_fill((args[0] == 0).all(dim=-1, keepdim=True), torch.inf)

    engine._model.model.embed_tokens.weight.data[bad] = 0.0
    engine._model.model.layers[0].register_forward_hook(spoil)
    answers = engine.annotate(rows, Request(FEATURES, top_k=4, features=FeatureSpec((1,), "attention")))
    for row, answer in enumerate(answers):
        is_bad = bad in rows["input_ids"][row][: LENGTHS_OF_REAL[row]]
        assert isinstance(answer, RowError) == bool(is_bad)
        if is_bad:
            assert "not finite at" in answer.reason
    with_states = engine.annotate(rows, Request(FEATURES, top_k=4, features=FeatureSpec((0,), "attention")))
    assert isinstance(with_states[2], RowError), "its log-probabilities have no answer either"


MODULES = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1", "model.norm", "lm_head")


def spread(model_path, device_map, **options):
    return hf.Engine(hf.Config(device_map=device_map), model=model_path, batch_tokens=80, **options)


@pytest.mark.parametrize("on_disk", [(), ("model.layers.1",), ("model.layers.0", "model.norm")])
def test_a_model_in_several_places_has_the_answers_of_one_in_one(build, model_path, rows, on_disk):
    """What is on disk is brought in by the hooks that also carry hidden states from GPU to GPU."""
    engine = spread(model_path, {name: "disk" if name in on_disk else "cpu" for name in MODULES})
    hooked = [name for name, module in engine._model.named_modules() if hasattr(module, "_hf_hook")]
    assert set(on_disk) <= set(hooked)
    assert bool(on_disk) == any(weight.is_meta for weight in engine._model.parameters())
    features = Request(FEATURES, top_k=8, features=FeatureSpec((0, 1, 2), "attention"))
    for request in (Request(top_k=8), Request(top_k=8, selection="sample"), Request(kind=HIDDEN_STATES), features):
        expected = build().annotate(rows, request)
        assert [answer.encode() for answer in engine.annotate(rows, request)] == [one.encode() for one in expected]


def test_several_gpus_of_an_actor_share_its_model(build, model_path, rows):
    """A machine without any: `auto` finds the CPU then, where a plain move to "cuda" would fail."""
    if torch.cuda.is_available():
        pytest.skip("this is about a machine without CUDA")
    with pytest.raises((AssertionError, RuntimeError)):
        spread(model_path, None, device="cuda")
    found = spread(model_path, None, device="cuda", is_spread=True).annotate(rows, Request(top_k=8))
    assert [one.encode() for one in found] == [one.encode() for one in build().annotate(rows, Request(top_k=8))]


@pytest.mark.parametrize("name", ["model.embed_tokens", "lm_head"])
def test_embeddings_and_head_are_where_they_are_used(tmp_path, name):
    untied = str(tiny_llama(tmp_path, tie=False))
    with pytest.raises(ConfigError, match="device_map puts its embeddings or its head on disk") as error:
        spread(untied, {one: "disk" if one == name else "cpu" for one in MODULES})
    assert "\n" not in str(error.value)


def test_a_model_that_does_not_fit_is_refused(model_path, monkeypatch):
    from transformers.integrations import accelerate

    monkeypatch.setattr(accelerate, "get_max_memory", lambda *given: {"cpu": 400_000})
    with pytest.raises(ConfigError, match=r"does not fit: device_map 'auto' leaves \d+ weights to the CPU or the disk"):
        spread(model_path, "auto")


def test_a_missing_accelerate_is_named_with_what_installs_it(model_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ConfigError, match=r"needs accelerate: pip install '.\[multi-gpu\]'$") as error:
        spread(model_path, "auto")
    assert "\n" not in str(error.value)
