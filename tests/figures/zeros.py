"""The size of zeros of both signs: normal weights, pruned by magnitude, by multiplication with a mask.

``python -m tests.figures.zeros`` prints, as JSON, the bits per weight of the file: with classes for zeros,
without them, and with +0 instead of each −0.
"""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np

from ..encode.test_zeros import bits_per_weight, positive, without_classes_for_zeros

SIDE, SHARE = 1024, 0.9


def main() -> None:
    weights = np.random.default_rng(0).standard_normal((SIDE, SIDE), np.float32)
    magnitudes = np.abs(weights)
    pruned = weights * (magnitudes >= np.quantile(magnitudes, SHARE))
    for name, dtype in (("BF16", ml_dtypes.bfloat16), ("F32", np.float32)):
        array = pruned.astype(dtype)
        with without_classes_for_zeros():
            without = bits_per_weight(array)
        row = {
            "classes": bits_per_weight(array),
            "no classes": without,
            "+0": bits_per_weight(positive(array)),
        }
        print(json.dumps({"dtype": name} | {key: round(bits, 2) for key, bits in row.items()}))


if __name__ == "__main__":
    main()
