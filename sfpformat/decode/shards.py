"""Reads models in several files (SPEC.md chapter 18)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..coding.bits import Bytes
from ..coding.mask import Mask
from ..coding.quantisers import F32
from ..container.chunk import ChunkIndex
from ..container.entry import TensorEntry
from ..errors import FileFault, MissingTensorError, fault
from ..io.closing import Closing
from ..io.paths import INDEX_SUFFIX, FilePath, file_path
from ..io.remote.ahead import DEFAULT_MEMORY, Range
from ..io.remote.location import Location, OpenFile
from ..io.safetensors import SafetensorsError
from ..io.threads import for_each
from ..limits import DEFAULT_LIMITS, Limits
from .execution import Into
from .pickling import Settings, reopened
from .prefetch import Item, Prefetch, Report
from .reader import SfpFile
from .selection import Selection
from .shard_index import ShardIndex
from .slices import SfpSlice
from .tensor import TensorDecoder, Values
from .tensor_info import TensorInfo

# Remote shards that are opened at a time. Each takes two or three requests, whose latency counts.
_OPENED_AT_ONCE = 16


@contextmanager
def in_shard(name: str) -> Iterator[None]:
    """Context manager that adds the name of a shard to a fault raised inside."""
    try:
        yield
    except FileFault as error:
        error.detail = f"in {name!r}: {error.detail}"
        raise


class ShardedFile(Closing):
    """An open model in several `.sfp` files; a context manager. Same interface as `SfpFile`.

    Entries and offsets are those of the shard that has the tensor. It can be pickled under the same
    conditions as an `SfpFile`.

    Attributes:
        limits: the limits with which the shards were opened.
        index: the index.
        files: file name -> open file, in the order of the names.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | Location | OpenFile,
        *,
        limits: Limits = DEFAULT_LIMITS,
        engine: str | None = None,
        threads: int | None = None,
    ) -> None:
        """Opens the index and every shard. Reads only the preamble and the directory of each shard.

        Args:
            path: path or URL of the ``.sfp.index.json``.
            limits, engine, threads: as in `sfpformat.open`.

        Raises:
            SafetensorsError: the index is not valid JSON of the expected form, or is an index of safetensors
                files.
            InvalidFileError, UnsupportedError, LimitError: a shard is refused, or the index does not match
                the shards.
            OSError: a file cannot be read.
        """
        self.limits = limits
        path, self._settings = file_path(path), Settings(limits, engine, threads)
        of_safetensors = path.name.endswith(f".safetensors{INDEX_SUFFIX}")
        self.index, path = ShardIndex.read_at(path, subfolders=of_safetensors)
        self._path = path if isinstance(path, Location) else os.path.abspath(path)
        if of_safetensors:
            raise SafetensorsError(
                f"{path} is an index of safetensors files; 'sfp pack' converts them to .sfp"
            )
        self.files: dict[str, SfpFile] = {}
        try:
            self._open_shards(path)
            wrong = self.index.misplaced(self.files)
            if wrong is not None:
                raise fault("R-SHD-001", wrong[1], tensor=wrong[0])
        except BaseException:
            self.close()
            raise

    def _open_shards(self, index: FilePath) -> None:
        """Opens all shards, remote ones concurrently."""
        limits, engine, threads = self._settings.limits, self._settings.engine, self._settings.threads
        names = self.index.files()
        opened: dict[str, SfpFile] = {}

        def open_shard(name: str) -> None:
            with in_shard(name):
                opened[name] = SfpFile(index.with_name(name), limits=limits, engine=engine, threads=threads)

        try:
            for_each(
                open_shard, names, min(_OPENED_AT_ONCE, len(names)) if isinstance(index, Location) else 1
            )
        finally:
            self.files.update((name, opened[name]) for name in names if name in opened)

    def close(self) -> None:
        """Closes all shards."""
        for file in self.files.values():
            file.close()

    @property
    def identity(self) -> tuple[tuple[str, tuple[int, int]], ...]:
        """The name and the `SfpFile.identity` of each shard."""
        return tuple((name, file.identity) for name, file in self.files.items())

    def __reduce__(self) -> tuple[object, ...]:
        """Pickles the path of the index and the settings. Unpickling opens the shards again.

        Raises:
            ClosedFileError: the model is closed.
        """
        for file in self.files.values():
            file.__reduce__()
        return reopened, (ShardedFile, self._path, self._settings, self.identity)

    @property
    def is_remote(self) -> bool:
        """Whether the shards are behind URLs."""
        return isinstance(self._path, Location)

    def keys(self) -> list[str]:
        """Returns the names of the tensors, shard by shard, each in file order."""
        return [name for file in self.files.values() for name in file]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __contains__(self, name: object) -> bool:
        return name in self.index.weight_map

    def __len__(self) -> int:
        return len(self.index.weight_map)

    def file_of(self, name: str) -> SfpFile:
        """Returns the shard that has a tensor.

        Raises:
            MissingTensorError: there is no tensor of that name.
        """
        return self.files[self._name_of_file(name)]

    def _name_of_file(self, name: str) -> str:
        if name not in self.index.weight_map:
            raise MissingTensorError(f"no tensor {name!r} in the model")
        return self.index.weight_map[name]

    def metadata(self) -> dict[str, str]:
        """Returns the metadata of all shards. If two shards have a key, the first shard's value counts."""
        out: dict[str, str] = {}
        for file in self.files.values():
            out = {**file.metadata(), **out}
        return out

    def entry(self, name: str) -> TensorEntry:
        """Returns the tensor's entry in its shard's directory."""
        return self.file_of(name).entry(name)

    def info(self, name: str) -> TensorInfo:
        """Returns the directory's information about a tensor, like `SfpFile.info`."""
        return self.file_of(name).info(name)

    def get_tensor(self, name: str) -> Values:
        """Decodes a whole tensor, like `SfpFile.get_tensor`."""
        return self.file_of(name).get_tensor(name)

    def get_tensors(self, names: Iterable[str] | None = None) -> dict[str, Values]:
        """Decodes whole tensors, like `SfpFile.get_tensors`. None decodes all, in the order of `keys`."""
        wanted = list(self.keys() if names is None else names)
        found: dict[str, Values] = {}
        with self._ahead(wanted):
            for file, some in self._by_file(wanted):
                found.update(file.get_tensors(some))
        return {name: found[name] for name in wanted}

    def read_into(self, out: Mapping[str, Values]) -> None:
        """Decodes whole tensors into arrays, like `SfpFile.read_into`.

        Works shard by shard: if it refuses the arrays of a shard, it has already written earlier shards.
        """
        with self._ahead(out):
            for file, names in self._by_file(out):
                file.read_into({name: out[name] for name in names})

    def _ahead(self, names: Iterable[str]) -> AbstractContextManager[object]:
        """Reads tensors ahead if they are remote, in the order in which `read_into` decodes them."""
        if not self.is_remote:
            return nullcontext()
        return self.prefetch(self.in_file_order(names))

    def in_file_order(self, names: Iterable[str]) -> list[str]:
        """Returns names shard by shard, each in the order of its data."""
        return [name for file, some in self._by_file(names) for name in file.in_file_order(some)]

    def heads_ahead(self, names: Iterable[str]) -> AbstractContextManager[object]:
        """Context manager that fetches what `read_head` reads, like `SfpFile.heads_ahead`."""
        stack = ExitStack()
        for file, some in self._by_file(names):
            stack.enter_context(file.heads_ahead(some))
        return stack

    def prefetch(
        self,
        items: Iterable[Item] | None = None,
        *,
        memory: int = DEFAULT_MEMORY,
        progress: Report | None = None,
    ) -> Prefetch[Values]:
        """Reads tensors and slices of remote shards ahead, like `SfpFile.prefetch`."""
        return Prefetch(
            self, self.get_tensors, lambda name, index: self.get_slice(name)[index], items, memory, progress
        )

    def unplanned(self, name: str, chunks: Sequence[int] | None = None) -> list[Range]:
        """Returns what has to be fetched for chunks of a tensor, like `SfpFile.unplanned`."""
        return self.file_of(name).unplanned(name, chunks)

    def forget(self, names: Iterable[str]) -> None:
        """Releases what was fetched for tensors, like `SfpFile.forget`."""
        for file, some in self._by_file(names):
            file.forget(some)

    def _by_file(self, names: Iterable[str]) -> list[tuple[SfpFile, list[str]]]:
        """Groups tensor names by the shard that has them."""
        found: dict[str, list[str]] = {}
        for name in names:
            found.setdefault(self._name_of_file(name), []).append(name)
        return [(self.files[file], some) for file, some in found.items()]

    def get_slice(self, name: str) -> SfpSlice:
        """Returns a lazy tensor, like `SfpFile.get_slice`."""
        return self.file_of(name).get_slice(name)

    def get_mask(self, name: str) -> Mask:
        """Decodes the mask, like `SfpFile.get_mask`."""
        return self.file_of(name).get_mask(name)

    def get_importance(self, name: str) -> F32 | None:
        """Decodes the importance, like `SfpFile.get_importance`."""
        return self.file_of(name).get_importance(name)

    def get_survivors(self, name: str) -> tuple[NDArray[np.int64], Values]:
        """Decodes the survivors' positions and weights, like `SfpFile.get_survivors`."""
        return self.file_of(name).get_survivors(name)

    def decode(
        self, entry: TensorEntry, selection: Selection, dtype: np.dtype[Any], into: Into
    ) -> NDArray[Any]:
        """Decodes the selected positions, like `SfpFile.decode`."""
        return self.file_of(entry.name).decode(entry, selection, dtype, into)

    def decoder(self, entry: TensorEntry) -> TensorDecoder:
        """Returns the decoder of a tensor, like `SfpFile.decoder`."""
        return self.file_of(entry.name).decoder(entry)

    def chunk_offset(self, entry: TensorEntry, k: int) -> int:
        """Returns the offset of chunk k of a tensor in its shard, like `SfpFile.chunk_offset`."""
        return self.file_of(entry.name).chunk_offset(entry, k)

    def read_checked(self, entry: TensorEntry, k: int) -> Bytes:
        """Reads chunk k of a tensor and compares its checksum, like `SfpFile.read_checked`."""
        return self.file_of(entry.name).read_checked(entry, k)

    def read_chunks(self, wanted: Sequence[tuple[TensorEntry, int]]) -> list[Bytes]:
        """Reads several chunks, like `SfpFile.read_chunks`. The result is in the order of ``wanted``."""
        out = [np.zeros(0, np.uint8)] * len(wanted)
        places: dict[str, list[int]] = {}
        for i, (entry, _) in enumerate(wanted):
            places.setdefault(self._name_of_file(entry.name), []).append(i)
        for name, here in places.items():
            for i, data in zip(here, self.files[name].read_chunks([wanted[i] for i in here]), strict=True):
                out[i] = data
        return out

    def read_chunks_into(self, wanted: Sequence[tuple[TensorEntry, int]], places: Sequence[Bytes]) -> None:
        """Reads several chunks into memory of the caller, like `SfpFile.read_chunks_into`."""
        inside: dict[str, list[int]] = {}
        for i, (entry, _) in enumerate(wanted):
            inside.setdefault(self._name_of_file(entry.name), []).append(i)
        for name, here in inside.items():
            self.files[name].read_chunks_into([wanted[i] for i in here], [places[i] for i in here])

    def read_head(self, entry: TensorEntry, k: int) -> ChunkIndex:
        """Reads the segment index of chunk k of a tensor, like `SfpFile.read_head`."""
        return self.file_of(entry.name).read_head(entry, k)
