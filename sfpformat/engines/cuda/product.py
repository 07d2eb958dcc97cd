"""Host side of products with a compressed matrix; the kernels are in ``kernels/source/product.cuh``.

Decides which matrices the kernels support, computes their record, and divides the columns among blocks. Does
not access a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...coding.quantisers import F32, Exact, NumberQuantiser
from ...container.entry import TensorEntry
from ...dtypes import DTYPES, Dtype
from ..translation import SCALE_QUOTIENT, SCALE_TENSOR, scale_of
from . import layout

# Dtype of the activations and of the result -> kernel, parts that it splits a number into, rows of x per
# launch.
KERNELS = {"BF16": ("multiply_bf16", 1, 8), "F16": ("multiply_f16", 1, 8), "F32": ("multiply_f32", 3, 4)}
_OLDEST_DEVICE = (8, 0)  # compute capability: tensor cores for these dtypes, asynchronous copies
_MOST_BYTES = 1 << 30  # of all chunks: levels are counted in 32 bits
# Multiprocessors of the largest devices that were measured, and blocks per multiprocessor that hide memory
# latency.
_MULTIPROCESSORS = 132
_BLOCKS_EACH = 3
# Cost of a block before its first unit and after its last, in units.
_AROUND = 0.25
_WIDE = ("F32", "F64")  # hold every number of float32


@dataclass(frozen=True, eq=False)
class Product:
    """The data that the kernels need for a matrix.

    Attributes:
        kernel: the name of the kernel.
        parts: number of parts that each number is split into.
        most: maximum number of rows of x per launch.
        record: a `layout.MATRIX`, without addresses.
        factors: the scale factors of rows or groups, or None.
        rows, columns: shape of the matrix.
        chunks: number of its chunks.
    """

    kernel: str
    parts: int
    most: int
    record: NDArray[np.void]
    factors: F32 | None
    rows: int
    columns: int
    chunks: int

    @cached_property
    def units(self) -> int:
        """Number of units of columns; the offset of the levels of each unit is stored."""
        return -(-self.columns // layout.UNIT)

    @cached_property
    def blocks(self) -> int:
        """Number of blocks of rows."""
        return -(-self.rows // layout.BLOCK_ROWS)

    @cached_property
    def units_of_slice(self) -> int:
        """Units per block: minimises the work of the busiest multiprocessor.

        Depends only on the shape, so that the order of additions, and therefore every bit of the result, is
        the same on every device.
        """
        most = self.blocks * self.units // (_MULTIPROCESSORS * _BLOCKS_EACH)

        def work(units: int) -> tuple[float, int]:
            blocks = -(-self.blocks * -(-self.units // units) // _MULTIPROCESSORS)
            return blocks * (units + _AROUND), -units

        return min(range(1, max(min(most, self.units), 1) + 1), key=work)

    @cached_property
    def slices(self) -> int:
        """Number of slices of the columns."""
        return -(-self.units // self.units_of_slice)

    def sums_bytes(self, batch: int) -> int:
        """Returns the bytes of memory for the partial sums of slices, for ``batch`` rows of x."""
        batch = min(batch, self.most)  # launches with fewer rows need no more
        return 4 * self.slices * self.rows * batch if self.slices > 1 else 0


def has_kernels(capability: Sequence[int]) -> bool:
    """Returns whether the kernels run on a device of that compute capability."""
    return tuple(capability) >= _OLDEST_DEVICE


def make_product(entry: TensorEntry, vectors: dict[str, F32], dtype: str, compute: str) -> Product | None:
    """Returns the data that the kernels need for a matrix; None if they do not support it.

    They support: no mask or a plain bitmap; levels of four bits; scales per tensor, per row, or per group of
    a multiple of 128 positions; rows that are whole runs of 128 positions and whole segments; chunks of whole
    rows.

    Args:
        entry: the tensor's entry.
        vectors: the checked vectors of its vector chunk.
        dtype: the dtype that decoded weights are converted to, by its name in the format.
        compute: the dtype of x, which the converted weights are then converted to.
    """
    if compute not in KERNELS or not _has_fixed_width(entry) or not _has_whole_rows(entry):
        return None
    weights = _weights(entry, vectors, [DTYPES[dtype], DTYPES[compute]])
    record = np.zeros((), layout.MATRIX)
    factors = None
    if weights is not None:
        record["patterns"] = _patterns(weights, compute)
    elif _rounds_once(entry, dtype, compute) and _has_whole_groups(entry):
        assert entry.fingerprints is not None
        numbers = np.arange(layout.MAGNITUDES, dtype=np.uint64) + np.uint64(
            entry.fingerprints.table.base // 2
        )
        centroids = vectors.get("fingerprint centroids")
        assert isinstance(entry.fingerprints.quantiser, NumberQuantiser)
        record["magnitudes"] = entry.fingerprints.quantiser.magnitudes(numbers, centroids)
        record["scale_runs"] = scale_of(entry)[1] // layout.RUN
        factors = vectors["scale"]
    else:
        return None
    rows, columns = entry.rows, entry.columns
    record["rows"], record["columns"], record["masked"] = rows, columns, entry.mask is not None
    record["chunk_rows"] = rows if len(entry.chunks) == 1 else entry.chunk * entry.segment // columns
    if factors is None:
        record["scale_runs"] = columns // layout.RUN
    kernel, parts, most = KERNELS[compute]
    return Product(kernel, parts, most, record, factors, rows, columns, len(entry.chunks))


def _has_fixed_width(entry: TensorEntry) -> bool:
    """Returns whether mask and levels have the layout that the kernels read."""
    fingerprints, mask, importance = entry.fingerprints, entry.mask, entry.importance
    if fingerprints is None or isinstance(fingerprints.quantiser, Exact):
        return False
    if importance is not None and importance.role == "multiplier":
        return False
    if mask is not None and not mask.is_bitmap:
        return False
    # The lowest bit of a level is its sign. With an odd base it differs from the lowest bit of the residual.
    table = fingerprints.table
    return table.extra == bytes([layout.LEVEL_BITS]) and table.base % 2 == 0


def _has_whole_rows(entry: TensorEntry) -> bool:
    """Returns whether rows are whole runs and whole segments, and chunks are whole rows."""
    if not entry.positions or int(entry.chunks["length"].sum()) > _MOST_BYTES:
        return False
    columns, whole = entry.columns, len(entry.chunks) == 1 or not entry.chunk * entry.segment % entry.columns
    return whole and not columns % layout.RUN and not columns % entry.segment


def _has_whole_groups(entry: TensorEntry) -> bool:
    by, unit = scale_of(entry)
    return by == SCALE_QUOTIENT and not unit % layout.RUN


def _weights(
    entry: TensorEntry, vectors: dict[str, F32], conversions: Sequence[Dtype]
) -> NDArray[np.generic] | None:
    """Returns the decoded and converted weights of the magnitudes; None if they depend on the position.

    None also if a weight is not finite and would have to be split into parts.
    """
    if scale_of(entry)[0] > SCALE_TENSOR:
        return None
    assert entry.fingerprints is not None
    levels = np.arange(2 * layout.MAGNITUDES, dtype=np.uint64) + np.uint64(entry.fingerprints.table.base)
    scale = vectors.get("scale")
    scales = None if scale is None else np.full(len(levels), scale[0])
    centroids = vectors.get("fingerprint centroids")
    weights = entry.fingerprints.quantiser.fingerprint_values(levels, entry.dtype, centroids, scales)
    with np.errstate(over="ignore"):
        for dtype in conversions:
            weights = weights.astype(dtype.numpy)
    return weights[::2] if conversions[-1].name != "F32" or np.isfinite(weights).all() else None


def _rounds_once(entry: TensorEntry, dtype: str, compute: str) -> bool:
    """Returns whether the conversions round float32 only once, directly to ``compute``, as the kernels do."""
    return all(name == compute or name in _WIDE for name in (entry.dtype.name, dtype))


def _patterns(weights: NDArray[np.generic], compute: str) -> NDArray[np.uint32]:
    """Returns the bytes of the magnitudes, shape [3, 4], a row per part; unused rows are zero.

    A row holds the upper bytes of the first four magnitudes and of the last four, then the lower bytes. A
    float32, with 24 significant bits, is split into three numbers of 8: its upper half, the upper half of the
    remainder, and the rest.
    """
    out = np.zeros((3, 4), np.uint32)
    rest: NDArray[Any] = weights
    for part in range(KERNELS[compute][1]):
        if compute == "F32":
            upper = (rest.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
            rest, patterns = rest - upper, upper.view(np.uint32) >> np.uint32(16)
        else:
            patterns = weights.view(np.uint16)
        raw = patterns.astype("<u2").view(np.uint8).reshape(-1, 2)
        out[part] = np.concatenate([raw[:, 1], raw[:, 0]]).view("<u4")
    return out
