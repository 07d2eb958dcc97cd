"""Lossless size and speed on all-MiniLM-L6-v2, compared with general and numeric compressors.

``python -m tests.figures.lossless`` prints, for F32 and for the same model rounded to BF16, the size relative
to raw bytes, the order-0 limit, the speeds of the reference engine on one thread, and the time of a slice of
1 % relative to the whole. Peers that are not installed are omitted.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import time
from collections.abc import Callable

import numpy as np

import sfpformat
from sfpformat import numpy as sfp
from sfpformat.coding.quantisers import patterns_to_levels

from .model import Tensors, as_bf16, load_f32, matrices, nbytes

_ROUNDS = 3
_SLICED = "embeddings.word_embeddings.weight"


def seconds(work: Callable[[], object]) -> float:
    """The median time of a few runs."""
    times = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


VARIANTS = {
    "default": sfpformat.PRESETS["default"],
    "size": sfpformat.PRESETS["size"],
    "gpu": sfpformat.PRESETS["gpu"],
    "one code a stream": sfpformat.Options(codes=1),
    "no trims": sfpformat.Options(trim=False),
    "segments of 384": sfpformat.Options(segment=384),
    "segments of 768": sfpformat.Options(segment=768),
    "segments of 1,536": sfpformat.Options(segment=1536),
    "eight codes a stream": sfpformat.Options(codes=8),
    "one mantissa bit in the class": sfpformat.Options(mantissa_bits=1),
}


def ours(tensors: Tensors, options: sfpformat.Options) -> dict[str, float]:
    """Returns size and speeds with some options; checks that every bit is restored."""
    data = sfp.save(tensors, options=options, engine="python")
    loaded = sfp.load(data)
    assert all(loaded[name].tobytes() == tensors[name].tobytes() for name in tensors)
    weights = sum(array.size for array in tensors.values())
    encode = seconds(lambda: sfp.save(tensors, options=options, engine="python"))
    decode = seconds(lambda: sfp.load(data, threads=1, engine="python"))
    return {
        "size": len(data) / nbytes(tensors),
        "encode M weights/s": weights / encode / 1e6,
        "decode M weights/s": weights / decode / 1e6,
    }


def order_0_limit(tensors: Tensors, mantissa_bits: int) -> float:
    """Size if sign, mantissa and so many bits of the exponent's class cost their order-0 entropy a tensor."""
    bits = 0.0
    for array in tensors.values():
        width = array.dtype.itemsize * 8
        if array.dtype.kind in "iu" or width not in (16, 32):
            bits += array.size * width
            continue
        extra = width - 8 - mantissa_bits
        levels = patterns_to_levels(array.reshape(-1).view(f"<u{width // 8}"))
        counts = np.bincount((levels >> np.uint64(extra)).astype(np.int64))
        counts = counts[counts > 0]
        bits += float((counts * np.log2(counts.sum() / counts)).sum()) + array.size * extra
    return bits / 8 / nbytes(tensors)


def peers(tensors: Tensors) -> dict[str, float]:
    """Size over raw bytes of each peer that is installed, tensor by tensor."""
    blobs = [array.tobytes() for array in tensors.values()]
    width = "bfloat16" if any(a.dtype.itemsize == 2 for a in tensors.values()) else "float32"
    out = {}
    for name, size in (
        ("zstandard", _zstandard),
        ("zipnn", lambda blob: _zipnn(blob, width)),
        ("pcodec", lambda blob: _pcodec(blob, width)),
    ):
        if importlib.util.find_spec(name if name != "zstandard" else "zstandard"):
            out[name] = sum(map(size, blobs)) / nbytes(tensors)
    return out


def _zstandard(blob: bytes) -> int:
    import zstandard

    return len(zstandard.ZstdCompressor(level=3).compress(blob))


def _zipnn(blob: bytes, dtype: str) -> int:
    from zipnn import ZipNN

    # It changes its input, and does not support very small tensors.
    coder = ZipNN(bytearray_dtype=dtype, input_format="byte", threads=1)
    return min(len(coder.compress(bytearray(blob))), len(blob)) if len(blob) > 4096 else len(blob)


def _pcodec(blob: bytes, dtype: str) -> int:
    from pcodec import ChunkConfig, standalone

    values = np.frombuffer(blob, "<u2" if dtype == "bfloat16" else "<f4")
    if dtype == "bfloat16":  # it has no BF16: the bits are given as integers in the order of the values
        values = np.where(values >> 15, ~values, values | 0x8000).astype(np.uint16)
    return len(standalone.simple_compress(values, ChunkConfig()))


def slice_share(tensors: Tensors) -> float:
    """The time of a slice of 1 % of the greatest tensor's rows over that of the whole."""
    with sfpformat.open(sfp.save({_SLICED: tensors[_SLICED]}), threads=1, engine="python") as file:
        rows = tensors[_SLICED].shape[0]
        first = rows // 3
        part = slice(first, first + rows // 100)
        whole = seconds(lambda: file.get_tensor(_SLICED))
        return seconds(lambda: file.get_slice(_SLICED)[part]) / whole


def main() -> None:
    f32 = load_f32()
    results: dict[str, float | dict[str, float | dict[str, float]]] = {}
    for name, tensors in (("BF16", as_bf16(f32)), ("F32", f32)):
        results[name] = {
            "order-0 limit, exponent": order_0_limit(tensors, 0),
            "order-0 limit, exponent and 1 mantissa bit": order_0_limit(tensors, 1),
            **{f"sfp, {name}": ours(tensors, options) for name, options in VARIANTS.items()},
            **peers(tensors),
        }
    results["slice of 1 %, time over whole"] = slice_share(as_bf16(matrices(f32)))
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
