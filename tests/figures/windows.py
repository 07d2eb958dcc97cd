"""Sizes of alternatives to prefix codes with symbols of a fixed width, lossless BF16 (SPEC.md chapter 27).

``python -m tests.figures.windows [FILE.safetensors]`` prints the size relative to raw bytes of the matrices
of a model, by default all-MiniLM-L6-v2. The class is the exponent; the other 8 bits are stored unchanged.
Segment indices are included, with 8 bits per segment for a count. Classes outside a window are stored in the
fewest bits that hold all classes ("raw"), in 8 bits, or at the entropy of these classes ("coded").
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from sfpformat.io.safetensors import SafetensorsFile

from .model import as_bf16, load_f32, matrices

_INDEX = 8  # bits per segment for the number of levels outside
Sizes = dict[str, float]


def exponents(path: str | None) -> Iterator[NDArray[np.int64]]:
    """Yields the exponents of the weights of each matrix."""
    if path is None:
        tensors = matrices(as_bf16(load_f32()))
    else:
        with SafetensorsFile(Path(path)) as file:
            tensors = matrices(as_bf16({name: file.read(name) for name in file.header.tensors}))
    for array in tensors.values():
        assert array.dtype == ml_dtypes.bfloat16
        yield (array.reshape(-1).view(np.uint16).astype(np.int64) >> 7) & 0xFF


def entropy(counts: NDArray[np.integer]) -> float:
    """The entropy of all symbols with these counts, in bits."""
    some = counts[counts > 0].astype(np.float64)
    return float(-(some * np.log2(some / some.sum())).sum())


def alternatives(levels: NDArray[np.int64], segment: int) -> Sizes:
    """Returns alternative -> bits for the exponents of whole segments of a matrix."""
    rows = (levels[: levels.size // segment * segment] - levels.min()).reshape(-1, segment)
    segments, classes = len(rows), int(levels.max() - levels.min()) + 1
    counts = np.zeros((segments, classes), np.int64)
    np.add.at(counts, (np.repeat(np.arange(segments), segment), rows.reshape(-1)), 1)
    before = np.concatenate([np.zeros((segments, 1), np.int64), np.cumsum(counts, axis=1)], axis=1)
    field, position = (classes - 1).bit_length(), (segment - 1).bit_length()
    out, by_width = {"entropy": entropy(counts.sum(0))}, []
    for width in (2, 3, 4):
        for size, what in (((1 << width) - 1, "escape symbol"), (1 << width, "positions")):
            size = min(size, classes)
            inside = before[:, size:] - before[:, :-size]
            window, outside = inside.argmax(1), segment - inside.max(1)
            number = np.arange(classes)
            is_outside = (number < window[:, None]) | (number >= window[:, None] + size)
            coded = entropy((counts * is_outside).sum(0))
            index = segments * (_INDEX + (classes - size).bit_length())
            fixed, escaped = width * rows.size + index, int(outside.sum())
            if what == "positions":
                out[f"{width} bits, positions, raw"] = fixed + escaped * (position + field)
                out[f"{width} bits, positions, coded"] = fixed + escaped * position + coded
                continue
            out[f"{width} bits, raw"] = fixed + escaped * field
            out[f"{width} bits, in 8 bits"] = fixed + escaped * 8
            out[f"{width} bits, coded"] = fixed + coded
            one = rows.size - int(inside.sum(0).max())
            out[f"{width} bits, one window, raw"] = width * rows.size + one * field + segments * _INDEX
            by_width.append(width * segment + outside * field + index / segments)
    out["a width per segment, raw"] = float(np.minimum.reduce(by_width).sum()) + 2 * segments
    out["a width per stream, raw"] = min(float(own.sum()) for own in by_width)
    return out


def main() -> None:
    path = sys.argv[1] if len(sys.argv) > 1 else None
    results = {}
    for segment in (512, 3072):
        total, weights = dict[str, float](), 0
        for levels in exponents(path):
            if levels.size >= segment:
                weights += levels.size // segment * segment
                for name, bits in alternatives(levels, segment).items():
                    total[name] = total.get(name, 0) + bits
        results[f"segments of {segment}"] = {
            name: round((8 + bits / weights) / 16, 4) for name, bits in total.items()
        }
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
