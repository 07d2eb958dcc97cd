"""Stochastic rounding of float32 numbers to 16 bits, without a random generator.

Theory of operation: a number between two neighbours of the 16-bit format is rounded up with a probability
equal to its position between them, so that small changes add up over many steps instead of being lost. The
"random" numbers are the fractional parts of multiples of irrational numbers (an additive recurrence, or
lattice). They depend only on row, column, step and a label. They are therefore the same on every device, and
take three integer operations per number. For each number of a tensor, the fractions of successive steps are
evenly distributed, which gives smaller errors than random fractions.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Powers of the inverse of the root of x⁵ = x + 1: jointly irrational steps for four dimensions (Roberts, The
# unreasonable effectiveness of quasirandom sequences, 2018).
_ROOT = 1.1673039782614187
_OF_ROW, _OF_COLUMN, _OF_STEP, _OF_LABEL = (_ROOT**-i for i in (1, 2, 3, 4))
_BITS = 16
_DROPPED = {torch.bfloat16: 16, torch.float16: 13}  # bits of float32's fraction that the format lacks


def rounded(values: Tensor, dtype: torch.dtype, first_row: int, step: int, label: int) -> Tensor:
    """Returns numbers rounded to a neighbour in a 16-bit format.

    Args:
        values: float32 [rows, columns], finite and in the range of the format.
        dtype: bfloat16 or float16; subnormal numbers of float16 are rounded to the nearest.
        first_row: number of the first row in its tensor.
        step: number of the step.
        label: number of the tensor.
    """
    dropped = _DROPPED[dtype]
    height, width = values.shape
    rows = torch.arange(first_row, first_row + height, dtype=torch.float64) * _OF_ROW
    columns = torch.arange(width, dtype=torch.float64) * _OF_COLUMN + (step * _OF_STEP + label * _OF_LABEL)
    # On the CPU, because some devices have no float64.
    lattice = _fractions(rows).to(values.device)[:, None] + _fractions(columns).to(values.device)
    lattice &= (1 << _BITS) - 1
    if dropped < _BITS:
        lattice >>= _BITS - dropped
    # A number's bits without the sign ascend with its magnitude, so the sum carries to the next neighbour.
    lattice += values.contiguous().view(torch.int32)
    lattice &= -1 << dropped
    return lattice.view(torch.float32).to(dtype)


def _fractions(x: Tensor) -> Tensor:
    """Returns the first 16 bits after the binary point, int32."""
    return ((x - x.floor()) * (1 << _BITS)).to(torch.int32)
