"""The fast engine: kernels compiled by Numba, which let go of the GIL."""

from __future__ import annotations

from ...coding.counts import assign, cluster, count_classes, count_symbols, lengths_of_codes, survey
from ...coding.mask import encode_mask
from ...coding.planes import encode_levels
from .decode import decode_levels, decode_runs, make_recipe

name = "numba"

__all__ = [
    "assign",
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
    "survey",
]
