"""Every engine on disk answers rows as `teacher/engine.py` says. What an engine needs to be built is in `CASES`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ray_kd import models, plugins, schema
from ray_kd.payloads import FEATURES, HIDDEN_STATES, TOPK_LOGPROBS, Features, FeatureSpec, HiddenStates, TopKLogprobs
from ray_kd.teacher.engine import Request, RowError, Stats, check_request, needed_lengths
from tests.tiny import VOCAB_SIZE, tiny_llama

T, ROWS = 20, 5
CASES: dict[str, dict[str, Any]] = {"hf": {}, "fake": {"vocab_size": VOCAB_SIZE, "nan_row_ids": [107]}}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def rows() -> dict[str, np.ndarray]:
    """Two documents of 8 and 7 tokens and padding; different prompts, so that rows have different lengths."""
    rng = np.random.default_rng(0)
    ids = rng.integers(3, VOCAB_SIZE, (ROWS, T)).astype(np.int32)
    positions = np.tile(np.concatenate([np.arange(8), np.arange(7), np.arange(5)]), (ROWS, 1)).astype(np.int32)
    labels = ids.copy()
    for row in range(ROWS):
        labels[row, : row + 1] = schema.IGNORED_LABEL
    labels[:, 15:] = schema.IGNORED_LABEL
    labels[3] = schema.IGNORED_LABEL
    ids[:, 15:] = 2
    row_ids = np.arange(100, 100 + ROWS)
    return {"row_id": row_ids, "input_ids": ids, "labels": labels, "position_ids": positions}


def build(kind: str, model_path: Path, batch_size: int = 2, returns_attention: bool = False, **options: Any) -> Any:
    module, config = plugins.options("teacher.engines", {"kind": kind, **CASES[kind], **options}, "teacher.engine")
    more = {"returns_attention": True} if returns_attention else {}
    return module.Engine(
        config, model=str(model_path), revision=None, dtype="float32", device="cpu", batch_size=batch_size, **more
    )


def provides(kind: str) -> frozenset[str]:
    return plugins.load("teacher.engines", kind).Engine.provides


def full_logprobs(kind: str, engine: Any, model_path: Path, ids: np.ndarray, temperature: float) -> np.ndarray:
    """[t, V] after each token of one document run alone: what the engine's answers are measured against."""
    if kind == "fake":
        return engine.logprobs(ids, temperature)
    model = models.load_causal_lm(str(model_path))
    with torch.no_grad():
        logits = model(torch.from_numpy(ids).long()[None], use_cache=False).logits[0]
    return (logits.double() / temperature).log_softmax(-1).numpy()


def expected_rows(kind: str, engine: Any, model_path: Path, rows: dict, temperature: float) -> list[np.ndarray]:
    """[M, V] per row, by walking the documents: the distribution after token t for each labelled token t + 1."""
    expected = []
    for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True):
        chosen = [np.zeros((0, VOCAB_SIZE))]
        for start, end in ((0, 8), (8, 15)):
            document = full_logprobs(kind, engine, model_path, ids[start:end], temperature)
            chosen.append(document[[t - start for t in range(start, end - 1) if labels[t + 1] != -100]])
        expected.append(np.concatenate(chosen))
    return expected


def test_every_engine_on_disk_is_covered() -> None:
    needs_more = {"vllm", "http"}  # a server or a virtual environment of its own
    assert set(plugins.available("teacher.engines")) - needs_more == set(CASES)


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_answers_are_aligned_in_order_and_full_vocabulary(kind, model_path, rows, temperature: float) -> None:
    engine = build(kind, model_path)
    answers = engine.annotate(rows, Request(top_k=8, temperature=temperature))
    expected = expected_rows(kind, engine, model_path, rows, temperature)
    num_targets = schema.target_positions(rows["labels"], rows["position_ids"]).sum(axis=1)
    assert len(set(num_targets.tolist())) > 2
    for answer, full, count in zip(answers, expected, num_targets, strict=True):
        assert isinstance(answer, TopKLogprobs)
        assert answer.ids.shape == answer.logprobs.shape == (count, 8)
        assert answer.logprobs.dtype == np.float32
        assert (answer.temperature, answer.vocab_size) == (temperature, VOCAB_SIZE)
        np.testing.assert_array_equal(answer.ids[:, 0], full.argmax(axis=-1))
        np.testing.assert_allclose(answer.logprobs, np.take_along_axis(full, answer.ids, -1), atol=1e-4)
        np.testing.assert_allclose(answer.logprobs, -np.sort(-full, axis=-1)[:, :8], atol=1e-4)
        decoded = TopKLogprobs.decode(answer.encode())
        np.testing.assert_array_equal(decoded.ids, answer.ids)


