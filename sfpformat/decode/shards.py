"""Reads models in several files (SPEC.md chapter 18), and the index that maps tensors to files."""

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
from .reader import SfpFile, SfpSlice
from .selection import Selection
from .tensor import TensorDecoder, Values
from .tensor_info import TensorInfo

# Same as the limit for directories: an index has fewer bytes per tensor than a directory.
MAX_INDEX_BYTES = DEFAULT_LIMITS.directory_bytes


def shard_name(stem: str, number: int, count: int, suffix: str = ".sfp") -> str:
    """Returns the file name of shard ``number`` of ``count``; the first has number 1."""
    return f"{stem}-{number:05d}-of-{count:05d}{suffix}"


def index_name(stem: str, suffix: str = ".sfp") -> str:
    """Returns the file name of the index of a model's shards."""
    return f"{stem}{suffix}{INDEX_SUFFIX}"


@dataclass(frozen=True)
class Placement:
    """The file from which each tensor of a safetensors index is read, and all conflicts of files and index.

    Attributes:
        files: tensor name -> name of the file from which it is read.
        missing: tensors that the index lists and no file has.
        unlisted: tensors that a file has and the index does not list.
        moved: tensors that are not in the file that the index names, but in another one.
        repeated: tensors that are in the file that the index names, and in another one too.
    """

    files: dict[str, str]
    missing: list[str]
    unlisted: list[str]
    moved: list[str]
    repeated: list[str]

    def disagreements(self) -> list[str]:
        """Returns one sentence per kind of conflict, with the number of tensors and some of their names."""
        kinds = (
            ("skipped because no file has them", self.missing),
            ("skipped because the index does not list them", self.unlisted),
            ("read from another file than the index names", self.moved),
            ("in several files, read from the one that the index names", self.repeated),
        )
        return [f"tensors {words} ({len(names):,}): {listed(names)}" for words, names in kinds if names]


@dataclass(frozen=True)
class ShardIndex:
    """The index of a model in shards: maps tensors to files.

    Attributes:
        weight_map: tensor name -> file name. Names of `.sfp` files have no directory part.
        metadata: the ``metadata`` object. Its ``total_size`` is the decoded size of all tensors, in bytes.
        listed: of `.sfp` files, the ``files`` of the metadata: names of all shards, also of those without
            tensors.
    """

    weight_map: dict[str, str]
    metadata: dict[str, object]
    listed: tuple[str, ...] = ()

    @classmethod
    def of_files(cls, names: Mapping[str, Iterable[str]], total_size: int) -> ShardIndex:
        """Returns the index of files, which lists those without tensors, too.

        Args:
            names: file name -> names of its tensors.
            total_size: decoded size of all tensors, in bytes.
        """
        weight_map = {name: file for file in sorted(names) for name in names[file]}
        metadata: dict[str, object] = {"total_size": total_size}
        if set(weight_map.values()) < set(names):
            metadata["files"] = sorted(names)
        return cls(weight_map, metadata)

    def to_bytes(self) -> bytes:
        """Returns the JSON text, in UTF-8."""
        fields = {"metadata": self.metadata, "weight_map": self.weight_map}
        return (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes, *, subfolders: bool = False) -> ShardIndex:
        """Parses the JSON text.

        Args:
            data: UTF-8.
            subfolders: whether files may be in subfolders of the index's folder. True for safetensors files,
                False for `.sfp` files.

        Raises:
            SafetensorsError: the JSON text is not valid or does not have the expected form, or (with
                ``subfolders``) a path leaves the index's folder.
            InvalidFileError: without ``subfolders``, a name is not a plain file name (R-SHD-002).
        """
        fields = strict_json(data, "the index")
        weight_map, metadata = fields.get("weight_map"), fields.get("metadata", {})
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise SafetensorsError("the index has no 'weight_map' from tensor names to file names")
        if not isinstance(metadata, dict):
            raise SafetensorsError("the 'metadata' of the index are not an object")
        for name, file in weight_map.items():
            if subfolders and not _is_below(file):
                words = f"the index names {quoted(file)}, which is not a path inside the folder of the index"
                raise SafetensorsError(f"tensor {quoted(name)}: {words}")
            if not subfolders and ("/" in file or not _is_below(file)):
                raise fault("R-SHD-002", f"{quoted(file)} is not a plain file name", tensor=name)
        listed = () if subfolders else _plain_names(metadata.get("files", []))
        return cls(weight_map, metadata, listed)

    @classmethod
    def read(cls, path: str | os.PathLike[str], *, subfolders: bool = False) -> ShardIndex:
        """Reads an index file.

        Args:
            path: path of the file.
            subfolders: as in `from_bytes`.

        Raises:
            SafetensorsError: as in `from_bytes`, or the file has more than `MAX_INDEX_BYTES`.
            InvalidFileError: as in `from_bytes`.
            OSError: the file cannot be read.
        """
        with open(path, "rb") as file:
            data = file.read(MAX_INDEX_BYTES + 1)
        if len(data) > MAX_INDEX_BYTES:
            raise SafetensorsError(f"the index has more than {MAX_INDEX_BYTES:,} bytes")
        return cls.from_bytes(data, subfolders=subfolders)

    def files(self) -> list[str]:
        """Returns the names of the files, ascending, also of those without tensors that it lists."""
        return sorted({*self.weight_map.values(), *self.listed})

    def misplaced(self, found: Mapping[str, Iterable[str]]) -> tuple[str, str] | None:
        """Returns the first item of `all_misplaced`, or None."""
        return next(self.all_misplaced(found), None)

    def all_misplaced(self, found: Mapping[str, Iterable[str]]) -> Iterator[tuple[str, str]]:
        """Yields each tensor that does not match the index, with the reason.

        It is missing, in another file, in a second file, or not listed.

        Args:
            found: file name -> names of the tensors in it. Tensors that the index lists in a file that is not
                a key are not reported as missing.
        """
        present: set[str] = set()
        for file, names in found.items():
            for name in names:
                present.add(name)
                listed = self.weight_map.get(name)
                if listed != file:
                    says = "does not list it" if listed is None else f"says {listed!r}"
                    yield name, f"it is in {file!r}, but the index {says}"
        for name, file in self.weight_map.items():
            if name not in present and file in found:
                yield name, f"it is not in {file!r}, which the index names"

    def placed(self, found: Mapping[str, Iterable[str]]) -> Placement:
        """Chooses the file from which each tensor is read. Raises no error; `misplaced` is the strict check.

        This is the file that the index names, if it has the tensor, else the first file that has it. Tensors
        that the index does not list are omitted.

        Args:
            found: file name -> names of the tensors in it.
        """
        places: dict[str, list[str]] = {}
        for file, names in found.items():
            for name in names:
                places.setdefault(name, []).append(file)
        files: dict[str, str] = {}
        missing, moved, repeated = [], [], []
        for name, indexed in self.weight_map.items():
            present = places.get(name, [])
            if not present:
                missing.append(name)
                continue
            files[name] = indexed if indexed in present else present[0]
            if indexed not in present:
                moved.append(name)
            elif len(present) > 1:
                repeated.append(name)
        unlisted = [name for name in places if name not in self.weight_map]
        return Placement(files, missing, unlisted, moved, repeated)


