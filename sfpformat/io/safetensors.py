"""Reads and writes safetensors files tensor by tensor, with bounds checks.

A file begins with the length of its header (u64, little-endian) and the header, a JSON object: tensor name
-> dtype, shape and offsets in the data. The tensors fill the rest of the file without gaps or overlaps. Files
are not mapped into memory, so that reading needs memory only for the largest tensor.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..dtypes import DTYPES, Dtype, of_numpy
from ..errors import MissingTensorError, SfpError, SfpWarning
from ..names import quoted
from .closing import Closing
from .positional import PositionalFile

# The limit of the reference implementation of safetensors.
MAX_HEADER_BYTES = 100_000_000
_LENGTH = struct.Struct("<Q")
_METADATA = "__metadata__"
# The dtypes of `.sfp` that safetensors does not have.
_NOT_IN_SAFETENSORS = frozenset({"C128"})
# Dtypes of safetensors with elements smaller than a byte -> bits per element. SPEC.md 25.1 reserves their
# names. Their tensors are stored as U8 arrays of the packed bytes.
SUB_BYTE_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}


class SafetensorsError(SfpError):
    """A safetensors file or index is damaged, or the format cannot represent the data to write."""


class SubByte(NamedTuple):
    """Dtype (a key of `SUB_BYTE_BITS`) and shape of a tensor whose elements are smaller than a byte."""

    dtype: str
    shape: tuple[int, ...]

    def as_bytes(self) -> tuple[int, ...] | None:
        """Returns the shape of the packed bytes, or None if the elements do not fill whole bytes.

        If each row fills whole bytes, only the last dimension changes; else the shape is [bytes].
        """
        bits = SUB_BYTE_BITS[self.dtype]
        size = math.prod(self.shape) * bits
        if size % 8:
            return None
        if self.shape and self.shape[-1] * bits % 8 == 0:
            return (*self.shape[:-1], self.shape[-1] * bits // 8)
        return (size // 8,)


class TensorSpec(NamedTuple):
    """Name, dtype and shape of a tensor, without its data.

    Attributes:
        name: the name of the tensor.
        dtype, shape: dtype and shape of its array.
        sub_byte: dtype and shape in safetensors, if the array holds packed elements smaller than a byte.
    """

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    sub_byte: SubByte | None = None

    @property
    def words(self) -> str:
        """Dtype and shape in safetensors, for messages."""
        dtype, shape = self.sub_byte or (self.dtype.name, self.shape)
        return f"{dtype} {list(shape)}"

    @property
    def elements(self) -> int:
        """Number of elements of the tensor's array."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data, in bytes."""
        return self.elements * self.dtype.itemsize


@dataclass(frozen=True)
class Header:
    """The checked header of a safetensors file.

    Attributes:
        tensors: name -> spec, in the order of the data.
        starts: name -> file offset of the tensor's first byte.
        metadata: the strings under ``__metadata__``.
        sha256: SHA-256 of the header's bytes, in hex.
    """

    tensors: dict[str, TensorSpec]
    starts: dict[str, int]
    metadata: dict[str, str]
    sha256: str


# ---------------------------------------------------------------------------------------------- header


