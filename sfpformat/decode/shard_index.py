"""The index that maps the tensors of a model to its files (SPEC.md chapter 18)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ..errors import fault
from ..io.paths import INDEX_SUFFIX, FilePath, file_path
from ..io.remote.location import Location
from ..io.safetensors import SafetensorsError, strict_json
from ..limits import DEFAULT_LIMITS
from ..names import listed, quoted

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
    def read(cls, path: str | os.PathLike[str] | Location, *, subfolders: bool = False) -> ShardIndex:
        """Reads an index file.

        Args:
            path: path or location of the file.
            subfolders: as in `from_bytes`.

        Raises:
            SafetensorsError: as in `from_bytes`, or the file has more than `MAX_INDEX_BYTES`.
            InvalidFileError: as in `from_bytes`.
            OSError: the file cannot be read.
        """
        return cls.read_at(file_path(path), subfolders=subfolders)[0]

    @classmethod
    def read_at(cls, path: FilePath, *, subfolders: bool = False) -> tuple[ShardIndex, FilePath]:
        """Reads an index file, as `read`. Also returns its path; on a hub, that at the commit."""
        if isinstance(path, Location):
            from ..io.remote.source import read_whole  # lazy: most models are local

            data, path = read_whole(path, MAX_INDEX_BYTES)
        else:
            with path.open("rb") as file:
                data = file.read(MAX_INDEX_BYTES + 1)
        if len(data) > MAX_INDEX_BYTES:
            raise SafetensorsError(f"the index has more than {MAX_INDEX_BYTES:,} bytes")
        return cls.from_bytes(data, subfolders=subfolders), path

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
