"""Reading `.sfp` files: names, metadata, whole tensors, slices, masks, importances, survivors.

Rules: nothing but preamble and directory is read when a file is opened. Every chunk that contributes to a
result is read whole and its checksum compared before anything of it is used (R-LAY-004). Results are
returned only when all of them was decoded (R-STR-001).
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .checksum import crc32
from .closing import Closing
from .codec.decode import TensorDecoder, Values
from .codec.jobs import Job, batches, fill_gaps, jobs_of_range, joined
from .codec.selection import Index, Selection, select
from .coding.bits import Bytes, as_bytes
from .coding.mask import Mask
from .coding.quantiser import F32
from .container.chunk import ChunkIndex, greatest_head, parse_head
from .container.directory import Directory
from .container.entry import TensorEntry
from .container.preamble import SIZE, Preamble
from .engines import Engine, Run, get_engine, require_name
from .errors import FileFault, MismatchError, MissingTensorError, fault, placed
from .limits import DEFAULT_LIMITS, Limits
from .memory import blocks_of
from .parallel import for_each
from .source import Readable, Source, open_source

Into = Callable[[TensorDecoder, Bytes, int, int, int, NDArray[Any]], None]

# Decoders that are kept: with tables of what levels mean they take up to half a megabyte each.
_DECODERS_KEPT = 32
# Fewer positions than this are decoded before another thread has begun.
_WORTH_THREADS = 1 << 18


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
        require_name(engine)
        self._engine_name = engine
        self._engine: Engine | None = None  # found when it is first needed
        self._threads = threads or os.cpu_count() or 1
        self.limits = limits
        self._source: Source = open_source(readable)
        try:
            self.preamble, self.directory = read_directory(self._source, limits)
        except BaseException:
            self._source.close()
            raise
        self._offsets = self.directory.offsets()
        self._decoders: OrderedDict[str, TensorDecoder] = OrderedDict()
        self._starts: dict[str, list[int]] = {}  # name -> offsets of its vector chunk and its chunks
        self._weights = sum(entry.positions for entry in self.directory.tensors.values())
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
        return self.get_tensors([name])[name]

    def get_tensors(self, names: Iterable[str] | None = None) -> dict[str, Values]:
        """Some whole tensors, side by side: all, in the file's order, where nothing is said.

        Tensors under 4 MiB share pieces of memory of 8 MiB; copy one that is to outlive the others by long.

        Raises:
            MissingTensorError, InvalidFileError, LimitError.
        """
        entries = [self.entry(name) for name in (self if names is None else names)]
        for entry in entries:
            self._require_within_limits(entry)
        memory = blocks_of([entry.decoded_bytes for entry in entries])
        out = {e.name: next(memory).view(e.dtype.numpy).reshape(e.shape) for e in entries}
        self.read_into(out)
        return out

    def read_into(self, out: Mapping[str, Values]) -> None:
        """Decodes some whole tensors, side by side, into arrays of their dtypes and shapes, C order.

        Raises:
            MismatchError: an array is not like its tensor; nothing was written.
            MissingTensorError, InvalidFileError, LimitError: the arrays may be written in part.
        """
        jobs: list[Job] = []
        for name, array in out.items():
            entry = self.entry(name)
            self._require_within_limits(entry)
            like = (array.dtype, array.shape) == (entry.dtype.numpy, entry.shape)
            if not (like and array.flags.c_contiguous and array.flags.writeable):
                raise MismatchError(
                    f"tensor {name!r}: needs {entry.dtype.numpy} {entry.shape} in C order, not read-only"
                )
            jobs += jobs_of_range(entry, array.reshape(-1), 0, entry.positions)
        self._decode(jobs, TensorDecoder.weights_into)

    def get_slice(self, name: str) -> SfpSlice:
        """The tensor, to be indexed: ``f.get_slice("w")[10:20, :64]`` decodes only the segments it needs."""
        return SfpSlice(self, self.entry(name))

    def get_mask(self, name: str) -> Mask:
        """The mask, bool, in the tensor's shape: True for survivors; all True where there is no mask."""
        entry = self.entry(name)
        if entry.mask is None:
            self._require_within_limits(entry)
            return np.ones(entry.shape, np.bool_)
        return self.decode(entry, select(entry.shape, ...), np.dtype(np.bool_), TensorDecoder.mask_into)

    def get_importance(self, name: str) -> F32 | None:
        """The importance of every position, float32, in the tensor's shape, or None where there is none.

        Pruned positions that the file keeps no importance for have 0.
        """
        entry = self.entry(name)
        if entry.importance is None:
            return None
        everything, float32 = select(entry.shape, ...), np.dtype(np.float32)
        return self.decode(entry, everything, float32, TensorDecoder.importance_into)

    def get_survivors(self, name: str) -> tuple[NDArray[np.int64], Values]:
        """The survivors: their positions in the flattened tensor, ascending, and their weights."""
        entry = self.entry(name)
        self._require_within_limits(entry)
        decoder = self.decoder(entry)
        positions = [np.zeros(0, np.int64)] * max(len(entry.chunks), 1)
        values = [np.zeros(0, entry.dtype.numpy)] * max(len(entry.chunks), 1)

        def survivors(k: int) -> None:
            with self._placed(entry, k):
                first, stop = entry.segments_of_chunk(k)
                chunk = decoder.open_chunk(self.read_checked(entry, k), k)
                positions[k], values[k] = decoder.survivors(chunk, 0, stop - first)

        for_each(survivors, range(len(entry.chunks)), self._threads_for(entry.positions))
        return np.concatenate(positions), np.concatenate(values)

    # ----------------------------------------------------------------------------- chunks and runs

    def decode(
        self, entry: TensorEntry, selection: Selection, dtype: np.dtype[Any], into: Into
    ) -> NDArray[Any]:
        """The selected positions of what an `..._into` method of `TensorDecoder` gives for runs."""
        self._require_within_limits(entry)
        out = np.empty(selection.size, dtype)
        if selection.size and selection.contiguous:
            low = int(selection.starts[0]) + selection.run.start
            self._decode_range(entry, out, low, into)
        elif selection.size:
            self._decode_scattered(entry, selection, out, into)
        return out.reshape(selection.shape)

    def _decode_range(self, entry: TensorEntry, out: NDArray[Any], low: int, into: Into) -> None:
        """The positions from ``low`` on; segments that stick out at either end are decoded apart."""
        high, segment = low + len(out), entry.segment
        whole_low, whole_high = -(-low // segment) * segment, high // segment * segment
        if high == entry.positions:
            whole_high = high
        jobs: list[Job] = []
        ends: list[tuple[int, NDArray[Any]]] = []
        for start in sorted({low // segment, (high - 1) // segment}):
            first, stop = start * segment, min((start + 1) * segment, entry.positions)
            if first < low or stop > high:
                ends.append((first, np.empty(stop - first, out.dtype)))
                jobs += jobs_of_range(entry, ends[-1][1], first, stop)
        if whole_low < whole_high:
            jobs += jobs_of_range(entry, out[whole_low - low : whole_high - low], whole_low, whole_high)
        self._decode(joined(jobs), into)
        for first, values in ends:
            clipped = values[max(low - first, 0) : high - first]
            out[max(first - low, 0) : max(first - low, 0) + len(clipped)] = clipped

    def _decode_scattered(
        self, entry: TensorEntry, selection: Selection, out: NDArray[Any], into: Into
    ) -> None:
        """Decodes the segments side by side into a buffer, and gathers from it."""
        segments = fill_gaps(selection.segments(entry.segment))
        place = np.zeros(int(segments[-1]) + 1, np.int64)
        place[segments] = np.arange(len(segments)) * entry.segment
        buffer = np.zeros(len(segments) * entry.segment, out.dtype)
        breaks = np.flatnonzero(np.diff(segments) > 1)
        jobs: list[Job] = []
        for first, last in zip(
            segments[np.r_[0, breaks + 1]].tolist(),
            segments[np.r_[breaks, len(segments) - 1]].tolist(),
            strict=True,
        ):
            low, high = first * entry.segment, min((last + 1) * entry.segment, entry.positions)
            at = int(place[first])
            jobs += jobs_of_range(entry, buffer[at : at + high - low], low, high)
        self._decode(joined(jobs), into)
        for at, positions in selection.blocks():
            segment, inside = np.divmod(positions, entry.segment)
            out[at : at + len(positions)] = buffer[place[segment] + inside]

    def _decode(self, jobs: list[Job], into: Into) -> None:
        """Does the jobs, some at a time, in threads where that pays."""
        wanted: dict[str, int] = {}
        for entry, _, runs in jobs:
            for _, _, out in runs:
                wanted[entry.name] = wanted.get(entry.name, 0) + out.size
        threads = self._threads_for(sum(wanted.values()))
        together = list(batches(jobs, threads))
        for_each(lambda batch: self._decode_batch(batch, wanted, into), together, min(threads, len(together)))

    def _decode_batch(self, jobs: list[Job], wanted: dict[str, int], into: Into) -> None:
        """Reads the chunks of some jobs and decodes them: what an engine can at once, the rest one by one."""
        pieces: list[tuple[TensorDecoder, Bytes, int, int, int, NDArray[Any]]] = []
        at_once: list[tuple[int, Run]] = []
        unread: FileFault | None = None
        for entry, k, runs in jobs:
            try:
                decoder = self.decoder(entry, wanted[entry.name])
                data = self._read_placed(entry, k)
            except FileFault as error:
                unread = error  # raised after the faults of the chunks before
                break
            for first, stop, out in runs:
                run = decoder.run(data, k, first, stop, out) if into is TensorDecoder.weights_into else None
                if run is not None:
                    at_once.append((len(pieces), run))
                pieces.append((decoder, data, k, first, stop, out))
        done: set[int] = set()
        if at_once:
            assert self._engine is not None
            good = self._engine.decode_runs([run for _, run in at_once])
            done = {number for (number, _), is_good in zip(at_once, good, strict=True) if is_good}
        for number, (decoder, data, k, first, stop, out) in enumerate(pieces):
            if number not in done:
                with self._placed(decoder.entry, k):
                    into(decoder, data, k, first, stop, out)
        if unread is not None:
            raise unread

    def _threads_for(self, positions: int) -> int:
        return self._threads if positions >= _WORTH_THREADS else 1

    def _require_within_limits(self, entry: TensorEntry) -> None:
        with placed(tensor=entry.name):
            self.limits.require_tensor(
                entry.decoded_bytes, entry.stored_bytes, self.preamble.directory_offset
            )

    def chunk_offset(self, entry: TensorEntry, k: int) -> int:
        """File offset of chunk k of a tensor; that of its vector chunk for k = -1."""
        starts = self._starts.get(entry.name)
        if starts is None:
            lengths = [] if entry.vectors is None else entry.vectors["length"].tolist()
            lengths += entry.chunks["length"].tolist()
            starts = list(accumulate(lengths, initial=self._offsets[entry.name]))
            self._starts[entry.name] = starts
        return starts[k + (entry.vectors is not None)] if k >= 0 else starts[0]

    def read_checked(self, entry: TensorEntry, k: int) -> Bytes:
        """The bytes of chunk k of a tensor (its vector chunk for k = -1), checksum compared (R-LAY-004)."""
        record = entry.vectors[0] if k < 0 and entry.vectors is not None else entry.chunks[k]
        length, checksum = record.item()
        data = self._source.read(self.chunk_offset(entry, k), length)
        if crc32(data) != checksum:
            raise fault("R-LAY-004", "a chunk's checksum does not match", offset=0)
        return as_bytes(data)

    def read_chunks(self, wanted: Sequence[tuple[TensorEntry, int]]) -> list[Bytes]:
        """The bytes of some chunks, read side by side, as `read_checked`; a fault knows its place."""
        out = [np.zeros(0, np.uint8)] * len(wanted)

        def read(i: int) -> None:
            out[i] = self._read_placed(*wanted[i])

        for_each(read, range(len(wanted)), min(self._threads, max(len(wanted), 1)))
        return out

    def _read_placed(self, entry: TensorEntry, k: int) -> Bytes:
        """As `read_checked`; a fault knows its place in the file."""
        try:  # not `placed`: this is done for every chunk, and the place is seldom needed
            return self.read_checked(entry, k)
        except FileFault as error:
            error.place(entry.name, self.chunk_offset(entry, k))
            raise

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

    def decoder(self, entry: TensorEntry, weights: int = 0) -> TensorDecoder:
        """The decoder of a tensor, its vectors read and checked; about so many weights will be decoded."""
        with self._lock:
            decoder = self._decoders.get(entry.name)
            if decoder is None:
                if self._engine is None:
                    self._engine = get_engine(self._engine_name, self._weights)
                with self._placed(entry, -1):
                    data = None if entry.vectors is None else self.read_checked(entry, -1)
                    decoder = TensorDecoder(entry, data, self._engine)
                self._decoders[entry.name] = decoder
                if len(self._decoders) > _DECODERS_KEPT:
                    self._decoders.popitem(last=False)
        decoder.expect(weights)
        return decoder


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
        return self._file.decode(self._entry, selection, self._entry.dtype.numpy, TensorDecoder.weights_into)


def read_directory(source: Source, limits: Limits) -> tuple[Preamble, Directory]:
    """Preamble and directory, checked."""
    preamble = Preamble.from_bytes(bytes(source.read(0, min(SIZE, source.length))), source.length)
    limits.require("directory_bytes", preamble.directory_length, preamble.directory_offset)
    with placed(base=preamble.directory_offset):
        data = bytes(source.read(preamble.directory_offset, preamble.directory_length))
    preamble.require_directory(data)
    with placed(base=preamble.directory_offset):
        return preamble, Directory.from_bytes(data, preamble.directory_offset, limits)
