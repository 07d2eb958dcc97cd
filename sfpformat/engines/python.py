"""The reference engine: bitarray for prefix planes, whole-array numpy for the rest."""

from __future__ import annotations

from ..coding.planes import decode_levels, encode_levels

name = "python"

__all__ = ["decode_levels", "encode_levels", "name"]
