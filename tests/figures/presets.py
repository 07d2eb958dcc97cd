"""The size of files with the presets for GPUs: bits per position of all-MiniLM-L6-v2 with matrices in BF16.

``python -m tests.figures.presets``
"""

from __future__ import annotations

import json

import numpy as np

from sfpformat import PRESETS, Table
from sfpformat import numpy as sfp

from .masks import magnitude_mask
from .model import Tensors, as_bf16, load_f32, matrices

_CENTROIDS = 8  # for levels of 4 bits, including the sign


def bits_by_preset(tensors: Tensors, names: list[str], **changes: object) -> dict[str, float]:
    """Returns preset -> bits per position."""
    positions = sum(array.size for array in tensors.values())
    sizes = {name: len(sfp.save(tensors, options=PRESETS[name].but(**changes))) for name in names}
    return {name: round(8 * size / positions, 3) for name, size in sizes.items()}


def main() -> None:
    dense = matrices(as_bf16(load_f32()))
    pruned = {
        name: np.where(magnitude_mask(array, 0.5), array, array.dtype.type(0))
        for name, array in dense.items()
    }
    results = {
        "lossless": bits_by_preset(dense, ["default", "gpu"]),
        "50 % pruned, lossless": bits_by_preset(pruned, ["default", "gpu"]),
        "50 % pruned, 4 bits a level": bits_by_preset(
            pruned, ["default", "gpu", "fused"], quantiser=Table(_CENTROIDS)
        ),
    }
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
