"""The teacher's K likeliest tokens at each target position, with their full-vocabulary log-probabilities.

Or, drawn from it: K draws, each token's share of them (`num_draws`, see `teacher/draws.py`).

Wire, little-endian: a header of 30 bytes a row, then per token 2K bytes of ids (their low 16 bits), K/8 bytes for each
bit a vocabulary needs beyond 16, and 2K bytes of log-probabilities (fp16): 272 bytes a token at K = 64 and 18-bit ids.
fp16 costs about 5e-4 relative in a log-probability, 1e-4 in the mass of a row.

    magic 4s | version u16 | M u32 | K u32 | temperature f64 | vocab_size u32 | num_draws u32
    ids & 0xffff   u16 [M, K]
    bit 16, bit 17, ... of the ids, each packed into ceil(M K / 8) bytes
    logprobs       f16 [M, K]
"""

import math
import struct
from dataclasses import dataclass

import numpy as np

from ray_kd.errors import DataError

MAGIC = b"RKTK"
VERSION = 2
_HEADER = struct.Struct("<4sHIIdII")
MAX_DRAWS = 2048
"""Up to here fp16 keeps the share of a token close enough to read its count back."""
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

    def encode(self) -> bytes:
        """The wire form. A log-probability under -65504 has no fp16 and leaves as an empty slot.

        Raises ValueError for ids outside the vocabulary and for log-probabilities that are NaN or +inf.
        """
        with np.errstate(over="ignore"):
            logprobs = np.ascontiguousarray(self.logprobs, dtype="<f2")
        _check_logprobs(logprobs)
        ids = np.ascontiguousarray(self.ids)
        is_empty = logprobs.view("<u2") == _FP16_MINUS_INFINITY
        if ids.size and ids.min() < 0:
            is_empty |= ids < 0
        if is_empty.any():
            ids = np.where(is_empty, 0, ids)
            logprobs = np.where(is_empty, np.float16(-np.inf), logprobs)
        _check_ids(ids, self.vocab_size)
        num_tokens, top_k = ids.shape
        header = _HEADER.pack(MAGIC, VERSION, num_tokens, top_k, self.temperature, self.vocab_size, self.num_draws)
        planes = [np.packbits((ids & (1 << bit)).astype(bool)).data for bit in _high_bits(self.vocab_size)]
        return b"".join([header, ids.astype("<u2").data, *planes, logprobs.data])

    @classmethod
    def decode(cls, blob: bytes) -> "TopKLogprobs":
        """ids as int32 with -1 at empty slots, log-probabilities as float32 with -inf there.

        Those of draws are the exact log(count / num_draws): fp16 would bias the estimate.

        Raises ValueError for another magic or version, a size that does not add up, ids outside the vocabulary, and
        log-probabilities that are NaN or +inf.
        """
        if len(blob) < _HEADER.size:
            raise DataError(f"top-k payload of {len(blob)} bytes is shorter than its header of {_HEADER.size}")
        magic, version, num_tokens, top_k, temperature, vocab_size, num_draws = _HEADER.unpack_from(blob)
        if magic != MAGIC:
            raise DataError(f"not a top-k payload: magic {magic!r}, expected {MAGIC!r}")
        if version != VERSION:
            raise DataError(f"top-k payload of version {version}; this code reads version {VERSION}")
        count = num_tokens * top_k
        plane_size = (count + 7) // 8
        high_bits = _high_bits(vocab_size)
        expected = _HEADER.size + 4 * count + plane_size * len(high_bits)
        if len(blob) != expected:
            raise DataError(f"top-k payload of {len(blob)} bytes; M={num_tokens} K={top_k} need {expected}")
        shape = (num_tokens, top_k)
        ids = np.frombuffer(blob, "<u2", count, _HEADER.size).astype(np.int32)
        offset = _HEADER.size + 2 * count
        for bit in high_bits:
            plane = np.unpackbits(np.frombuffer(blob, np.uint8, plane_size, offset), count=count)
            ids |= plane.astype(np.int32) << bit
            offset += plane_size
        _check_ids(ids, vocab_size)
        wire_logprobs = np.frombuffer(blob, "<f2", count, offset)
        _check_logprobs(wire_logprobs)
        is_empty = wire_logprobs.view("<u2") == _FP16_MINUS_INFINITY
        if is_empty.any():
            ids[is_empty] = -1
        logprobs = wire_logprobs.astype(np.float32)
        if 0 < num_draws <= MAX_DRAWS:
            with np.errstate(divide="ignore"):
                logprobs = np.log(np.rint(np.exp(logprobs) * num_draws) / np.float32(num_draws))
        return cls(ids.reshape(shape), logprobs.reshape(shape), temperature, vocab_size, num_draws)


def nbytes_per_token(k: int, vocab_size: int) -> int:
    """Bytes of one target position on the wire, without the header of the row."""
    return 4 * k + len(_high_bits(vocab_size)) * ((k + 7) // 8)


def example(num_tokens: int, rng: np.random.Generator) -> TopKLogprobs:
    """A payload of random numbers with some empty slots, for tests and benchmarks."""
    vocab_size, top_k = 152064, 8
    # One id from each of top_k ranges: distinct without a loop.
    ids = rng.integers(0, vocab_size // top_k, (num_tokens, top_k)) * top_k + np.arange(top_k)
    logprobs = -np.sort(rng.exponential(4.0, (num_tokens, top_k))).astype(np.float32) - 0.1
    is_empty = rng.random((num_tokens, top_k)) < 0.1
    ids = np.where(is_empty, -1, ids).astype(np.int32)
    return TopKLogprobs(ids, np.where(is_empty, np.float32(-np.inf), logprobs), 1.0, vocab_size)


def _high_bits(vocab_size: int) -> range:
    """The bits of an id that do not fit the 16-bit part."""
    return range(_LOW_BITS, max((vocab_size - 1).bit_length(), _LOW_BITS))


def _check_ids(ids: np.ndarray, vocab_size: int) -> None:
    if ids.size and int(ids.max()) >= vocab_size:
        raise DataError(f"token id {int(ids.max())} is outside the vocabulary of {vocab_size}")


def _check_logprobs(logprobs: np.ndarray) -> None:
    """NaN and +inf, on the bits: numpy has no fast float16 arithmetic."""
    bits = logprobs.view("<u2")
    magnitude = bits & 0x7FFF
    if logprobs.size and (int(magnitude.max()) > _FP16_INFINITY or bool((bits == _FP16_INFINITY).any())):
        raise DataError("log-probabilities contain NaN or +inf; an empty slot is -inf")
