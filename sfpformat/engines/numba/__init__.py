"""The engine ``numba``: kernels compiled by Numba, which release the GIL."""

from __future__ import annotations

from .change_checksums import compare, crc32_with
from .changes import find_changes, place_changes, write_changes
from .decode import decode_levels, decode_runs, make_recipe
from .dense_survey import survey_dense
from .encode import (
    assign,
    best_layout,
    chosen,
    cluster,
    count_classes,
    count_symbols,
    encode_levels,
    encode_mask,
    lengths_of_codes,
    survivors,
    uniform_levels,
)
from .exact_encoding import count_exact, encode_exact, exact_zeros
from .keyed import decode_rows, hash_keys, solve_rows
from .magnitudes import few_magnitudes, translate
from .plain import plan_plain

name = "numba"

__all__ = [
    "assign",
    "best_layout",
    "chosen",
    "cluster",
    "compare",
    "count_classes",
    "count_exact",
    "count_symbols",
    "crc32_with",
    "decode_levels",
    "decode_rows",
    "decode_runs",
    "encode_exact",
    "encode_levels",
    "encode_mask",
    "exact_zeros",
    "few_magnitudes",
    "find_changes",
    "hash_keys",
    "lengths_of_codes",
    "make_recipe",
    "name",
    "place_changes",
    "plan_plain",
    "solve_rows",
    "survey_dense",
    "survivors",
    "translate",
    "uniform_levels",
    "write_changes",
]
