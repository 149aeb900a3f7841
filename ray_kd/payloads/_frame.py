"""What every top-k encoding begins with: a header of 32 bytes a row with a checksum of all the rest.

    magic 4s | version u16 | M u32 | K u32 | temperature f64 | vocab_size u32 | num_draws u16 | crc32 u32

The CRC-32 is over the header before it and the body: any change within 32 neighbouring bits is found for certain,
another one with a chance of 1 - 2^-32. It costs 0.08 us a token of 272 bytes on each side.
"""

import struct
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from ray_kd.errors import DataError

_FIELDS = struct.Struct("<4sHIIdIH")
_CRC = struct.Struct("<I")
NBYTES = _FIELDS.size + _CRC.size


class Frame(NamedTuple):
    """The header, without the checksum."""

    magic: bytes
    version: int
    num_tokens: int
    top_k: int
    temperature: float
    vocab_size: int
    num_draws: int


def seal(frame: Frame, parts: Sequence[Any]) -> bytes:
    """Header and body. parts: contiguous buffers, joined in order."""
    fields = _FIELDS.pack(*frame)
    crc = zlib.crc32(fields)
    for part in parts:
        crc = zlib.crc32(part, crc)
    return b"".join([fields, _CRC.pack(crc), *parts])


def unseal(blob: bytes, versions: dict[bytes, int]) -> Frame:
    """The header; the body is what follows NBYTES. versions: the version this code reads, for each known magic.

    Raises DataError for another magic or version and for bytes that are not those that were sealed.
    """
    if len(blob) < NBYTES:
        raise DataError(f"top-k payload of {len(blob)} bytes is shorter than its header of {NBYTES}")
    frame = Frame(*_FIELDS.unpack_from(blob))
    if frame.magic not in versions:
        raise DataError(f"not a top-k payload: magic {frame.magic!r}, expected {' or '.join(map(repr, versions))}")
    if frame.version != versions[frame.magic]:
        raise DataError(
            f"top-k payload of version {frame.version}; this code reads version {versions[frame.magic]} "
            f"of {frame.magic!r}"
        )
    view = memoryview(blob)
    if zlib.crc32(view[NBYTES:], zlib.crc32(view[: _FIELDS.size])) != _CRC.unpack_from(blob, _FIELDS.size)[0]:
        raise DataError(f"top-k payload of {len(blob)} bytes is damaged or cut: its checksum does not match")
    return frame
