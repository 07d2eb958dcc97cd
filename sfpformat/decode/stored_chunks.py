"""Reads the chunks of a file, and compares their checksums.

Rules: a chunk is read whole, and its checksum is compared, before any byte of it is used (R-LAY-004).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from typing import NamedTuple

from ..coding.bits import Bytes, as_bytes
from ..container.chunk import ChunkIndex, greatest_head, parse_head
from ..container.directory import Directory
from ..container.entry import TensorEntry
from ..errors import FileFault, fault, placed
from ..io.checksum import crc32
from ..io.remote.ahead import Range, ReadAhead
from ..io.source import Source

_NOTHING: AbstractContextManager[object] = nullcontext()


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

    def ahead(self, chunks: Iterable[tuple[TensorEntry, int]]) -> AbstractContextManager[object]:
        """Context manager that fetches chunks of a remote file concurrently; each will be read once.

        Args:
            chunks: tensors and numbers of chunks, -1 for the vector chunk.
        """
        if not self._source.is_remote:
            return _NOTHING
        ranges = [one for entry, k in chunks for one in self.unplanned(entry, [k])]
        return ReadAhead(ranges) if ranges else _NOTHING

    def unplanned(self, entry: TensorEntry, chunks: Sequence[int] | None = None) -> list[Range]:
        """Returns what a `ReadAhead` has to fetch for chunks of a tensor; for None, of all of them."""
        if not self._source.is_remote:
            return []
        if chunks is None:
            return self._source.unplanned([self._whole(entry)])
        places = self._places_of(entry)
        return self._source.unplanned(
            [(places[k].offset, places[k].offset + places[k].length) for k in chunks]
        )

    def heads_ahead(self, entries: Iterable[TensorEntry]) -> AbstractContextManager[object]:
        """Context manager that fetches what `read_head` reads of all chunks of tensors of a remote file."""
        if not self._source.is_remote:
            return _NOTHING
        heads = [self._head(entry, k) for entry in entries for k in range(len(entry.chunks))]
        ranges = self._source.unplanned([(offset, offset + size) for offset, size in heads])
        return ReadAhead(ranges) if ranges else _NOTHING

    def _head(self, entry: TensorEntry, k: int) -> tuple[int, int]:
        """Returns file offset and greatest size of the segment index of chunk k."""
        place = self._places_of(entry)[k]
        first, stop = entry.segments_of_chunk(k)
        return place.offset, min(place.length, greatest_head(entry, stop - first))

    def forget(self, entries: Iterable[TensorEntry]) -> None:
        """Releases what a `ReadAhead` has of tensors that will not be read again."""
        if self._source.is_remote:
            for entry in entries:
                self._source.forget(*self._whole(entry))

    def _whole(self, entry: TensorEntry) -> tuple[int, int]:
        """Returns the file offsets of a tensor, whose chunks are consecutive: start, and exclusive stop."""
        start = self._offsets[entry.name]
        return start, start + entry.stored_bytes

    def read(self, entry: TensorEntry, k: int) -> Bytes:
        """Reads chunk k of a tensor (its vector chunk for k = -1) and compares its checksum.

        Raises:
            InvalidFileError: checksum mismatch (R-LAY-004), or the file is too short. The error has the
                tensor's name and the offset.
            RemoteError: a request failed, or the file has changed since it was opened.
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
                raise self._mismatch(entry, offset)
            yield chunk

    def read_into(self, entry: TensorEntry, k: int, out: Bytes) -> None:
        """Reads chunk k of a tensor into ``out``, of its length, and compares its checksum there.

        Raises:
            InvalidFileError, RemoteError: as in `read`; ``out`` is then undefined.
        """
        offset, _, checksum = self._places_of(entry)[k]
        with placed(tensor=entry.name, base=offset):
            self._source.read_into(out.data, offset)
        if crc32(out.data) != checksum:
            raise self._mismatch(entry, offset)

    def _mismatch(self, entry: TensorEntry, offset: int) -> Exception:
        """Returns the error of a chunk whose checksum does not match; raises if a remote file has changed."""
        self._source.require_unchanged()
        return fault("R-LAY-004", "a chunk's checksum does not match", tensor=entry.name, offset=offset)

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
            return parse_head(as_bytes(self._source.read(*self._head(entry, k))), entry, k)[0]
