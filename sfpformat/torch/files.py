"""`load_file`, `load` and `safe_open`: read tensors from files. Same interface as `safetensors.torch`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from ..decode.opening import open_any
from ..decode.prefetch import Item, Prefetch, Report
from ..decode.reader import SfpFile
from ..decode.selection import Index
from ..decode.shards import ShardedFile
from ..decode.slices import SfpSlice
from ..decode.tensor_info import TensorInfo
from ..engines import decodes_on_device
from ..errors import OptionError
from ..io.closing import Closing
from ..io.paths import AnyPath
from ..io.remote.ahead import DEFAULT_MEMORY
from ..io.source import Buffer, Readable
from ..limits import DEFAULT_LIMITS, Limits
from .sparse_tensors import Layout, layout_of, read_sparse
from .tensors import first_line, tensor_of, torch_dtype

Device = str | int | torch.device

# Bytes of tensors for another device that the CPU decodes at a time: enough to keep all threads busy.
_BATCH_BYTES = 64 << 20


def load_file(
    path: AnyPath,
    device: Device = "cpu",
    *,
    limits: Limits = DEFAULT_LIMITS,
    threads: int | None = None,
    engine: str | None = None,
) -> dict[str, torch.Tensor]:
    """Returns all tensors of a file, by name, in file order.

    Example: ``tensors = load_file("model.sfp", device="cuda")``.

    Args:
        path: path or URL of the file, of the ``.sfp.index.json`` of a sharded model, or of a folder that has
            one of these; or what ``fsspec.open`` returns.
        device: the device of the tensors; ``"meta"`` gives shapes and dtypes without reading data.
        limits, threads, engine: as in `sfpformat.open`.

    Raises:
        InvalidFileError, UnsupportedError, LimitError: the file is damaged or refused.
        OSError: the file cannot be read.
        MismatchError: this version of torch has no such dtype.
        OptionError: the device does not exist.
    """
    with safe_open(path, device=device, limits=limits, threads=threads, engine=engine) as file:
        return file.get_tensors()


def load(
    data: Buffer,
    *,
    limits: Limits = DEFAULT_LIMITS,
    threads: int | None = None,
    engine: str | None = None,
) -> dict[str, torch.Tensor]:
    """Returns all tensors of a file in memory, by name, on the CPU, in file order.

    Args:
        data: the bytes of the file.
        limits, threads, engine: as in `sfpformat.open`.

    Raises:
        InvalidFileError, UnsupportedError, LimitError: the file is damaged or refused.
        MismatchError: this version of torch has no such dtype.
    """
    with safe_open(data, limits=limits, threads=threads, engine=engine) as file:
        return file.get_tensors()


class TorchFile(Closing):
    """An open file that returns torch tensors; a context manager. `safe_open` creates it. Thread-safe.

    Attributes:
        file: the underlying reader, which returns numpy arrays.
        device: the device of the tensors.
    """

    def __init__(self, file: SfpFile | ShardedFile, device: torch.device, engine: str | None = None) -> None:
        """Wraps an open file; ``engine`` is the one that the file was opened with."""
        self.file = file
        self.device = device
        self._engine = engine
        self._on_device = is_decoded_on(device, engine)

    def close(self) -> None:
        """Closes the file."""
        self.file.close()

    def __reduce__(self) -> tuple[object, ...]:
        """Pickles the file like `SfpFile`: unpickling opens it again."""
        return TorchFile, (self.file, self.device, self._engine)

    def keys(self) -> list[str]:
        """Returns the names of the tensors, in file order."""
        return self.file.keys()

    def offset_keys(self) -> list[str]:
        """Returns the same as `keys`: file order is the order of the data."""
        return self.file.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.file)

    def __getitem__(self, name: str) -> torch.Tensor:
        """Returns the same as `get_tensor`, like a mapping: accelerate takes a file as a state dict."""
        return self.get_tensor(name)

    def values(self) -> Iterator[torch.Tensor]:
        """Yields the tensors, in file order. Decodes each when it is needed."""
        return (self.get_tensor(name) for name in self)

    def items(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields names and tensors, in file order. Decodes each tensor when it is needed."""
        return ((name, self.get_tensor(name)) for name in self)

    def __contains__(self, name: object) -> bool:
        return name in self.file

    def __len__(self) -> int:
        return len(self.file)

    def metadata(self) -> dict[str, str]:
        """Returns the file's metadata."""
        return self.file.metadata()

    def info(self, name: str) -> TensorInfo:
        """Returns the directory's information about a tensor; reads no data."""
        return self.file.info(name)

    def get_tensor(self, name: str, layout: Layout = "strided") -> torch.Tensor:
        """Returns a whole tensor in its dtype and shape.

        Args:
            name: name of the tensor.
            layout: ``"strided"``, ``"coo"`` (coalesced) or ``"csr"`` (two dimensions). In a sparse tensor the
                entries are the survivors and the indices are int64; the dense tensor is never allocated.

        Raises:
            MissingTensorError: there is no tensor of that name.
            InvalidFileError, LimitError: the file is damaged or refused.
            MismatchError: the layout does not fit the shape, or this version of torch has no such dtype.
            OptionError: the layout is unknown.
        """
        wanted = layout_of(layout)
        if wanted == torch.strided:
            return self.get_tensors([name])[name]
        torch_dtype(self.info(name).dtype)
        return read_sparse(self.file, name, wanted).to(self.device)

    def get_tensors(self, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
        """Returns whole tensors by name, decoded in parallel. None reads all tensors, in file order.

        A CUDA device decodes them itself if the engine ``cuda`` is available or was requested. For other
        devices, the CPU decodes at most 64 MiB or one tensor at a time.

        Raises:
            MissingTensorError: there is no tensor of that name.
            InvalidFileError, LimitError: the file is damaged or refused.
            MismatchError: this version of torch has no such dtype.
        """
        if self.device.type == "cpu":
            return {name: tensor_of(array) for name, array in self.file.get_tensors(names).items()}
        infos = {name: self.info(name) for name in (self.keys() if names is None else names)}
        dtypes = {name: torch_dtype(info.dtype) for name, info in infos.items()}
        if self.device.type == "meta":
            return {
                name: torch.empty(info.shape, dtype=dtypes[name], device="meta")
                for name, info in infos.items()
            }
        with self.file.prefetch(list(infos)) as plan:
            if self._on_device and not plan.reads_ahead:
                return self._read_on_device(list(infos))
            out: dict[str, torch.Tensor] = {}
            if self._on_device:  # by groups, because all vectors of a call are read first
                for group in plan.groups():
                    out.update(self._read_on_device(group))
                return out
            for batch in batches({name: info.decoded_bytes for name, info in infos.items()}):
                for name, array in self.file.get_tensors(batch).items():
                    out[name] = tensor_of(array).to(self.device)
            return out

    def _read_on_device(self, names: list[str]) -> dict[str, torch.Tensor]:
        from .device_memory import read_tensors  # lazy: the import prepares the kernels' tables

        return read_tensors(self.file, names, self.device)

    def prefetch(
        self,
        items: Iterable[Item] | None = None,
        *,
        memory: int = DEFAULT_MEMORY,
        progress: Report | None = None,
    ) -> Prefetch[torch.Tensor]:
        """Reads tensors and slices of a remote file ahead, as `SfpFile.prefetch`, for the device.

        Example: ``for name, tensor in file.prefetch(memory=1 << 30): ...``.
        """
        return Prefetch(
            self.file, self.get_tensors, lambda name, at: self.get_slice(name)[at], items, memory, progress
        )

    def get_slice(self, name: str) -> TorchSlice:
        """Returns a lazy tensor: ``f.get_slice("w")[10:20, :64]`` decodes only the segments that it needs.

        Raises:
            MissingTensorError: there is no tensor of that name.
        """
        return TorchSlice(self.file.get_slice(name), self.device)

    def slices(self) -> dict[str, TorchSlice]:
        """Returns all tensors as slices, by name: a state dict that decodes a tensor when it is read."""
        return {name: self.get_slice(name) for name in self}

    def get_mask(self, name: str) -> torch.Tensor:
        """Returns the mask: bool, of the tensor's shape, True for survivors. All True if there is no mask.

        A CUDA device decodes it itself, as `get_tensors`.

        Raises:
            MissingTensorError: there is no tensor of that name.
            InvalidFileError, LimitError: the file is damaged or refused.
        """
        if self._on_device:
            from .device_memory import read_mask  # lazy: the import prepares the kernels' tables

            return read_mask(self.file, name, self.device)
        return tensor_of(self.file.get_mask(name)).to(self.device)

    def get_importance(self, name: str) -> torch.Tensor | None:
        """Returns the importance of every position: float32, of the tensor's shape. None if there is none.

        It is 0 at pruned positions for which the file stores none. A CUDA device decodes it itself, as
        `get_tensors`.

        Raises:
            MissingTensorError: there is no tensor of that name.
            InvalidFileError, LimitError: the file is damaged or refused.
        """
        if self._on_device:
            from .device_memory import read_importance  # lazy, as above

            return read_importance(self.file, name, self.device)
        importance = self.file.get_importance(name)
        return None if importance is None else tensor_of(importance).to(self.device)


class TorchSlice:
    """A tensor that is decoded when it is indexed. Same interface as the slice object of safetensors.

    Also has what transformers and accelerate ask a tensor before they read it: ``dtype``, ``shape``,
    ``device``, ``is_floating_point()``. Nothing but indexing and `to` decodes.
    """

    def __init__(self, part: SfpSlice, device: torch.device) -> None:
        """Wraps a slice that returns numpy arrays."""
        self._slice = part
        self._device = device

    def get_shape(self) -> list[int]:
        """Returns the tensor's shape."""
        return self._slice.get_shape()

    def get_dtype(self) -> str:
        """Returns the name of the tensor's dtype, such as ``"BF16"``."""
        return self._slice.get_dtype()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the tensor.

        Raises:
            MismatchError: this version of torch has no such dtype.
        """
        return torch_dtype(self.get_dtype())

    @property
    def shape(self) -> torch.Size:
        """The shape of the tensor."""
        return torch.Size(self.get_shape())

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return len(self.get_shape())

    @property
    def device(self) -> torch.device:
        """The device of the tensors that indexing returns."""
        return self._device

    def numel(self) -> int:
        """Returns the number of elements."""
        return self.shape.numel()

    def is_floating_point(self) -> bool:
        """Returns whether the dtype is one of floats."""
        return self.dtype.is_floating_point

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Decodes the whole tensor, and returns it on a device or in a dtype, as `torch.Tensor.to`."""
        return self[...].to(*args, **kwargs)

    def __getitem__(self, index: Index) -> torch.Tensor:
        """Returns the selected part as a new tensor.

        Args:
            index: integers, slices with any step, and ``...``, as in basic numpy indexing.

        Raises:
            IndexError: the index does not fit the shape, or has an item of another type.
            InvalidFileError, LimitError: the file is damaged or refused.
            MismatchError: this version of torch has no such dtype.
        """
        return tensor_of(np.asarray(self._slice[index])).to(self._device)


def safe_open(
    readable: Readable,
    framework: str = "pt",
    device: Device = "cpu",
    *,
    limits: Limits = DEFAULT_LIMITS,
    threads: int | None = None,
    engine: str | None = None,
) -> TorchFile:
    """Opens a file for reading tensor by tensor. Reads only the preamble and the directory.

    Example: ``with safe_open("model.sfp") as f: part = f.get_slice("w")[10:20, :64]``.

    Args:
        readable: as in `sfpformat.open`.
        framework: ``"pt"``, safetensors' name for torch; ``"torch"`` and ``"pytorch"`` are valid too.
        device: the device of the tensors.
        limits, threads, engine: as in `sfpformat.open`.

    Raises:
        InvalidFileError, UnsupportedError, LimitError: the file is damaged or refused.
        OSError: the file cannot be read.
        OptionError: the framework is another one, or the device does not exist.
    """
    if framework not in ("pt", "torch", "pytorch"):
        raise OptionError(
            f"framework is {framework!r}, must be 'pt': this function returns torch tensors; "
            "use sfpformat.numpy for arrays"
        )
    where = require_device(device)
    return TorchFile(open_any(readable, limits=limits, threads=threads, engine=engine), where, engine)


def require_device(device: Device) -> torch.device:
    """Returns a device by its name or index, after a check that it is available.

    Raises:
        OptionError: torch does not know the device, or cannot use it on this machine.
    """
    try:
        where = torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise OptionError(f"device {device!r}: {first_line(error)}") from error
    if where.type in ("cpu", "meta"):
        return where
    if where.type == "cuda":
        # These calls create no context on the device, so that the process can still fork.
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count <= (where.index or 0):
            built = "" if torch.version.cuda or torch.version.hip else "; this torch is built without CUDA"
            raise OptionError(f"device {device!r}: torch finds {count or 'no'} CUDA devices{built}")
        return where
    try:
        torch.empty(0, device=where)
    except Exception as error:  # each backend raises its own exceptions
        raise OptionError(f"device {device!r} cannot be used: {first_line(error)}") from error
    return where


def is_decoded_on(device: torch.device, engine: str | None) -> bool:
    """Returns whether the engine of a file decodes tensors for this device on the device itself."""
    return decodes_on_device(device.type, engine)


def batches(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Yields the names in order, in batches of at most 64 MiB or one tensor.

    Args:
        sizes: name -> bytes.
    """
    batch: list[str] = []
    left = _BATCH_BYTES
    for name, size in sizes.items():
        if batch and size > left:
            yield batch
            batch, left = [], _BATCH_BYTES
        batch.append(name)
        left -= size
    if batch:
        yield batch
