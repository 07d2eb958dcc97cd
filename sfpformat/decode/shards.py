"""Models that lie in several files (SPEC.md chapter 18), and the index that tells what is where."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
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
from ..io.paths import INDEX_SUFFIX
from ..io.safetensors import SafetensorsError, strict_json
from ..limits import DEFAULT_LIMITS, Limits
from ..names import listed, quoted
from .execution import Into
from .pickling import Settings, reopened
from .reader import SfpFile, SfpSlice, TensorInfo
from .selection import Selection
from .tensor import TensorDecoder, Values

# As many bytes as a directory may have: an index says less about a tensor than a directory.
MAX_INDEX_BYTES = DEFAULT_LIMITS.directory_bytes


def shard_name(stem: str, number: int, count: int, suffix: str = ".sfp") -> str:
    """The name of shard ``number``, from 1, of ``count``."""
    return f"{stem}-{number:05d}-of-{count:05d}{suffix}"


def index_name(stem: str, suffix: str = ".sfp") -> str:
    """The name of the index of a model's shards."""
    return f"{stem}{suffix}{INDEX_SUFFIX}"


@dataclass(frozen=True)
class Placement:
    """Which file each tensor of a safetensors index is read from, and where files and index disagree.

    Attributes:
        files: tensor name -> name of the file that it is read from.
        missing: tensors of the index that no file has.
        unlisted: tensors of the files that the index does not list.
        moved: tensors that only another file has than the index says.
        repeated: tensors that are in several files, and also in the one that the index says.
    """

    files: dict[str, str]
    missing: list[str]
    unlisted: list[str]
    moved: list[str]
    repeated: list[str]

    def disagreements(self) -> list[str]:
        """One sentence for each kind of disagreement, with the number and some names of the tensors."""
        kinds = (
            ("left out because no file has them", self.missing),
            ("left out because the index does not list them", self.unlisted),
            ("read from another file than the index says", self.moved),
            ("in several files, and read from the one that the index says", self.repeated),
        )
        return [f"tensors {words} ({len(names):,}): {listed(names)}" for words, names in kinds if names]


@dataclass(frozen=True)
class ShardIndex:
    """Which file has which tensor.

    Attributes:
        weight_map: tensor name -> file name; without a directory part where the files are `.sfp`.
        metadata: the object of that name; ``total_size`` is the bytes of all tensors once decoded.
    """

    weight_map: dict[str, str]
    metadata: dict[str, object]

    def to_bytes(self) -> bytes:
        """The JSON text."""
        fields = {"metadata": self.metadata, "weight_map": self.weight_map}
        return (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes, *, subfolders: bool = False) -> ShardIndex:
        """Reads the JSON text.

        Args:
            data: UTF-8.
            subfolders: whether files may lie in folders below that of the index, as those of safetensors may.
                `.sfp` files may not.

        Raises:
            SafetensorsError: it is not such a JSON text, or a file lies elsewhere than below the index.
            InvalidFileError: a file name has a directory part (R-SHD-002).
        """
        fields = strict_json(data, "the index")
        weight_map, metadata = fields.get("weight_map"), fields.get("metadata", {})
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise SafetensorsError("the index has no 'weight_map' from tensor names to file names")
        if not isinstance(metadata, dict):
            raise SafetensorsError("the 'metadata' of the index are not an object")
        for name, file in weight_map.items():
            if subfolders and not _is_below(file):
                words = f"the index names {quoted(file)}, which is no path in the index's folder or below it"
                raise SafetensorsError(f"tensor {quoted(name)}: {words}")
            if not subfolders and ("/" in file or not _is_below(file)):
                raise fault("R-SHD-002", f"{quoted(file)} is not a plain file name", tensor=name)
        return cls(weight_map, metadata)

    @classmethod
    def read(cls, path: str | os.PathLike[str], *, subfolders: bool = False) -> ShardIndex:
        """Reads an index file.

        Args:
            path: of the file.
            subfolders: as in `from_bytes`.

        Raises:
            SafetensorsError, InvalidFileError: as `from_bytes`.
            OSError: it cannot be read.
        """
        with open(path, "rb") as file:
            data = file.read(MAX_INDEX_BYTES + 1)
        if len(data) > MAX_INDEX_BYTES:
            raise SafetensorsError(f"the index has more than {MAX_INDEX_BYTES:,} bytes")
        return cls.from_bytes(data, subfolders=subfolders)

    def files(self) -> list[str]:
        """The names of the files, ascending."""
        return sorted(set(self.weight_map.values()))

    def misplaced(self, found: Mapping[str, Iterable[str]]) -> tuple[str, str] | None:
        """The first of `all_misplaced`, or None."""
        return next(self.all_misplaced(found), None)

    def all_misplaced(self, found: Mapping[str, Iterable[str]]) -> Iterator[tuple[str, str]]:
        """The tensors that are missing, elsewhere, twice, or not listed, each with what is wrong with it.

        Args:
            found: file name -> names of the tensors that it has. Nothing is said of tensors that the index
                lists in other files.
        """
        there: set[str] = set()
        for file, names in found.items():
            for name in names:
                there.add(name)
                listed = self.weight_map.get(name)
                if listed != file:
                    says = "does not list it" if listed is None else f"says {listed!r}"
                    yield name, f"it is in {file!r}, the index {says}"
        for name, file in self.weight_map.items():
            if name not in there and file in found:
                yield name, f"it is not in {file!r}, where the index says"

    def placed(self, found: Mapping[str, Iterable[str]]) -> Placement:
        """Where each tensor is read from when the index decides; see `misplaced` for the strict rule.

        Args:
            found: file name -> names of the tensors that it has.
        """
        places: dict[str, list[str]] = {}
        for file, names in found.items():
            for name in names:
                places.setdefault(name, []).append(file)
        files: dict[str, str] = {}
        missing, moved, repeated = [], [], []
        for name, said in self.weight_map.items():
            there = places.get(name, [])
            if not there:
                missing.append(name)
                continue
            files[name] = said if said in there else there[0]
            if said not in there:
                moved.append(name)
            elif len(there) > 1:
                repeated.append(name)
        unlisted = [name for name in places if name not in self.weight_map]
        return Placement(files, missing, unlisted, moved, repeated)


