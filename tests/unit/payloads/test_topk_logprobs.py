"""Sizes, round trips and refusals of the top-k wire, in its plain encoding."""

import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest

from ray_kd.errors import DataError
from ray_kd.payloads import TopKLogprobs, _float16
from ray_kd.payloads.topk_logprobs import example, nbytes_per_token

HEADER = 32
"""Bytes before the ids: magic, version, M, K, temperature, vocab_size, checksum."""


def sealed(blob):
    """The same bytes with the right checksum: what an encoder with a bug would send."""
    blob = bytes(blob)
    return blob[:28] + struct.pack("<I", zlib.crc32(blob[32:], zlib.crc32(blob[:28]))) + blob[32:]


def draw(num_tokens, top_k, vocab_size, empty=0.0, dtype=np.int32, seed=0):
    rng = np.random.default_rng(seed)
    ids = np.array([rng.permutation(vocab_size)[:top_k] for _ in range(num_tokens)]).reshape(num_tokens, top_k)
    logprobs = -rng.exponential(5.0, (num_tokens, top_k)).astype(np.float32)
    is_empty = rng.random((num_tokens, top_k)) < empty
    ids[is_empty] = -1
    logprobs[is_empty] = -np.inf
    return TopKLogprobs(ids.astype(dtype), logprobs, 1.0, vocab_size)


