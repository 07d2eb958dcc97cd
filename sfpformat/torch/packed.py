"""The compressed bytes of one weight as a tensor: a complete `.sfp` file with one tensor.

Rules: chunks from a larger file are copied without encoding them again. Weights are decoded into new memory
that torch allocates, so that they have the same alignment as in a dense model.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..container.entry import TensorEntry
from ..decode.reader import SfpFile
from ..decode.selection import Selection
from ..decode.tensor import TensorDecoder
from ..encode.sink import MemorySink
from ..encode.writer import Writer
from ..engines import get_engine
from ..errors import MismatchError
from ..names import listed
from ..options import Options
from .files import is_decoded_on
from .loading import AnyFile
from .tensors import array_of, memory_of, tensor_of, torch_dtype
from .weight_file import TENSOR_NAME, open_weight


def pack(weight: torch.Tensor, options: Options | None = None) -> torch.Tensor:
    """Encodes a tensor as a file.

    Args:
        weight: a tensor on any device, with any strides.
        options: encoding options; None is lossless.

    Returns:
        The file, uint8 [bytes], on the CPU.

    Raises:
        OptionError: the options do not fit the tensor, or it has no memory.
    """
    sink = MemorySink()
    with Writer(sink, threads=torch.get_num_threads()) as writer:
        writer.add(TENSOR_NAME, array_of(weight, TENSOR_NAME), options)
    return _bytes_tensor(sink.data)


def cut_out(file: AnyFile, name: str) -> torch.Tensor:
    """Copies one tensor of a larger file to a new file with this tensor alone: uint8 [bytes], on the CPU.

    Raises:
        MissingTensorError: there is no tensor of that name.
        InvalidFileError: a chunk's checksum does not match.
        MismatchError: this version of torch has no such dtype.
    """
    torch_dtype(file.info(name).dtype)
    sink = MemorySink()
    with Writer(sink, threads=1) as writer:
        _copy_tensor(file.file_of(name), name, writer, TENSOR_NAME)
    return _bytes_tensor(sink.data)


def put_into(data: torch.Tensor, writer: Writer, name: str) -> None:
    """Copies a weight into a larger file, under that name; the inverse of `cut_out`.

    Raises:
        InvalidFileError, UnsupportedError, LimitError: the bytes are damaged or refused.
    """
    with open_weight(data) as file:
        _copy_tensor(file, TENSOR_NAME, writer, name)


def _copy_tensor(file: SfpFile, name: str, writer: Writer, new_name: str) -> None:
    """Copies a tensor's chunks from one file to another without encoding them again.

    Raises:
        MissingTensorError: there is no tensor of that name.
        OptionError: the new name is taken.
        InvalidFileError: a chunk's checksum does not match.
    """
    entry = file.entry(name)
    vectors = None if entry.vectors is None else file.read_checked(entry, -1)
    chunks = (file.read_checked(entry, k) for k in range(len(entry.chunks)))
    writer.add_encoded(replace(entry, name=new_name), vectors, chunks)


def _bytes_tensor(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())


def may_be_bytes(value: object) -> bool:
    """Returns whether a value can be the bytes of a weight: a uint8 vector, which no dense weight is."""
    return isinstance(value, torch.Tensor) and value.dtype == torch.uint8 and value.dim() == 1


def require_shape(data: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Refuses bytes that are not a file with one weight of that shape. Reads only the directory.

    Raises:
        MismatchError: the value is not a uint8 vector, the file has other tensors, or the shape differs.
        InvalidFileError, UnsupportedError, LimitError: the file is damaged or refused.
    """
    if not may_be_bytes(data):
        raise MismatchError("a compressed weight must be a uint8 vector, the bytes of an .sfp file")
    with open_weight(data) as file:
        if file.keys() != [TENSOR_NAME]:
            raise MismatchError(
                f"a compressed weight must contain the tensor {TENSOR_NAME!r} alone; this one contains "
                f"{listed(file.keys())}"
            )
        info = file.info(TENSOR_NAME)
    torch_dtype(info.dtype)
    if info.shape != shape:
        raise MismatchError(
            f"the compressed weight has the shape {list(info.shape)}, the module's weight {list(shape)}"
        )


def decode(data: torch.Tensor) -> torch.Tensor:
    """Decodes the weight into a new tensor in its stored dtype.

    The result is on the device of the bytes if that is a CUDA device and the engine ``cuda`` can decode it.
    Otherwise it is on the CPU.

    Args:
        data: the result of `pack` or `cut_out`, on any device.

    Raises:
        InvalidFileError, UnsupportedError, LimitError: the bytes are damaged or refused.
    """
    if is_decoded_on(data.device, None):
        from . import resident_weight  # lazy: the import prepares the kernels' tables

        weight = resident_weight.decode(data)
        if weight is not None:
            return weight
    with open_weight(data) as file, torch.inference_mode(False):  # the cache may use it outside later
        info = file.info(TENSOR_NAME)
        # The device is explicit, because torch's default device can be another one.
        out = torch.empty(info.shape, dtype=torch_dtype(info.dtype), device="cpu")
        _engines.expect(out.numel())
        file.read_into({TENSOR_NAME: memory_of(out)})
    return out


def decode_rows(data: torch.Tensor, rows: torch.Tensor) -> torch.Tensor | None:
    """Decodes some rows of a matrix, unless decoding all rows is less work.

    Args:
        data: as for `decode`.
        rows: row indices, int64 [n], on the CPU.

    Returns:
        A new tensor, [n, columns], on the device that `decode` uses; None if decoding all is less work.

    Raises:
        IndexError: an index is out of range.
        InvalidFileError, UnsupportedError, LimitError: the bytes are damaged or refused.
    """
    if is_decoded_on(data.device, None):
        from . import resident_weight  # lazy: the import prepares the kernels' tables

        entry = resident_weight.entry_of(data)
        few = None if entry is None else _few_rows(entry, rows)
        if entry is not None:
            if few is None:
                return None
            part = resident_weight.decode_rows(data, few.numbers)
            if part is not None:
                return part[few.places.to(part.device)]
    with open_weight(data) as file:
        entry = file.entry(TENSOR_NAME)
        few = _few_rows(entry, rows)
        if few is None:
            return None
        chosen = Selection(
            (len(few.numbers), entry.columns), few.numbers * entry.columns, range(entry.columns)
        )
        _engines.expect(chosen.size)
        part = tensor_of(file.decode(entry, chosen, entry.dtype.numpy, TensorDecoder.weights_into))
    return part[few.places]


class _Few(NamedTuple):
    """The unique row indices, ascending, and the position of each requested row among them."""

    numbers: NDArray[np.int64]
    places: torch.Tensor


def _few_rows(entry: TensorEntry, rows: torch.Tensor) -> _Few | None:
    """Returns the rows to decode; None if decoding all rows is less work.

    Raises:
        IndexError: an index is out of range.
    """
    height, columns = entry.shape
    if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < height:
        raise IndexError(f"a row index is out of range for the {height} rows of the weight")
    few, places = torch.unique(rows, return_inverse=True)
    # A row that begins or ends inside a segment needs the whole segment.
    if 2 * len(few) * (columns + entry.segment) >= entry.positions:
        return None
    return _Few(few.numpy(), places)


class _Engines:
    """Counts decoded weights, so that the compiled engine is also loaded for many small weights."""

    def __init__(self) -> None:
        self._decoded = 0

    def expect(self, weights: int) -> None:
        """Adds weights that will be decoded to the count. Not locked: the count is only an estimate."""
        self._decoded += weights
        get_engine(None, self._decoded)


_engines = _Engines()
