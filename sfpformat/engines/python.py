"""The reference engine: bitarray for prefix planes, whole-array numpy for the rest."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..coding.bits import Bytes
from ..coding.planes import decode_levels, encode_levels
from ..coding.quantiser import F32
from ..container.entry import TensorEntry

name = "python"

__all__ = ["decode_levels", "decode_values", "encode_levels", "make_recipe", "name"]


def make_recipe(entry: TensorEntry, vectors: dict[str, F32], weights: int) -> None:
    """None: all weights go by their levels."""


def decode_values(
    recipe: None, data: Bytes, total: int, start: int, first: int, stop: int, out: NDArray[np.generic]
) -> bool:
    """Not here."""
    return False
