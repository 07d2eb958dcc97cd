"""Encodes exact streams (SPEC.md chapter 11) from the bit patterns of floats.

Levels are patterns with the sign moved to the lowest bit. This module is the reference implementation; it
converts patterns to levels first. Other engines may encode the patterns directly.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .codetable import CodeTable
from .counts import Rows, count_classes
from .planes import Counts, Planes, encode_levels, shared_zeros
from .quantisers import patterns_to_levels

Patterns = NDArray[np.unsignedinteger]


def count_exact(patterns: Patterns, counts: Counts, width: int, first: int, classes: int) -> Rows:
    """Calls `counts.count_classes` for the levels of bit patterns. ``width`` is at least 1."""
    return count_classes(patterns_to_levels(patterns), counts, width, first, classes)


def exact_zeros(patterns: Patterns, counts: Counts) -> Counts:
    """Calls `planes.shared_zeros` for the levels of bit patterns."""
    return shared_zeros(patterns_to_levels(patterns), counts)


def encode_exact(
    patterns: Patterns, counts: Counts, codes: Counts, trims: Counts, table: CodeTable
) -> Planes:
    """Calls `planes.encode_levels` for the levels of bit patterns."""
    return encode_levels(patterns_to_levels(patterns), counts, codes, trims, table)