@pytest.mark.parametrize("dtype", [np.int32, np.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("empty", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    ("num_tokens", "top_k", "vocab_size"),
    [
        (0, 64, 152064),
        (1, 1, 1),
        (1, 1, 2**17 + 1),
        (3, 7, 7),
        (5, 64, 65536),
        (5, 64, 65537),
        (37, 64, 152064),
        (11, 13, 262144),
        (2, 3, 2**20),
    ],
)
def test_round_trip(num_tokens, top_k, vocab_size, empty, dtype):
    payload = draw(num_tokens, top_k, vocab_size, empty, dtype)
    blob = payload.encode()
    decoded = TopKLogprobs.decode(blob)
    assert decoded.ids.dtype == np.int32
    assert decoded.logprobs.dtype == np.float32
    np.testing.assert_array_equal(decoded.ids, payload.ids)
    np.testing.assert_array_equal(decoded.logprobs, payload.logprobs.astype(np.float16).astype(np.float32))
    assert (decoded.temperature, decoded.vocab_size) == (1.0, vocab_size)
    assert len(blob) <= HEADER + num_tokens * nbytes_per_token(top_k, vocab_size)
    if top_k % 8 == 0:
        assert len(blob) == HEADER + num_tokens * nbytes_per_token(top_k, vocab_size)


def test_the_budget_of_the_design():
    assert HEADER <= 32
    assert nbytes_per_token(64, 152064) == 272
    assert nbytes_per_token(64, 65536) == 256
    assert nbytes_per_token(64, 65537) == 264
    payload = example(500, np.random.default_rng(0), top_k=64, vocab_size=2**18, empty=0.0)
    assert len(payload.encode()) <= 272 * 500 + 32


@pytest.mark.parametrize("vocab_size", [152064, 65537, 2**24 + 1])
def test_the_largest_and_smallest_ids_survive(vocab_size):
    ids = np.array([[0, vocab_size - 1, 65535, 65536]])
    decoded = TopKLogprobs.decode(TopKLogprobs(ids, np.full((1, 4), -1, np.float32), 2.0, vocab_size).encode())
    np.testing.assert_array_equal(decoded.ids, ids)
    assert decoded.temperature == 2.0


def test_an_empty_slot_is_marked_by_either_and_comes_back_as_both():
    ids = np.array([[5, -1, 7]])
    logprobs = np.array([[-np.inf, -1.0, -0.5]], np.float32)
    decoded = TopKLogprobs.decode(TopKLogprobs(ids, logprobs, 1.0, 10).encode())
    np.testing.assert_array_equal(decoded.ids, [[-1, -1, 7]])
    np.testing.assert_array_equal(decoded.logprobs, [[-np.inf, -np.inf, -0.5]])


def test_a_probability_without_a_half_float_leaves_as_an_empty_slot():
    decoded = TopKLogprobs.decode(TopKLogprobs(np.array([[3, 4]]), np.float32([[-0.1, -1e6]]), 1.0, 10).encode())
    np.testing.assert_array_equal(decoded.ids, [[3, -1]])


def test_arrays_that_are_not_contiguous():
    wide = draw(6, 8, 100)
    payload = TopKLogprobs(wide.ids[::2, ::2], wide.logprobs[::2, ::2], 1.0, 100)
    np.testing.assert_array_equal(TopKLogprobs.decode(payload.encode()).ids, wide.ids[::2, ::2])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_encode_refuses_what_is_no_log_probability(value):
    with pytest.raises(ValueError, match="NaN or"):
        TopKLogprobs(np.array([[1]]), np.float32([[value]]), 1.0, 10).encode()


@pytest.mark.parametrize(("bad", "message"), [(10, "token id 10.*10")])
def test_encode_refuses_ids_outside_the_vocabulary(bad, message):
    with pytest.raises(ValueError, match=message):
        TopKLogprobs(np.array([[bad]]), np.float32([[-1]]), 1.0, 10).encode()


REFUSED = {
    "shapes": (np.zeros((2, 3), int), np.zeros((2, 4)), 1.0, 10),
    "one_dimension": (np.zeros(3, int), np.zeros(3), 1.0, 10),
    "temperature_zero": (np.zeros((1, 1), int), np.zeros((1, 1)), 0.0, 10),
    "temperature_nan": (np.zeros((1, 1), int), np.zeros((1, 1)), float("nan"), 10),
    "more_tokens_than_vocabulary": (np.zeros((1, 3), int), np.zeros((1, 3)), 1.0, 2),
    "too_many_draws": (np.zeros((1, 1), int), np.zeros((1, 1)), 1.0, 10, 2049),
    "no_vocabulary": (np.zeros((1, 0), int), np.zeros((1, 0)), 1.0, 0),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_a_payload_is_refused(case):
    with pytest.raises(ValueError, match=r"must both be|temperature|vocab_size|num_draws"):
        TopKLogprobs(*REFUSED[case])


def test_decode_refuses_ids_outside_the_vocabulary_and_nan():
    payload = TopKLogprobs(np.array([[1, 2]]), np.float32([[-1, -2]]), 1.0, 10)
    blob = bytearray(payload.encode())
    blob[HEADER : HEADER + 2] = struct.pack("<H", 10)
    with pytest.raises(ValueError, match=r"token id 10.*10"):
        TopKLogprobs.decode(sealed(blob))
    for bits in (0x7E00, 0xFE00, 0xFC01, 0x7C01, 0x7C00):
        blob = payload.encode()[:-2] + struct.pack("<H", bits)
        with pytest.raises(ValueError, match="NaN or"):
            TopKLogprobs.decode(sealed(blob))


def test_a_changed_header_with_the_right_checksum_never_passes_as_another_shape():
    """Any single changed byte of M or K: the sizes leave no room for another reading."""
    blob = draw(4, 8, 152064).encode()
    for position in range(6, 14):
        damaged = bytearray(blob)
        damaged[position] ^= 0x01
        with pytest.raises(DataError, match="payload"):
            TopKLogprobs.decode(sealed(damaged))


def test_log_probabilities_above_0_and_beside_empty_slots_are_kept():
    logprobs = np.float32([[1e-3, 0.0, -0.0, -7.0, -np.inf]])
    decoded = TopKLogprobs.decode(TopKLogprobs(np.arange(5)[None], logprobs, 1.0, 10).encode())
    np.testing.assert_array_equal(decoded.logprobs, logprobs.astype(np.float16))
    np.testing.assert_array_equal(decoded.ids, [[0, 1, 2, 3, -1]])


def test_float16_on_the_bits_is_what_numpy_makes():
    """Every float16 down to -65504, the midpoints between neighbours (ties to even) and random numbers."""
    half = np.arange(0x8000, 0xFC00, dtype=np.uint16)
    exact = half.view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(_float16.from_bits(half), exact)
    between = ((exact[1:].astype(np.float64) + exact[:-1]) / 2).astype(np.float32)
    random = -np.exp(np.random.default_rng(0).uniform(-9.6, 11, 100_000)).astype(np.float32)
    sides = [np.nextafter(between, np.float32(side)) for side in (0, -np.inf)]
    values = np.concatenate([exact, between, *sides, random, np.float32([-65519, -np.inf])])
    got, wanted = _float16.to_bits(values).view(np.float16), values.astype(np.float16)
    is_normal = values <= -(2.0**-14)
    np.testing.assert_array_equal(got[is_normal], wanted[is_normal])
    # Below 6e-5 it rounds twice, which can move a tie by one.
    np.testing.assert_allclose(got[~is_normal], wanted[~is_normal], rtol=0, atol=2.0**-24)


def test_the_codec_needs_neither_torch_nor_ray():
    code = "import sys, ray_kd.payloads; assert not {'torch', 'ray', 'pickle5'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("wire", ["plain", "compact"])
@pytest.mark.parametrize("num_draws", [1, 7, 64, 1000, 2048])
def test_counts_of_draws_come_back_exactly(num_draws, wire):
    """Every count there is: after fp16 the probabilities are still multiples of 1 / num_draws, to fp32."""
    counts = np.arange(num_draws + 1)[:, None]
    with np.errstate(divide="ignore"):
        logprobs = np.log(counts / num_draws).astype(np.float32)
    sent = TopKLogprobs(np.zeros((num_draws + 1, 1), np.int32), logprobs, 1.0, 10, num_draws)
    decoded = TopKLogprobs.decode(sent.encode(wire))
    assert decoded.num_draws == num_draws
    assert decoded.logprobs.dtype == np.float32
    np.testing.assert_array_equal(decoded.ids[:, 0], np.where(counts[:, 0] == 0, -1, 0))
    np.testing.assert_allclose(decoded.logprobs, logprobs, atol=1e-6, rtol=0)
