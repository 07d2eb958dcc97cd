"""Benchmarks with ``--device``: tensors are decoded on a CUDA device.

The time covers opening, checksums, copying to the device and decoding, from a file or bytes in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..engines import why_not as why_no_engine
from ..options import Options
from .codecs import Judge, SfpRunner
from .measure import Contender
from .peers import imported
from .settings import Settings
from .subject import Tensors


def device_of(name: str) -> Any:
    """Returns torch's device of that name."""
    return imported("torch").device(name)


def why_not(name: str) -> str | None:
    """Returns why tensors cannot be decoded on a device of that name, or None."""
    try:
        torch = imported("torch")
        device = device_of(name)
    except ImportError:
        return "torch is not installed; pip install 'sfpformat[torch]'"
    except RuntimeError as error:
        return str(error).splitlines()[0]
    if device.type != "cuda":
        return f"the benchmark supports only CUDA devices, not {name!r}"
    reason = why_no_engine("cuda")
    if reason is not None:
        return reason
    count: int = torch.cuda.device_count()
    if not count:
        return f"torch {torch.__version__} finds no CUDA device"
    if device.index is not None and device.index >= count:
        return f"there is no device {name!r}; the number of CUDA devices that torch finds is {count}"
    return None


def load(readable: bytes | Path, name: str, threads: int) -> dict[str, Any]:
    """Loads all tensors of a file to a device."""
    from ..decode.opening import open_any
    from ..torch.device_memory import read_tensors

    with open_any(readable, threads=threads) as file:
        return read_tensors(file, list(file), device_of(name))


def safetensors_load_file(path: Path, name: str) -> dict[str, Any]:
    """Loads all tensors of a safetensors file to a device, and synchronises it."""
    device = device_of(name)
    loaded: dict[str, Any] = imported("safetensors.torch").load_file(path, device=str(device))
    if device.type == "cuda":
        imported("torch").cuda.synchronize(device)
    return loaded


def arrays_of(tensors: Mapping[str, Any]) -> Tensors:
    """Copies tensors to the CPU as arrays."""
    from ..torch.tensors import array_of

    return {name: array_of(tensor) for name, tensor in tensors.items()}


class DeviceRunner(SfpRunner):
    """Like `SfpRunner`, but decodes to tensors on a device."""

    def __init__(self, name: str, *given: Any) -> None:
        super().__init__(*given)
        self._name = name

    def decode(self) -> dict[str, Any]:
        """Decodes all tensors to the device."""
        return load(self.data, self._name, self.contender.threads)

    def judge(self, decoded: Any) -> dict[str, float]:
        """Copies the tensors to the CPU and calls the given judge."""
        return super().judge(arrays_of(decoded))


def sfp_runner(
    settings: Settings,
    contender: Contender,
    tensors: Tensors,
    options: Options | Mapping[str, Options],
    files: dict[tuple[str | None, str | None], bytes],
    judge: Judge | None = None,
) -> SfpRunner:
    """Creates a runner of this package, for arrays, or for a device if the settings name one."""
    given = contender, tensors, options, files, judge
    return SfpRunner(*given) if settings.device is None else DeviceRunner(settings.device, *given)
