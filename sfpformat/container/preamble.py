"""The preamble of a file (SPEC.md chapter 4): writes, parses and checks it."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from ..errors import fault

SIZE = 64
MAGIC = b"\x89SFP\r\n\x1a\n"
MAJOR, MINOR = 1, 0

# magic, major, minor, reserved, directory offset, directory length, file length, directory CRC, reserved
_FIELDS = struct.Struct("<8sHH4sQQQI16s")
_CHECKSUM = struct.Struct("<I")


@dataclass(frozen=True)
class Preamble:
    """The fields of the preamble; offsets and lengths in bytes."""

    directory_offset: int
    directory_length: int
    file_length: int
    directory_crc: int
    minor: int = MINOR

    def to_bytes(self) -> bytes:
        """Returns the 64 bytes of the preamble."""
        fields = _FIELDS.pack(
            MAGIC,
            MAJOR,
            self.minor,
            bytes(4),
            self.directory_offset,
            self.directory_length,
            self.file_length,
            self.directory_crc,
            bytes(16),
        )
        return fields + _CHECKSUM.pack(zlib.crc32(fields))

    @classmethod
    def from_bytes(cls, data: bytes, length: int) -> Preamble:
        """Parses and checks the preamble.

        Args:
            data: the first 64 bytes of the file, or all bytes of a shorter file.
            length: length of the file, in bytes.

        Raises:
            InvalidFileError, UnsupportedError: by the clauses R-PRE-001 to R-PRE-011.
        """
        if data[: len(MAGIC)] != MAGIC[: len(data)]:
            # The header of a safetensors file is JSON after eight bytes of its length.
            other = "it is probably a safetensors file, which 'sfp pack' converts"
            words = other if data[5:9] == b"\0\0\0{" else "it does not begin with the magic bytes"
            raise fault("R-PRE-001", f"not an .sfp file: {words}", offset=0)
        if len(data) < SIZE:
            words = f"the file ends after {len(data)} bytes, inside the preamble of {SIZE} bytes"
            raise fault("R-PRE-002", words, offset=len(data))
        if _CHECKSUM.unpack_from(data, _FIELDS.size)[0] != zlib.crc32(data[: _FIELDS.size]):
            raise fault("R-PRE-003", "the preamble's checksum does not match", offset=60)
        _, major, minor, zero, at, size, claimed, crc, zeros = _FIELDS.unpack_from(data)
        if major != MAJOR:
            raise fault(
                "R-PRE-004",
                f"version {major}.{minor} is not supported; this reader supports major version {MAJOR}",
                offset=8,
            )
        if any(zero) or any(zeros):
            raise fault("R-PRE-006", "a reserved field is not zero", offset=12 if any(zero) else 44)
        if claimed > length:
            raise fault("R-PRE-007", f"the file has {length} bytes, must have {claimed}", offset=length)
        if claimed < length:
            raise fault("R-PRE-008", f"the file has {length} bytes, must have {claimed}", offset=claimed)
        if at + size != claimed:
            raise fault("R-PRE-009", "the directory does not end where the file ends", offset=16)
        if at % 64 or at < SIZE:
            words = f"the directory offset is {at}, must be a multiple of {SIZE} above 0"
            raise fault("R-PRE-011", words, offset=16)
        return cls(at, size, claimed, crc, minor)

    def require_directory(self, directory: bytes) -> None:
        """Raises R-PRE-010 if the checksum of the directory's bytes does not match."""
        if zlib.crc32(directory) != self.directory_crc:
            raise fault("R-PRE-010", "the directory's checksum does not match", offset=self.directory_offset)
