"""Every encoding of every payload kind on disk: what is encoded comes back, bytes that are not whole are refused."""

import dataclasses
import pickle

import numpy as np
import pytest

from ray_kd import plugins
from ray_kd.errors import DataError
from ray_kd.payloads import TopKLogprobs

KINDS = plugins.available("payloads")
WIRES = [(kind, wire) for kind in KINDS for wire in plugins.load("payloads", kind).WIRES]


def drawn(kind, num_tokens, seed=0):
    return plugins.load("payloads", kind).example(num_tokens, np.random.default_rng(seed))


def assert_close(payload, other, rtol, atol=0.0):
    for field in dataclasses.fields(payload):
        before, after = getattr(payload, field.name), getattr(other, field.name)
        if isinstance(before, TopKLogprobs):
            assert_close(before, after, rtol, atol)
            continue
        assert np.shape(after) == np.shape(before)
        if np.issubdtype(np.asarray(before).dtype, np.floating):
            np.testing.assert_allclose(after, before, rtol=rtol, atol=atol, err_msg=field.name)
        else:
            np.testing.assert_array_equal(after, before, err_msg=field.name)


def assert_refused(payload, blob):
    with pytest.raises(DataError, match="payload"):
        type(payload).decode(blob)


def test_the_payloads_of_the_design_are_found():
    assert {("topk_logprobs", "plain"), ("hidden_states", "plain"), ("features", "plain")} <= set(WIRES)


@pytest.mark.parametrize("num_tokens", [0, 1, 5, 333])
@pytest.mark.parametrize(("kind", "wire"), WIRES)
def test_what_is_encoded_comes_back_and_does_not_drift(kind, wire, num_tokens):
    """The first trip rounds to the wire's precision; from then on nothing changes."""
    payload = drawn(kind, num_tokens)
    blob = payload.encode(wire)
    assert isinstance(blob, bytes)
    decoded = type(payload).decode(blob)
    assert_close(payload, decoded, rtol=4e-3, atol=1e-2)
    assert_close(decoded, type(payload).decode(decoded.encode(wire)), rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_every_encoding_is_another_one_and_an_unknown_one_is_refused(kind):
    payload = drawn(kind, 100)
    wires = plugins.load("payloads", kind).WIRES
    assert len({payload.encode(wire)[:4] for wire in wires}) == len(wires)
    assert payload.encode() == payload.encode(wires[0])
    with pytest.raises(ValueError, match=r"gzip.*allowed"):
        payload.encode("gzip")


@pytest.mark.parametrize("num_tokens", [1, 100])
@pytest.mark.parametrize(("kind", "wire"), WIRES)
def test_a_flip_of_any_byte_is_refused(kind, wire, num_tokens):
    payload = drawn(kind, num_tokens)
    blob, rng = payload.encode(wire), np.random.default_rng(1)
    for position in range(len(blob)):
        for flip in (1 << rng.integers(8), rng.integers(1, 256), 0xFF):
            assert_refused(payload, blob[:position] + bytes([blob[position] ^ int(flip)]) + blob[position + 1 :])


@pytest.mark.parametrize(("kind", "wire"), WIRES)
def test_what_is_cut_extended_or_swapped_is_refused(kind, wire):
    payload = drawn(kind, 100)
    blob, rng = payload.encode(wire), np.random.default_rng(2)
    damaged = [blob[:size] for size in range(len(blob))]
    damaged += [blob[size:] for size in range(1, len(blob), 7)]
    damaged += [blob + b"\0", blob + blob, blob + bytes(1000), b"\0" + blob, bytes(len(blob)), b"\xff" * len(blob)]
    damaged += [blob[:32] + drawn(kind, 100, seed=1).encode(wire)[32:]]
    for _ in range(300):
        size = int(rng.integers(1, len(blob) // 2))
        a = int(rng.integers(0, len(blob) - 2 * size + 1))
        b = int(rng.integers(a + size, len(blob) - size + 1))
        damaged.append(blob[:a] + blob[b : b + size] + blob[a + size : b] + blob[a : a + size] + blob[b + size :])
        damaged.append(blob[:a] + rng.bytes(size) + blob[a + size :])
    for other in damaged:
        if other != blob:  # a swap of equal blocks
            assert_refused(payload, other)


@pytest.mark.parametrize(("kind", "wire"), WIRES)
def test_another_version_is_refused_by_its_number(kind, wire):
    payload = drawn(kind, 100)
    blob = payload.encode(wire)
    version = int.from_bytes(blob[4:6], "little")
    for other in (version - 1, version + 1):
        with pytest.raises(DataError, match=f"version {other}.*version {version}"):
            type(payload).decode(blob[:4] + other.to_bytes(2, "little") + blob[6:])


@pytest.mark.parametrize("kind", KINDS)
def test_a_pickle_is_refused(kind):
    assert_refused(drawn(kind, 1), pickle.dumps({"ids": list(range(64))}))