def _plain_names(files: object) -> tuple[str, ...]:
    """Returns the list of all shards in the metadata of an index, after checking it (R-SHD-002)."""
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        raise SafetensorsError("'files' in the 'metadata' of the index is not an array of file names")
    for file in files:
        if "/" in file or not _is_below(file):
            raise fault("R-SHD-002", f"{quoted(file)} is not a plain file name")
    return tuple(files)


def _is_below(file: str) -> bool:
    """Returns whether a name is a relative path without ``.``, ``..``, empty parts, ``\\`` and U+0000."""
    return not any(part in ("", ".", "..") for part in file.split("/")) and not any(c in file for c in "\\\0")


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
        path: str | os.PathLike[str],
        *,
        limits: Limits = DEFAULT_LIMITS,
        engine: str | None = None,
        threads: int | None = None,
    ) -> None:
        """Opens the index and every shard. Reads only the preamble and the directory of each shard.

        Args:
            path: path of the ``.sfp.index.json``.
            limits, engine, threads: as in `sfpformat.open`.

        Raises:
            SafetensorsError: the index is not valid JSON of the expected form, or is an index of safetensors
                files.
            InvalidFileError, UnsupportedError, LimitError: a shard is refused, or the index does not match
                the shards.
            OSError: a file cannot be read.
        """
        self.limits = limits
        self._path, self._settings = os.path.abspath(path), Settings(limits, engine, threads)
        of_safetensors = os.fspath(path).endswith(f".safetensors{INDEX_SUFFIX}")
        self.index = ShardIndex.read(path, subfolders=of_safetensors)
        if of_safetensors:
            raise SafetensorsError(
                f"{path} is an index of safetensors files; 'sfp pack' converts them to .sfp"
            )
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
        """Pickles the path of the index and the settings. Unpickling opens the shards again.

        Raises:
            ClosedFileError: the model is closed.
        """
        for file in self.files.values():
            file.__reduce__()
        return reopened, (ShardedFile, self._path, self._settings, self.identity)

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
        for file, some in self._by_file(wanted):
            found.update(file.get_tensors(some))
        return {name: found[name] for name in wanted}

    def read_into(self, out: Mapping[str, Values]) -> None:
        """Decodes whole tensors into arrays, like `SfpFile.read_into`.

        Works shard by shard: if it refuses the arrays of a shard, it has already written earlier shards.
        """
        for file, names in self._by_file(out):
            file.read_into({name: out[name] for name in names})

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

    def read_head(self, entry: TensorEntry, k: int) -> ChunkIndex:
        """Reads the segment index of chunk k of a tensor, like `SfpFile.read_head`."""
        return self.file_of(entry.name).read_head(entry, k)