@pytest.mark.parametrize("kind", CASES)
def test_the_whole_vocabulary_can_be_asked_for(kind, model_path, rows) -> None:
    engine = build(kind, model_path)
    answer = engine.annotate({name: column[:1] for name, column in rows.items()}, Request(top_k=VOCAB_SIZE))[0]
    full = expected_rows(kind, engine, model_path, rows, 1.0)[0]
    dense = np.zeros_like(full)
    np.put_along_axis(dense, answer.ids.astype(np.int64), answer.logprobs.astype(np.float64), axis=-1)
    np.testing.assert_allclose(dense, full, atol=1e-4)


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_answers_may_be_asked_for_over_fewer_ids(kind, model_path, rows, temperature: float) -> None:
    """The distribution over the ids below, given that it is one of them: softmax over their logits alone."""
    engine, num_ids = build(kind, model_path), 200
    request = Request(top_k=8, temperature=temperature, vocab_size=num_ids)
    expected = expected_rows(kind, engine, model_path, rows, temperature)
    for answer, full in zip(engine.annotate(rows, request), expected, strict=True):
        own = np.exp(full[:, :num_ids])
        own = np.log(own / own.sum(axis=-1, keepdims=True))
        assert answer.vocab_size == num_ids
        np.testing.assert_allclose(answer.logprobs, -np.sort(-own, axis=-1)[:, :8], atol=1e-4)
        np.testing.assert_allclose(answer.logprobs, np.take_along_axis(own, answer.ids, -1), atol=1e-4)
    draws = Request(top_k=64, temperature=temperature, vocab_size=num_ids, selection="sample")
    assert all(answer.ids.max(initial=0) < num_ids for answer in engine.annotate(rows, draws))
    for wrong in (replace(request, vocab_size=VOCAB_SIZE + 1), replace(request, vocab_size=0)):
        with pytest.raises(ValueError, match=r"vocab_size is .*; allowed: 1 to the model's 259"):
            engine.annotate(rows, wrong)
    with pytest.raises(ValueError, match="top_k is 8; allowed: 1 to the vocabulary size 7"):
        engine.annotate(rows, replace(request, vocab_size=7))


@pytest.mark.parametrize("kind", CASES)
def test_batch_size_changes_no_answer(kind, model_path, rows) -> None:
    request = Request(top_k=4)
    one, all_at_once = (build(kind, model_path, batch_size=size).annotate(rows, request) for size in (1, 16))
    for a, b in zip(one, all_at_once, strict=True):
        np.testing.assert_array_equal(a.ids, b.ids)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


