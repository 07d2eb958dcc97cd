"""Small valid files for tests to damage, each created once."""

from __future__ import annotations

from functools import cache

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from sfp_conformance.forge import Forge, Part, exact, f32_bytes, hand_file, hand_part, patterns, table

from sfpformat import Exact, ImportanceOptions, Options, Table, Uniform
from sfpformat.numpy import save


def weights(*shape: int, density: float = 0.4, seed: int = 0) -> NDArray[np.float32]:
    """Returns normal weights, pruned to a density."""
    rng = np.random.default_rng(seed)
    kept = rng.random(shape) < density
    return np.where(kept, rng.normal(size=shape), 0).astype(np.float32)


def importance(*shape: int) -> NDArray[np.float32]:
    """Returns importances."""
    return np.abs(weights(*shape, density=1.0, seed=7)) + np.float32(0.1)


@cache
def everything() -> bytes:
    """Returns a file of a few kilobytes with every coding, mask kind, quantiser, scale and importance."""
    w = weights(4, 24)
    tensors = {
        "raw": np.arange(-7, 33, dtype=np.int16).reshape(5, 8),
        "flags": np.arange(9) % 3 == 0,
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.float64(-2.5).reshape(()),
        "runs": w,
        "octets": w.astype(ml_dtypes.bfloat16),
        "uniform": w,
        "table": w.astype(np.float16),
        "group": w,
    }
    base = Options(coding="fingerprint", segment=32, chunk=64)
    options = {
        "raw": Options(segment=32, chunk=32),
        "empty": base.but(quantiser=Uniform(step=0.5, scale="row")),
        "runs": base.but(mask="runs", quantiser=Exact()),
        "octets": base.but(mask="octets", quantiser=Exact()),
        "uniform": base.but(
            quantiser=Uniform(step=0.25, scale="row"),
            mask="runs",
            group=2,
            importance=ImportanceOptions(role="multiplier", over="survivors"),
        ),
        "table": base.but(quantiser=Table(centroids=5, scale="column"), mask="octets"),
        "group": base.but(
            quantiser=Uniform(step=0.1314, scale=7, scale_dtype="BF16"),
            group=1,
            importance=ImportanceOptions(role="metadata", over="all", quantiser="exact", dtype="BF16"),
        ),
    }
    importances: dict[str, NDArray[np.float32] | tuple[NDArray[np.float32], NDArray[np.float32]]] = {
        "uniform": importance(4, 24),
        "group": importance(4, 24),
        "table": (importance(4), importance(24)),
    }
    made = save(tensors, {"format": "np"}, options=options, importances=importances)
    forge = Forge.of(made)
    forge.parts.append(coded())
    return forge.build()


def coded(name: str = "coded") -> Part:
    """Returns a hand-made tensor: two codes, pairs of levels, several class widths, importance by table."""
    entry = {
        "name": name,
        "dtype": "F32",
        "shape": [2, 35],
        "segment": 32,
        "chunk": 2,
        "mask": {"kind": "runs", "polarity": 1, **table([0, 1, 2], [1, 2, 2], [2, 2, 1])},
        "fingerprints": {
            "quantiser": "uniform",
            "step": f32_bytes(0.5),
            # Symbols 0 to 8 are the pairs of three classes: (0, 0), (1, 0), (2, 0), (0, 1), …
            **table([1, 1, 3], [1, 3, 4, 4, 4, 4, 4, 4, 0], [3, 3, 3, 3, 3, 3, 3, 4, 4], base=2, group=2),
        },
        "scale": {"per": "tensor", "dtype": "F32"},
        "importance": {
            "over": "survivors",
            "role": "multiplier",
            "quantiser": "table",
            "count": 3,
            **table([0, 0, 0], [1, 2, 2]),
        },
    }
    mask = [int(p % 3 == 0 or p % 7 == 1) for p in range(70)]
    first = sum(mask[:32])
    count = sum(mask)
    low, high = [2, 3, 4, 5, 3, 2, 7, 2, 2, 2, 13, 3], [4, 4, 2, 5, 3, 6, 2, 2]
    fingerprints = (low * 9)[:first] + (high * 9)[: count - first]
    return hand_part(
        entry,
        {"fingerprints": fingerprints, "importance": [p * p % 3 for p in range(count)]},
        mask=mask,
        codes={"fingerprints": [0, 1, 1], "mask": [0, 0, 1]},
        vectors={
            "scale": patterns("F32", -1.5),
            "importance centroids": patterns("F32", 0.0, 0.75, 2.0),
        },
    )


@cache
def plain() -> bytes:
    """Returns a file with one tensor and one class per stream, in which the meaning of each bit is obvious.

    40 positions of BF16 in two segments of 32 and 8; 16 residual bits per survivor; a plain bitmap as mask.
    """
    entry = {
        "name": "plain",
        "dtype": "BF16",
        "shape": [40],
        "chunk": 2,
        "mask": {"kind": "octets", **table([8])},
        "fingerprints": exact("BF16", **table([16])),
    }
    mask = [int(p % 2 == 0) for p in range(40)]
    return hand_file(hand_part(entry, {"fingerprints": [2 * p + 0x7E00 for p in range(20)]}, mask=mask))