def strict_json(data: bytes, what: str) -> dict[str, Any]:
    """Parses a JSON object. Refuses duplicate keys, NaN and infinities.

    Args:
        data: the object in UTF-8.
        what: name of the data in error messages.

    Raises:
        SafetensorsError: the data are not a JSON object, or contain a refused key or number.
    """
    try:
        value = json.loads(data.decode(), object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except RecursionError:
        raise SafetensorsError(f"{what} is nested too deep") from None
    except UnicodeDecodeError:
        raise SafetensorsError(f"{what} is not UTF-8") from None
    except ValueError as error:
        raise SafetensorsError(f"{what} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise SafetensorsError(f"{what} is not a JSON object")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for i, key in enumerate(keys) if key in keys[:i])
        raise ValueError(f"the key {twice!r} occurs twice")
    return found


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is not a JSON number")


def parse_header(data: bytes, data_bytes: int) -> Header:
    """Parses and checks a header.

    Args:
        data: the header's bytes, without its length.
        data_bytes: number of bytes after the header in the file.

    Raises:
        SafetensorsError: the header is damaged, or the tensors do not fill the data exactly.
    """
    fields = strict_json(data, "the safetensors header")
    metadata = _metadata(fields.pop(_METADATA, {}))
    found: list[tuple[int, int, TensorSpec]] = []
    for name, value in fields.items():
        spec = _spec(name, value)
        start, stop = _size_list(name, value, "data_offsets", 2)
        if stop - start != spec.nbytes:
            raise SafetensorsError(
                f"tensor {quoted(name)}: data_offsets cover {stop - start} bytes, but its shape and "
                f"dtype take {spec.nbytes}"
            )
        found.append((start, stop, spec))
    found.sort(key=lambda place: place[:2])
    end = 0
    for start, stop, spec in found:
        if start != end:
            word = "overlaps the tensor before it" if start < end else "leaves a gap"
            raise SafetensorsError(f"tensor {quoted(spec.name)} {word}: it starts at {start}, not at {end}")
        end = stop
    if end != data_bytes:
        word = "is cut off" if end > data_bytes else "has bytes after the last tensor"
        raise SafetensorsError(
            f"the file {word}: it has {data_bytes:,} bytes of data, its header names {end:,}; get it again"
        )
    base = _LENGTH.size + len(data)
    return Header(
        {spec.name: spec for _, _, spec in found},
        {spec.name: base + start for start, _, spec in found},
        metadata,
        hashlib.sha256(data).hexdigest(),
    )


def _metadata(value: object) -> dict[str, str]:
    if value is None:  # the reference implementation accepts null
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise SafetensorsError(f"{_METADATA} of the safetensors header must map strings to strings")
    return value


def _spec(name: str, value: object) -> TensorSpec:
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= set(value):
        raise SafetensorsError(f"tensor {quoted(name)}: the header must give dtype, shape and data_offsets")
    shape = tuple(_size_list(name, value, "shape", None))
    word = value["dtype"]
    if isinstance(word, str) and word in SUB_BYTE_BITS:
        sub_byte = SubByte(word, shape)
        of_bytes = sub_byte.as_bytes()
        if of_bytes is None:
            raise SafetensorsError(f"tensor {quoted(name)}: {word} {list(shape)} does not fill whole bytes")
        _require_array(name, of_bytes, 1)
        return TensorSpec(name, DTYPES["U8"], of_bytes, sub_byte)
    dtype = DTYPES.get(word) if isinstance(word, str) else None
    if dtype is None or dtype.name in _NOT_IN_SAFETENSORS:
        raise SafetensorsError(f"tensor {quoted(name)}: the dtype {quoted(word, 20)} is unknown")
    _require_array(name, shape, dtype.itemsize)
    return TensorSpec(name, dtype, shape)


def _require_array(name: str, shape: tuple[int, ...], itemsize: int) -> None:
    """Raises `SafetensorsError` if numpy has no array of a shape. Sizes of 0 do not make others smaller."""
    if math.prod(size or 1 for size in shape) * itemsize >= 1 << 63:
        raise SafetensorsError(f"tensor {quoted(name)}: a shape of {list(shape[:32])} is too large")


def _size_list(name: str, value: dict[str, Any], key: str, count: int | None) -> list[int]:
    """Returns the checked list of a key: ``count`` integers (None: any number) from 0 to 2^63 - 1."""
    sizes = value[key]
    good = isinstance(sizes, list) and all(type(size) is int and 0 <= size < 1 << 63 for size in sizes)
    if not good or (count is not None and len(sizes) != count):
        raise SafetensorsError(f"tensor {quoted(name)}: {key} must be a list of sizes")
    return list(sizes)


def header_bytes(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """Returns the length of the header and the header of a file with tensors in this order.

    The header is padded to a multiple of 8 bytes.

    Raises:
        SafetensorsError: a name is reserved or repeated, safetensors lacks a dtype, or the header is too
            long.
    """
    fields: dict[str, object] = {_METADATA: dict(metadata)} if metadata else {}
    end = 0
    for spec in specs:
        if spec.name in fields or spec.name == _METADATA:
            raise SafetensorsError(
                f"{quoted(spec.name)} is reserved, not UTF-8, or occurs twice; rename the tensor"
            )
        if spec.dtype.name in _NOT_IN_SAFETENSORS:
            raise SafetensorsError(f"tensor {quoted(spec.name)}: safetensors has no dtype {spec.dtype.name}")
        offsets = [end, end + spec.nbytes]
        dtype, shape = spec.sub_byte or (spec.dtype.name, spec.shape)
        fields[spec.name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        end += spec.nbytes
    data = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    data += b" " * (-len(data) % 8)
    if len(data) > MAX_HEADER_BYTES:
        raise SafetensorsError(f"the header would have {len(data):,} bytes, more than {MAX_HEADER_BYTES:,}")
    return _LENGTH.pack(len(data)) + data


def in_aligned_order(specs: Sequence[TensorSpec]) -> list[TensorSpec]:
    """Sorts tensors by element size, the greatest first, so that each is aligned to its element size."""
    return sorted(specs, key=lambda spec: -spec.dtype.itemsize)


# --------------------------------------------------------------------------------------------- reading


class SafetensorsFile(Closing):
    """An open safetensors file, which reads tensors on demand. A context manager."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Reads and checks the header.

        Raises:
            SafetensorsError: the header is damaged.
            OSError: the file cannot be read.
        """
        self.path = Path(path)
        self._file = PositionalFile(path)
        try:
            self.header = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def _read_header(self) -> Header:
        size = self._file.length
        if size < _LENGTH.size:
            raise SafetensorsError(f"not a safetensors file: it has only {size} bytes")
        (length,) = _LENGTH.unpack(self._pread(0, _LENGTH.size).data)
        rest = size - _LENGTH.size
        if length > MAX_HEADER_BYTES:
            raise SafetensorsError("not a safetensors file: its header would have more than 100 MB")
        if length > rest:
            raise SafetensorsError(
                f"cut off, or not safetensors: the header would have {length} bytes, but only {rest} follow"
            )
        return parse_header(self._pread(_LENGTH.size, length).tobytes(), rest - length)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def read(self, name: str) -> NDArray[np.generic]:
        """Reads a tensor into a new, writable array of its shape. BF16 and FP8 have dtypes of `ml_dtypes`.

        In BOOL tensors, bytes other than 0 and 1 become 1, with an `SfpWarning`, because other readers take
        them as true.

        Raises:
            MissingTensorError: there is no tensor of that name.
            SafetensorsError: the file became shorter after it was opened.
            OSError: the file cannot be read.
        """
        if name not in self.header.tensors:
            raise MissingTensorError(f"no tensor {quoted(name)} in the file")
        spec = self.header.tensors[name]
        return self.read_elements(name, 0, math.prod(spec.shape)).reshape(spec.shape)

    def read_elements(self, name: str, start: int, stop: int) -> NDArray[np.generic]:
        """Reads the elements ``start`` to ``stop`` - 1 of a flattened tensor, which has them; like `read`."""
        dtype = self.header.tensors[name].dtype
        size = dtype.itemsize
        data = self._pread(self.header.starts[name] + start * size, (stop - start) * size)
        if dtype.name == "BOOL" and len(data) and data.max() > 1:
            count = int(np.count_nonzero(data > 1))
            words = f"tensor {quoted(name)}: {count:,} BOOL values are neither 0 nor 1; they are read as 1"
            warnings.warn(words, SfpWarning, stacklevel=3)
            np.minimum(data, 1, out=data)
        return data.view(dtype.numpy)

    def _pread(self, offset: int, size: int) -> NDArray[np.uint8]:
        """Reads ``size`` bytes from ``offset`` directly into a new array."""
        out = np.empty(size, np.uint8)
        if self._file.read_into(out.data, offset) != size:
            raise SafetensorsError("the file became shorter after it was opened; get it again")
        return out


# --------------------------------------------------------------------------------------------- writing


def write_tensors(
    file: BinaryIO,
    specs: Sequence[TensorSpec],
    metadata: Mapping[str, str],
    arrays: Iterator[NDArray[np.generic]],
) -> None:
    """Writes a whole safetensors file, tensor by tensor.

    Args:
        file: the file, which is written from its current position.
        specs: the tensors, in the order of the data. `in_aligned_order` returns an aligned order.
        metadata: the caller's strings.
        arrays: the tensors in the same order. Each array is released before the next one is requested.

    Raises:
        SafetensorsError: an array does not match its spec, or there are too few or too many arrays.
        OSError: the file cannot be written.
    """
    file.write(header_bytes(specs, metadata))
    for spec in specs:
        array = next(arrays, None)
        if array is None or of_numpy(array.dtype) != spec.dtype or array.shape != spec.shape:
            raise SafetensorsError(
                f"tensor {quoted(spec.name)} is not {spec.dtype.name} {list(spec.shape)} as in the header"
            )
        flat = np.ascontiguousarray(array, spec.dtype.numpy).reshape(-1)
        if flat.nbytes:
            file.write(flat.view(np.uint8).data)
        del array, flat
    if next(arrays, None) is not None:
        raise SafetensorsError("there are more tensors than in the header")
