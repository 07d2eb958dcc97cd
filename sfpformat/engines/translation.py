"""Translates the entry of a tensor to the numbers on which the kernels of every engine branch.

An engine adds its own packing: `numba.recipe` and `cuda.recipe`. ``kernels/source/recipe.cuh`` has the same
constants; a test compares them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..coding.quantisers import F32, Exact
from ..container.entry import MAX_POSITIONS, TensorEntry

# Streams, in the order of SPEC.md 15.2.
STREAMS = ("mask", "fingerprints", "importance")
MASK, FINGERPRINTS, IMPORTANCE = range(len(STREAMS))

# Rules for the number of levels of a segment.
COUNT_POSITIONS, COUNT_SURVIVORS, COUNT_PRUNED, COUNT_OCTETS = range(4)
# Kinds of masks.
NO_MASK, OCTETS, RUNS_OF_PRUNED, RUNS_OF_SURVIVORS = range(4)
# How the index of a scale factor follows from a position: 0, position div unit, position mod unit.
NO_SCALE, SCALE_TENSOR, SCALE_QUOTIENT, SCALE_REMAINDER = range(4)
# Importances that multiply the weights: none, one per survivor, one per position, a factor per row and one
# per column.
NO_MULTIPLIER, OF_SURVIVORS, OF_POSITIONS, OF_FACTORS = range(4)

# A look-up table over levels may have this many levels even if the tensor has fewer weights.
_FEW_LEVELS = 1 << 12


def count_rule_of(entry: TensorEntry, stream: str) -> int:
    """Returns the rule for the number of levels of a segment (`container.chunk.stream_counts`)."""
    if stream == "fingerprints":
        return COUNT_SURVIVORS
    if stream == "importance":
        assert entry.importance is not None
        return COUNT_SURVIVORS if entry.importance.over == "survivors" else COUNT_POSITIONS
    assert entry.mask is not None
    if entry.mask.kind == "octets":
        return COUNT_OCTETS
    return COUNT_SURVIVORS if entry.mask.polarity else COUNT_PRUNED


def mask_kind_of(entry: TensorEntry) -> int:
    """Returns the kind of the mask."""
    if entry.mask is None:
        return NO_MASK
    if entry.mask.kind == "octets":
        return OCTETS
    return RUNS_OF_SURVIVORS if entry.mask.polarity else RUNS_OF_PRUNED


def scale_of(entry: TensorEntry) -> tuple[int, int]:
    """Returns how positions map to scale factors, and the unit that positions are divided by."""
    if entry.scale is None:
        return NO_SCALE, 1
    if entry.scale.per == "tensor":
        return SCALE_TENSOR, MAX_POSITIONS
    if entry.scale.per == "group":
        return SCALE_QUOTIENT, min(entry.scale.size, MAX_POSITIONS)
    return SCALE_QUOTIENT if entry.scale.per == "row" else SCALE_REMAINDER, max(entry.columns, 1)


def multiplier_of(entry: TensorEntry) -> int:
    """Returns which importances multiply the weights."""
    if entry.importance is None or entry.importance.role != "multiplier":
        return NO_MULTIPLIER
    return importance_positions(entry)


def importance_positions(entry: TensorEntry) -> int:
    """Returns which positions have an importance, of whatever role. The tensor must have importances."""
    importance = entry.importance
    assert importance is not None
    if importance.over == "factors":
        return OF_FACTORS
    # Without a mask every position is a survivor.
    return OF_POSITIONS if importance.over == "all" and entry.mask else OF_SURVIVORS


def keeps_patterns(entry: TensorEntry) -> bool:
    """Returns whether levels are bit patterns of the tensor's own dtype. It must have fingerprints."""
    assert entry.fingerprints is not None
    quantiser = entry.fingerprints.quantiser
    return isinstance(quantiser, Exact) and quantiser.dtype == entry.dtype


def has_few_levels(entry: TensorEntry, most: int) -> bool:
    """Returns whether a table over all levels of the fingerprints is small enough.

    Args:
        entry: the tensor's entry; it must have fingerprints.
        most: the greatest number of levels.
    """
    assert entry.fingerprints is not None
    return entry.fingerprints.table.top <= min(most, max(entry.positions, _FEW_LEVELS))


def level_patterns(entry: TensorEntry, vectors: dict[str, F32]) -> NDArray[np.uint32]:
    """Returns the bit pattern of the weight of every level, computed by the reference.

    Args:
        entry: the tensor's entry; fingerprints, at most one scale factor, weights of at most 4 bytes.
        vectors: the checked vectors of its vector chunk.
    """
    assert entry.fingerprints is not None
    every = np.arange(entry.fingerprints.table.top, dtype=np.uint64)
    centroids, scale = vectors.get("fingerprint centroids"), vectors.get("scale")
    scales = None if scale is None else np.full(len(every), scale[0])
    weights = entry.fingerprints.quantiser.fingerprint_values(every, entry.dtype, centroids, scales)
    return weights.view(entry.dtype.pattern).astype(np.uint32)
