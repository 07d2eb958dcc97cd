"""Engines: interchangeable implementations of the bit-level work. This module selects one.

An engine is a module with the functions of `Engine`. All engines give the same bits and the same faults. The
engine ``python`` is the reference implementation and always available; ``numba`` is compiled; ``cuda``
decodes weights on a GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from typing import cast

from ..errors import EngineError
from .interface import Engine, PlainPlan, PlainRuns, Run

__all__ = [
    "Engine",
    "PlainPlan",
    "PlainRuns",
    "Run",
    "available",
    "decodes_on_device",
    "get_engine",
    "require_name",
    "why_not",
]

ENGINE_VARIABLE = "SFPFORMAT_ENGINE"
AUTO = "auto"
# Engine -> its module.
_MODULES = {"python": "reference", "numba": "numba", "cuda": "cuda.engine"}
# The reference decodes fewer weights than this in the time that importing Numba takes.
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


def decodes_on_device(name: str | None) -> bool:
    """Returns whether tensors for a CUDA device are decoded on that device: by request, or by ``"auto"``.

    Args:
        name: same as for `get_engine`; `require_name` must have accepted it.
    """
    chosen = name or os.environ.get(ENGINE_VARIABLE) or AUTO
    return chosen == "cuda" or (chosen == AUTO and why_not("cuda") is None)


def get_engine(name: str | None = None, weights: int | None = None) -> Engine:
    """Returns the engine of that name.

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
