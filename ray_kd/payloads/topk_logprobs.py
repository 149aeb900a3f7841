"""The teacher's K likeliest tokens at each target position, with their full-vocabulary log-probabilities.

Or, drawn from it: K draws, each token's share of them (`num_draws`, see `teacher/draws.py`).

Two encodings of the same payload, each with a version and a checksum (`_frame.py`); `decode` knows both.

plain     little-endian: a header of 32 bytes a row (M u32, K u32, temperature f64, vocab_size u32, num_draws u16 among
          them), then per token 2K bytes of ids (their low 16 bits), K/8 bytes for each bit a vocabulary needs beyond
          16, and 2K bytes of log-probabilities (fp16): 272 bytes a token at K = 64 and 18-bit ids. fp16 costs about
          5e-4 relative in a log-probability, 1e-4 in the mass of a row.
compact   never larger; about 140 bytes a token at K = 64 and a vocabulary of 49152, for five times the work
          (`_compact.py`).

The body of plain:

    ids & 0xffff   u16 [M, K]
    bit 16, bit 17, ... of the ids, each packed into ceil(M K / 8) bytes
    logprobs       f16 [M, K]
"""

import math
import struct
from dataclasses import dataclass

import numpy as np

from ray_kd.errors import DataError
from ray_kd.payloads import _compact, _float16
from ray_kd.payloads._frame import NBYTES as HEADER_NBYTES
from ray_kd.payloads._frame import seal, unseal

WIRES = ("plain", "compact")
_PLAIN, _COMPACT = b"RKTK", b"RKTC"
_VERSIONS = {_PLAIN: 2, _COMPACT: 1}
MAX_DRAWS = 2048
"""Up to here fp16 keeps the share of a token close enough to read its count back."""
_FIELDS = struct.Struct("<IIdIH")
_LOW_BITS = 16
_FP16_INFINITY = 0x7C00
_FP16_MINUS_INFINITY = 0xFC00


@dataclass(frozen=True, eq=False)
class TopKLogprobs:
    """One entry per target position of a row, in order; M positions, K tokens each."""

    ids: np.ndarray
    """int32 or int64 [M, K], distinct within a position; negative = empty slot."""
    logprobs: np.ndarray
    """float32 [M, K], log-probabilities over the full vocabulary in nats; -inf = empty slot."""
    temperature: float
    """The temperature the log-probabilities were taken at."""
    vocab_size: int
    """Of the teacher: every id is below it."""
    num_draws: int = 0
    """0: these are the likeliest tokens. Else the log-probabilities are estimates, log(count / num_draws), which sum to
    one: right for forward KL with tail drop, for nothing else."""

    def __post_init__(self) -> None:
        if self.ids.ndim != 2 or self.ids.shape != self.logprobs.shape:
            raise DataError(f"ids {self.ids.shape} and logprobs {self.logprobs.shape} must both be [M, K]")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise DataError(f"temperature {self.temperature} is not a positive number")
        if not 1 <= self.vocab_size <= 2**31 or self.ids.shape[1] > self.vocab_size:
            raise DataError(f"K = {self.ids.shape[1]} and vocab_size {self.vocab_size} need K <= vocab_size <= 2^31")
        if not 0 <= self.num_draws <= MAX_DRAWS:
            raise DataError(f"num_draws {self.num_draws} is not 0 to {MAX_DRAWS}")

    def encode(self, wire: str = "plain") -> bytes:
        """The wire form; compact: the smaller of the two, which for a few tokens is plain. Draws are always plain.

        A log-probability under -65504 has no fp16 and leaves as an empty slot. Raises DataError for ids outside the
        vocabulary and for log-probabilities that are NaN or +inf.
        """
        ids, logprobs, highest = _checked(self.ids, self.logprobs, self.vocab_size)
        num_tokens, top_k = ids.shape
        if wire not in WIRES:
            raise ValueError(f"wire is {wire!r}; allowed: {', '.join(WIRES)}")
        fields = _FIELDS.pack(num_tokens, top_k, self.temperature, self.vocab_size, self.num_draws)
        # The grid of compact is too coarse to read a count back.
        if wire == "compact" and ids.size and not self.num_draws:
            blob = seal(_COMPACT, _VERSIONS[_COMPACT], fields, _compact.encode(ids, logprobs, self.vocab_size))
            if len(blob) < HEADER_NBYTES + _body_nbytes(ids.size, self.vocab_size):
                return blob
        half = _float16.to_bits(logprobs) if highest <= 0 else logprobs.astype("<f2")
        return seal(_PLAIN, _VERSIONS[_PLAIN], fields, [part.data for part in (*_pack_ids(ids, self.vocab_size), half)])

    @classmethod
    def decode(cls, blob: bytes) -> "TopKLogprobs":
        """ids as int32 with -1 at empty slots, log-probabilities as float32 with -inf there, both in their order.

        Those of draws are the exact log(count / num_draws): fp16 would bias the estimate.

        Raises DataError for another magic or version, bytes that changed, a size that does not add up, ids outside
        the vocabulary, and log-probabilities that are NaN or +inf.
        """
        magic, fields, body = unseal(blob, _VERSIONS, "top-k")
        num_tokens, top_k, temperature, vocab_size, num_draws = _FIELDS.unpack(fields)
        if magic == _COMPACT:
            return cls(*_compact.decode(body, num_tokens, top_k, vocab_size), temperature, vocab_size)
        count = num_tokens * top_k
        if len(body) != _body_nbytes(count, vocab_size):
            needed = HEADER_NBYTES + _body_nbytes(count, vocab_size)
            raise DataError(f"top-k payload of {len(blob)} bytes; M={num_tokens} K={top_k} need {needed}")
        ids = _unpack_ids(body, count, vocab_size)
        if count and (largest := int(np.maximum.reduce(ids))) >= vocab_size:
            raise DataError(f"token id {largest} is outside the vocabulary of {vocab_size}")
        logprobs, is_empty = _widen(np.frombuffer(body, "<u2", count, len(body) - 2 * count))
        if is_empty is not None:
            ids[is_empty] = -1
        shape = (num_tokens, top_k)
        if 0 < num_draws <= MAX_DRAWS:
            with np.errstate(divide="ignore"):
                logprobs = np.log(np.rint(np.exp(logprobs) * num_draws) / np.float32(num_draws))
        return cls(ids.reshape(shape), logprobs.reshape(shape), temperature, vocab_size, num_draws)


