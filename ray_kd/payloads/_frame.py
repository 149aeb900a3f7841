"""What every payload begins with: a header of 32 bytes a row with a checksum of all the rest.

    magic 4s | version u16 | 22 bytes of the payload's own | crc32 u32

The CRC-32 is over the header before it and the body: any change within 32 neighbouring bits is found for certain,
another one with a chance of 1 - 2^-32. It costs 0.08 us a token of 272 bytes on each side.
"""

import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from ray_kd.errors import DataError

_KIND = struct.Struct("<4sH")
_CRC = struct.Struct("<I")
FIELDS_NBYTES = 22
NBYTES = _KIND.size + FIELDS_NBYTES + _CRC.size


def seal(magic: bytes, version: int, fields: bytes, parts: Sequence[Any]) -> bytes:
    """Header and body. fields: 22 bytes; parts: contiguous buffers, joined in order."""
    assert len(fields) == FIELDS_NBYTES, f"{len(fields)} bytes of fields"
    header = _KIND.pack(magic, version) + fields
    crc = zlib.crc32(header)
    for part in parts:
        crc = zlib.crc32(part, crc)
    return b"".join([header, _CRC.pack(crc), *parts])


def unseal(blob: bytes, versions: Mapping[bytes, int], what: str) -> tuple[bytes, memoryview, memoryview]:
    """Magic, the 22 bytes of fields and the body. versions: the version this code reads, for each known magic.

    Raises DataError for another magic or version and for bytes that are not those that were sealed.
    """
    if len(blob) < NBYTES:
        raise DataError(f"{what} payload of {len(blob)} bytes is shorter than its header of {NBYTES}")
    magic, version = _KIND.unpack_from(blob)
    if magic not in versions:
        raise DataError(f"not a {what} payload: magic {magic!r}, expected {' or '.join(map(repr, versions))}")
    if version != versions[magic]:
        raise DataError(f"{what} payload of version {version}; this code reads version {versions[magic]} of {magic!r}")
    view = memoryview(blob)
    end = NBYTES - _CRC.size
    if zlib.crc32(view[NBYTES:], zlib.crc32(view[:end])) != _CRC.unpack_from(blob, end)[0]:
        raise DataError(f"{what} payload of {len(blob)} bytes is damaged or cut: its checksum does not match")
    return magic, view[_KIND.size : end], view[NBYTES:]
