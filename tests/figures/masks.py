"""The size of masks: all-MiniLM-L6-v2 pruned by magnitude, compared with the entropy of the mask.

``python -m tests.figures.masks``
"""

from __future__ import annotations

import json

import numpy as np
from numpy.typing import NDArray

import sfpformat
from sfpformat import numpy as sfp
from sfpformat.coding.codetable import pack_lengths
from sfpformat.container.chunk import ChunkIndex

from .model import Tensors, as_bf16, load_f32, matrices


def magnitude_mask(array: NDArray[np.generic], share: float) -> NDArray[np.bool_]:
    """Returns the mask after pruning ``share`` of a tensor's weights by magnitude: True for survivors."""
    magnitudes = np.abs(array.astype(np.float32)).reshape(-1)
    mask = np.ones(array.size, bool)
    mask[np.argsort(magnitudes, kind="stable")[: round(array.size * share)]] = False
    return mask.reshape(array.shape)


def two_of_four(array: NDArray[np.generic]) -> NDArray[np.bool_]:
    """Returns the mask that keeps the two greatest of every four neighbours of a row."""
    groups = np.abs(array.astype(np.float32)).reshape(-1, 4)
    mask = np.zeros(groups.shape, bool)
    np.put_along_axis(mask, np.argsort(groups, axis=1, kind="stable")[:, 2:], True, axis=1)
    return mask.reshape(array.shape)


def entropy(masks: dict[str, NDArray[np.bool_]]) -> float:
    """Returns the entropy of all masks in bits, each with its own share of survivors."""
    bits = 0.0
    for mask in masks.values():
        p = mask.mean()
        bits -= mask.size * (p * np.log2(p) + (1 - p) * np.log2(1 - p))
    return float(bits)


def mask_bits(data: bytes) -> dict[str, float]:
    """Returns the bits of masks in a file: planes, index, tables and others separately."""
    out = {"planes": 0.0, "index": 0.0, "tables": 0.0, "fingerprints": 0.0}
    with sfpformat.open(data) as file:
        for name in file:
            entry = file.entry(name)
            if entry.mask is not None:
                table = entry.mask.table
                packed = sum(len(pack_lengths(code.length)) for code in table.codes)
                out["tables"] += 8 * (table.classes + packed)
            for k in range(len(entry.chunks)):
                index = file.read_head(entry, k)
                for (stream, _), bits in index.bits.items():
                    out["planes" if stream == "mask" else "fingerprints"] += int(bits.sum())
                out["index"] += _index_bits(index, entry.mask is not None)
    return out


def _index_bits(index: ChunkIndex, has_mask: bool) -> int:
    """Returns the bits of the index for the mask: survivors, mask codes, mask lengths."""
    if not has_mask:
        return 0
    quantities = [index.survivors, index.codes["mask"], index.bits["mask", "prefix"]]
    return sum(len(q) * int(q.max() - q.min()).bit_length() for q in quantities)


def measure(tensors: Tensors, masks: dict[str, NDArray[np.bool_]]) -> dict[str, float]:
    """Returns the mask's bits per position, by part, and its entropy."""
    pruned = {name: np.where(masks[name], a, a.dtype.type(0)) for name, a in tensors.items()}
    data = sfp.save(pruned, masks=masks)
    loaded = sfp.load(data)
    assert all(loaded[name].tobytes() == pruned[name].tobytes() for name in pruned)
    positions = sum(array.size for array in tensors.values())
    parts = mask_bits(data)
    cost = parts["planes"] + parts["index"] + parts["tables"]
    whole = entropy(masks)
    return {
        "entropy": whole / positions,
        "mask": cost / positions,
        **{name: bits / positions for name, bits in parts.items()},
        "over entropy, %": 100 * (cost / whole - 1),
        "file": 8 * len(data) / positions,
    }


def main() -> None:
    tensors = matrices(as_bf16(load_f32()))
    results = {}
    for share in (0.5, 0.9):
        masks = {name: magnitude_mask(array, share) for name, array in tensors.items()}
        results[f"{share:.0%} pruned"] = measure(tensors, masks)
    results["2:4"] = measure(tensors, {name: two_of_four(array) for name, array in tensors.items()})
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
