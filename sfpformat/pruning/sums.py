"""Sums whose bits do not depend on how rows are divided."""

from __future__ import annotations

import torch
from torch import Tensor


def row_sums(matrix: Tensor) -> Tensor:
    """Returns the sum of each row of a matrix; its bits do not depend on the number of rows."""
    if len(matrix) == 1:  # torch would divide a single sum among its threads
        return torch.cat([matrix, matrix]).sum(1)[:1]
    return matrix.sum(1)
