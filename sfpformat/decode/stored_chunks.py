"""Reads the chunks of a file, and compares their checksums.

Rules: a chunk is read whole, and its checksum is compared, before any byte of it is used (R-LAY-004).
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
    """File offset, length and expected checksum of a chunk."""

    offset: int
    length: int
    checksum: int


class StoredChunks:
    """The chunks of all tensors of a file. Thread-safe."""

    def __init__(self, source: Source, directory: Directory) -> None:
        self._source = source
        self._offsets = directory.offsets()
        self._places: dict[str, list[_Place]] = {}

    def _places_of(self, entry: TensorEntry) -> list[_Place]:
        """Returns the places of the tensor's chunks. A vector chunk is last, so that -1 indexes it."""
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
        """Returns the file offset of chunk k of a tensor. For k = -1, the offset of its first stored chunk.

        The vector chunk, if any, is stored first.
        """
        return self._offsets[entry.name] if k < 0 else self._places_of(entry)[k].offset

    def starts(self, names: Iterable[str]) -> list[int]:
        """Returns the file offset of the first chunk of each tensor."""
        return list(map(self._offsets.__getitem__, names))

    def placed(self, entry: TensorEntry, k: int) -> AbstractContextManager[None]:
        """Context manager that adds the tensor's name and the offset of chunk k to a fault raised inside."""
        return placed(tensor=entry.name, base=self.offset(entry, k))

    def read(self, entry: TensorEntry, k: int) -> Bytes:
        """Reads chunk k of a tensor (its vector chunk for k = -1) and compares its checksum.

        Raises:
            InvalidFileError: checksum mismatch (R-LAY-004), or the file is too short. The error has the
                tensor's name and the offset.
        """
        return next(self.read_in_turn(entry, k, 1))

    def read_in_turn(self, entry: TensorEntry, first: int, count: int) -> Iterator[Bytes]:
        """Reads consecutive chunks of a tensor with one call, and yields the bytes of each.

        The checksum of a chunk is compared just before the chunk is yielded.

        Args:
            entry: the tensor's entry.
            first: number of the first chunk, or -1 for the vector chunk alone.
            count: number of chunks.

        Raises:
            InvalidFileError: as in `read`.
        """
        places = self._places_of(entry)[first : first + count] if first >= 0 else self._places_of(entry)[-1:]
        start = places[0].offset
        try:  # not `placed`: this is the hot path, and the place is needed only on errors
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
        """Reads consecutive chunks of any tensors. None if a checksum differs or the file is too short.

        Args:
            offset: file offset of the first chunk.
            chunks: length and checksum of each chunk.
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
        """Reads the segment index of chunk k from the chunk's first bytes. Does not compare its checksum."""
        with self.placed(entry, k):
            place = self._places_of(entry)[k]
            first, stop = entry.segments_of_chunk(k)
            head = min(place.length, greatest_head(entry, stop - first))
            return parse_head(as_bytes(self._source.read(place.offset, head)), entry, k)[0]
