"""Opens models for commands: an `.sfp` file, a safetensors file, or the shards of an index."""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..container.entry import TensorEntry
from ..container.preamble import MAGIC
from ..decode.parts import Parts, parts_of
from ..decode.reader import SfpFile
from ..decode.selection import Selection
from ..decode.shard_index import ShardIndex
from ..decode.shards import ShardedFile
from ..deltas.tensors import selected, selected_of_safetensors
from ..errors import SfpWarning
from ..io.closing import Closing
from ..io.paths import INDEX_SUFFIX, FilePath, file_path, file_size, model_path, models_in
from ..io.remote.ahead import ReadAhead
from ..io.remote.location import Location
from ..io.safetensors import SUB_BYTE_BITS, SafetensorsError, SafetensorsFile, SubByte, TensorSpec
from ..limits import DEFAULT_LIMITS, Limits
from ..names import listed, quoted
from .errors import CommandError, PathLike, local_path, path_in_errors, require_file
from .foreign import HEAD_BYTES, describe, describe_file, is_like_safetensors

# The entry key that stores the original dtype of a tensor whose dtype only safetensors has.
_SUB_BYTE = "x-safetensors"
# Suffixes of models of other packages; used in the message for a folder without a supported model.
_OTHER_MODELS = frozenset((".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".npz"))


class Model(Closing):
    """An open model. Also a context manager, which closes it.

    Attributes:
        path: path of the file or index.
        kind: ``sfp`` or ``safetensors``.
        files: file name -> open `SfpFile` or `SafetensorsFile`, for each file of the model.
        specs: tensor name -> name, dtype and shape, in file order.
        sharded: whether the model has an index.
        strict_index: whether an index of safetensors that contradicts its files is an error.
        keeps_metadata: whether `metadata` and `metadata_of` return the metadata of the files. If false, they
            return none.
    """

    def __init__(
        self,
        path: FilePath,
        *,
        strict_index: bool = False,
        deltas: bool = False,
        keyed: bool = False,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        """Opens a file or an index. The contents determine the kind of a file, and its name if these do not.

        If an index of safetensors contradicts its files, follows the index and warns (`SfpWarning`).

        Args:
            path: path of the file or index, or the location of an `.sfp` file or its index.
            strict_index: whether an index that contradicts its files is an error.
            deltas: whether to open a delta; its tensors are those that it stores.
            keyed: whether to open a file with keyed tables; their bit arrays are among its tensors.
            limits: limits on what an `.sfp` file may claim.

        Raises:
            CommandError: the file is not a model, or is damaged; or it is remote and not an `.sfp` file.
            OSError: the file cannot be read.
        """
        self._deltas, self._keyed = deltas, keyed
        self.path, self._limits = path, limits
        self.strict_index = strict_index
        self.keeps_metadata = True
        require_file(path)
        self.files: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        self._stored_name: dict[str, str] = {}  # new name -> stored name, of renamed tensors
        self._placed: dict[str, str] | None = None  # of an index of safetensors: tensor name -> file name
        self.specs: dict[str, TensorSpec] = {}
        self._stack = ExitStack()
        self.sharded = path.name.endswith(".json")
        try:
            with path_in_errors(path):
                self.kind = self._open_shards() if self.sharded else self._open_one()
        except BaseException:
            self.close()
            raise
        for file_name, file in self.files.items():
            for spec in _specs(file):
                if self._placed is None or self._placed.get(spec.name) == file_name:
                    self.specs[spec.name] = spec
                    self._file_of[spec.name] = file_name

    def _open_one(self) -> str:
        if isinstance(self.path, Location):
            return self._open_sfp()
        with self.path.open("rb") as file:
            start = file.read(HEAD_BYTES)
        if start.startswith(MAGIC[:4]) or self.path.suffix == ".sfp":
            return self._open_sfp()
        if not is_like_safetensors(start) and self.path.suffix != ".safetensors":
            words = describe(start, self.path.name, self.path.stat().st_size)
            raise CommandError(
                f"{self.path}: " + (f"is {words}" if words else "is neither an .sfp nor a safetensors file")
            )
        self.files[self.path.name] = self._stack.enter_context(SafetensorsFile(self.path))
        return "safetensors"

    def _open_sfp(self) -> str:
        if self.path.suffix == ".safetensors":
            local_path(self.path, "a safetensors file: 'sfp'")
        opened = self._stack.enter_context(SfpFile(self.path, limits=self._limits))
        self._require_kind(opened)
        self.files[self.path.name] = opened
        return "sfp"

    def _require_kind(self, file: SfpFile) -> None:
        """Raises CommandError for a delta or keyed tables, unless the caller accepts them."""
        if file.directory.delta is not None and not self._deltas:
            raise CommandError(
                f"{self.path}: is a delta, not a model; 'sfp apply BASE {self.path}' makes the model"
            )
        if file.directory.keyed and not self._keyed:
            raise CommandError(
                f"{self.path}: has keyed tables, which this command would lose; "
                "sfpformat.KeyedTable opens them"
            )

    def _open_shards(self) -> str:
        index = ShardIndex.read(self.path, subfolders=not self.path.name.endswith(f".sfp{INDEX_SUFFIX}"))
        names = index.files()
        if names and all(name.endswith(".sfp") for name in names):
            shards = self._stack.enter_context(ShardedFile(self.path, limits=self._limits))
            self.files = dict(shards.files)
            for file in shards.files.values():
                self._require_kind(file)
            return "sfp"
        folder = local_path(self.path, "an index of safetensors files: 'sfp'").parent
        for name in names:
            shard = folder / name
            _require_below(shard.parent, folder)
            with path_in_errors(shard):
                self.files[name] = self._stack.enter_context(SafetensorsFile(shard))
        found = {name: file.header.tensors for name, file in self.files.items()}
        wrong = index.misplaced(found) if self.strict_index else None
        if wrong is not None:
            raise SafetensorsError(f"tensor {quoted(wrong[0])}: {wrong[1]}")
        self._apply_index(index, found, folder)
        return "safetensors"

    def _apply_index(self, index: ShardIndex, found: Mapping[str, Iterable[str]], folder: Path) -> None:
        """Assigns each tensor to the file that the index names, and warns of contradictions.

        Args:
            index: the index.
            found: file name -> names of its tensors.
            folder: the folder of the index.

        Raises:
            SafetensorsError: the files have none of the listed tensors, or a strict index omits a shard.
        """
        placement = index.placed(found)
        if index.weight_map and not placement.files:
            raise SafetensorsError("the files contain none of the tensors that the index lists")
        forgotten = _unlisted_shards(folder, found)
        if self.strict_index and forgotten:
            raise SafetensorsError(f"the index does not name the file {forgotten[0]!r}")
        disagreements = placement.disagreements()
        if forgotten:
            words = f"files skipped because the index does not name them ({len(forgotten):,})"
            disagreements.append(f"{words}: {listed(forgotten)}")
        for words in disagreements:
            warnings.warn(
                f"{self.path}: {words}; with --strict-index this is an error", SfpWarning, stacklevel=2
            )
        self._placed = placement.files
        for name in set(self.files) - set(placement.files.values()):
            self.files.pop(name).close()

    def __reduce__(self) -> tuple[object, ...]:
        """Pickles the path of the model, and the names of its tensors. Unpickling opens the model again."""
        stored = {name: self._stored_name.get(name, name) for name in self.specs}
        settings = self.strict_index, self._deltas, self._limits, self.keeps_metadata
        return _reopened, (self.path, stored, *settings)

    def close(self) -> None:
        """Closes all files."""
        self._stack.close()

    @property
    def nbytes(self) -> int:
        """Total size of all decoded tensors in bytes."""
        return sum(spec.nbytes for spec in self.specs.values())

    @property
    def stored_bytes(self) -> int:
        """Total size of all files in bytes, without the index."""
        return sum(
            file.preamble.file_length if isinstance(file, SfpFile) else file_size(self._path_of(name))
            for name, file in self.files.items()
        )

    def paths(self) -> list[Path]:
        """Returns the paths of the files on this machine."""
        found = map(self._path_of, self.files)
        return [path for path in found if isinstance(path, Path)]

    def _path_of(self, file_name: str) -> FilePath:
        if not self.sharded:
            return self.path
        return self.path.parent / file_name if isinstance(self.path, Path) else self.path.with_name(file_name)

    def names_in(self, file_name: str) -> list[str]:
        """Returns the names of the tensors of one file, in its order."""
        return [name for name, file in self._file_of.items() if file == file_name]

    def file_of(self, name: str) -> Any:
        """Returns the open file that holds a tensor."""
        return self.files[self._file_of[name]]

    def ahead(self, names: Iterable[str]) -> AbstractContextManager[object]:
        """Context manager that reads tensors of remote files ahead, which will be read in this order."""
        stored = ((self.file_of(name), self._stored_name.get(name, name)) for name in names)
        ranges = [one for file, name in stored if isinstance(file, SfpFile) for one in file.unplanned(name)]
        return ReadAhead(ranges) if ranges else nullcontext()

    def metadata_of(self, file_name: str) -> dict[str, str]:
        """Returns the metadata of one file."""
        file = self.files[file_name]
        if not self.keeps_metadata:
            return {}
        return file.metadata() if isinstance(file, SfpFile) else dict(file.header.metadata)

    def metadata(self) -> dict[str, str]:
        """Returns the metadata of all files. If several have the same key, the value of the first counts."""
        out: dict[str, str] = {}
        for file_name in self.files:
            out = {**self.metadata_of(file_name), **out}
        return out

    def aliases(self) -> dict[str, str]:
        """Returns alias -> stored name, for the tied tensors that the metadata list."""
        pairs = self.metadata().items()
        return {name: kept for name, kept in pairs if kept in self.specs and name not in self.specs}

    def rename(self, name: str, new_name: str) -> None:
        """Renames a tensor in this object, not in the file. The new name must be unused."""
        self.specs[new_name] = self.specs.pop(name)._replace(name=new_name)
        self._file_of[new_name] = self._file_of.pop(name)
        self._stored_name[new_name] = name

    def drop(self, name: str) -> None:
        """Removes a tensor from this object, not from the file."""
        del self.specs[name], self._file_of[name]

    def read(self, name: str) -> NDArray[np.generic]:
        """Reads a whole tensor. Returns an array of its dtype and shape.

        Raises:
            CommandError: the data are damaged.
            OSError: the data cannot be read.
        """
        file_name = self._file_of[name]
        file = self.files[file_name]
        with path_in_errors(self._path_of(file_name)):
            read: Callable[[str], NDArray[np.generic]]
            read = file.get_tensor if isinstance(file, SfpFile) else file.read
            return read(self._stored_name.get(name, name))

    def read_part(self, name: str, selection: Selection) -> NDArray[np.generic]:
        """Reads the selected elements of a tensor. Returns an array of the selection's shape.

        Raises:
            CommandError: the data are damaged.
            OSError: the data cannot be read.
        """
        file_name = self._file_of[name]
        file, stored = self.files[file_name], self._stored_name.get(name, name)
        with path_in_errors(self._path_of(file_name)):
            if isinstance(file, SfpFile):
                return selected(file, stored, selection)
            return selected_of_safetensors(file, stored, selection)

    def parts(self, name: str) -> Parts | None:
        """Returns a tensor with its mask, levels and importance; None if it is no more than its elements.

        Raises:
            CommandError: the data are damaged.
            OSError: the data cannot be read.
        """
        file_name = self._file_of[name]
        file = self.files[file_name]
        if not isinstance(file, SfpFile):
            return None
        with path_in_errors(self._path_of(file_name)):
            return parts_of(file, self._stored_name.get(name, name))


def _reopened(
    path: FilePath,
    stored: dict[str, str],
    strict_index: bool,
    deltas: bool,
    limits: Limits,
    keeps_metadata: bool,
) -> Model:
    """Opens a pickled model again.

    Args:
        path, strict_index, deltas, limits: as for `Model`.
        stored: name of each tensor -> its name in the file.
        keeps_metadata: as in `Model`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SfpWarning)  # they were issued when the model was opened
        model = Model(path, strict_index=strict_index, deltas=deltas, limits=limits)
    model.keeps_metadata = keeps_metadata
    for name in set(model.specs) - set(stored.values()):
        model.drop(name)
    for name, old in stored.items():
        if name != old:
            model.rename(old, name)
    return model


def _specs(file: SfpFile | SafetensorsFile) -> Iterable[TensorSpec]:
    if isinstance(file, SafetensorsFile):
        return file.header.tensors.values()
    entries = (file.entry(name) for name in file)
    return [TensorSpec(entry.name, entry.dtype, entry.shape, sub_byte_of(entry)) for entry in entries]


def sub_byte_keys(spec: TensorSpec) -> dict[str, object]:
    """Returns the entry key that stores the safetensors dtype and shape of sub-byte elements."""
    if spec.sub_byte is None:
        return {}
    return {_SUB_BYTE: {"dtype": spec.sub_byte.dtype, "shape": list(spec.sub_byte.shape)}}


def sub_byte_of(entry: TensorEntry) -> SubByte | None:
    """Reads the key of `sub_byte_keys`. Returns None if it is absent, or does not match the tensor."""
    kept = entry.other.get(_SUB_BYTE)
    if not isinstance(kept, dict) or entry.dtype.name != "U8":
        return None
    dtype, shape = kept.get("dtype"), kept.get("shape")
    if not (isinstance(dtype, str) and dtype in SUB_BYTE_BITS and isinstance(shape, list)):
        return None
    if not all(type(size) is int for size in shape):
        return None
    found = SubByte(dtype, tuple(shape))
    return found if found.as_bytes() == entry.shape else None


def as_bits(array: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Returns the bytes of a contiguous array, uint8 [bytes]. They distinguish NaNs and signs of zeros."""
    return array.reshape(-1).view(np.uint8)


def _require_below(folder: Path, top: Path) -> None:
    """Checks that a folder, with links resolved, lies inside another.

    Files in the folder may be links, because the cache of the Hugging Face hub uses them.

    Raises:
        SafetensorsError: the folder lies outside.
    """
    if not Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(top)):
        raise SafetensorsError(f"{folder} is a link to a folder outside that of the index")


def _unlisted_shards(folder: Path, found: Iterable[str]) -> list[str]:
    """Returns the names of safetensors shards in a folder that are not in ``found``."""
    shards = (path.name for path in folder.glob("*-?????-of-?????.safetensors"))
    return sorted(set(shards) - set(found))


def open_model(
    path: PathLike,
    *,
    kind: str | None = None,
    strict_index: bool = False,
    deltas: bool = False,
    keyed: bool = False,
    limits: Limits = DEFAULT_LIMITS,
) -> Model:
    """Opens a file, an index, or the only model of a folder.

    Args:
        path: path of the file, index or folder, or the URL of an `.sfp` model.
        kind: the kind to prefer if a folder has both, ``sfp`` or ``safetensors``.
        strict_index, deltas, keyed: same as for `Model`.
        limits: limits on what an `.sfp` file may claim.

    Raises:
        CommandError: it is not a model, or is damaged.
        OSError: it cannot be read.
    """
    with path_in_errors(path):
        found = file_path(path)
        if isinstance(found, Location):
            found = model_path(found)
    if isinstance(found, Path) and found.is_dir():
        found = _find_model(found, kind)
    return Model(found, strict_index=strict_index, deltas=deltas, keyed=keyed, limits=limits)


def add_strict_index(parser: argparse.ArgumentParser) -> None:
    """Adds the option ``--strict-index``."""
    parser.add_argument(
        "--strict-index",
        action="store_true",
        help="stop with an error if a safetensors index contradicts its files",
    )


def _find_model(folder: Path, kind: str | None) -> Path:
    """Returns the path of the only model in a folder, or of the only one of the preferred kind.

    Raises:
        CommandError: the folder has no model, or several.
    """
    by_kind = {"sfp": models_in(folder), "safetensors": _safetensors_in(folder)}
    found = by_kind.get(kind or "") or [name for names in by_kind.values() for name in names]
    if len(found) == 1:
        return folder / found[0]
    if found:
        raise CommandError(f"{folder}: contains several models; name one of {listed(found)}")
    raise CommandError(
        f"{folder}: contains no .safetensors file, no .sfp file and no index of shards{_suggestion(folder)}"
    )


def _safetensors_in(folder: Path) -> list[str]:
    """Returns the names of the safetensors indices in a folder, or without one, of its safetensors files."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    indices = [name for name in names if name.endswith(f".safetensors{INDEX_SUFFIX}")]
    return indices or [name for name in names if name.endswith(".safetensors")]


def _suggestion(folder: Path) -> str:
    """Returns advice for a folder without a model. Names folders in it that have one, or another format."""
    inside = sorted(folder.iterdir())
    folders = [path.name for path in inside if path.is_dir() and any(map(_is_model, path.iterdir()))]
    if folders:
        return f"; name one of its folders: {listed(folders)}"
    for path in inside:
        words = describe_file(path) if path.is_file() and path.suffix in _OTHER_MODELS else None
        if words is not None:
            return f"; {path.name} is {words}"
    return ""


def _is_model(path: Path) -> bool:
    return path.suffix in (".safetensors", ".sfp") and path.is_file()
