"""The reference engine: bitarray decodes prefix planes; numpy does everything else, on whole arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from ..coding.changes import (
    ElementKind,
    Extent,
    Patterns,
    extent_of,
    find_changes,
    place_changes,
    write_changes,
)
from ..coding.classes import best_layout
from ..coding.counts import assign, cluster, count_classes, count_symbols, lengths_of_codes
from ..coding.exact_encoding import count_exact, encode_exact, exact_zeros
from ..coding.keyed.equations import solve_rows
from ..coding.keyed.hashing import hash_keys
from ..coding.keyed.rows import decode_rows
from ..coding.magnitudes import few_magnitudes, translate
from ..coding.mask import chosen, encode_mask, survivors
from ..coding.planes import Counts, decode_levels, encode_levels
from ..coding.quantisers import F32, uniform_levels
from ..container.entry import TensorEntry
from ..container.plain_entries import PlainTensors
from ..io.checksum import crc32, crc32_with
from .interface import Run

name = "python"

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


def compare(base: Patterns, new: Patterns, kind: ElementKind, known: int) -> tuple[int, Extent]:
    """Implements `Engine.compare`."""
    return crc32(new.data), extent_of(base, new, kind)


def make_recipe(entry: TensorEntry, vectors: dict[str, F32], weights: int) -> None:
    """Returns None: the reference decodes all weights from their levels."""


def decode_runs(runs: Sequence[Run[NDArray[Any]]]) -> list[bool]:
    """Returns False for every run: there is no fast path."""
    return [False] * len(runs)


def plan_plain(tensors: PlainTensors) -> None:
    """Returns None: the reference decodes chunk by chunk."""


def survey_dense(
    patterns: Patterns, counts: Counts, chunk: int, width: int, fine: int, part: int, least: int
) -> None:
    """Returns None: the planner surveys chunk by chunk."""
