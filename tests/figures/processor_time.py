"""Processor time of encoding and decoding on one thread, relative to ZipNN, for machines that do other work.

``python -m tests.figures.processor_time bf16 [FILE.safetensors]``, or ``f32``: by default all-MiniLM-L6-v2.
Contenders run in turns, from memory to new arrays; ``again`` decodes into arrays that were written before, so
that the operating system provides no new memory. Prints the median of the ratios of all rounds, and the
second least and greatest ratio.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

import sfpformat
from sfpformat import PRESETS
from sfpformat.io.safetensors import SafetensorsFile
from sfpformat.numpy import load, save

from .model import Tensors, model_path

_ROUNDS = 9
_NAMES = {"bf16": (ml_dtypes.bfloat16, "bfloat16"), "f32": (np.float32, "float32")}


def floats(path: Path, dtype: Any) -> Tensors:
    """Returns the float tensors of a file, cast to a dtype."""
    with SafetensorsFile(path) as file:
        arrays = {name: file.read(name) for name in file.header.tensors}
    return {name: array.astype(dtype) for name, array in arrays.items() if array.dtype.kind not in "iub"}


def seconds(work: Callable[[], object]) -> float:
    """Processor time of a call, without the release of its result."""
    start = time.process_time()
    result = work()
    elapsed = time.process_time() - start
    del result
    return elapsed


def read_again(data: bytes, out: dict[str, NDArray[Any]]) -> None:
    """Decodes all tensors of a file in memory into arrays."""
    with sfpformat.open(data, engine="numba", threads=1) as file:
        file.read_into(out)


def main() -> None:
    import zipnn

    dtype, name = _NAMES[sys.argv[1]]
    tensors = floats(Path(sys.argv[2]) if len(sys.argv) > 2 else model_path(), dtype)
    size = sum(array.nbytes for array in tensors.values())
    peer = zipnn.ZipNN(bytearray_dtype=name, threads=1)
    raw = [array.tobytes() for array in tensors.values()]
    packed = [peer.compress(bytearray(part)) for part in raw]
    sizes = {"zipnn": sum(map(len, packed))}
    decode: dict[str, Callable[[], object]] = {"zipnn": lambda: [peer.decompress(part) for part in packed]}
    encode: dict[str, Callable[[], object]] = {
        "zipnn": lambda: [peer.compress(bytearray(part)) for part in raw]
    }
    tried = {"default": PRESETS["default"], "speed": PRESETS["speed"]}
    for preset, options in tried.items():
        encode[preset] = partial(save, tensors, options=options, engine="numba", threads=1)
        data = save(tensors, options=options, engine="numba", threads=1)
        decode[preset] = partial(load, data, engine="numba", threads=1)
        found = load(data, engine="numba", threads=1)
        assert all(found[key].tobytes() == array.tobytes() for key, array in tensors.items())
        decode[f"{preset} again"] = partial(read_again, data, found)
        sizes[preset] = sizes[f"{preset} again"] = len(data)
    for task, contenders in (("decode", decode), ("encode", encode)):
        spent: dict[str, list[float]] = {contender: [] for contender in contenders}
        for _ in range(_ROUNDS):
            for contender, work in contenders.items():
                spent[contender].append(seconds(work))
        for contender, own in spent.items():
            ratios = sorted(a / b for a, b in zip(spent["zipnn"], own, strict=True))
            speed = size / statistics.median(own) / 1e6
            print(
                f"{task} {contender}: {statistics.median(ratios):.2f} x ({ratios[1]:.2f}-{ratios[-2]:.2f}), "
                f"{speed:.0f} MB/s, size {sizes[contender] / size:.4f}"
            )


if __name__ == "__main__":
    main()