def nbytes_per_token(k: int, vocab_size: int) -> int:
    """Bytes of one target position on the plain wire, without the header of the row; compact takes no more."""
    return 4 * k + len(_high_bits(vocab_size)) * ((k + 7) // 8)


def example(
    num_tokens: int, rng: np.random.Generator, top_k: int = 8, vocab_size: int = 152064, empty: float = 0.1
) -> TopKLogprobs:
    """A payload like a language model's, for tests and benchmarks; top_k well below vocab_size.

    ids: Zipf's law from rank 100 on (log-uniform). Log-probabilities: the largest of exponential logits, so the gap
    between the j-th and the next is exponential with mean 1.8 / j nats (8.5 nats in all at K = 64); the mass outside
    the top k is log-uniform between 1e-4 and 0.7. empty: the share of empty slots.
    """
    ids = np.full((num_tokens, top_k), -1)
    is_open = np.ones(ids.shape, bool)
    while is_open.any():  # an id may stand in a row once
        ids[is_open] = np.exp(rng.uniform(np.log(100), np.log(vocab_size + 100), is_open.sum())).astype(int) - 100
        order = np.argsort(ids, axis=1, kind="stable")
        np.put_along_axis(is_open, order[:, 1:], np.diff(np.take_along_axis(ids, order, 1), axis=1) == 0, axis=1)
        np.put_along_axis(is_open, order[:, :1], False, axis=1)
    gaps = np.zeros(ids.shape)
    gaps[:, 1:] = np.cumsum(rng.exponential(1.8 / np.arange(1, top_k), (num_tokens, top_k - 1)), axis=1)
    log_mass = np.log1p(-np.exp(rng.uniform(np.log(1e-4), np.log(0.7), (num_tokens, 1))))
    logprobs = (log_mass - np.log(np.exp(-gaps).sum(axis=1, keepdims=True)) - gaps).astype(np.float32)
    is_empty = rng.random(ids.shape) < empty
    ids = np.where(is_empty, -1, ids).astype(np.int32)
    return TopKLogprobs(ids, np.where(is_empty, np.float32(-np.inf), logprobs), 1.0, vocab_size)


def _high_bits(vocab_size: int) -> range:
    """The bits of an id that do not fit the 16-bit part."""
    return range(_LOW_BITS, max((vocab_size - 1).bit_length(), _LOW_BITS))


def _plane_nbytes(count: int) -> int:
    return (count + 7) // 8


def _body_nbytes(count: int, vocab_size: int) -> int:
    return 4 * count + len(_high_bits(vocab_size)) * _plane_nbytes(count)


def _pack_ids(ids: np.ndarray, vocab_size: int) -> list[np.ndarray]:
    """The low 16 bits as uint16, then bit 16, bit 17, ... as uint8 [ceil(M K / 8)] each."""
    num_planes = len(_high_bits(vocab_size))
    if num_planes == 0:
        return [ids.astype("<u2")]
    high = ids.reshape(-1).astype(np.int32)
    low = high.astype("<u2")
    high >>= _LOW_BITS
    high = high.astype(np.uint8 if num_planes <= 8 else np.uint16)
    return [low, *(np.packbits(high & (1 << plane)) for plane in range(num_planes))]


def _unpack_ids(body: memoryview, count: int, vocab_size: int) -> np.ndarray:
    """int32 [M K] of the bytes that `_pack_ids` made."""
    ids = np.frombuffer(body, "<u2", count).astype(np.int32)
    num_planes = len(_high_bits(vocab_size))
    if num_planes == 0:
        return ids
    planes = np.frombuffer(body, np.uint8, num_planes * _plane_nbytes(count), 2 * count).reshape(num_planes, -1)
    high = np.unpackbits(planes[-1], count=count)
    if num_planes > 8:
        high = high.astype(np.uint16)
    for plane in planes[-2::-1]:
        high += high
        high |= np.unpackbits(plane, count=count)
    shifted = high.astype(np.int32)
    shifted <<= _LOW_BITS
    ids |= shifted
    return ids


def _checked(ids: np.ndarray, logprobs: np.ndarray, vocab_size: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Contiguous ids and float32 logprobs with 0 and -inf at empty slots, and the largest log-probability.

    Passes are what encoding costs: one each for the largest and the least number, and more only when a slot is empty.
    """
    ids = np.ascontiguousarray(ids)
    logprobs = np.ascontiguousarray(logprobs, dtype=np.float32)
    if not ids.size:
        return ids, logprobs, 0.0
    highest = float(np.maximum.reduce(logprobs, axis=None))
    if not highest < _float16.OVERFLOW:  # or NaN
        raise DataError("log-probabilities contain NaN or +inf; an empty slot is -inf")
    largest = int(np.maximum.reduce(ids.view(f"u{ids.itemsize}"), axis=None))  # an id below 0 is a large one there
    if largest >= vocab_size or np.minimum.reduce(logprobs, axis=None) <= -_float16.OVERFLOW:
        is_empty = (ids < 0) | (logprobs <= -_float16.OVERFLOW)
        ids = np.where(is_empty, 0, ids)
        logprobs = np.where(is_empty, np.float32(-np.inf), logprobs)
        if (largest := int(np.maximum.reduce(ids, axis=None))) >= vocab_size:
            raise DataError(f"token id {largest} is outside the vocabulary of {vocab_size}")
    return ids, logprobs, highest


def _widen(half: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """float32 [M K] of fp16 bits, and where a slot is empty, None for nowhere. Raises DataError for NaN and +inf."""
    if not half.size:
        return np.empty(0, np.float32), None
    # As int16: finite negatives are the smallest, then -inf, negative NaN, positives, +inf, NaN.
    largest = int(np.maximum.reduce(half.view("<i2")))
    minus_infinity = _FP16_MINUS_INFINITY - 2**16
    if largest < minus_infinity:
        return _float16.from_bits(half), None
    magnitude = half & 0x7FFF
    if largest >= _FP16_INFINITY or (largest != minus_infinity and bool((magnitude > _FP16_INFINITY).any())):
        raise DataError("log-probabilities contain NaN or +inf; an empty slot is -inf")
    is_empty = half == _FP16_MINUS_INFINITY
    return half.view("<f2").astype(np.float32), is_empty if is_empty.any() else None
