"""The payload of features: what it refuses, what it costs, and what several terms together ask for."""

from dataclasses import replace

import numpy as np
import pytest

from ray_kd import schema
from ray_kd.errors import DataError
from ray_kd.payloads import Features, FeatureSpec, TopKLogprobs, features, hidden_states, topk_logprobs
from ray_kd.payloads._frame import NBYTES as HEADER_NBYTES
from ray_kd.payloads._frame import seal

RNG = np.random.default_rng(0)


def drawn(num_tokens=20, **options):
    return features.example(num_tokens, np.random.default_rng(1), **options)


def test_what_it_carries_comes_back_bit_for_bit():
    payload = drawn()
    for wire in features.WIRES:
        decoded = Features.decode(payload.encode(wire))
        assert decoded.spec == payload.spec
        np.testing.assert_array_equal(decoded.hidden, payload.hidden)
        np.testing.assert_array_equal(decoded.attention, payload.attention)
        assert decoded.topk.encode() == TopKLogprobs.decode(payload.topk.encode(wire)).encode()
        for array in (decoded.hidden, decoded.attention):
            with pytest.raises(ValueError, match="read-only"):
                array[...] = 0


@pytest.mark.parametrize("num_tokens", [0, 3])
@pytest.mark.parametrize(
    "spec",
    [
        FeatureSpec(),
        FeatureSpec((0,), "attention"),
        FeatureSpec((), "targets", (0, 65535), "attention"),
        FeatureSpec((2, 9), "targets", (1,), "targets", mean_over_heads=True),
    ],
)
def test_any_part_may_be_absent(spec, num_tokens):
    num_heads = 1 if spec.mean_over_heads else 3
    payload = Features(
        topk_logprobs.example(num_tokens, RNG),
        spec,
        RNG.integers(0, 1000, (len(spec.hidden_layers), num_tokens, 5)).astype(np.uint16),
        RNG.random((len(spec.attention_layers), num_heads, 2 * num_tokens)).astype(np.float16),
    )
    decoded = Features.decode(payload.encode())
    assert decoded.spec == spec
    assert (decoded.hidden.shape, decoded.attention.shape) == (payload.hidden.shape, payload.attention.shape)


def test_compact_log_probabilities_make_it_smaller():
    payload = replace(drawn(100), topk=topk_logprobs.example(100, RNG, top_k=64))
    plain, compact = (len(payload.encode(wire)) for wire in features.WIRES)
    topk_plain, topk_compact = (len(payload.topk.encode(wire)) for wire in topk_logprobs.WIRES)
    assert plain - compact == topk_plain - topk_compact > 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1e-3, 1.001, -0.0])
def test_attention_that_is_no_probability_is_refused(value):
    payload = drawn()
    payload.attention[0, 1, 3] = value
    with pytest.raises(DataError, match="attention contains NaN or a value outside 0 to 1"):
        payload.encode()


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0])
def test_hidden_states_that_are_not_finite_are_refused(bits):
    payload = drawn()
    payload.hidden[1, 2, 3] = bits
    with pytest.raises(DataError, match="hidden states contain NaN or an infinite value"):
        payload.encode()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": np.zeros((2, 20, 12), np.float32)}, r"hidden is float32 \[2, 20, 12\], must be uint16"),
        ({"hidden": np.zeros((3, 20, 12), np.uint16)}, "the first of 2 layers"),
        ({"hidden": np.zeros((2, 20), np.uint16)}, "with 3 axes"),
        ({"attention": np.zeros((1, 2, 9), np.float32)}, "must be float16"),
        ({"attention": np.zeros((0, 2, 9), np.float16)}, "the first of 1 layers"),
        ({"spec": FeatureSpec((1, 3), "targets", (2,), "targets", True)}, "a mean over heads has 1 map a layer, not 2"),
    ],
)
def test_arrays_of_another_make_are_refused(change, message):
    with pytest.raises(DataError, match=message):
        replace(drawn(), **change)


def fields_and_body():
    payload = drawn()
    blob = payload.encode()
    return blob[6:28], blob[HEADER_NBYTES:]


def resealed(fields, body):
    """Bytes with a right checksum: what only a writer that is wrong would make."""
    return seal(b"RKFP", 1, fields, [body])