@pytest.mark.parametrize("kind", CASES)
def test_requests_that_cannot_be_served_are_refused(kind, model_path, rows) -> None:
    engine = build(kind, model_path)
    assert TOPK_LOGPROBS in engine.provides
    for request, message in (
        (Request(kind="attention"), "provides .*topk_logprobs, not 'attention'"),
        (Request(selection="greedy"), "selects by .*not 'greedy'"),
        (Request(top_k=VOCAB_SIZE + 1), "allowed: 1 to the vocabulary size 259"),
        (Request(top_k=0), "allowed: 1 to"),
        (Request(temperature=0.0), "allowed: above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.annotate(rows, request)


@pytest.mark.parametrize("kind", [kind for kind in CASES if HIDDEN_STATES in provides(kind)])
def test_hidden_states_with_the_models_head_are_its_distribution(kind, model_path, rows) -> None:
    engine = build(kind, model_path)
    assert engine.is_local_model
    head = models.head_of(models.load_causal_lm(str(model_path)))
    expected = expected_rows(kind, engine, model_path, rows, 1.0)
    # The tokens asked for and their temperature are not those of this kind of payload.
    answers = engine.annotate(rows, Request(kind=HIDDEN_STATES, top_k=10**6))
    for answer, full in zip(answers, expected, strict=True):
        assert isinstance(answer, HiddenStates)
        decoded = HiddenStates.decode(answer.encode())
        logits = head.logits(torch.from_numpy(decoded.bits.copy()).view(torch.bfloat16)).double()
        # bfloat16 keeps 8 bits of each of the products' factors.
        np.testing.assert_allclose(logits.log_softmax(-1).numpy(), full, atol=0.05)


with_features = pytest.mark.parametrize("kind", [kind for kind in CASES if FEATURES in provides(kind)])
SPECS = [
    FeatureSpec((0, 2), "targets"),
    FeatureSpec((1,), "attention", (0, 1), "targets"),
    FeatureSpec((), "targets", (1,), "attention", mean_over_heads=True),
]


def document_features(kind: str, engine: Any, model_path: Path, ids: np.ndarray, spec: FeatureSpec) -> tuple[Any, Any]:
    """[L, t, D] and [L, h, t, t] of one document run alone."""
    if kind == "fake":
        maps = [engine.attention(ids, np.arange(len(ids)), layer) for layer in spec.attention_layers]
        return [engine.hidden_states(ids, layer) for layer in spec.hidden_layers], maps
    model = models.load_causal_lm(str(model_path), attn_implementation="eager")
    with torch.no_grad():
        output = model(
            torch.from_numpy(ids).long()[None], use_cache=False, output_hidden_states=True, output_attentions=True
        )
    maps = [output.attentions[layer][0].numpy() for layer in spec.attention_layers]
    return [output.hidden_states[layer][0].numpy() for layer in spec.hidden_layers], maps


@with_features
@pytest.mark.parametrize("spec", SPECS, ids=["states", "both", "mean"])
def test_features_are_those_of_documents_alone(kind, model_path, rows, spec: FeatureSpec) -> None:
    engine = build(kind, model_path, returns_attention=True)
    answers = engine.annotate(rows, Request(FEATURES, top_k=4, features=spec))
    plain = engine.annotate(rows, Request(top_k=4))
    for answer, topk, ids, labels in zip(answers, plain, rows["input_ids"], rows["labels"], strict=True):
        assert isinstance(answer, Features)
        assert answer.spec == spec
        np.testing.assert_array_equal(answer.topk.ids, topk.ids)
        np.testing.assert_allclose(answer.topk.logprobs, topk.logprobs, atol=1e-5)
        states = [np.empty((len(spec.hidden_layers), 0, answer.hidden.shape[-1]))]
        pairs = [np.empty((len(spec.attention_layers), answer.attention.shape[1], 0))]
        for start, end in ((0, 8), (8, 15)):
            places = {
                "targets": [t for t in range(start, end - 1) if labels[t + 1] != -100],
                "attention": list(range(start, end)),
            }
            hidden, maps = document_features(kind, engine, model_path, ids[start:end], spec)
            for t in places[spec.hidden_mask] if hidden else []:
                states.append(np.stack([layer[t - start] for layer in hidden])[:, None])
            for query in places[spec.attention_mask] if maps else []:
                for key in places[spec.attention_mask]:
                    if key <= query:
                        of_heads = np.stack([layer[:, query - start, key - start] for layer in maps])[..., None]
                        pairs.append(of_heads.mean(axis=1, keepdims=True) if spec.mean_over_heads else of_heads)
        found = torch.from_numpy(answer.hidden.copy()).view(torch.bfloat16).double().numpy()
        assert len(found) == len(spec.hidden_layers)
        if spec.hidden_layers:
            np.testing.assert_allclose(found, np.concatenate(states, axis=1), rtol=2**-8, atol=1e-4)
        np.testing.assert_allclose(answer.attention, np.concatenate(pairs, axis=2), rtol=2**-10, atol=1e-5)
        assert Features.decode(answer.encode()).spec == spec


@with_features
def test_batch_size_changes_no_feature(kind, model_path, rows) -> None:
    request = Request(FEATURES, top_k=4, features=SPECS[1])
    one, all_at_once = (
        build(kind, model_path, batch_size=size, returns_attention=True).annotate(rows, request) for size in (1, 16)
    )
    for a, b in zip(one, all_at_once, strict=True):
        np.testing.assert_allclose(a.attention, b.attention, atol=1e-3)
        states = [torch.from_numpy(x.hidden.copy()).view(torch.bfloat16).float().numpy() for x in (a, b)]
        np.testing.assert_allclose(*states, rtol=2**-7, atol=1e-5)


@with_features
def test_features_are_asked_for_with_their_kind_alone(kind, model_path, rows) -> None:
    engine = build(kind, model_path)
    for request in (Request(FEATURES), Request(features=SPECS[0])):
        with pytest.raises(ValueError, match="allowed: with 'features' alone"):
            engine.annotate(rows, request)


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_draws_are_shares_that_follow_the_distribution(kind, model_path, rows, temperature: float) -> None:
    engine = build(kind, model_path)
    request = Request(top_k=200, temperature=temperature, selection="sample", seed=3)
    expected = expected_rows(kind, engine, model_path, rows, temperature)
    for answer, full in zip(engine.annotate(rows, request), expected, strict=True):
        assert (answer.num_draws, answer.temperature, answer.ids.shape) == (200, temperature, (len(full), 200))
        np.testing.assert_array_equal(answer.ids < 0, answer.logprobs == -np.inf)
        shares = np.zeros_like(full)
        for position, (ids, logprobs) in enumerate(zip(answer.ids, answer.logprobs, strict=True)):
            filled = ids >= 0
            assert len(set(ids[filled].tolist())) == filled.sum()
            assert (np.diff(logprobs[filled]) <= 0).all()
            shares[position, ids[filled]] = np.exp(logprobs[filled])
        np.testing.assert_allclose(shares.sum(axis=-1), 1, atol=1e-5)
        # Five standard deviations of a share, per token; and the squared error of a row is what draws have.
        q = np.exp(full)
        assert (np.abs(shares - q) <= 5 * np.sqrt(q * (1 - q) / 200) + 5 / 200).all()
        if len(full):
            assert 0.6 < 200 * ((shares - q) ** 2).sum() / (q * (1 - q)).sum() < 1.5


@pytest.mark.parametrize("kind", CASES)
def test_draws_depend_on_seed_row_and_position_alone(kind, model_path, rows) -> None:
    request = Request(top_k=16, selection="sample", seed=3)
    one, again, batched = (build(kind, model_path, batch_size=size).annotate(rows, request) for size in (1, 1, 16))
    backwards = build(kind, model_path).annotate({name: column[::-1].copy() for name, column in rows.items()}, request)
    for answer, *others in zip(one, again, batched, backwards[::-1], strict=True):
        for other in others:
            assert answer.encode() == other.encode()
    other_seed = build(kind, model_path).annotate(rows, Request(top_k=16, selection="sample", seed=4))
    renamed = build(kind, model_path).annotate({**rows, "row_id": rows["row_id"] + 900}, request)
    for other in (other_seed, renamed):
        assert one[0].encode() != other[0].encode()


@pytest.mark.parametrize("kind", CASES)
def test_stats_grow_by_the_tokens_that_the_answers_needed(kind, model_path, rows) -> None:
    engine = build(kind, model_path)
    assert engine.stats == Stats(0, 0, 0)
    expected = (ROWS - 1) * 14  # the documents have 15 tokens, and nothing follows the last; row 3 has no target
    for call in (1, 2):
        engine.annotate(rows, Request(top_k=4))
        assert engine.stats.tokens == call * expected
        assert engine.stats.tokens <= engine.stats.places <= call * ROWS * T
        assert engine.stats.retries == 0
    before = replace(engine.stats)
    engine.annotate({name: column[3:4] for name, column in rows.items()}, Request(top_k=4))
    engine.annotate({name: column[:0] for name, column in rows.items()}, Request(top_k=4))
    assert engine.stats == before


@pytest.mark.parametrize("kind", CASES)
def test_no_rows_and_closing_twice_are_harmless(kind, model_path, rows) -> None:
    engine = build(kind, model_path)
    assert engine.annotate({name: column[:0] for name, column in rows.items()}, Request(top_k=4)) == []
    engine.close()
    engine.close()


@pytest.mark.parametrize("kind", CASES)
def test_a_broken_row_is_reported_alone(kind, model_path, rows) -> None:
    engine = build(kind, model_path, batch_size=8)
    broken = dict(rows)
    if kind == "fake":
        broken["row_id"] = np.array([100, 107, 102, 103, 104])
    else:
        # A token whose embedding is not finite, in row 1 only. The head is untied first: it must stay finite.
        head = engine._model.lm_head
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        engine._head = models.head_of(engine._model)
        broken["input_ids"] = np.where(rows["input_ids"] == 200, 201, rows["input_ids"]).astype(np.int32)
        broken["input_ids"][1, 4] = 200
        engine._model.model.embed_tokens.weight.data[200] = torch.nan
    for selection in ("topk", "sample"):
        answers = engine.annotate(broken, Request(top_k=4, selection=selection))
        assert [isinstance(answer, RowError) for answer in answers] == [False, True, False, False, False]
        assert "not finite" in answers[1].reason
    if HIDDEN_STATES in engine.provides:
        answers = engine.annotate(broken, Request(kind=HIDDEN_STATES))
        assert [isinstance(answer, RowError) for answer in answers] == [False, True, False, False, False]
        assert "not finite at" in answers[1].reason


def test_fake_can_fail_and_be_slow(model_path, rows) -> None:
    with pytest.raises(RuntimeError, match="told to fail at row 102"):
        build("fake", model_path, fail_row_ids=[102]).annotate(rows, Request(top_k=4))
    assert len(build("fake", model_path, delay_s=0.001).annotate(rows, Request(top_k=4))) == ROWS


def test_a_row_is_needed_up_to_its_last_target() -> None:
    targets = np.array([[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]], np.bool_)
    assert needed_lengths(targets).tolist() == [1, 3, 0, 4]
    assert needed_lengths(targets[:0]).tolist() == []


def test_check_request_accepts_the_edges() -> None:
    with pytest.raises(ValueError, match="selects by topk, not 'sample'"):
        check_request(Request(selection="sample"), frozenset({TOPK_LOGPROBS}), frozenset({"topk"}), VOCAB_SIZE)
    check_request(
        Request(top_k=VOCAB_SIZE, temperature=0.1), frozenset({TOPK_LOGPROBS}), frozenset({"topk"}), VOCAB_SIZE
    )
