"""Access to the tensors of a model, whatever holds them: arrays by name, or files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, Protocol, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from ..coding.changes import Patterns, kind_of
from ..container.preamble import MAGIC
from ..decode.opening import open_any
from ..decode.parts import Parts, parts_of
from ..decode.reader import SfpFile
from ..decode.selection import Selection
from ..decode.shard_index import ShardIndex
from ..decode.shards import ShardedFile
from ..decode.tensor import TensorDecoder
from ..dtypes import Dtype, of_numpy
from ..errors import OptionError
from ..io.closing import Closing
from ..io.paths import INDEX_SUFFIX, FilePath
from ..io.remote.location import Location, OpenFile, location_of
from ..io.safetensors import SafetensorsError, SafetensorsFile
from ..limits import DEFAULT_LIMITS, Limits
from ..names import quoted

Array = NDArray[np.generic]

# Elements that are read at a time if the selected ones lie apart.
_SPAN = 1 << 19


class Spec(NamedTuple):
    """Dtype and shape of a tensor."""

    dtype: Dtype
    shape: tuple[int, ...]


class Tensors(Protocol):
    """The tensors of a model.

    Those of an `.sfp` file also have a method ``parts(name)``, which returns a tensor as `Parts`, or None if
    it is no more than its elements.
    """

    @property
    def specs(self) -> Mapping[str, Spec]:
        """Name -> dtype and shape, in the order of the model."""

    def read(self, name: str) -> Array:
        """Returns a tensor in its dtype and shape. The caller does not write to it."""

    def read_part(self, name: str, selection: Selection) -> Array:
        """Returns the selected elements of a tensor as a new array of the selection's shape."""

    def metadata(self) -> dict[str, str]:
        """Returns the strings of the model's user."""


# What holds the tensors of a model.
Source: TypeAlias = (
    Tensors | Mapping[str, Array] | SfpFile | ShardedFile | str | os.PathLike[str] | Location | OpenFile
)


class ArrayTensors:
    """The tensors of a mapping from name to array. Shares their memory."""

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        """Checks the arrays.

        Raises:
            OptionError: a value is not an array of a dtype of the format.
        """
        self._arrays = arrays
        self.specs: dict[str, Spec] = {name: spec_of(name, array) for name, array in arrays.items()}

    def read(self, name: str) -> Array:
        return self._arrays[name]

    def read_part(self, name: str, selection: Selection) -> Array:
        flat = np.ascontiguousarray(self._arrays[name]).reshape(-1)
        return gathered(selection, flat.dtype, lambda start, stop: flat[start:stop])

    def metadata(self) -> dict[str, str]:
        return {}


def spec_of(name: str, array: Array) -> Spec:
    """Returns dtype and shape of an array, which the tensor ``name`` has.

    Raises:
        OptionError: the value is not an array of a dtype of the format.
    """
    dtype = of_numpy(array.dtype) if isinstance(array, np.ndarray) else None
    if dtype is None:
        kind = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise OptionError(f"tensor {quoted(name)}: {kind} is not an array of a dtype of the format")
    return Spec(dtype, array.shape)


class FileTensors:
    """The tensors of an open `.sfp` file, or of a model in shards."""

    def __init__(self, file: SfpFile | ShardedFile) -> None:
        """Reads the directory.

        Raises:
            OptionError: the file has keyed tables, which a delta cannot describe (R-KEY-013).
        """
        self._file = file
        files = [file] if isinstance(file, SfpFile) else file.files.values()
        if any(one.directory.keyed for one in files):
            raise OptionError("the model has keyed tables, which a delta cannot describe")
        entries = ((name, file.entry(name)) for name in file)
        self.specs = {name: Spec(entry.dtype, entry.shape) for name, entry in entries}

    def read(self, name: str) -> Array:
        return self._file.get_tensor(name)

    def read_part(self, name: str, selection: Selection) -> Array:
        return selected(self._file, name, selection)

    def parts(self, name: str) -> Parts | None:
        """Returns a tensor in parts; None if it is no more than its elements."""
        return parts_of(self._file.file_of(name), name)

    def metadata(self) -> dict[str, str]:
        return self._file.metadata()


class SafetensorsTensors:
    """The tensors of open safetensors files."""

    def __init__(self, files: list[SafetensorsFile]) -> None:
        self._file_of = {name: file for file in files for name in file.header.tensors}
        specs = ((name, file.header.tensors[name]) for name, file in self._file_of.items())
        self.specs = {name: Spec(spec.dtype, spec.shape) for name, spec in specs}
        self._metadata = {key: text for file in reversed(files) for key, text in file.header.metadata.items()}

    def read(self, name: str) -> Array:
        return self._file_of[name].read(name)

    def read_part(self, name: str, selection: Selection) -> Array:
        return selected_of_safetensors(self._file_of[name], name, selection)

    def metadata(self) -> dict[str, str]:
        return dict(self._metadata)


