"""The reference engine: bitarray for prefix planes, whole-array numpy for the rest."""

from __future__ import annotations

from collections.abc import Sequence

from ..coding.counts import assign, cluster, count_classes, count_symbols, lengths_of_codes
from ..coding.mask import chosen, encode_mask, survivors
from ..coding.planes import decode_levels, encode_levels, shared_zeros
from ..coding.quantiser import F32, patterns_to_levels, uniform_levels
from ..container.entry import TensorEntry
from ..container.plain import PlainTensors
from .interface import Run

name = "python"

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


def make_recipe(entry: TensorEntry, vectors: dict[str, F32], weights: int) -> None:
    """None: all weights go by their levels."""


def decode_runs(runs: Sequence[Run]) -> list[bool]:
    """None of them here."""
    return [False] * len(runs)


def plan_plain(tensors: PlainTensors) -> None:
    """None: it decodes chunk by chunk."""
