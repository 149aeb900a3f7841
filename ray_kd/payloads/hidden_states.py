"""The teacher's final hidden states at each target position: with its head they give its whole distribution.

plain     little-endian: a header of 32 bytes a row, then bfloat16 [M, D]. 2 D bytes a token: 8 kB at a width of 4096,
          beside 0.27 kB for 64 log-probabilities. What a bfloat16 teacher computed arrives as it was; a float32 one is
          rounded to 8 bits of mantissa.
"""

import struct
from dataclasses import dataclass

import numpy as np

from ray_kd.errors import DataError
from ray_kd.payloads._frame import NBYTES as HEADER_NBYTES
from ray_kd.payloads._frame import seal, unseal

WIRES = ("plain",)
_PLAIN = b"RKHS"
_VERSIONS = {_PLAIN: 1}
_FIELDS = struct.Struct("<II14x")
_INFINITY = 0x7F80


@dataclass(frozen=True, eq=False)
class HiddenStates:
    """One entry per target position of a row, in order; M positions, width D."""

    bits: np.ndarray
    """uint16 [M, D]: bfloat16, which numpy does not have, by its bits (a torch tensor views them as such)."""

    def __post_init__(self) -> None:
        if self.bits.ndim != 2 or self.bits.dtype != np.uint16:
            raise DataError(f"hidden states are {self.bits.dtype} {list(self.bits.shape)}, must be uint16 [M, D]")

    def encode(self, wire: str = "plain") -> bytes:
        """The wire form. Raises DataError for values that are NaN or infinite."""
        if wire not in WIRES:
            raise ValueError(f"wire is {wire!r}; allowed: {', '.join(WIRES)}")
        check_finite(self.bits)
        body = np.ascontiguousarray(self.bits, dtype="<u2")
        return seal(_PLAIN, _VERSIONS[_PLAIN], _FIELDS.pack(*body.shape), [body.data] if body.size else [])

    @classmethod
    def decode(cls, blob: bytes) -> "HiddenStates":
        """The same; the array shares the memory of blob and cannot be written.

        Raises DataError for another magic or version, bytes that changed, a size that does not add up, and values that
        are NaN or infinite.
        """
        _, fields, body = unseal(blob, _VERSIONS, "hidden-states")
        num_tokens, width = _FIELDS.unpack(fields)
        if len(body) != num_tokens * nbytes_per_token(width):
            needed = HEADER_NBYTES + num_tokens * nbytes_per_token(width)
            raise DataError(f"hidden-states payload of {len(blob)} bytes; M={num_tokens} D={width} need {needed}")
        bits = np.frombuffer(body, "<u2").astype(np.uint16, copy=False).reshape(num_tokens, width)
        check_finite(bits)
        return cls(bits)


def nbytes_per_token(width: int) -> int:
    """Bytes of one target position, without the header of the row."""
    return 2 * width


def example(num_tokens: int, rng: np.random.Generator, width: int = 48) -> HiddenStates:
    """A payload like a model's after its final norm, for tests and benchmarks: normal, some channels large."""
    values = rng.normal(size=(num_tokens, width)) * np.exp(rng.normal(size=width))
    return HiddenStates((values.astype("<f4").view("<u4") >> 16).astype(np.uint16))


def check_finite(bits: np.ndarray) -> None:
    """Raises DataError when bfloat16 values, by their bits, are NaN or infinite."""
    # Without the sign, an infinity is the least of what is not finite.
    if bits.size and int((bits & 0x7FFF).max()) >= _INFINITY:
        raise DataError("hidden states contain NaN or an infinite value")
