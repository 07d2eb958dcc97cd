"""The compressed bytes of one weight as a tensor: an `.sfp` file of its own, with one tensor.

Rules: bytes cut out of a larger file are its chunks as they are, nothing is encoded again. What is decoded is
new memory of torch's own, so that arithmetic meets the alignment that it would meet in a dense model.
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
from ..options import Options
from .files import is_decoded_on
from .one import NAME, opened
from .places import AnyFile
from .tensors import array_of, memory_of, tensor_of, torch_dtype


def pack(weight: torch.Tensor, options: Options | None = None) -> torch.Tensor:
    """Encodes a tensor.

    Args:
        weight: any device and strides.
        options: how; lossless without.

    Returns:
        The file, uint8 [bytes], on the processor.

    Raises:
        OptionError: the options do not fit.
    """
    sink = MemorySink()
    with Writer(sink, threads=torch.get_num_threads()) as writer:
        writer.add(NAME, array_of(weight, NAME), options)
    return _bytes_tensor(sink.data)


def cut_out(file: AnyFile, name: str) -> torch.Tensor:
    """A file of one tensor of a larger file, uint8 [bytes], on the processor.

    Raises:
        MissingTensorError: there is no tensor of that name.
        InvalidFileError: a chunk's checksum does not match.
        MismatchError: this version of torch has no such dtype.
    """
    torch_dtype(file.info(name).dtype)
    sink = MemorySink()
    with Writer(sink, threads=1) as writer:
        _copy_tensor(file.file_of(name), name, writer, NAME)
    return _bytes_tensor(sink.data)


def put_into(data: torch.Tensor, writer: Writer, name: str) -> None:
    """Writes a weight into a larger file, under that name; the other way round than `cut_out`.

    Raises:
        InvalidFileError, UnsupportedError, LimitError: the bytes are damaged or refused.
    """
    with opened(data) as file:
        _copy_tensor(file, NAME, writer, name)


def _copy_tensor(file: SfpFile, name: str, writer: Writer, new_name: str) -> None:
    """Writes a tensor of one file into another as it is.

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
    """Whether something has the type of the bytes of a weight, which no weight has."""
    return isinstance(value, torch.Tensor) and value.dtype == torch.uint8 and value.dim() == 1


def require_shape(data: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Refuses bytes that are no file of one weight of that shape; reads its directory alone.

    Raises:
        MismatchError: the file has another tensor, or none.
        InvalidFileError, UnsupportedError, LimitError: it is damaged or refused.
    """
    if not may_be_bytes(data):
        raise MismatchError("the bytes of a weight are a tensor, uint8 [bytes]")
    with opened(data) as file:
        if file.keys() != [NAME]:
            raise MismatchError(f"the file has the tensors {file.keys()}, not {NAME!r} alone")
        info = file.info(NAME)
    torch_dtype(info.dtype)
    if info.shape != shape:
        raise MismatchError(f"the compressed weight is {list(info.shape)}, the module's {list(shape)}")


def decode(data: torch.Tensor) -> torch.Tensor:
    """The weight, a new tensor in the dtype that it was stored in.

    It is on the device of its bytes where that is a CUDA device and the engine ``cuda`` can be used, else on
    the processor.

    Args:
        data: as `pack` and `cut_out` give it, on any device.

    Raises:
        InvalidFileError, UnsupportedError, LimitError: the bytes are damaged or refused.
    """
    if is_decoded_on(data.device, None):
        from . import resident  # not before it is needed: it makes ready what kernels take

        weight = resident.decode(data)
        if weight is not None:
            return weight
    with opened(data) as file, torch.inference_mode(False):  # what is kept may be used outside later
        info = file.info(NAME)
        # The processor is named: a default device of torch's may be another.
        out = torch.empty(info.shape, dtype=torch_dtype(info.dtype), device="cpu")
        _engines.expect(out.numel())
        file.read_into({NAME: memory_of(out)})
    return out


def decode_rows(data: torch.Tensor, rows: torch.Tensor) -> torch.Tensor | None:
    """Some rows of a matrix, decoded alone where that is less work than decoding all.

    Args:
        data: as for `decode`.
        rows: numbers, int64 [n], on the processor.

    Returns:
        A new tensor, [n, columns], where `decode` has it; None where the whole should be decoded.

    Raises:
        IndexError: there is no such row.
        InvalidFileError, UnsupportedError, LimitError: the bytes are damaged or refused.
    """
    if is_decoded_on(data.device, None):
        from . import resident  # not before it is needed: it makes ready what kernels take

        entry = resident.entry_of(data)
        few = None if entry is None else _few_rows(entry, rows)
        if entry is not None:
            if few is None:
                return None
            part = resident.decode_rows(data, few.numbers)
            if part is not None:
                return part[few.places.to(part.device)]
    with opened(data) as file:
        entry = file.entry(NAME)
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
    """Different rows, ascending, and for each row that was asked for its place among them."""

    numbers: NDArray[np.int64]
    places: torch.Tensor


def _few_rows(entry: TensorEntry, rows: torch.Tensor) -> _Few | None:
    """The rows to decode alone; None where decoding all is less work.

    Raises:
        IndexError: there is no such row.
    """
    height, columns = entry.shape
    if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < height:
        raise IndexError(f"a row beyond the {height} of the weight")
    few, places = torch.unique(rows, return_inverse=True)
    # A row that begins or ends inside a segment takes all of it.
    if 2 * len(few) * (columns + entry.segment) >= entry.positions:
        return None
    return _Few(few.numpy(), places)


class _Engines:
    """Sees to it that a compiled engine is there once much was decoded, however small each weight is."""

    def __init__(self) -> None:
        self._decoded = 0

    def expect(self, weights: int) -> None:
        """So many more are to be decoded. (Threads may count past each other: it is only an estimate.)"""
        self._decoded += weights
        get_engine(None, self._decoded)


_engines = _Engines()
