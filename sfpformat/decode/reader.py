"""Reads `.sfp` files: names, metadata, whole tensors, slices, masks, importances, survivors.

Rules: opening a file reads only its preamble and directory. A chunk is read whole, and its checksum is
compared, before any of its bytes are used (R-LAY-004). A result is returned only after all of it has been
decoded (R-STR-001).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..coding.bits import Bytes
from ..coding.mask import Mask
from ..coding.quantisers import F32
from ..container.chunk import ChunkIndex
from ..container.directory import Directory
from ..container.entry import TensorEntry
from ..container.plain_entries import Outline
from ..container.preamble import SIZE, Preamble
from ..engines import require_name
from ..errors import MismatchError, MissingTensorError, placed
from ..io.closing import Closing
from ..io.remote.ahead import DEFAULT_MEMORY, Range
from ..io.source import Readable, Source, open_source
from ..io.threads import for_each, thread_count
from ..limits import DEFAULT_LIMITS, Limits
from .array_memory import SHARING, arrays_of
from .execution import Decoding, Into
from .fast_path import Bulk
from .jobs import Job, jobs_of_range
from .pickling import Settings, reopened
from .prefetch import Item, Prefetch, Report
from .selected_positions import decode_selection
from .selection import Selection, select
from .slices import SfpSlice
from .stored_chunks import StoredChunks
from .tensor import TensorDecoder, Values
from .tensor_info import TensorInfo

# The least number of tensors for which decoding plain ones together is faster.
_WORTH_BULK = 4


class SfpFile(Closing):
    """An open `.sfp` file; a context manager. `sfpformat.open` creates it. Thread-safe.

    It can be pickled, for worker processes: unpickling opens the file again by its path, and raises
    `MismatchError` if the file has changed. A file in memory is pickled with its bytes, at most 64 MiB.

    Example: ``with sfpformat.open("model.sfp") as f: weight, mask = f.get_tensor("w"), f.get_mask("w")``.
    """

    def __init__(
        self,
        readable: Readable,
        *,
        limits: Limits = DEFAULT_LIMITS,
        engine: str | None = None,
        threads: int | None = None,
    ) -> None:
        """Opens a file and reads its directory. Same arguments and errors as `sfpformat.open`."""
        require_name(engine)
        self._settings = Settings(limits, engine, threads)
        self._threads = thread_count(threads)
        self.limits = limits
        # A tensor of at most this size is within all limits on sizes: `Limits.require_tensor` is not needed.
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
        """Closes the file. A seekable object that the caller passed stays open."""
        self._source.close()

    @property
    def identity(self) -> tuple[int, int]:
        """File length and directory checksum, which identify the contents: a directory has all checksums."""
        return self.preamble.file_length, self.preamble.directory_crc

    def __reduce__(self) -> tuple[object, ...]:
        """Pickles the file's path or bytes, and the settings with which it was opened.

        Raises:
            OptionError: the file is read from a stream, or has more than 64 MiB in memory.
            ClosedFileError: the file is closed.
        """
        return reopened, (SfpFile, self._source.reopenable(), self._settings, self.identity)

    @property
    def is_remote(self) -> bool:
        """Whether the file is behind a URL."""
        return self._source.is_remote

    def file_of(self, name: str) -> SfpFile:
        """Returns the file that has a tensor: this file. `ShardedFile.file_of` returns the shard.

        Raises:
            MissingTensorError: there is no tensor of that name.
        """
        self._require_present(name)
        return self

    # ------------------------------------------------------------------------------------ directory

    def keys(self) -> list[str]:
        """Returns the names of the tensors, in file order."""
        return list(self.directory.tensors)

    def __iter__(self) -> Iterator[str]:
        return iter(self.directory.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.directory.tensors

    def __len__(self) -> int:
        return len(self.directory.tensors)

    def metadata(self) -> dict[str, str]:
        """Returns a copy of the file's metadata."""
        return dict(self.directory.metadata)

    def entry(self, name: str) -> TensorEntry:
        """Returns the tensor's entry in the directory.

        Raises:
            MissingTensorError: there is no tensor of that name.
        """
        self._require_present(name)
        return self.directory.tensors[name]

    def _require_present(self, name: str) -> None:
        if name not in self.directory.tensors:
            raise MissingTensorError(f"no tensor {name!r} in the file")

    def _outline(self, name: str) -> Outline:
        """Returns the outline of a tensor. Raises if there is no such tensor or its size exceeds a limit."""
        self._require_present(name)
        outline = self.directory.outline(name)
        if outline.decoded_bytes > self._sure_bytes:
            require_within_limits(self, self.entry(name))
        return outline

    def info(self, name: str) -> TensorInfo:
        """Returns the directory's information about a tensor; reads no tensor data.

        Raises:
            MissingTensorError: there is no tensor of that name.
        """
        return TensorInfo.of(self.entry(name))

    # -------------------------------------------------------------------------------------- tensors

    def get_tensor(self, name: str) -> Values:
        """Decodes a whole tensor, in its dtype and shape. BF16 and FP8 have dtypes of `ml_dtypes`.

        Raises:
            MissingTensorError: there is no tensor of that name.
            InvalidFileError: the file is damaged.
            LimitError: the tensor exceeds a limit.
        """
        return self.get_tensors([name])[name]

    def get_tensors(self, names: Iterable[str] | None = None) -> dict[str, Values]:
        """Decodes whole tensors in parallel. None decodes all tensors, in file order.

        Tensors of 64 KiB to 4 MiB may share blocks of memory. A block has at most eight times the bytes of
        any tensor in it, so a tensor in use keeps at most eight times its own bytes in memory. Blocks may
        have up to 2 MiB more of address space, which is not touched.

        Raises:
            MissingTensorError: a name is not in the file.
            InvalidFileError: the file is damaged.
            LimitError: a tensor exceeds a limit.
        """
        wanted = list(dict.fromkeys(self if names is None else names))
        if self.is_remote:
            found: dict[str, Values] = {}
            with self.prefetch(self.in_file_order(wanted)) as plan:
                for group in plan.groups():
                    found.update(self._get_tensors(group))
            return {name: found[name] for name in wanted}
        return self._get_tensors(wanted)

    def _get_tensors(self, wanted: Sequence[str]) -> dict[str, Values]:
        made = self._small_raw(wanted)
        rest = {name: self._outline(name) for name in wanted if name not in made}
        kinds = [(shape, dtype.numpy, size) for dtype, shape, size, _ in rest.values()]
        out = dict(zip(rest, arrays_of(kinds), strict=True))
        self._read_into(out)
        return {name: made[name] if name in made else out[name] for name in wanted} if made else out

    def _small_raw(self, names: Sequence[str]) -> dict[str, Values]:
        """Fast path for small raw tensors. Returns {} if there are few, or if one of them has a problem."""
        if len(names) < _WORTH_BULK or self._sure_bytes < SHARING or self._decoding.small_raw is None:
            return {}
        small = self._decoding.small_raw
        known = [name for name in names if name in small.numbers]
        if len(known) < _WORTH_BULK:
            return {}
        return small.read(known) or {}  # {}: the caller decodes them by jobs, which raise the error

    def read_into(self, out: Mapping[str, Values]) -> None:
        """Decodes whole tensors in parallel into arrays that the caller provides.

        Args:
            out: name -> writable array of the tensor's dtype and shape, C order.

        Raises:
            MismatchError: an array does not have the tensor's dtype and shape, is not in C order or is
                read-only. No array was written.
            MissingTensorError, LimitError: no array was written.
            InvalidFileError: the arrays may be partly written.
        """
        for name, array in out.items():
            dtype, shape, _, _ = self._outline(name)
            like = (array.dtype, array.shape) == (dtype.numpy, shape)
            if not (like and array.flags.c_contiguous and array.flags.writeable):
                raise MismatchError(
                    f"tensor {name!r}: the array must be {dtype.numpy} of shape {shape}, in C order, writable"
                )
        if self.is_remote:
            with self.prefetch(self.in_file_order(out)) as plan:
                for group in plan.groups():
                    self._fill({name: out[name] for name in group})
        else:
            self._fill(out)

    def _fill(self, out: Mapping[str, Values]) -> None:
        """Decodes into arrays that `read_into` checked."""
        made = self._small_raw(list(out))
        for name, values in made.items():
            out[name][...] = values
        self._read_into({name: array for name, array in out.items() if name not in made})

    def _read_into(self, out: Mapping[str, Values]) -> None:
        """Decodes into checked arrays: first the plain tensors together, then the rest."""
        bulk = self._decoding.bulk if len(out) >= _WORTH_BULK else None
        rest = out if bulk is None else self._left_by(bulk, out)
        jobs: list[Job] = []
        for name, array in rest.items():
            entry = self.entry(name)
            if entry.vectors is not None and not entry.positions:
                self._decoding.decoder(entry)  # no chunk is decoded, but the vectors are checked (3.1)
            jobs += jobs_of_range(entry, array.reshape(-1), 0, entry.positions)
        self._decoding.do(jobs, TensorDecoder.weights_into)

    def _left_by(self, bulk: Bulk, out: Mapping[str, Values]) -> Mapping[str, Values]:
        """Decodes the plain tensors together. Returns the others, or all if a plain one has an error."""
        known = bulk.numbers
        together = {name: array for name, array in out.items() if name in known}
        positions = sum([array.size for array in together.values()])
        if not bulk.read_into(together, self._decoding.threads_for(positions)):
            return out
        return {name: array for name, array in out.items() if name not in known}

    def prefetch(
        self,
        items: Iterable[Item] | None = None,
        *,
        memory: int = DEFAULT_MEMORY,
        progress: Report | None = None,
    ) -> Prefetch[Values]:
        """Reads tensors and slices of a remote file ahead, in the background, and decodes them on arrival.

        Example: ``for name, array in file.prefetch(): ...``. Or ``with file.prefetch(names): ...``, where
        other reads in the block use what was read ahead. The system reads local files ahead.

        Args:
            items: names of tensors, and pairs of a name and an index as for `get_slice`, in the order in
                which they will be read, each once. None takes all tensors, in file order.
            memory: the greatest number of bytes that were requested or have arrived, and are not decoded
                yet. One request of 8 MiB, and reads out of order, may exceed it.
            progress: called with a `Progress` after each block of at most 8 MiB was read.

        Raises:
            MissingTensorError: a name is not in the file.
            IndexError: an index does not fit the shape.
            OptionError: an argument has another form.
        """
        return Prefetch(
            self, self._get_tensors, lambda name, at: self.get_slice(name)[at], items, memory, progress
        )

    def in_file_order(self, names: Iterable[str]) -> list[str]:
        """Returns names in the order of their data."""
        wanted = set(names)
        for name in wanted - self.directory.tensors.keys():
            self._require_present(name)
        return [name for name in self if name in wanted]

    def unplanned(self, name: str, chunks: Sequence[int] | None = None) -> list[Range]:
        """Returns what has to be fetched for chunks, or all chunks, of a tensor; of a local file, nothing."""
        return self._stored.unplanned(self.entry(name), chunks)

    def forget(self, names: Iterable[str]) -> None:
        """Releases what `prefetch` fetched for tensors that will not be read again."""
        self._stored.forget(map(self.entry, names))

    def get_slice(self, name: str) -> SfpSlice:
        """Returns a lazy tensor: ``f.get_slice("w")[10:20, :64]`` decodes only the segments that it needs.

        Raises:
            MissingTensorError: there is no tensor of that name.
        """
        return SfpSlice(self, self.entry(name))

    def get_mask(self, name: str) -> Mask:
        """Decodes the mask: bool, of the tensor's shape, True for survivors. All True if there is no mask.

        Raises:
            MissingTensorError: there is no tensor of that name.
            InvalidFileError: the file is damaged.
            LimitError: the tensor exceeds a limit.
        """
        entry = self.entry(name)
        if entry.mask is None:
            require_within_limits(self, entry)
            return np.ones(entry.shape, np.bool_)
        return self.decode(entry, select(entry.shape, ...), np.dtype(np.bool_), TensorDecoder.mask_into)

    def get_importance(self, name: str) -> F32 | None:
        """Decodes the importance of every position: float32, of the tensor's shape. None if there is none.

        It is 0 at pruned positions for which the file stores no importance.

        Raises:
            MissingTensorError: there is no tensor of that name.
            InvalidFileError: the file is damaged.
            LimitError: the tensor exceeds a limit.
        """
        entry = self.entry(name)
        if entry.importance is None:
            return None
        everything, float32 = select(entry.shape, ...), np.dtype(np.float32)
        return self.decode(entry, everything, float32, TensorDecoder.importance_into)

    def get_survivors(self, name: str) -> tuple[NDArray[np.int64], Values]:
        """Decodes the survivors alone. Without a mask, all positions are survivors.

        Returns:
            Their positions in the flattened tensor, ascending, int64 [n], and their weights, [n], in the
            tensor's dtype.

        Raises:
            MissingTensorError: there is no tensor of that name.
            InvalidFileError: the file is damaged.
            LimitError: the tensor exceeds a limit.
        """
        entry = self.entry(name)
        require_within_limits(self, entry)
        decoder = self.decoder(entry)
        positions = [np.zeros(0, np.int64)] * max(len(entry.chunks), 1)
        values = [np.zeros(0, entry.dtype.numpy)] * max(len(entry.chunks), 1)

        def survivors(k: int) -> None:
            data = self._stored.read(entry, k)
            with self._stored.placed(entry, k):
                first, stop = entry.segments_of_chunk(k)
                chunk = decoder.open_chunk(data, k)
                positions[k], values[k] = decoder.survivors(chunk, 0, stop - first)

        with self._stored.ahead((entry, k) for k in range(len(entry.chunks))):
            for_each(survivors, range(len(entry.chunks)), self._decoding.threads_for(entry.positions))
        return np.concatenate(positions), np.concatenate(values)

    # ----------------------------------------------------------------------------- chunks and runs

    def decode(
        self, entry: TensorEntry, selection: Selection, dtype: np.dtype[Any], into: Into
    ) -> NDArray[Any]:
        """Decodes the selected positions of a tensor.

        Args:
            entry: the tensor's entry.
            selection: the positions; its shape is the shape of the result.
            dtype: the dtype of the result.
            into: the `..._into` method of `TensorDecoder` that decodes a run of segments.

        Raises:
            InvalidFileError: the file is damaged.
            LimitError: the tensor exceeds a limit.
        """
        require_within_limits(self, entry)
        return decode_selection(self._decoding, entry, selection, dtype, into)

    def chunk_offset(self, entry: TensorEntry, k: int) -> int:
        """Returns the file offset of chunk k of a tensor; for k = -1 that of its vector chunk."""
        return self._stored.offset(entry, k)

    def read_checked(self, entry: TensorEntry, k: int) -> Bytes:
        """Reads chunk k of a tensor (its vector chunk for k = -1) and compares its checksum (R-LAY-004).

        Raises:
            InvalidFileError: checksum mismatch, or the file is too short.
        """
        return self._stored.read(entry, k)

    def read_chunks(self, wanted: Sequence[tuple[TensorEntry, int]]) -> list[Bytes]:
        """Reads several chunks in parallel, each like `read_checked`. Keeps the order of ``wanted``."""
        out = [np.zeros(0, np.uint8)] * len(wanted)

        def read(i: int) -> None:
            out[i] = self._stored.read(*wanted[i])

        with self._stored.ahead(wanted):
            for_each(read, range(len(wanted)), min(self._threads, max(len(wanted), 1)))
        return out

    def read_chunks_into(self, wanted: Sequence[tuple[TensorEntry, int]], places: Sequence[Bytes]) -> None:
        """Does what `read_chunks` does, into memory of the caller: a place of its length for each chunk.

        Raises:
            InvalidFileError: as in `read_checked`; the places are then undefined.
        """

        def read(i: int) -> None:
            self._stored.read_into(*wanted[i], places[i])

        with self._stored.ahead(wanted):
            for_each(read, range(len(wanted)), min(self._threads, max(len(wanted), 1)))

    def read_head(self, entry: TensorEntry, k: int) -> ChunkIndex:
        """Reads the segment index of chunk k from the chunk's first bytes. Does not compare its checksum."""
        return self._stored.read_head(entry, k)

    def heads_ahead(self, names: Iterable[str]) -> AbstractContextManager[object]:
        """Context manager that fetches what `read_head` reads of some tensors, if the file is remote."""
        entries = map(self.entry, names)
        return self._stored.heads_ahead(entry for entry in entries if entry.coding != "raw")

    def decoder(self, entry: TensorEntry) -> TensorDecoder:
        """Returns the decoder of a tensor. Reads and checks the tensor's vectors.

        Raises:
            InvalidFileError: the vector chunk is damaged.
        """
        return self._decoding.decoder(entry)


def read_directory(source: Source, limits: Limits) -> tuple[Preamble, Directory]:
    """Reads and checks the preamble and the directory.

    Raises:
        InvalidFileError, UnsupportedError, LimitError: the file is damaged or refused.
    """
    preamble = Preamble.from_bytes(bytes(source.read(0, min(SIZE, source.length))), source.length)
    limits.require("directory_bytes", preamble.directory_length, preamble.directory_offset)
    with placed(base=preamble.directory_offset):
        data = bytes(source.read(preamble.directory_offset, preamble.directory_length))
    preamble.require_directory(data)
    with placed(base=preamble.directory_offset):
        return preamble, Directory.from_bytes(data, preamble.directory_offset, limits)


def require_within_limits(file: SfpFile, entry: TensorEntry) -> None:
    """Raises LimitError if the sizes of a tensor exceed the limits with which the file was opened."""
    with placed(tensor=entry.name):
        file.limits.require_tensor(entry.decoded_bytes, entry.stored_bytes, file.preamble.directory_offset)
