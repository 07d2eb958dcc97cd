"""Quantiser kinds, one module each: bit-exact conversion of levels to numbers, and their directory keys.

A new kind needs a module here with a subclass of `Quantiser`, an entry in `KINDS`, and a source of levels in
`encode.level_sources`.
"""

from __future__ import annotations

from .exact import (
    Exact,
    finite_bound,
    float_patterns,
    levels_to_patterns,
    may_be_narrower,
    multiplied,
    narrowest_exact,
    patterns_to_levels,
)
from .kind import F32, NumberQuantiser, Quantiser, StreamMap, round_to, scaled_down
from .table import MAX_CENTROIDS, Table, require_centroids
from .uniform import MAX_NUMBER, Uniform, uniform_levels, uniform_numbers

__all__ = [
    "F32",
    "KINDS",
    "MAX_CENTROIDS",
    "MAX_NUMBER",
    "Exact",
    "NumberQuantiser",
    "Quantiser",
    "StreamMap",
    "Table",
    "Uniform",
    "finite_bound",
    "float_patterns",
    "levels_to_patterns",
    "may_be_narrower",
    "multiplied",
    "narrowest_exact",
    "patterns_to_levels",
    "require_centroids",
    "round_to",
    "scaled_down",
    "uniform_levels",
    "uniform_numbers",
]

# Name in the directory (R-QNT-001) -> kind.
KINDS: dict[str, type[Quantiser]] = {kind.NAME: kind for kind in (Exact, Uniform, Table)}
