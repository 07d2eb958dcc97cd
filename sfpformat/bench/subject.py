"""The subject of the benchmark: a model's tensors, unchanged, cast, or a pruned sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..dtypes import DTYPES, of_numpy

Array = NDArray[np.generic]
F32 = NDArray[np.float32]
Tensors = dict[str, Array]

CASTS = {"bf16": "BF16", "f32": "F32"}

# Smaller matrices are usually biases and gains with the shape of a matrix.
_MATRIX_WEIGHTS = 4096
_ENTROPY_STEPS = 24
# Positions of each tensor in a small file that decodes quickly.
_HEAD_POSITIONS = 2048


@dataclass(frozen=True)
class Subject:
    """A model.

    Attributes:
        name: the file's name for display, without its path.
        tensors: the tensors by name.
    """

    name: str
    tensors: Tensors

    @property
    def raw_bytes(self) -> int:
        """The bytes of all tensors."""
        return sum(array.nbytes for array in self.tensors.values())

    @property
    def weights(self) -> int:
        """The number of elements of all tensors."""
        return sum(array.size for array in self.tensors.values())

    @property
    def dtypes(self) -> list[str]:
        """The names of the dtypes, in descending order of their bytes."""
        sizes: dict[str, int] = {}
        for array in self.tensors.values():
            dtype = of_numpy(array.dtype)
            name = dtype.name if dtype else str(array.dtype)
            sizes[name] = sizes.get(name, 0) + array.nbytes
        return sorted(sizes, key=lambda name: -sizes[name])


def is_float(array: Array) -> bool:
    """Returns whether an array has a float dtype of the format."""
    dtype = of_numpy(array.dtype)
    return dtype is not None and dtype.is_float


def cast(tensors: Mapping[str, Array], dtype: str | None) -> Tensors:
    """Converts float tensors to another dtype (``BF16``, ``F32``); others are unchanged."""
    if dtype is None:
        return dict(tensors)
    target = DTYPES[dtype].numpy
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return {name: a.astype(target) if is_float(a) else a for name, a in tensors.items()}


def bits_of(array: Array) -> NDArray[np.uint8]:
    """Returns the bytes of an array, so that NaNs and signed zeros can be compared exactly."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def same_bits(one: Mapping[str, Array], other: Mapping[str, Array]) -> bool:
    """Returns whether two models have the same names, dtypes, shapes and bits."""
    return one.keys() == other.keys() and all(
        a.dtype == other[name].dtype
        and a.shape == other[name].shape
        and np.array_equal(bits_of(a), bits_of(other[name]))
        for name, a in one.items()
    )


def heads(tensors: Mapping[str, Array]) -> Tensors:
    """Returns the first positions of every tensor: a small model with all dtypes of the large one."""
    return {name: np.ascontiguousarray(a.reshape(-1)[:_HEAD_POSITIONS]) for name, a in tensors.items()}


def matrices(tensors: Mapping[str, Array]) -> dict[str, F32]:
    """Returns the weight matrices as F32; the kernels of a convolution are rows."""
    return {
        name: np.ascontiguousarray(array.reshape(array.shape[0], -1), np.float32)
        for name, array in tensors.items()
        if array.ndim >= 2 and array.size >= _MATRIX_WEIGHTS and is_float(array)
    }


def sample(found: Mapping[str, F32], limit: int) -> dict[str, F32]:
    """Returns matrices, or their first rows, from all parts of the model: at most about ``limit`` weights."""
    if sum(matrix.size for matrix in found.values()) <= limit:
        return dict(found)
    names, chosen, left = list(found), {}, limit
    stride = max(1, len(names) // 4)
    for name in (name for first in range(stride) for name in names[first::stride]):
        matrix = found[name]
        rows = min(matrix.shape[0], min(left, max(limit // 4, 1)) // max(matrix.shape[1], 1))
        if rows:
            chosen[name] = np.ascontiguousarray(matrix[:rows])
            left -= chosen[name].size
    return {name: chosen[name] for name in names if name in chosen}


def pruned(matrix: F32, share: float) -> F32:
    """Returns a copy with the smallest ``share`` of the magnitudes set to zero."""
    out = matrix.copy()
    flat = out.reshape(-1)
    count = round(flat.size * share)
    if count:
        flat[np.argpartition(np.abs(flat), count - 1)[:count]] = 0
    return out


def entropy(levels: NDArray[np.int64]) -> float:
    """Returns the order-0 entropy of integers, in bits per integer."""
    if not levels.size:
        return 0.0
    _, counts = np.unique(levels, return_counts=True)
    p = counts / levels.size
    return float(-(p * np.log2(p)).sum())


def step_of_bits(matrix: F32, bits: float) -> float:
    """Returns the step at which the levels of the non-zero weights have an entropy of ``bits`` bits."""
    values = matrix[matrix != 0].astype(np.float64)
    if not values.size:
        return 1.0
    # Bisection between a step that is much too fine and one that leaves few levels.
    high = float(np.abs(values).max()) * 2
    low = high / 2**24
    for _ in range(_ENTROPY_STEPS):
        middle = (low * high) ** 0.5
        if entropy(np.rint(values / middle).astype(np.int64)) > bits:
            low = middle
        else:
            high = middle
    return high
