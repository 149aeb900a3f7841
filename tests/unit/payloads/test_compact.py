"""The compact encoding: sizes, what rounding costs, and every shape a payload can have."""

import math
import struct
import zlib

import numpy as np
import pytest

from ray_kd.errors import DataError
from ray_kd.payloads import TopKLogprobs
from ray_kd.payloads.topk_logprobs import example

MAGIC = b"RKTC"


def sealed(blob):
    """The same bytes with the right checksum: what an encoder with a bug would send."""
    blob = bytes(blob)
    return blob[:28] + struct.pack("<I", zlib.crc32(blob[32:], zlib.crc32(blob[:28]))) + blob[32:]


def trip(payload):
    blob = payload.encode("compact")
    assert blob[:4] == MAGIC
    return TopKLogprobs.decode(blob)


def divergence(exact, decoded):
    """KL(exact || decoded) of one token over its filled slots and a bucket, term by term."""
    terms = [math.exp(a) * (a - b) for a, b in zip(exact.tolist(), decoded.tolist(), strict=True) if a > -math.inf]
    tails = [max(1 - math.fsum(math.exp(x) for x in side.tolist()), 1e-7) for side in (exact, decoded)]
    return math.fsum([*terms, tails[0] * math.log(tails[0] / tails[1])])


@pytest.mark.parametrize("vocab_size", [49152, 151936])
@pytest.mark.parametrize("ids", ["zipf", "uniform"])
def test_the_size_budget(vocab_size, ids):
    payload = example(500, np.random.default_rng(0), top_k=64, vocab_size=vocab_size, empty=0.0)
    if ids == "uniform":  # nothing to compress
        drawn = np.random.default_rng(1).integers(0, vocab_size // 64, (500, 64)) * 64 + np.arange(64)
        payload = TopKLogprobs(drawn, payload.logprobs, 1.0, vocab_size)
    assert len(payload.encode("compact")) <= 185 * 500


@pytest.mark.parametrize("top_k", [4, 8, 64, 500])
def test_rounding_costs_at_most_2e_5_nats(top_k):
    """On the mean, with room; of single tokens all but one in 2000."""
    payload = example(2000, np.random.default_rng(3), top_k=top_k, vocab_size=151936, empty=0.0)
    decoded = trip(payload)
    costs = np.array([divergence(a, b) for a, b in zip(payload.logprobs, decoded.logprobs, strict=True)])
    assert costs.mean() < 1e-5
    assert np.quantile(costs, 0.9995) < 2e-5
    np.testing.assert_array_equal(decoded.ids, payload.ids)


def test_flat_and_sharp_rows_cost_as_little():
    """A uniform top k, and a top token of 1 - 1e-6: the mass of the row is kept exactly, so the tail is."""
    uniform = np.full((100, 64), -math.log(100))
    sharp = np.full((100, 64), math.log(1e-8))
    sharp[:, 0] = math.log1p(-1e-6)
    two = np.full((100, 64), math.log(1e-7))
    two[:, :2] = math.log((1 - 1e-5) / 2) + np.float32([[0.03, -0.03]])
    logprobs = np.concatenate([uniform, sharp, two]).astype(np.float32)
    decoded = trip(TopKLogprobs(np.tile(np.arange(64), (300, 1)), logprobs, 1.0, 1000))
    assert max(divergence(a, b) for a, b in zip(logprobs, decoded.logprobs, strict=True)) < 1e-5


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("empty", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    ("num_tokens", "top_k", "vocab_size"),
    [(300, 1, 2), (100, 7, 7), (40, 259, 259), (50, 64, 65536), (50, 64, 65537), (50, 8, 2**24 + 1), (90, 9, 2**31)],
)
def test_ids_order_and_empty_slots_come_back(num_tokens, top_k, vocab_size, empty, dtype):
    """Random order too: it costs bytes, not correctness."""
    rng = np.random.default_rng(top_k)
    space = vocab_size // top_k
    ids = np.array([rng.integers(0, space, top_k) + space * rng.permutation(top_k) for _ in range(num_tokens)])
    logprobs = -np.sort(rng.exponential(3.0, (num_tokens, top_k))).astype(np.float32) - 1
    if empty == 0.3:
        rng.permuted(logprobs, axis=1, out=logprobs)
    is_empty = rng.random(ids.shape) < empty
    logprobs[is_empty] = -np.inf
    decoded = TopKLogprobs.decode(TopKLogprobs(ids.astype(dtype), logprobs, 2.0, vocab_size).encode("compact"))
    assert (decoded.ids.dtype, decoded.logprobs.dtype) == (np.int32, np.float32)
    np.testing.assert_array_equal(decoded.ids, np.where(is_empty, -1, ids))
    np.testing.assert_allclose(decoded.logprobs, logprobs, rtol=4e-3, atol=1e-2)
    assert (decoded.temperature, decoded.vocab_size) == (2.0, vocab_size)


def test_the_largest_id_survives():
    ids = np.tile([2**31 - 1, 0, 2**31 - 2, 65536], (100, 1))
    decoded = trip(TopKLogprobs(ids, np.full(ids.shape, -2, np.float32), 1.0, 2**31))
    np.testing.assert_array_equal(decoded.ids, ids)


def test_12_bits_reach_as_far_as_a_half_float_and_beyond_it_a_slot_is_empty():
    logprobs = np.tile(np.float32([0.0, -1e-6, -100, -65000, -1e6, -np.inf]), (100, 1))
    decoded = trip(TopKLogprobs(np.tile(np.arange(6), (100, 1)), logprobs, 1.0, 10))
    np.testing.assert_allclose(decoded.logprobs[0, :4], logprobs[0, :4], rtol=4e-3, atol=1e-2)
    np.testing.assert_array_equal(decoded.ids[0], [0, 1, 2, 3, -1, -1])


def test_it_is_never_larger_than_plain():
    rng = np.random.default_rng(0)
    for num_tokens in (0, 1, 2, 5, 20):
        payload = example(num_tokens, rng, top_k=4, vocab_size=300)
        assert len(payload.encode("compact")) <= len(payload.encode())


def test_encode_refuses_what_plain_refuses():
    for logprob in (np.nan, np.inf):
        with pytest.raises(DataError, match="NaN or"):
            TopKLogprobs(np.array([[1]]), np.float32([[logprob]]), 1.0, 10).encode("compact")
    with pytest.raises(DataError, match=r"token id 10.*10"):
        TopKLogprobs(np.array([[10]]), np.float32([[-1]]), 1.0, 10).encode("compact")


def test_bytes_with_the_right_checksum_are_refused_by_name_or_are_a_payload():
    """What a faulty encoder could send: nothing but DataError, and never an array that breaks the contract."""
    rng, refused = np.random.default_rng(5), 0
    blob = example(60, rng, top_k=8, vocab_size=300).encode("compact")
    assert blob[:4] == MAGIC
    for position in range(6, len(blob)):
        for flip in (0x01, 0x80, int(rng.integers(1, 256))):
            damaged = bytearray(blob)
            damaged[position] ^= flip
            try:
                decoded = TopKLogprobs.decode(sealed(damaged))
            except DataError:
                refused += 1
                continue
            assert decoded.ids.shape == decoded.logprobs.shape
            assert decoded.ids.max() < decoded.vocab_size
            assert not np.isnan(decoded.logprobs).any()
            np.testing.assert_array_equal(decoded.ids < 0, np.isneginf(decoded.logprobs))
    assert refused > 0
