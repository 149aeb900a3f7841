"""The compact encoding of top-k log-probabilities: half the bytes of the plain one, for slow links and for disks.

After the frame's header, little-endian; every stream is one zstd frame, or stands as it is where that is not smaller
(a stream that is as long as its content):

    length u32 of each stream
    ids            one stream for each byte that an id needs, [M, K]; 0 at empty slots
    code steps     u16 [M, K] differences of neighbouring codes, modulo 2^16: all low bytes, all high bytes
    references     the upper three bytes of a float32 [M]: all lowest bytes, all middle, all highest

    logprob[m, k] = reference[m] - gap(code[m, k]),   gap(c) = 4 (exp(c / 422) - 1),   code 4095: an empty slot

Three things make it small and exact where it counts (measurements in DESIGN.md):

- Entries stay in their order. The teacher sends the most likely first, so codes rise and their steps are small numbers.
- Steps of the grid grow with the gap: 0.0095 nats beside the top, 0.02 at 4 nats, and 12 bits reach 65504 nats.
- The reference is not the top log-probability but the one with which the decoded row has the mass of the exact row.
  Otherwise rounding moves mass to or from the tail, which is small: that alone is most of the divergence.
"""

import math

import numpy as np
import pyarrow as pa

from ray_kd.errors import DataError

_EMPTY = 4095
_LARGEST_GAP = 65504.0
_LINEAR = 4.0
"""Nats below the top up to which the grid is nearly uniform."""
_CODES_PER_E = (_EMPTY - 1) / math.log1p(_LARGEST_GAP / _LINEAR)
_GAPS = np.append(_LINEAR * np.expm1(np.arange(_EMPTY) / _CODES_PER_E), np.inf).astype(np.float32)
_REFERENCE_BYTES = 3
_MOST_RATIO = 2**16
"""Above what zstd reaches: a block of 128 kB takes at least four bytes."""
_zstd = pa.Codec("zstd", compression_level=1)


def encode(ids: np.ndarray, logprobs: np.ndarray, vocab_size: int) -> list[bytes]:
    """The parts of the body. ids and float32 logprobs [M, K], not of size 0, -inf in empty slots (their ids are 0).

    An entry more than 65504 nats below the top of its row leaves as an empty slot.
    """
    top = np.maximum.reduce(logprobs, axis=1)
    top[np.isneginf(top)] = 0.0
    gaps = top[:, None] - logprobs
    codes = np.minimum(np.rint(np.log1p(gaps * np.float32(1 / _LINEAR)) * np.float32(_CODES_PER_E)), _EMPTY)
    codes = codes.astype("<u2")
    relative = np.exp(-_GAPS.take(codes))
    mass = np.maximum(np.add.reduce(relative, axis=1), 1.0)  # below 1 only where all slots are empty
    reference = top + np.log1p(np.add.reduce(np.exp(-gaps) - relative, axis=1) / mass)
    codes[:, 1:] -= codes[:, :-1].copy()
    bits = reference.view(np.uint32) + np.uint32(0x80)
    streams = [
        *_byte_planes(ids.astype("<u4"), range(_id_bytes(vocab_size))),
        *_byte_planes(codes, range(2)),
        np.concatenate(_byte_planes(bits.astype("<u4"), range(1, 4))),
    ]
    packed = [_compressed(stream) for stream in streams]
    return [np.array([len(stream) for stream in packed], "<u4").tobytes(), *packed]


def decode(body: memoryview, num_tokens: int, top_k: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """ids int32 [M, K] and logprobs float32 [M, K], -1 and -inf at empty slots.

    Raises DataError for streams that do not add up and for ids, codes and references out of range.
    """
    count, id_bytes = num_tokens * top_k, _id_bytes(vocab_size)
    sizes = [count] * (id_bytes + 2) + [_REFERENCE_BYTES * num_tokens]
    if not 4 * len(sizes) <= len(body) or count > _MOST_RATIO * len(body):
        raise DataError(f"compact top-k payload: a body of {len(body)} bytes cannot hold M={num_tokens} K={top_k}")
    lengths = np.frombuffer(body, "<u4", len(sizes)).astype(np.int64)
    ends = 4 * len(sizes) + np.cumsum(lengths)
    if ends[-1] != len(body):
        raise DataError(f"compact top-k payload: streams to byte {ends[-1]} in a body of {len(body)}")
    planes = [
        _decompressed(body[end - length : end], size) for end, length, size in zip(ends, lengths, sizes, strict=True)
    ]
    ids = _from_byte_planes(planes[:id_bytes], 0, "<u4").view(np.int32).reshape(num_tokens, top_k)
    if count and not 0 <= np.minimum.reduce(ids, axis=None) <= np.maximum.reduce(ids, axis=None) < vocab_size:
        raise DataError(f"compact top-k payload: a token id is outside the vocabulary of {vocab_size}")
    steps = _from_byte_planes(planes[id_bytes:-1], 0, "<u2").reshape(num_tokens, top_k)
    codes = np.cumsum(steps, axis=1, dtype=np.uint16)
    largest = np.maximum.reduce(codes, axis=None, initial=0)
    if largest > _EMPTY:
        raise DataError(f"compact top-k payload: code {largest}, allowed is 0 to {_EMPTY}")
    reference = _from_byte_planes(planes[-1].reshape(_REFERENCE_BYTES, num_tokens), 1, "<f4")
    if not np.isfinite(reference).all():
        raise DataError("compact top-k payload: a reference is NaN or infinite")
    if largest == _EMPTY:
        ids[codes == _EMPTY] = -1
    return ids, reference[:, None] - _GAPS.take(codes)


def _id_bytes(vocab_size: int) -> int:
    return max((vocab_size - 1).bit_length() + 7, 8) // 8


def _byte_planes(values: np.ndarray, places: range) -> list[np.ndarray]:
    """One uint8 array for each of these bytes of little-endian integers."""
    columns = values.reshape(-1).view(np.uint8).reshape(-1, values.itemsize)
    return [np.ascontiguousarray(columns[:, place]) for place in places]


def _from_byte_planes(planes: "list[np.ndarray] | np.ndarray", first: int, dtype: str) -> np.ndarray:
    """The numbers whose bytes from place `first` on are these; the others are 0."""
    values = np.zeros(len(planes[0]), dtype)
    columns = values.view(np.uint8).reshape(-1, values.itemsize)
    for place, plane in enumerate(planes, start=first):
        columns[:, place] = plane
    return values


def _compressed(stream: np.ndarray) -> bytes:
    packed = _zstd.compress(stream, asbytes=True)
    return packed if len(packed) < stream.size else stream.tobytes()


def _decompressed(packed: memoryview, size: int) -> np.ndarray:
    if len(packed) == size:
        return np.frombuffer(packed, np.uint8)
    try:
        return np.frombuffer(_zstd.decompress(packed, size), np.uint8)
    except (OSError, MemoryError) as error:  # what pyarrow raises for content that is not zstd's, or not of this size
        raise DataError(f"compact top-k payload: a stream cannot be read ({error})") from error