def test_what_was_sealed_wrong_is_refused():
    fields, body = fields_and_body()
    assert Features.decode(resealed(fields, body)).spec == drawn().spec
    for other in (body[:-2], body + b"\0\0", b""):
        with pytest.raises(DataError, match=r"features payload of \d+ bytes; N=20 D=12 P=\d+ heads=2 .* need"):
            Features.decode(resealed(fields, other))
    for place in range(21):  # every count, and a flag that there is not
        changed = bytearray(fields)
        changed[place] ^= 1 if place < 20 else 8
        with pytest.raises(DataError, match="payload"):
            Features.decode(resealed(bytes(changed), body))
    with pytest.raises(DataError, match=r"hidden_layers is \(3, 1\); allowed: at most 255 ascending"):
        Features.decode(resealed(fields, body[2:4] + body[:2] + body[4:]))
    with pytest.raises(DataError, match="attention contains NaN"):
        Features.decode(resealed(fields, body[:-1] + b"\x7e"))
    first_state = 6 + len(drawn().topk.encode())
    with pytest.raises(DataError, match="hidden states contain NaN"):
        Features.decode(resealed(fields, body[:first_state] + b"\xc0\x7f" + body[first_state + 2 :]))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"hidden_layers": (1, 1)}, "ascending"),
        ({"hidden_layers": (-1,)}, "from 0 on"),
        ({"attention_layers": (3, 2)}, "attention_layers is"),
        ({"attention_layers": tuple(range(256))}, "at most 255"),
        ({"hidden_layers": (70000,)}, "hidden_layers is"),
        ({"hidden_mask": "all"}, "hidden_mask is 'all'; allowed: targets, attention"),
        ({"attention_mask": ""}, "attention_mask is ''"),
    ],
)
def test_a_spec_that_says_nothing_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        FeatureSpec(**given)


def test_the_union_has_what_both_ask_for():
    states = FeatureSpec((1, 4), "targets")
    all_states = FeatureSpec((0, 4), "attention")
    maps, mean = FeatureSpec((), "targets", (2,)), FeatureSpec((), "targets", (3,), "attention", True)
    assert states.union(all_states) == FeatureSpec((0, 1, 4), "attention")
    assert states.union(maps) == maps.union(states) == FeatureSpec((1, 4), "targets", (2,))
    assert maps.union(mean) == FeatureSpec((), "targets", (2, 3), "attention", False)
    assert mean.union(states) == FeatureSpec((1, 4), "targets", (3,), "attention", True)
    for spec in (states, all_states, maps, mean):
        assert spec.union(spec) == spec.union(FeatureSpec()) == FeatureSpec().union(spec) == spec
        assert FeatureSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize("lengths", [(16,), (4, 12), (1, 1, 2, 7, 5)])
@pytest.mark.parametrize("mask", ["targets", "attention"])
@pytest.mark.parametrize("mean_over_heads", [False, True])
def test_no_row_takes_more_than_was_computed_before(lengths, mask, mean_over_heads):
    """And a row that is one document of tokens that all count takes just that."""
    num_tokens, width, num_heads, top_k, vocab_size = sum(lengths), 6, 3, 8, 152064
    positions = np.concatenate([np.arange(length) for length in lengths])
    is_chosen = np.ones(num_tokens, bool)
    if mask == "targets":
        is_chosen = schema.target_positions(np.ones(num_tokens, int), positions)
    num_chosen, num_pairs = is_chosen.sum(), len(schema.causal_pairs(is_chosen, positions)[0])
    spec = FeatureSpec((1, 2), mask, (0, 3), mask, mean_over_heads)
    hidden = np.stack([hidden_states.example(num_chosen, RNG, width).bits for _ in range(2)])
    attention = np.zeros((2, 1 if mean_over_heads else num_heads, num_pairs), np.float16)
    payload = Features(topk_logprobs.example(num_chosen, RNG, top_k, vocab_size), spec, hidden, attention)
    most = num_tokens * features.nbytes_per_token(
        spec, top_k=top_k, vocab_size=vocab_size, width=width, num_heads=num_heads, sequence_length=num_tokens
    )
    headers = 2 * HEADER_NBYTES + 2 * 4
    assert len(payload.encode()) <= most + headers
    if lengths == (16,) and mask == "attention":
        assert len(payload.encode()) == most + headers
