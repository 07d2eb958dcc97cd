"""Compares the sizes of deltas between pruned and quantised models.

``python -m tests.figures.delta_parts MODEL.safetensors`` prunes and quantises the first matrices of a model,
once unchanged and once after an update by normally distributed steps. It prints the bytes of each case:

* whole: the new `.sfp` file; patch: a zstd frame that refers to the base, as that of ``zstd --patch-from``;
* elements: a delta of decoded weights; parts: that of `write_delta`, with mask, levels and vectors;
* the levels alone, in the order of other keys of the base: none, pruned or not (that of parts), number div 4.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

import sfpformat
from sfpformat import Options, Table, Uniform, Writer
from sfpformat.decode.parts import parts_of
from sfpformat.decode.reader import SfpFile
from sfpformat.deltas.tensors import Source
from sfpformat.encode.sink import MemorySink
from sfpformat.io.safetensors import SafetensorsFile

from .deltas import zstd

Model = dict[str, NDArray[Any]]
UPDATES = (1e-5, 1e-4)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--tensors", type=int, default=12)
    options = parser.parse_args()
    with SafetensorsFile(options.model) as file:
        matrices = [name for name, spec in file.header.tensors.items() if len(spec.shape) == 2]
        chosen = [name for name in matrices if "encoder" in name][: options.tensors]
        base = {name: file.read(name).astype(np.float32) for name in chosen}
    weights = sum(array.size for array in base.values())
    step = float(np.mean([array.std() for array in base.values()])) / 4
    print(f"{len(base)} matrices, {weights:,} weights; bytes")
    quantisers: dict[str, Any] = {"table of 16": Table(bits=4), "equal steps": Uniform(step=step)}
    quantisers["own steps, 4 bits"] = Uniform(bits=4)
    for name, quantiser in quantisers.items():
        for update in UPDATES:
            rng = np.random.default_rng(0)
            new = {
                n: w + np.float32(update) * rng.standard_normal(w.shape, np.float32) for n, w in base.items()
            }
            for pruned, same in ((0.5, True), (0.5, False), (0.9, False)):
                old, now = pruned_by(base, base, pruned), pruned_by(new, base if same else new, pruned)
                mask = "the same mask" if same else "another mask"
                print(f"{name}, update {update:g}, {pruned:.0%} pruned, {mask}: ", end="")
                print(compared(old, now, Options(quantiser=quantiser)), flush=True)


def pruned_by(model: Model, by: Model, share: float) -> Model:
    """Prunes the weights whose magnitudes in another model are the smallest of their matrix."""
    return {
        name: np.where(np.abs(by[name]) > np.quantile(np.abs(by[name]), share), array, np.float32(0))
        for name, array in model.items()
    }


def compared(old: Model, now: Model, options: Options) -> str:
    """Returns the sizes of all contenders, in words."""
    base, new = packed(old, options), packed(now, options)
    with SfpFile(base) as before, SfpFile(new) as after:
        sizes = {"whole": len(new), "patch": patch(base, new)}
        sizes["elements"] = size_of(before, after, parts=False)
        sizes["parts"] = size_of(before, after)
        numbers = [levels_of(file) for file in (before, after)]
    sizes["no key"] = size_of(*(viewed(model, np.uint32) for model in numbers))
    sizes["pruned or not"] = size_of(*(viewed(model, np.float32) for model in numbers))
    if max(int((array & 0x7FFFFFFF).max()) for model in numbers for array in model.values()) < 128:
        sizes["number div 4"] = size_of(*(narrow(model) for model in numbers))
    changed = sum(int((array != numbers[1][name]).sum()) for name, array in numbers[0].items())
    share = changed / sum(array.size for array in numbers[0].values())
    return f"{share:.3%} of the levels; " + ", ".join(f"{key} {size:,}" for key, size in sizes.items())


def packed(model: Model, options: Options) -> bytes:
    """Returns the `.sfp` file of a model."""
    sink = MemorySink()
    with Writer(sink, threads=1) as writer:
        for name, array in model.items():
            writer.add(name, array, options)
    return bytes(sink.data)


def patch(base: bytes, new: bytes) -> int:
    """Returns the bytes of a zstd frame that refers to the base."""
    own = zstd()
    known = own.ZstdCompressionDict(base, dict_type=own.DICT_TYPE_RAWCONTENT)
    settings = own.ZstdCompressionParameters.from_level(3, window_log=27, enable_ldm=True)
    return len(own.ZstdCompressor(dict_data=known, compression_params=settings).compress(new))


def size_of(base: Source, new: Source, **options: Any) -> int:
    """Returns the bytes of a delta."""
    sink = MemorySink()
    sfpformat.write_delta(sink, base, new, threads=1, **options)
    return len(bytes(sink.data))


def levels_of(file: SfpFile) -> dict[str, NDArray[np.uint32]]:
    """Returns the patterns of the part `weights` of each tensor."""
    out = {}
    for name in file:
        parts = parts_of(file, name)
        assert parts is not None
        out[name] = parts.weights.astype(np.uint32)
    return out


def viewed(model: dict[str, NDArray[np.uint32]], dtype: Any) -> Model:
    """Returns the patterns as elements of a dtype."""
    return {name: array.view(dtype) for name, array in model.items()}


def narrow(model: dict[str, NDArray[np.uint32]]) -> Model:
    """Returns the patterns in eight bits, of which the upper five of the magnitude are the key."""
    out: Model = {}
    for name, array in model.items():
        small = ((array >> np.uint32(24)) & np.uint32(0x80)) | (array & np.uint32(0x7F))
        out[name] = small.astype(np.uint8).view(ml_dtypes.float8_e5m2)
    return out


if __name__ == "__main__":
    main()
