"""Every payload kind on disk: what is encoded comes back, and bytes that are not whole are refused."""

import dataclasses
import pickle

import numpy as np
import pytest

from ray_kd import plugins

KINDS = plugins.available("payloads")


def drawn(kind, num_tokens, seed=0):
    return plugins.load("payloads", kind).example(num_tokens, np.random.default_rng(seed))


def assert_same(payload, other):
    for field in dataclasses.fields(payload):
        np.testing.assert_array_equal(getattr(other, field.name), getattr(payload, field.name), err_msg=field.name)


def test_the_payload_of_the_design_is_found():
    assert "topk_logprobs" in KINDS


@pytest.mark.parametrize("num_tokens", [0, 1, 5, 333])
@pytest.mark.parametrize("kind", KINDS)
def test_a_decoded_payload_encodes_to_the_same_bytes_and_decodes_to_the_same_arrays(kind, num_tokens):
    """The first trip rounds to the wire's precision; from then on nothing changes."""
    payload = drawn(kind, num_tokens)
    blob = payload.encode()
    assert isinstance(blob, bytes)
    decoded = type(payload).decode(blob)
    assert decoded.encode() == blob
    assert_same(decoded, type(payload).decode(decoded.encode()))
    for field in dataclasses.fields(payload):
        before, after = getattr(payload, field.name), getattr(decoded, field.name)
        assert np.shape(after) == np.shape(before)
        np.testing.assert_allclose(after, before, rtol=1e-3, err_msg=field.name)


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_that_are_cut_extended_or_of_another_version_are_refused(kind):
    payload = drawn(kind, 9)
    blob = payload.encode()
    damaged = [blob[:size] for size in range(0, len(blob), 7)] + [blob[:-1], blob + b"\0", b"x" + blob[1:]]
    for other in damaged:
        with pytest.raises(ValueError, match="payload"):
            type(payload).decode(other)
    version = int.from_bytes(blob[4:6], "little")
    with pytest.raises(ValueError, match=f"version {version + 1}.*version {version}"):
        type(payload).decode(blob[:4] + (version + 1).to_bytes(2, "little") + blob[6:])


@pytest.mark.parametrize("kind", KINDS)
def test_a_pickle_is_refused(kind):
    with pytest.raises(ValueError, match="payload"):
        type(drawn(kind, 1)).decode(pickle.dumps({"ids": list(range(64))}))
