"""Engines: interchangeable implementations of the work on bits, chosen in this one place.

An engine is a module with the functions of `Engine`; all engines give the same bits and the same faults. The
pure-Python one is the plain statement of the algorithms and is always there; ``numba`` is the same, compiled;
``cuda`` decodes weights on a GPU.
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
# Fewer weights than this the reference decodes in the time that importing Numba takes.
_WORTH_NUMBA = 8_000_000


def why_not(name: str) -> str | None:
    """Why an engine cannot be used here, or None."""
    if name == "numba" and importlib.util.find_spec("numba") is None:
        return "numba is not installed; pip install 'sfpformat[fast]'"
    if name == "cuda":
        from .cuda import driver  # not before somebody asks: it looks for a device

        return driver.why_not()
    return None


def available() -> dict[str, str | None]:
    """Engine name -> None where it can be used, else the reason why not."""
    return {name: why_not(name) for name in _MODULES}


def require_name(name: str | None) -> None:
    """Raises EngineError unless `get_engine` would find an engine for that name."""
    chosen = name or os.environ.get(ENGINE_VARIABLE) or AUTO
    if chosen == AUTO:
        return
    if chosen not in _MODULES:
        raise EngineError(f"no engine {chosen!r} in this version; there is: {', '.join(_MODULES)}, {AUTO}")
    reason = why_not(chosen)
    if reason is not None:
        raise EngineError(f"the engine {chosen!r} cannot be used: {reason}")


def decodes_on_device(name: str | None) -> bool:
    """Whether tensors for a CUDA device are decoded there: because it was asked for, or by ``"auto"``.

    Args:
        name: as in `get_engine`, checked by `require_name`.
    """
    chosen = name or os.environ.get(ENGINE_VARIABLE) or AUTO
    return chosen == "cuda" or (chosen == AUTO and why_not("cuda") is None)


def get_engine(name: str | None = None, weights: int | None = None) -> Engine:
    """The engine of that name.

    Args:
        name: ``"python"``, ``"numba"``, ``"cuda"``, or ``"auto"`` for the best that is available for arrays
            in the processor's memory, never a GPU; None takes the environment variable ``SFPFORMAT_ENGINE``,
            or ``"auto"``.
        weights: about how many there are to work on. For a few ``"auto"`` does not import Numba.

    Raises:
        EngineError: there is no such engine, or it cannot be used here.
    """
    require_name(name)
    chosen = name or os.environ.get(ENGINE_VARIABLE) or AUTO
    if chosen == AUTO:
        few = weights is not None and weights < _WORTH_NUMBA and "numba" not in sys.modules
        chosen = "python" if few or why_not("numba") is not None else "numba"
    return cast(Engine, importlib.import_module(f".{_MODULES[chosen]}", __name__))
