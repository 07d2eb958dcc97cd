"""Engines: interchangeable implementations of the work on bits, chosen in this one place.

An engine is a module with the functions of `Engine`; all engines give the same bits and the same faults. The
pure-Python one is the plain statement of the algorithms and is always there.
"""

from __future__ import annotations

import os
from typing import Protocol

from ..coding.bits import Bytes
from ..coding.codetable import CodeTable
from ..coding.planes import Counts, Levels, Planes, StreamSpan
from ..errors import EngineError
from . import python

ENGINE_VARIABLE = "SFPFORMAT_ENGINE"
AUTO = "auto"


class Engine(Protocol):
    """What an engine does."""

    name: str

    def decode_levels(self, data: Bytes, span: StreamSpan, table: CodeTable) -> Levels:
        """As `coding.planes.decode_levels`."""

    def encode_levels(
        self, levels: Levels, counts: Counts, codes: Counts, trims: Counts, table: CodeTable
    ) -> Planes:
        """As `coding.planes.encode_levels`."""


_ENGINES: dict[str, Engine] = {"python": python}


def available() -> dict[str, str | None]:
    """Engine name -> None where it can be used, else the reason why not."""
    return dict.fromkeys(_ENGINES)


def get_engine(name: str | None = None) -> Engine:
    """The engine of that name.

    Args:
        name: ``"python"``, or ``"auto"`` for the best that is available; None takes the environment variable
            ``SFPFORMAT_ENGINE``, or ``"auto"``.

    Raises:
        EngineError: there is no such engine, or it cannot be used here.
    """
    chosen = name or os.environ.get(ENGINE_VARIABLE) or AUTO
    if chosen == AUTO:
        return python
    if chosen not in _ENGINES:
        raise EngineError(f"no engine {chosen!r} in this version; there is: {', '.join(_ENGINES)}, {AUTO}")
    return _ENGINES[chosen]
