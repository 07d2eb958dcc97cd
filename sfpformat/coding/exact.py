"""Exact streams (SPEC.md chapter 11) from the bit patterns of floats: what encoding asks of their levels.

Levels are patterns with the sign moved to the lowest bit. Engines need not write them down; this module is
the plain statement.
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
    """As `counts.count_classes`, of the levels of some bit patterns; ``width`` is at least 1."""
    return count_classes(patterns_to_levels(patterns), counts, width, first, classes)


def exact_zeros(patterns: Patterns, counts: Counts) -> Counts:
    """As `planes.shared_zeros`, of the levels of some bit patterns."""
    return shared_zeros(patterns_to_levels(patterns), counts)


def encode_exact(
    patterns: Patterns, counts: Counts, codes: Counts, trims: Counts, table: CodeTable
) -> Planes:
    """As `planes.encode_levels`, of the levels of some bit patterns."""
    return encode_levels(patterns_to_levels(patterns), counts, codes, trims, table)
