"""The fast engine: kernels compiled by Numba, which let go of the GIL."""

from __future__ import annotations

from ...coding.mask import encode_mask
from .decode import decode_levels, decode_runs, make_recipe
from .encode import (
    assign,
    chosen,
    cluster,
    count_classes,
    count_symbols,
    encode_levels,
    lengths_of_codes,
    patterns_to_levels,
    shared_zeros,
    survivors,
    uniform_levels,
)
from .plain import plan_plain

name = "numba"

__all__ = [
    "assign",
    "chosen",
    "cluster",
    "count_classes",
    "count_symbols",
    "decode_levels",
    "decode_runs",
    "encode_levels",
    "encode_mask",
    "lengths_of_codes",
    "make_recipe",
    "name",
    "patterns_to_levels",
    "plan_plain",
    "shared_zeros",
    "survivors",
    "uniform_levels",
]
