"""Compares the size and speed of deltas between checkpoints in BF16 or F32.

``python -m tests.figures.deltas BASE.safetensors NEW.safetensors [BASE NEW ...]`` prints a table for each
pair, such as those that ``tests.figures.train_steps`` and ``tests.figures.fine_tunes`` write: bytes, bits a
weight, size as a multiple of `.sfp`, and MB of checkpoint per second for encoding and decoding. Every
contender is decoded and compared bit for bit. Times are processor times of one thread, the least of
``--rounds`` interleaved rounds; of `.sfp`, also the median. ``--only sfp`` measures one contender.

* entropy: that of the differences of each tensor, given the base's exponent, with the tensor's statistics;
* sfp: the whole file of `write_delta`;
* whole sfp: the whole result, losslessly, in an `.sfp` file;
* indices + values: 4 bytes for the position, and the value, of each change, as trainers send them;
* zstd: level 3; patch: a zstd frame that refers to the base, with long-distance matching, as that of
  ``zstd --patch-from``;
* CRC-32, copy: the speed of only a checksum of the base, and of only a copy of the base into existing memory,
  which bound the speed of any reader that checks or copies its base.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import sfpformat
from sfpformat.coding.changes import kind_of, to_levels
from sfpformat.deltas.tensors import OpenTensors
from sfpformat.dtypes import DTYPES
from sfpformat.encode.sink import MemorySink
from sfpformat.io.checksum import crc32
from sfpformat.numpy import load, save

Patterns = NDArray[np.unsignedinteger]
Model = dict[str, NDArray[Any]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pairs", nargs="+", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help="the name of one contender")
    options = parser.parse_args()
    for base, new in zip(options.pairs[::2], options.pairs[1::2], strict=True):
        compare(base, new, options.rounds, options.only)


def read(path: Path) -> Model:
    """Returns the tensors of a safetensors file."""
    with OpenTensors(path) as opened:
        return {name: opened.tensors.read(name) for name in opened.tensors.specs}


def compare(base_path: Path, new_path: Path, rounds: int, only: str | None) -> None:
    """Prints the table of a pair."""
    base, new = read(base_path), read(new_path)
    old, now = (np.concatenate([patterns(a) for a in model.values()]) for model in (base, new))
    changed = int(np.count_nonzero(old != now))
    bits = entropy(base, new)
    told = f"{changed / len(old):.3%} changed; entropy {bits / len(old):.4f} bits a weight"
    print(f"{base_path} -> {new_path}: {told}")
    targets: list[Model] = []
    contenders: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
        "sfp": (lambda: written(base, new), lambda data: sfpformat.apply_delta(targets[-1], data, threads=1)),
        "whole sfp": (lambda: save(new, threads=1), lambda data: load(data, threads=1)),
        "indices + values": (lambda: raw(old, now), lambda data: placed(old, now, data)),
        "indices + values, zstd": (
            lambda: zstd().ZstdCompressor(3).compress(raw(old, now)),
            lambda data: placed(old, now, zstd().ZstdDecompressor().decompress(data)),
        ),
        "XOR, zstd": (
            lambda: zstd().ZstdCompressor(3).compress((old ^ now).data),
            lambda data: xored(old, now, zstd().ZstdDecompressor().decompress(data)),
        ),
        "zstd patch": (lambda: patch(old, now), lambda data: patched(old, now, data)),
        **zipnn(old, now),
    }
    if only is not None:
        if only not in contenders:
            raise SystemExit(f"{only!r} is none of {', '.join(contenders)}")
        contenders = {only: contenders[only]}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    sizes = {}
    room, floors = np.zeros_like(old), dict[str, float]()
    for _ in range(rounds):
        targets.append({name: array.copy() for name, array in base.items()})
        for name, (encode, decode) in contenders.items():
            begin = time.process_time()
            data = encode()
            middle = time.process_time()
            assert decode(data) is not False, name
            times[name].append((middle - begin, time.process_time() - middle))
            sizes[name] = len(data)
        target = targets.pop()
        assert "sfp" not in sizes or all(
            np.array_equal(patterns(target[name]), patterns(new[name])) for name in new
        )
        for name, work in (("CRC-32", lambda: crc32(old.data)), ("copy", lambda: np.copyto(room, old))):
            begin = time.process_time()
            work()
            floors[name] = min(floors.get(name, np.inf), time.process_time() - begin)
    for name, size in sizes.items():
        speeds = " | ".join(f"{old.nbytes / seconds / 1e6:,.0f}" for seconds in np.min(times[name], axis=0))
        ratio = f"{size / sizes['sfp']:.2f}" if "sfp" in sizes else ""
        print(f"| {name} | {size:,} | {8 * size / len(old):.4f} | {ratio} | {speeds} |")
    if "sfp" in sizes:
        print(f"sfp: {8 * sizes['sfp'] / bits - 1:+.1%} of the entropy")
        medians = (f"{old.nbytes / seconds / 1e6:,.0f}" for seconds in np.median(times["sfp"], axis=0))
        print(f"sfp, median of the rounds: {', '.join(medians)} MB/s")
    speeds = ", ".join(f"{name} {old.nbytes / seconds / 1e6:,.0f}" for name, seconds in floors.items())
    print(f"MB/s: {speeds}")


def patterns(array: NDArray[Any]) -> Patterns:
    """Returns the bit patterns of a tensor, [elements]."""
    return array.reshape(-1).view(f"<u{array.itemsize}")


def entropy(base: Model, new: Model) -> float:
    """Returns the entropy in bits of the differences of each tensor, given the exponents of the base."""
    total = 0.0
    for name, array in base.items():
        old, now = (patterns(model[name]) for model in (base, new))
        if np.array_equal(old, now):
            continue
        kind = kind_of(DTYPES["BF16" if array.itemsize == 2 else "F32"])
        levels = to_levels(old, now, kind)
        exponents = (old >> old.dtype.type(kind.shift)) & old.dtype.type(kind.keys - 1)
        for exponent in np.unique(exponents):
            counts = np.unique(levels[exponents == exponent], return_counts=True)[1]
            total += float((counts * np.log2(counts.sum() / counts)).sum())
    return total


def written(base: Model, new: Model) -> bytes:
    """Returns the bytes of the delta."""
    out = MemorySink()
    sfpformat.write_delta(out, base, new, threads=1)
    return out.data


def raw(old: Patterns, now: Patterns) -> bytes:
    """Returns indices and values of the changes."""
    at = np.flatnonzero(old != now).astype(np.uint32)
    return at.tobytes() + now[at].tobytes()


def placed(old: Patterns, now: Patterns, data: bytes) -> bool:
    """Applies indices and values."""
    count = len(data) // (4 + old.itemsize)
    out = old.copy()
    out[np.frombuffer(data, np.uint32, count)] = np.frombuffer(data, old.dtype, count, 4 * count)
    return bool(np.array_equal(out, now))


def xored(old: Patterns, now: Patterns, data: bytes) -> bool:
    """Applies an exclusive or."""
    return bool(np.array_equal(old ^ np.frombuffer(data, old.dtype), now))


def zstd() -> Any:
    """Returns the package zstandard."""
    return importlib.import_module("zstandard")


def _window(size: int) -> int:
    return min(max((2 * size).bit_length(), 20), 30)


def patch(old: Patterns, now: Patterns) -> bytes:
    """Returns a zstd frame that refers to the base."""
    z = pyzstd()
    options = {
        z.CParameter.compressionLevel: 3,
        z.CParameter.enableLongDistanceMatching: 1,
        z.CParameter.windowLog: _window(old.nbytes),
    }
    base = z.ZstdDict(old.tobytes(), is_raw=True).as_prefix
    return bytes(z.compress(now.tobytes(), options, base))


def patched(old: Patterns, now: Patterns, data: bytes) -> bool:
    """Decodes a frame of `patch`."""
    z = pyzstd()
    base = z.ZstdDict(old.tobytes(), is_raw=True).as_prefix
    found = z.decompress(data, base, {z.DParameter.windowLogMax: 31})
    return bool(np.array_equal(np.frombuffer(found, old.dtype), now))


def pyzstd() -> Any:
    """Returns the package pyzstd, which can refer to a prefix as the option ``--patch-from`` does."""
    return importlib.import_module("pyzstd")


def zipnn(old: Patterns, now: Patterns) -> dict[str, tuple[Callable[[], Any], Callable[[Any], object]]]:
    """Returns ZipNN on the exclusive or, if the package is installed."""
    try:
        package: Any = importlib.import_module("zipnn")
    except ImportError:
        print("zipnn is not installed; its row is missing")
        return {}
    codec = package.ZipNN(bytearray_dtype="bfloat16" if old.itemsize == 2 else "float32", threads=1)
    return {
        "XOR, ZipNN": (
            lambda: codec.compress(bytearray((old ^ now).tobytes())),
            lambda data: xored(old, now, bytes(codec.decompress(data))),
        )
    }


if __name__ == "__main__":
    main()
