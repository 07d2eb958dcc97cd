"""Scale factors of lossy quantisers: root mean squares of the survivors that share a factor."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..coding.mask import Mask
from ..coding.quantisers import F32
from ..container.entry import TensorEntry
from ..container.stream_maps import ScaleEntry
from ..decode.tensor import scale_index
from ..dtypes import DTYPES, Dtype
from ..options import LossyQuantiser
from .quantise import F64, SAMPLE

# The greatest power of two by which factors are scaled: the step is scaled inversely and must stay a normal
# float32.
_MOST_MOVED = 120
# Exponent of the greatest factor after scaling: F16 has a range of 2^-24 to 2^15, BF16 and F32 far more.
_MOVED_TO = {"F16": 14, "BF16": 100, "F32": 100}


@dataclass(frozen=True)
class Scaling:
    """The scale of a tensor.

    Attributes:
        entry: the tensor's entry, with the scale.
        factors: the stored factors, widened to float32.
        unit: ratio of a root mean square to its factor: a power of two, equal for all factors. A step in
            units of root mean squares is multiplied by it before it is stored.
    """

    entry: TensorEntry
    factors: F32
    unit: float = 1.0

    def of(self, positions: NDArray[np.int64]) -> F32:
        """Returns the factor of each position."""
        return self.factors[scale_index(self.entry, positions)]


def scaling_of(
    flat: NDArray[np.generic], entry: TensorEntry, asked: LossyQuantiser, mask: Mask | None
) -> Scaling | None:
    """Returns the scale of a tensor, or None if the caller's quantiser has none.

    The factors are the root mean squares of the survivors that share a factor.
    """
    if asked.scale is None:
        return None
    per = asked.scale if isinstance(asked.scale, str) else "group"
    size = 0 if isinstance(asked.scale, str) else int(asked.scale)
    dtype = DTYPES[asked.scale_dtype or "F16"]
    shaped = replace(entry, scale=ScaleEntry(per, size, dtype))
    count = next(v.size for v in shaped.vector_list() if v.name == "scale")
    squares, counts = np.zeros(count), np.zeros(count, np.int64)
    for start in range(0, len(flat), SAMPLE):
        block = slice(start, min(start + SAMPLE, len(flat)))
        index = scale_index(shaped, np.arange(block.start, block.stop))
        values = flat[block].astype(np.float64)
        alive = values != 0 if mask is None else mask[block]
        squares += np.bincount(index[alive], values[alive] ** 2, count)
        counts += np.bincount(index[alive], minlength=count)
    return Scaling(shaped, *_stored_factors(np.sqrt(squares / np.maximum(counts, 1)), dtype, entry.dtype))


def _stored_factors(roots: F64, dtype: Dtype, of_weights: Dtype) -> tuple[F32, float]:
    """Returns the stored factors for root mean squares, widened to float32, and their `Scaling.unit`.

    If a factor would overflow or be subnormal in its dtype, all factors are scaled by one power of two, and
    the step inversely. A factor that would still become 0 becomes the least positive number, so that no
    weight is lost.

    Args:
        roots: root mean square of the survivors of each factor, 0 if there are none.
        dtype: the dtype in which factors are stored.
        of_weights: the tensor's dtype.
    """
    greatest = float(roots.max(initial=0))
    unit = 1.0
    if greatest > dtype.greatest or ((roots > 0) & (roots < dtype.least_normal)).any():
        moved = _MOVED_TO[dtype.name] - math.frexp(greatest)[1]
        unit = math.ldexp(1.0, -min(max(moved, -_MOST_MOVED), _MOST_MOVED))
    # A factor is at most the greatest weight, and small enough that other groups' numbers stay in float32.
    limit = min(of_weights.greatest, DTYPES["F32"].greatest / 4) / unit
    with np.errstate(over="ignore", under="ignore"):
        factors = np.minimum(roots / unit, limit).astype(dtype.numpy)
        rounded_up = factors.astype(np.float64) > limit
        patterns = factors.view(dtype.pattern)
        patterns[rounded_up] -= dtype.pattern.type(1)
    factors[(factors == 0) & (roots > 0)] = dtype.numpy.type(dtype.least)
    return factors.astype(np.float32), unit
