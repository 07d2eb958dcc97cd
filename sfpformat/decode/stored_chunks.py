"""The chunks of a file as they are stored: where each lies, its bytes, its checksum.

Rules: a chunk is read whole and its checksum compared before any byte of it is used (R-LAY-004).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import accumulate
from typing import NamedTuple

from ..coding.bits import Bytes, as_bytes
from ..container.chunk import ChunkIndex, greatest_head, parse_head
from ..container.directory import Directory
from ..container.entry import TensorEntry
from ..errors import FileFault, fault, placed
from ..io.checksum import crc32
from ..io.source import Source


class _Place(NamedTuple):
    """Where a chunk lies in the file, and the checksum that it must have."""

    offset: int
    length: int
    checksum: int


class StoredChunks:
    """The chunks of all tensors of a file; used by any number of threads."""

    def __init__(self, source: Source, directory: Directory) -> None:
        self._source = source
        self._offsets = directory.offsets()
        self._places: dict[str, list[_Place]] = {}

    def _places_of(self, entry: TensorEntry) -> list[_Place]:
        """Those of the tensor's chunks; that of its vector chunk comes last, where -1 finds it."""
        places = self._places.get(entry.name)
        if places is None:
            records = entry.chunks.tolist()
            if entry.vectors is not None:
                records = entry.vectors.tolist() + records
            starts = accumulate([length for length, _ in records], initial=self._offsets[entry.name])
            places = [_Place(at, *record) for at, record in zip(starts, records, strict=False)]
            if entry.vectors is not None:
                places.append(places.pop(0))
            self._places[entry.name] = places
        return places

    def offset(self, entry: TensorEntry, k: int) -> int:
        """File offset of chunk k of a tensor; for k = -1 that of its vector chunk, or where one would be."""
        return self._offsets[entry.name] if k < 0 else self._places_of(entry)[k].offset

    def starts(self, names: Iterable[str]) -> list[int]:
        """File offset of the first chunk of each of some tensors."""
        return list(map(self._offsets.__getitem__, names))

    def placed(self, entry: TensorEntry, k: int) -> AbstractContextManager[None]:
        """Gives a fault within chunk k its tensor and its place in the file."""
        return placed(tensor=entry.name, base=self.offset(entry, k))

    def read(self, entry: TensorEntry, k: int) -> Bytes:
        """The bytes of chunk k of a tensor (its vector chunk for k = -1).

        Raises:
            InvalidFileError: E_CRC by R-LAY-004, or the file ends too early; it knows its place.
        """
        return next(self.read_in_turn(entry, k, 1))

    def read_in_turn(self, entry: TensorEntry, first: int, count: int) -> Iterator[Bytes]:
        """The bytes of neighbouring chunks, fetched at once; each is compared with its checksum in its turn.

        Raises:
            InvalidFileError: as `read`.
        """
        places = self._places_of(entry)[first : first + count] if first >= 0 else self._places_of(entry)[-1:]
        start = places[0].offset
        try:  # not `placed`: the place is seldom needed
            data = as_bytes(self._source.read(start, places[-1].offset + places[-1].length - start))
        except FileFault as error:
            error.place(entry.name, start)
            raise
        for offset, length, checksum in places:
            chunk = data[offset - start : offset - start + length]
            if crc32(chunk.data) != checksum:
                raise fault(
                    "R-LAY-004", "a chunk's checksum does not match", tensor=entry.name, offset=offset
                )
            yield chunk

    def read_region(self, offset: int, chunks: Sequence[tuple[int, int]]) -> Bytes | None:
        """The bytes of neighbouring chunks of any tensors; None where one is not what its record says.

        Args:
            offset: file offset of the first.
            chunks: length and checksum of each.
        """
        try:
            view = memoryview(self._source.read(offset, sum([length for length, _ in chunks])))
        except FileFault:
            return None
        at = 0
        for length, checksum in chunks:
            if crc32(view[at : at + length]) != checksum:
                return None
            at += length
        return as_bytes(view)

    def read_head(self, entry: TensorEntry, k: int) -> ChunkIndex:
        """The segment index of chunk k, from the chunk's first bytes; its checksum is not compared."""
        with self.placed(entry, k):
            place = self._places_of(entry)[k]
            first, stop = entry.segments_of_chunk(k)
            head = min(place.length, greatest_head(entry, stop - first))
            return parse_head(as_bytes(self._source.read(place.offset, head)), entry, k)[0]
