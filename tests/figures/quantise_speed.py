"""Measures how long quantising takes, by options, in processor time per weight.

python -m tests.figures.quantise_speed model.safetensors
"""

from __future__ import annotations

import argparse
from functools import partial

import numpy as np

from sfpformat import Options, Table, Uniform
from sfpformat.io.safetensors import SafetensorsFile
from sfpformat.numpy import options_for_weights, save

from .parallel import as_bf16, least

_CASES = {
    "bits=4": Options(Uniform(bits=4)),
    "step=0.05": Options(Uniform(step=0.05)),
    "budget=3": Options(Uniform(budget=3)),
    "error_db=-20": Options(Uniform(error_db=-20)),
    "16 centroids": Options(Table(centroids=16)),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.figures.quantise_speed", description=__doc__)
    parser.add_argument("model", help="a safetensors file; float32 is converted to BF16")
    parser.add_argument("--most", type=int, default=16_000_000, help="stop after this many weights")
    args = parser.parse_args()
    with SafetensorsFile(args.model) as file:
        tensors: dict[str, np.ndarray] = {}
        for name in file.header.tensors:
            if sum(array.size for array in tensors.values()) < args.most:
                tensors[name] = as_bf16(file.read(name))
    chosen = options_for_weights(tensors, Options())
    tensors = {name: tensors[name] for name in chosen}
    weights = sum(array.size for array in tensors.values())
    for words, options in _CASES.items():
        work = partial(save, tensors, options=options, engine="numba", threads=1)
        print(f"{words}: {least(work, repeats=2) / weights * 1e9:.0f} ns a weight")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
