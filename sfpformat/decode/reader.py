"""Reading `.sfp` files: names, metadata, whole tensors, slices, masks, importances, survivors.

Rules: nothing but preamble and directory is read when a file is opened. Every chunk that contributes to a
result is read whole and its checksum compared before anything of it is used (R-LAY-004). Results are
returned only when all of them was decoded (R-STR-001).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..coding.bits import Bytes
from ..coding.mask import Mask
from ..coding.quantisers import F32
from ..container.chunk import ChunkIndex
from ..container.directory import Directory
from ..container.entry import TensorEntry
from ..container.plain import Outline
from ..container.preamble import SIZE, Preamble
from ..engines import require_name
from ..errors import MismatchError, MissingTensorError, placed
from ..io.closing import Closing
from ..io.source import Readable, Source, open_source
from ..io.threads import for_each
from ..limits import DEFAULT_LIMITS, Limits
from .allocation import SHARING, arrays_of
from .execution import Decoding, Into
from .fast_path import Bulk
from .jobs import Job, fill_gaps, jobs_of_range, joined
from .pickling import Settings, reopened
from .selection import Index, Selection, select
from .stored_chunks import StoredChunks
from .tensor import TensorDecoder, Values

# From so many tensors on it pays to decode plain ones together.
_WORTH_BULK = 4


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
    """An open `.sfp` file; a context manager. Made by `sfpformat.open`. Safe to use from several threads.

    It can be pickled, as workers in other processes need it: they open the file again by its path, and get a
    `MismatchError` where it was written anew meanwhile. Of bytes in memory up to 64 MiB are pickled.
    """

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
        self._settings = Settings(limits, engine, threads)
        self._threads = threads or os.cpu_count() or 1
        self.limits = limits
        # No limit of the sizes of tensors is beyond one of so many bytes.
        self._sure_bytes = min(limits.tensor_bytes, limits.expansion_floor)
        self._source: Source = open_source(readable)
        try:
            self.preamble, self.directory = read_directory(self._source, limits)
        except BaseException:
            self._source.close()
            raise
        self._stored = StoredChunks(self._source, self.directory)
        self._decoding = Decoding(self._stored, self.directory, engine, self._threads)

    def close(self) -> None:
        """Closes the file; a seekable object that was given stays open."""
        self._source.close()

    @property
    def identity(self) -> tuple[int, int]:
        """Length and directory checksum, which differ where contents do: the directory has all checksums."""
        return self.preamble.file_length, self.preamble.directory_crc

    def __reduce__(self) -> tuple[object, ...]:
        """How the file is pickled.

        Raises:
            OptionError: it is read from a stream, or has too many bytes in memory.
            ClosedFileError: it is closed.
        """
        return reopened, (SfpFile, self._source.again(), self._settings, self.identity)

    def file_of(self, name: str) -> SfpFile:
        """The file that has a tensor: this one; that of a model in shards may be another.

        Raises:
            MissingTensorError: there is no tensor of that name.
        """
        self._require_present(name)
        return self

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
        self._require_present(name)
        return self.directory.tensors[name]

    def _require_present(self, name: str) -> None:
        if name not in self.directory.tensors:
            raise MissingTensorError(f"no tensor {name!r} in the file")

    def _outline(self, name: str) -> Outline:
        """That of a tensor whose size is within the limits."""
        self._require_present(name)
        outline = self.directory.outline(name)
        if outline.decoded_bytes > self._sure_bytes:
            self._require_within_limits(self.entry(name))
        return outline

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

        Tensors of 64 KiB to 4 MiB may share blocks of memory, of at most eight times the bytes of any tensor
        in them: a tensor that is kept keeps no more than that alive.

        Raises:
            MissingTensorError, InvalidFileError, LimitError.
        """
        wanted = list(dict.fromkeys(self if names is None else names))
        made = self._small_raw(wanted)
        rest = {name: self._outline(name) for name in wanted if name not in made}
        kinds = [(shape, dtype.numpy, size) for dtype, shape, size, _ in rest.values()]
        out = dict(zip(rest, arrays_of(kinds), strict=True))
        self._read_into(out)
        return {name: made[name] if name in made else out[name] for name in wanted} if made else out

    def _small_raw(self, names: Sequence[str]) -> dict[str, Values]:
        """The small raw ones of some tensors, where they are many; none where one of them is at fault."""
        if len(names) < _WORTH_BULK or self._sure_bytes < SHARING or self._decoding.small_raw is None:
            return {}
        small = self._decoding.small_raw
        known = [name for name in names if name in small.numbers]
        if len(known) < _WORTH_BULK:
            return {}
        return small.read(known) or {}  # if not, the jobs tell what is wrong

    def read_into(self, out: Mapping[str, Values]) -> None:
        """Decodes some whole tensors, side by side, into arrays of their dtypes and shapes, C order.

        Raises:
            MismatchError: an array is not like its tensor; nothing was written.
            MissingTensorError, InvalidFileError, LimitError: the arrays may be written in part.
        """
        for name, array in out.items():
            dtype, shape, _, _ = self._outline(name)
            like = (array.dtype, array.shape) == (dtype.numpy, shape)
            if not (like and array.flags.c_contiguous and array.flags.writeable):
                raise MismatchError(f"tensor {name!r}: needs {dtype.numpy} {shape} in C order, not read-only")
        made = self._small_raw(list(out))
        for name, values in made.items():
            out[name][...] = values
        self._read_into({name: array for name, array in out.items() if name not in made})

    def _read_into(self, out: Mapping[str, Values]) -> None:
        """As `read_into`, for names and arrays that were checked: plain tensors together, then the rest."""
        bulk = self._decoding.bulk if len(out) >= _WORTH_BULK else None
        rest = out if bulk is None else self._left_by(bulk, out)
        jobs: list[Job] = []
        for name, array in rest.items():
            entry = self.entry(name)
            jobs += jobs_of_range(entry, array.reshape(-1), 0, entry.positions)
        self._decoding.do(jobs, TensorDecoder.weights_into)

    def _left_by(self, bulk: Bulk, out: Mapping[str, Values]) -> Mapping[str, Values]:
        """Decodes plain tensors together; gives the others, or all where one of them is at fault."""
        known = bulk.numbers
        together = {name: array for name, array in out.items() if name in known}
        positions = sum([array.size for array in together.values()])
        if not bulk.read_into(together, self._decoding.threads_for(positions)):
            return out
        return {name: array for name, array in out.items() if name not in known}

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
            data = self._stored.read(entry, k)
            with self._stored.placed(entry, k):
                first, stop = entry.segments_of_chunk(k)
                chunk = decoder.open_chunk(data, k)
                positions[k], values[k] = decoder.survivors(chunk, 0, stop - first)

        for_each(survivors, range(len(entry.chunks)), self._decoding.threads_for(entry.positions))
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
        self._decoding.do(joined(jobs), into)
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
        self._decoding.do(joined(jobs), into)
        for at, positions in selection.blocks():
            segment, inside = np.divmod(positions, entry.segment)
            out[at : at + len(positions)] = buffer[place[segment] + inside]

    def _require_within_limits(self, entry: TensorEntry) -> None:
        with placed(tensor=entry.name):
            self.limits.require_tensor(
                entry.decoded_bytes, entry.stored_bytes, self.preamble.directory_offset
            )

    def chunk_offset(self, entry: TensorEntry, k: int) -> int:
        """File offset of chunk k of a tensor; that of its vector chunk for k = -1."""
        return self._stored.offset(entry, k)

    def read_checked(self, entry: TensorEntry, k: int) -> Bytes:
        """The bytes of chunk k of a tensor (its vector chunk for k = -1), checksum compared (R-LAY-004)."""
        return self._stored.read(entry, k)

    def read_chunks(self, wanted: Sequence[tuple[TensorEntry, int]]) -> list[Bytes]:
        """The bytes of some chunks, read side by side, as `read_checked`."""
        out = [np.zeros(0, np.uint8)] * len(wanted)

        def read(i: int) -> None:
            out[i] = self._stored.read(*wanted[i])

        for_each(read, range(len(wanted)), min(self._threads, max(len(wanted), 1)))
        return out

    def read_head(self, entry: TensorEntry, k: int) -> ChunkIndex:
        """The segment index of chunk k, from the chunk's first bytes; its checksum is not compared."""
        return self._stored.read_head(entry, k)

    def decoder(self, entry: TensorEntry) -> TensorDecoder:
        """The decoder of a tensor, its vectors read and checked."""
        return self._decoding.decoder(entry)


class SfpSlice:
    """A tensor that is decoded when it is indexed: the slice object of safetensors, for `.sfp`."""

    def __init__(self, file: SfpFile, entry: TensorEntry) -> None:
        self._file = file
        self._entry = entry

    def __reduce__(self) -> tuple[object, ...]:
        """How the slice is pickled: with its file, which is opened again."""
        return SfpFile.get_slice, (self._file, self._entry.name)

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