class OpenTensors(Closing):
    """Opens the files of a model. A context manager, which closes what it opened.

    Attributes:
        tensors: the tensors.
        name: the name of the file, or None for arrays.
    """

    def __init__(self, source: Source, limits: Limits = DEFAULT_LIMITS) -> None:
        """Opens a source.

        Args:
            source: arrays by name; an open file; or the path of an `.sfp` or safetensors file, of the index
                of a model in shards, or of a folder that has exactly one `.sfp` model; or the
                URL of an `.sfp` model.
            limits: the limits on `.sfp` files.

        Raises:
            OptionError: the source is something else, or a value is not an array.
            InvalidFileError, UnsupportedError, LimitError, SafetensorsError: a file is damaged.
            OSError: a file cannot be read.
        """
        self._stack = ExitStack()
        self.name: str | None = None
        try:
            self.tensors = self._opened(source, limits)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closes the files that this object opened."""
        self._stack.close()

    def _opened(self, source: Source, limits: Limits) -> Tensors:
        if isinstance(source, Mapping):
            return ArrayTensors(source)
        if isinstance(source, (SfpFile, ShardedFile)):
            return FileTensors(source)
        location = location_of(source)
        if location is not None:
            return self._opened_file(location, limits)
        if not isinstance(source, (str, os.PathLike)):
            if all(hasattr(source, name) for name in ("specs", "read", "read_part")):
                return cast(Tensors, source)
            raise OptionError(
                f"a {type(source).__name__} is neither a path, an open file, nor arrays by name"
            )
        path = Path(source)
        self.name = path.name
        if path.name.endswith(f".safetensors{INDEX_SUFFIX}"):
            names = ShardIndex.read(path, subfolders=True).files()
            return self._safetensors([path.parent / name for name in names])
        if path.suffix == ".safetensors" and not _is_sfp(path):
            return self._safetensors([path])
        return self._opened_file(path, limits)

    def _opened_file(self, path: FilePath, limits: Limits) -> Tensors:
        self.name = path.name
        file = open_any(path, limits=limits)
        self._stack.callback(file.close)
        return FileTensors(file)

    def _safetensors(self, paths: list[Path]) -> Tensors:
        files = [self._stack.enter_context(SafetensorsFile(path)) for path in paths]
        names = [name for file in files for name in file.header.tensors]
        if len(names) != len(set(names)):
            raise SafetensorsError("a tensor is in several shards; write the model again")
        return SafetensorsTensors(files)


def _is_sfp(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == MAGIC[:4]


def selected(file: SfpFile | ShardedFile, name: str, selection: Selection) -> Array:
    """Decodes the selected elements of a tensor of an `.sfp` file."""
    entry = file.entry(name)
    return file.decode(entry, selection, entry.dtype.numpy, TensorDecoder.weights_into)


def selected_of_safetensors(file: SafetensorsFile, name: str, selection: Selection) -> Array:
    """Reads the selected elements of a tensor of a safetensors file."""
    dtype = file.header.tensors[name].dtype.numpy
    return gathered(selection, dtype, lambda start, stop: file.read_elements(name, start, stop))


def gathered(selection: Selection, dtype: np.dtype[np.generic], read: Callable[[int, int], Array]) -> Array:
    """Gathers the selected elements of a tensor. Reads a few of them at a time.

    Args:
        selection: the positions.
        dtype: the dtype of the elements.
        read: returns the elements of a range of positions, given its start and its stop, exclusive.
    """
    out = np.empty(selection.size, dtype)
    starts, run = selection.starts, selection.run
    if not selection.size:
        return out.reshape(selection.shape)
    low, high = min(run[0], run[-1]), max(run[0], run[-1]) + 1
    apart = int(np.abs(np.diff(starts)).max(initial=1))
    count = max(_SPAN // max(apart, high - low), 1)  # starts whose elements are read together
    for first in range(0, len(starts), count):
        some = starts[first : first + count]
        begin = int(some.min()) + low
        data = read(begin, int(some.max()) + high)
        into = out[first * len(run) : (first + len(some)) * len(run)]
        if len(some) == 1:  # no array of positions
            stop = run.stop - low
            into[...] = data[run.start - low : stop if stop >= 0 else None : run.step]
        else:
            offsets = np.arange(run.start, run.stop, run.step)
            into[...] = data[((some - begin)[:, None] + offsets).reshape(-1)]
    return out.reshape(selection.shape)


def patterns_of(array: Array, dtype: Dtype) -> Patterns:
    """Returns the bit patterns of a tensor's elements, [elements]. Shares its memory if possible."""
    flat = np.ascontiguousarray(array, dtype.numpy).reshape(-1)
    if dtype.name == "BOOL":
        return np.asarray((flat.view(np.uint8) != 0).view(np.uint8))  # true may be another byte than 1
    return flat.view(kind_of(dtype).pattern)
