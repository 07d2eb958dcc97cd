"""Reading `.sfp` files: names, metadata, whole tensors, slices, masks, importances, survivors.

Rules: nothing but preamble and directory is read when a file is opened. Every chunk that contributes to a
result is read whole and its checksum compared before anything of it is used (R-LAY-004). Results are
returned only when all of them was decoded (R-STR-001).
"""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from .closing import Closing
from .codec.decode import Chunk, TensorDecoder, Values
from .codec.selection import Index, Selection, select
from .coding.bits import Bytes, as_bytes
from .coding.mask import Mask
from .coding.quantiser import F32
from .container.chunk import ChunkIndex, greatest_head, parse_head
from .container.directory import Directory
from .container.entry import TensorEntry
from .container.preamble import SIZE, Preamble
from .engines import Engine, get_engine
from .errors import MissingTensorError, fault, placed
from .limits import DEFAULT_LIMITS, Limits
from .source import Readable, Source, open_source

T = TypeVar("T")
R = TypeVar("R")
Decode = Callable[[TensorDecoder, Chunk, int, int], "NDArray[Any] | None"]

# Segments between two that are needed are decoded too when they are at most this many: starting a run in the
# reference engine takes as long as decoding about as many.
_JOIN_GAP = 3


@dataclass(frozen=True)
class TensorInfo:
    """What a file's directory says about a tensor, read without reading data.

    Attributes:
        name, shape: the tensor's.
        dtype: name of the dtype, as in safetensors.
        coding: ``raw`` or ``fingerprint``.
        quantiser: ``exact``, ``uniform``, ``table``, or None for a raw tensor.
        mask: ``runs``, ``octets``, or None.
        importance: ``survivors``, ``all``, ``factors``, or None.
        role: of the importance, ``multiplier`` or ``metadata``, or None.
        stored_bytes: bytes of its chunks in the file.
        decoded_bytes: bytes of the decoded tensor.
        unknown: keys of its entry that this version does not know; under ``mask``,
            ``fingerprints``, ``scale`` and ``importance`` those inside these maps.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    coding: str
    quantiser: str | None
    mask: str | None
    importance: str | None
    role: str | None
    stored_bytes: int
    decoded_bytes: int
    unknown: dict[str, object]


class SfpFile(Closing):
    """An open `.sfp` file; a context manager. Made by `sfpformat.open`. Safe to use from several threads."""

    def __init__(
        self,
        readable: Readable,
        *,
        limits: Limits = DEFAULT_LIMITS,
        engine: str | None = None,
        threads: int | None = None,
    ) -> None:
        """Opens a file and reads its directory; see `sfpformat.open`."""
        self._engine: Engine = get_engine(engine)
        self._threads = threads or os.cpu_count() or 1
        self.limits = limits
        self._source: Source = open_source(readable)
        try:
            self.preamble, self.directory = read_directory(self._source, limits)
        except BaseException:
            self._source.close()
            raise
        self._offsets = self.directory.offsets()
        self._decoders: dict[str, TensorDecoder] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        """Closes the file; a seekable object that was given stays open."""
        self._source.close()

    # ------------------------------------------------------------------------------------ directory

    def keys(self) -> list[str]:
        """The names of the tensors, in the order of the file."""
        return list(self.directory.tensors)

    def __iter__(self) -> Iterator[str]:
        return iter(self.directory.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.directory.tensors

    def __len__(self) -> int:
        return len(self.directory.tensors)

    def metadata(self) -> dict[str, str]:
        """The file's metadata."""
        return dict(self.directory.metadata)

    def entry(self, name: str) -> TensorEntry:
        """The tensor's entry in the directory.

        Raises:
            MissingTensorError: there is no tensor of that name.
        """
        if name not in self.directory.tensors:
            raise MissingTensorError(f"no tensor {name!r} in the file")
        return self.directory.tensors[name]

    def info(self, name: str) -> TensorInfo:
        """What the directory says about a tensor; reads no data."""
        entry = self.entry(name)
        fingerprints, mask, importance = entry.fingerprints, entry.mask, entry.importance
        return TensorInfo(
            entry.name,
            entry.shape,
            entry.dtype.name,
            entry.coding,
            type(fingerprints.quantiser).__name__.lower() if fingerprints else None,
            mask.kind if mask else None,
            importance.over if importance else None,
            importance.role if importance else None,
            entry.stored_bytes,
            entry.decoded_bytes,
            dict(entry.other),
        )

    # -------------------------------------------------------------------------------------- tensors

    def get_tensor(self, name: str) -> Values:
        """A whole tensor, in its dtype and shape (`ml_dtypes` gives BF16 and FP8).

        Raises:
            MissingTensorError, InvalidFileError, LimitError.
        """
        return self.get_slice(name)[...]

    def get_slice(self, name: str) -> SfpSlice:
        """The tensor, to be indexed: ``f.get_slice("w")[10:20, :64]`` decodes only the segments it needs."""
        return SfpSlice(self, self.entry(name))

    def get_mask(self, name: str) -> Mask:
        """The mask, bool, in the tensor's shape: True for survivors; all True where there is no mask."""
        entry = self.entry(name)
        if entry.mask is None:
            self._require_within_limits(entry)
            return np.ones(entry.shape, np.bool_)
        return self.decode(entry, select(entry.shape, ...), np.dtype(np.bool_), TensorDecoder.mask)

    def get_importance(self, name: str) -> F32 | None:
        """The importance of every position, float32, in the tensor's shape, or None where there is none.

        Pruned positions that the file keeps no importance for have 0.
        """
        entry = self.entry(name)
        if entry.importance is None:
            return None
        everything, float32 = select(entry.shape, ...), np.dtype(np.float32)
        return self.decode(entry, everything, float32, TensorDecoder.importance)

    def get_survivors(self, name: str) -> tuple[NDArray[np.int64], Values]:
        """The survivors: their positions in the flattened tensor, ascending, and their weights."""
        entry = self.entry(name)
        self._require_within_limits(entry)
        decoder = self.decoder(entry)

        def survivors(k: int) -> tuple[NDArray[np.int64], Values]:
            with self._placed(entry, k):
                first, stop = entry.segments_of_chunk(k)
                return decoder.survivors(self._chunk(entry, k), 0, stop - first)

        parts = self._map(survivors, range(len(entry.chunks)))
        positions = [part[0] for part in parts] or [np.zeros(0, np.int64)]
        values = [part[1] for part in parts] or [np.zeros(0, entry.dtype.numpy)]
        return np.concatenate(positions), np.concatenate(values)

    # ----------------------------------------------------------------------------- chunks and runs

    def decode(
        self, entry: TensorEntry, selection: Selection, dtype: np.dtype[Any], what: Decode
    ) -> NDArray[Any]:
        """The selected positions of what a method of `TensorDecoder` gives for runs of segments."""
        self._require_within_limits(entry)
        out = np.empty(selection.size, dtype)
        if selection.size:
            segments = selection.segments(entry.segment)
            if selection.contiguous:
                self._decode_contiguous(entry, selection, segments, out, what)
            else:
                self._decode_scattered(entry, selection, segments, out, what)
        return out.reshape(selection.shape)

    def _decode_contiguous(
        self,
        entry: TensorEntry,
        selection: Selection,
        segments: NDArray[np.int64],
        out: NDArray[Any],
        what: Decode,
    ) -> None:
        low = int(selection.starts[0]) + selection.run.start

        def put(segment: int, values: NDArray[Any]) -> None:
            start = segment * entry.segment - low
            clipped = values[max(-start, 0) : len(out) - start]
            out[max(start, 0) : max(start, 0) + len(clipped)] = clipped

        self._decode_segments(entry, segments, put, what)

    def _decode_scattered(
        self,
        entry: TensorEntry,
        selection: Selection,
        segments: NDArray[np.int64],
        out: NDArray[Any],
        what: Decode,
    ) -> None:
        """Decodes the segments side by side into a buffer, and gathers from it."""
        segments = _fill_gaps(segments)
        place = np.zeros(int(segments[-1]) + 1, np.int64)
        place[segments] = np.arange(len(segments)) * entry.segment
        buffer = np.zeros(len(segments) * entry.segment, out.dtype)

        def put(segment: int, values: NDArray[Any]) -> None:
            buffer[place[segment] : place[segment] + len(values)] = values

        self._decode_segments(entry, segments, put, what)
        for at, positions in selection.blocks():
            segment, inside = np.divmod(positions, entry.segment)
            out[at : at + len(positions)] = buffer[place[segment] + inside]

    def _decode_segments(
        self,
        entry: TensorEntry,
        segments: NDArray[np.int64],
        put: Callable[[int, NDArray[Any]], None],
        what: Decode,
    ) -> None:
        """Decodes runs of neighbouring segments, a chunk at a time, and hands each run to ``put``."""
        decoder = self.decoder(entry)
        breaks = np.flatnonzero((np.diff(segments) > 1) | (np.diff(segments // entry.chunk) > 0))
        firsts = segments[np.r_[0, breaks + 1]]
        stops = segments[np.r_[breaks, len(segments) - 1]] + 1
        by_chunk: dict[int, list[tuple[int, int]]] = {}
        for first, stop in zip(firsts.tolist(), stops.tolist(), strict=True):
            by_chunk.setdefault(first // entry.chunk, []).append((first, stop))

        def work(item: tuple[int, list[tuple[int, int]]]) -> None:
            k, runs = item
            with self._placed(entry, k):
                chunk = self._chunk(entry, k)
                for first, stop in runs:
                    values = what(decoder, chunk, first - k * entry.chunk, stop - k * entry.chunk)
                    assert values is not None
                    put(first, values)

        self._map(work, list(by_chunk.items()))

    def _require_within_limits(self, entry: TensorEntry) -> None:
        with placed(tensor=entry.name):
            self.limits.require_tensor(entry.decoded_bytes, entry.stored_bytes)

    def chunk_offset(self, entry: TensorEntry, k: int) -> int:
        """File offset of chunk k of a tensor; that of its vector chunk for k = -1."""
        vectors = 0 if entry.vectors is None or k < 0 else int(entry.vectors["length"][0])
        before = entry.chunks["length"][: max(k, 0)].sum(dtype=np.int64)
        return self._offsets[entry.name] + vectors + int(before)

    def read_checked(self, entry: TensorEntry, k: int) -> Bytes:
        """The bytes of chunk k of a tensor (its vector chunk for k = -1), checksum compared (R-LAY-004)."""
        record = entry.vectors[0] if k < 0 and entry.vectors is not None else entry.chunks[k]
        data = self._source.read(self.chunk_offset(entry, k), int(record["length"]))
        if zlib.crc32(data) != record["crc"]:
            raise fault("R-LAY-004", "a chunk's checksum does not match", offset=0)
        return as_bytes(data)

    def read_head(self, entry: TensorEntry, k: int) -> ChunkIndex:
        """The segment index of chunk k, from the chunk's first bytes; its checksum is not compared."""
        with self._placed(entry, k):
            length = int(entry.chunks["length"][k])
            segments = entry.segments_of_chunk(k)[1] - entry.segments_of_chunk(k)[0]
            head = min(length, greatest_head(entry, segments))
            data = self._source.read(self.chunk_offset(entry, k), head)
            return parse_head(as_bytes(data), entry, k)[0]

    def _placed(self, entry: TensorEntry, k: int) -> AbstractContextManager[None]:
        return placed(tensor=entry.name, base=self.chunk_offset(entry, k))

    def decoder(self, entry: TensorEntry) -> TensorDecoder:
        """The decoder of a tensor, its vectors read and checked."""
        with self._lock:
            if entry.name not in self._decoders:
                with self._placed(entry, -1):
                    data = None if entry.vectors is None else self.read_checked(entry, -1)
                    self._decoders[entry.name] = TensorDecoder(entry, data, self._engine)
            return self._decoders[entry.name]

    def _chunk(self, entry: TensorEntry, k: int) -> Chunk:
        return self.decoder(entry).open_chunk(self.read_checked(entry, k), k)

    def _map(self, work: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """The work done for each item, in threads where there are several of both."""
        if self._threads == 1 or len(items) < 2:
            return [work(item) for item in items]
        with ThreadPoolExecutor(min(self._threads, len(items))) as pool:
            return list(pool.map(work, items))


class SfpSlice:
    """A tensor that is decoded when it is indexed: the slice object of safetensors, for `.sfp`."""

    def __init__(self, file: SfpFile, entry: TensorEntry) -> None:
        self._file = file
        self._entry = entry

    def get_shape(self) -> list[int]:
        """The tensor's shape."""
        return list(self._entry.shape)

    def get_dtype(self) -> str:
        """The name of the tensor's dtype, such as ``"BF16"``."""
        return self._entry.dtype.name

    def __getitem__(self, index: Index) -> Values:
        """The selected part, a new array; integers, slices with any step, and ``...``.

        Raises:
            IndexError: the index does not fit the shape.
            InvalidFileError, LimitError.
        """
        selection = select(self._entry.shape, index)
        return self._file.decode(self._entry, selection, self._entry.dtype.numpy, TensorDecoder.values)


def read_directory(source: Source, limits: Limits) -> tuple[Preamble, Directory]:
    """Preamble and directory, checked."""
    preamble = Preamble.from_bytes(bytes(source.read(0, min(SIZE, source.length))), source.length)
    limits.require("directory_bytes", preamble.directory_length, preamble.directory_offset)
    with placed(base=preamble.directory_offset):
        data = bytes(source.read(preamble.directory_offset, preamble.directory_length))
    preamble.require_directory(data)
    with placed(base=preamble.directory_offset):
        return preamble, Directory.from_bytes(data, preamble.directory_offset, limits)


def _fill_gaps(segments: NDArray[np.int64]) -> NDArray[np.int64]:
    """Adds the segments of gaps so short that decoding them costs less than starting a new run."""
    gaps = np.diff(segments) - 1
    short = np.flatnonzero((gaps > 0) & (gaps <= _JOIN_GAP))
    if not len(short):
        return segments
    filling = [np.arange(segments[i] + 1, segments[i + 1]) for i in short]
    return np.sort(np.concatenate([segments, *filling]))