def _is_below(file: str) -> bool:
    """Whether a name is a relative path without ``.``, ``..``, empty parts, backslashes and U+0000."""
    return not any(part in ("", ".", "..") for part in file.split("/")) and not any(c in file for c in "\\\0")


@contextmanager
def in_shard(name: str) -> Iterator[None]:
    """Adds the name of a shard to the faults of its file."""
    try:
        yield
    except FileFault as error:
        error.detail = f"in {name!r}: {error.detail}"
        raise


class ShardedFile(Closing):
    """An open model in several `.sfp` files; a context manager that is used as an `SfpFile` is.

    What takes or gives an entry does so for the shard that has the tensor; offsets are those in that shard.
    Pickled as an `SfpFile` is.

    Attributes:
        limits: those that the shards were opened with.
        index: the index.
        files: file name -> the open file, in the order of the names.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        limits: Limits = DEFAULT_LIMITS,
        engine: str | None = None,
        threads: int | None = None,
    ) -> None:
        """Opens the index and every shard; of the shards only the directories are read.

        Args:
            path: of the ``.sfp.index.json``.
            limits, engine, threads: as in `sfpformat.open`.

        Raises:
            SafetensorsError: the index is not the JSON that it should be, or one of safetensors files.
            InvalidFileError, UnsupportedError, LimitError: a file is damaged, or the index is wrong.
            OSError: a file cannot be read.
        """
        self.limits = limits
        self._path, self._settings = os.path.abspath(path), Settings(limits, engine, threads)
        of_safetensors = os.fspath(path).endswith(f".safetensors{INDEX_SUFFIX}")
        self.index = ShardIndex.read(path, subfolders=of_safetensors)
        if of_safetensors:
            raise SafetensorsError(f"{path} is an index of safetensors files; 'sfp pack' makes .sfp of them")
        self.files: dict[str, SfpFile] = {}
        folder = Path(path).parent
        try:
            for name in self.index.files():
                with in_shard(name):
                    self.files[name] = SfpFile(folder / name, limits=limits, engine=engine, threads=threads)
            wrong = self.index.misplaced(self.files)
            if wrong is not None:
                raise fault("R-SHD-001", wrong[1], tensor=wrong[0])
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closes all shards."""
        for file in self.files.values():
            file.close()

    @property
    def identity(self) -> tuple[tuple[str, tuple[int, int]], ...]:
        """The name and the `SfpFile.identity` of each shard."""
        return tuple((name, file.identity) for name, file in self.files.items())

    def __reduce__(self) -> tuple[object, ...]:
        """How the model is pickled: its shards are opened again.

        Raises:
            ClosedFileError: it is closed.
        """
        for file in self.files.values():
            file.__reduce__()
        return reopened, (ShardedFile, self._path, self._settings, self.identity)

    def keys(self) -> list[str]:
        """The names of the tensors, shard by shard, in the order of each."""
        return [name for file in self.files.values() for name in file]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __contains__(self, name: object) -> bool:
        return name in self.index.weight_map

    def __len__(self) -> int:
        return len(self.index.weight_map)

    def file_of(self, name: str) -> SfpFile:
        """The shard that has a tensor.

        Raises:
            MissingTensorError: there is no tensor of that name.
        """
        return self.files[self._name_of_file(name)]

    def _name_of_file(self, name: str) -> str:
        if name not in self.index.weight_map:
            raise MissingTensorError(f"no tensor {name!r} in the model")
        return self.index.weight_map[name]

    def metadata(self) -> dict[str, str]:
        """The metadata of all shards; where two have the same key, those of the first count."""
        out: dict[str, str] = {}
        for file in self.files.values():
            out = {**file.metadata(), **out}
        return out

    def entry(self, name: str) -> TensorEntry:
        """The tensor's entry in its shard's directory."""
        return self.file_of(name).entry(name)

    def info(self, name: str) -> TensorInfo:
        """What the directory says about a tensor; reads no data."""
        return self.file_of(name).info(name)

    def get_tensor(self, name: str) -> Values:
        """A whole tensor, as `SfpFile.get_tensor` gives it."""
        return self.file_of(name).get_tensor(name)

    def get_tensors(self, names: Iterable[str] | None = None) -> dict[str, Values]:
        """Some whole tensors, all where nothing is said, as `SfpFile.get_tensors` gives them."""
        wanted = list(self.keys() if names is None else names)
        found: dict[str, Values] = {}
        for file, some in self._by_file(wanted):
            found.update(file.get_tensors(some))
        return {name: found[name] for name in wanted}

    def read_into(self, out: Mapping[str, Values]) -> None:
        """Decodes some whole tensors into arrays, as `SfpFile.read_into` does."""
        for file, names in self._by_file(out):
            file.read_into({name: out[name] for name in names})

    def _by_file(self, names: Iterable[str]) -> list[tuple[SfpFile, list[str]]]:
        """The files that have the tensors, and which of them."""
        found: dict[str, list[str]] = {}
        for name in names:
            found.setdefault(self._name_of_file(name), []).append(name)
        return [(self.files[file], some) for file, some in found.items()]

    def get_slice(self, name: str) -> SfpSlice:
        """The tensor, to be indexed, as `SfpFile.get_slice` gives it."""
        return self.file_of(name).get_slice(name)

    def get_mask(self, name: str) -> Mask:
        """The mask, as `SfpFile.get_mask` gives it."""
        return self.file_of(name).get_mask(name)

    def get_importance(self, name: str) -> F32 | None:
        """The importance, as `SfpFile.get_importance` gives it."""
        return self.file_of(name).get_importance(name)

    def get_survivors(self, name: str) -> tuple[NDArray[np.int64], Values]:
        """The survivors: positions and weights, as `SfpFile.get_survivors` gives them."""
        return self.file_of(name).get_survivors(name)

    def decode(
        self, entry: TensorEntry, selection: Selection, dtype: np.dtype[Any], into: Into
    ) -> NDArray[Any]:
        """The selected positions, as `SfpFile.decode` gives them."""
        return self.file_of(entry.name).decode(entry, selection, dtype, into)

    def decoder(self, entry: TensorEntry) -> TensorDecoder:
        """The decoder of a tensor, as `SfpFile.decoder` gives it."""
        return self.file_of(entry.name).decoder(entry)

    def chunk_offset(self, entry: TensorEntry, k: int) -> int:
        """Offset of chunk k of a tensor in its shard, as `SfpFile.chunk_offset` gives it."""
        return self.file_of(entry.name).chunk_offset(entry, k)

    def read_checked(self, entry: TensorEntry, k: int) -> Bytes:
        """The bytes of chunk k of a tensor, as `SfpFile.read_checked` gives them."""
        return self.file_of(entry.name).read_checked(entry, k)

    def read_chunks(self, wanted: Sequence[tuple[TensorEntry, int]]) -> list[Bytes]:
        """The bytes of some chunks, as `SfpFile.read_chunks` gives them."""
        out = [np.zeros(0, np.uint8)] * len(wanted)
        places: dict[str, list[int]] = {}
        for i, (entry, _) in enumerate(wanted):
            places.setdefault(self._name_of_file(entry.name), []).append(i)
        for name, here in places.items():
            for i, data in zip(here, self.files[name].read_chunks([wanted[i] for i in here]), strict=True):
                out[i] = data
        return out

    def read_head(self, entry: TensorEntry, k: int) -> ChunkIndex:
        """The segment index of chunk k of a tensor, as `SfpFile.read_head` gives it."""
        return self.file_of(entry.name).read_head(entry, k)
