"""The fast engine: kernels compiled by Numba, which let go of the GIL."""

from __future__ import annotations

from ...coding.planes import encode_levels
from .decode import decode_levels, decode_runs, make_recipe

name = "numba"

__all__ = ["decode_levels", "decode_runs", "encode_levels", "make_recipe", "name"]
