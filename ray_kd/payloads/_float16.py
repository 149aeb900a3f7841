"""float32 <-> float16 on the bits, for log-probabilities: numpy converts one number at a time.

Measured for 64 numbers, in rows of 500: to float16 0.07 us instead of 0.20, back 0.03 instead of 0.09.

A float16 moved to the place of a float32's exponent and mantissa reads as a float32 that is 2^112 times smaller,
subnormals included, so a product with 2^112 is the whole conversion and the way back needs only the rounding.
"""

import numpy as np

_SCALE = np.float32(2.0**112)
_DROPPED_BITS = 13
"""Mantissa bits that a float16 does not have."""
_SIGN = 0x8000
OVERFLOW = 65520.0
"""The least magnitude that rounds to infinity."""


def to_bits(values: np.ndarray) -> np.ndarray:
    """uint16 of float32 values, each -inf or in (-65520, 0]; rounded to nearest, ties to even. 0 leaves as -0."""
    bits = (values * (1 / _SCALE)).view(np.uint32)
    rounding = bits >> _DROPPED_BITS
    rounding &= 1
    rounding += (1 << (_DROPPED_BITS - 1)) - 1
    bits += rounding
    bits >>= _DROPPED_BITS
    half = bits.astype("<u2")
    half |= _SIGN  # it was lost: it lies above bit 15
    return half


def from_bits(half: np.ndarray) -> np.ndarray:
    """float32 of uint16 float16 bits that are all negative and finite."""
    bits = (half & (_SIGN - 1)).astype(np.uint32)
    bits <<= _DROPPED_BITS
    values = bits.view(np.float32)
    values *= -_SCALE
    return values
