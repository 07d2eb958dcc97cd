"""CRC-32 (SPEC.md R-CNV-004). Uses zlib-ng if it is installed, which is much faster than zlib."""

from __future__ import annotations

from .source import Buffer

try:
    from zlib_ng.zlib_ng import crc32 as _crc32
except ImportError:
    from zlib import crc32 as _crc32


def crc32(data: Buffer, before: int = 0) -> int:
    """Returns the CRC-32 of ``data``, an integer from 0 to 2^32 - 1.

    Args:
        data: the bytes.
        before: the CRC-32 of all bytes before ``data``; 0 without such bytes.
    """
    return _crc32(data, before)
