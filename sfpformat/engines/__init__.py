"""Engines: interchangeable implementations of the bit-level work. This module selects one.

An engine is a module with the functions of `Engine`. All engines give the same bits and the same faults. The
engine ``python`` is the reference implementation and always available; ``numba`` is compiled; ``cuda``
decodes weights on a GPU. A `DeviceEngine` decodes into the memory of a device; a new one needs an entry in
`_DEVICE_MODULES`, under the device type, which must also be the name of an engine.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from typing import cast

from ..errors import EngineError
from .device_interface import (
    CheckedBlock,
    DeviceBlock,
    DeviceChanges,
    DeviceEngine,
    DevicePart,
    DeviceQueue,
    Misfit,
    Operands,
    PendingBlocks,
    PlacedChanges,
    ResidentMatrix,
    ResidentRun,
    ResidentTensor,
)
from .interface import DenseSurvey, Engine, PlainPlan, PlainRuns, Run

__all__ = [
    "CheckedBlock",
    "DenseSurvey",
    "DeviceBlock",
    "DeviceChanges",
    "DeviceEngine",
    "DevicePart",
    "DeviceQueue",
    "Engine",
    "Misfit",
    "Operands",
    "PendingBlocks",
    "PlacedChanges",
    "PlainPlan",
    "PlainRuns",
    "ResidentMatrix",
    "ResidentRun",
    "ResidentTensor",
    "Run",
    "available",
    "decodes_on_device",
    "get_device_engine",
    "get_engine",
    "require_name",
    "why_not",
]

ENGINE_VARIABLE = "SFPFORMAT_ENGINE"
AUTO = "auto"
# Engine -> its module.
_MODULES = {"python": "reference", "numba": "numba", "cuda": "cuda.engine"}
# Type of a device, which is also the name of its engine -> the module with the functions of `DeviceEngine`.
_DEVICE_MODULES = {"cuda": "cuda.on_device"}
# In the time that importing Numba takes, the reference decodes about this many weights.
_WORTH_NUMBA = 8_000_000


def why_not(name: str) -> str | None:
    """Returns why an engine is unavailable on this machine, or None."""
    if name == "numba" and importlib.util.find_spec("numba") is None:
        return "numba is not installed; pip install 'sfpformat[fast]'"
    if name == "cuda":
        from .cuda import driver  # lazy, because it looks for a device

        return driver.why_not()
    return None


def available() -> dict[str, str | None]:
    """Returns engine name -> None if it is available, else the reason why not."""
    return {name: why_not(name) for name in _MODULES}


def require_name(name: str | None) -> None:
    """Raises EngineError if `get_engine` would refuse the name."""
    chosen = name or os.environ.get(ENGINE_VARIABLE) or AUTO
    if chosen == AUTO:
        return
    if chosen not in _MODULES:
        raise EngineError(f"there is no engine {chosen!r}; choose from {', '.join(_MODULES)}, {AUTO}")
    reason = why_not(chosen)
    if reason is not None:
        raise EngineError(f"the engine {chosen!r} is not available: {reason}")


def decodes_on_device(device: str, name: str | None) -> bool:
    """Returns whether a device decodes its own tensors: if its engine was requested or ``"auto"`` selects it.

    Args:
        device: type of the device, such as ``"cuda"`` or ``"cpu"``.
        name: same as for `get_engine`; `require_name` must have accepted it.
    """
    if device not in _DEVICE_MODULES:
        return False
    chosen = name or os.environ.get(ENGINE_VARIABLE) or AUTO
    return chosen == device or (chosen == AUTO and why_not(device) is None)


def get_device_engine(device: str) -> DeviceEngine:
    """Returns the engine that decodes into the memory of a device; `decodes_on_device` must be true."""
    return cast(DeviceEngine, importlib.import_module(f".{_DEVICE_MODULES[device]}", __name__))


def get_engine(name: str | None = None, weights: int | None = None) -> Engine:
    """Returns the engine with a name.

    Args:
        name: ``"python"``, ``"numba"``, ``"cuda"``, or ``"auto"`` for the fastest available engine for arrays
            in CPU memory, never a GPU. None uses the environment variable ``SFPFORMAT_ENGINE``, by default
            ``"auto"``.
        weights: the approximate number of weights. For a small number, ``"auto"`` does not import Numba.

    Raises:
        EngineError: there is no such engine, or it is unavailable on this machine.
    """
    require_name(name)
    chosen = name or os.environ.get(ENGINE_VARIABLE) or AUTO
    if chosen == AUTO:
        few = weights is not None and weights < _WORTH_NUMBA and "numba" not in sys.modules
        chosen = "python" if few or why_not("numba") is not None else "numba"
    return cast(Engine, importlib.import_module(f".{_MODULES[chosen]}", __name__))
