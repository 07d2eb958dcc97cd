"""Describes the contents of a valid file as JSON, and the features that a reader must support for it."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping
from typing import Any

from . import slow_reader
from .slow_reader.delta import result_of
from .slow_reader.keyed import look_ups

Json = dict[str, Any]

# Features that lie outside the profile `core` (SPEC.md chapter 23).
NOT_CORE = {
    "delta",
    "delta-parts",
    "keyed",
    "uniform",
    "table",
    "narrow",
    "group-2",
    "scale",
    "multiplier",
    "windows",
}
SHOWN = 4  # elements shown at each end of an array


def contents(data: bytes) -> tuple[Json, bytes]:
    """Describes the contents of a valid file as the slow reader decodes it, and joins its arrays."""
    file = slow_reader.read(data)
    entries = {entry["name"]: entry for entry in file.root["tensors"]}
    return _described(file.root, {name: (entries[name], tensor) for name, tensor in file.tensors.items()})


def result_contents(delta: bytes, base: bytes) -> tuple[Json, bytes]:
    """Describes the result of a delta and its base, and joins its arrays; same as `contents`.

    Raises:
        slow_reader.Bad: a file is invalid, or the base is another one.
    """
    file, under = slow_reader.read(delta), slow_reader.read(base)
    entries = {entry["name"]: entry for entry in under.root["tensors"]}
    return _described(file.root, result_of(file.root, file.tensors, entries, under.tensors))


def looked_up_contents(data: bytes, keys: list[bytes]) -> tuple[Json, bytes]:
    """Describes what look-ups of keys in all keyed tables of a file return, and joins the arrays."""
    file = slow_reader.read(data)
    found = look_ups(file.root, file.tensors, keys)
    return _described(file.root, {name: ({}, tensor) for name, tensor in found.items()})


def _described(root: Json, found: Mapping[str, tuple[Json, slow_reader.Tensor]]) -> tuple[Json, bytes]:
    """Describes tensors, each given with a map whose keys say what it has: `mask`, `importance`."""
    tensors, arrays = [], bytearray()

    def placed(dtype: str, shape: Iterable[int], raw: bytes) -> Json:
        arrays.extend(raw)
        return {"offset": str(len(arrays) - len(raw)), **array(dtype, shape, raw)}

    for name, (entry, tensor) in found.items():
        out: Json = {"name": name, **placed(tensor.dtype, tensor.shape, tensor.data)}
        if "mask" in entry:
            out["mask"] = placed("U8", tensor.shape, bytes(tensor.mask))
        if "importance" in entry:
            raw = b"".join(struct.pack("<I", slow_reader.pattern_of(x, "F32")) for x in _kept(tensor))
            role, over = entry["importance"]["role"], entry["importance"]["over"]
            out["importance"] = {"role": role, "over": over, **placed("F32", tensor.shape, raw)}
        tensors.append(out)
    return {"metadata": root.get("metadata", {}), "tensors": tensors}, bytes(arrays)


def array(dtype: str, shape: Iterable[int], raw: bytes) -> Json:
    """Describes an array: dtype, shape, size, SHA-256 of little-endian bytes, first and last bit patterns."""
    size = slow_reader.BYTES[dtype]
    patterns = [f"0x{raw[at : at + size][::-1].hex()}" for at in _ends(len(raw) // size, size)]
    half = min(len(patterns), SHOWN)
    return {
        "dtype": dtype,
        "shape": list(map(str, shape)),
        "bytes": str(len(raw)),
        "sha256": hashlib.sha256(raw).hexdigest(),
        "first": patterns[:half],
        "last": patterns[-half:] if half else [],
    }


def _ends(count: int, size: int) -> list[int]:
    """Returns the byte offsets of the first and the last elements, without duplicates."""
    places = sorted({*range(min(SHOWN, count)), *range(max(count - SHOWN, 0), count)})
    return [place * size for place in places]


def _kept(tensor: slow_reader.Tensor) -> Iterable[float]:
    """Returns the importances, with 0 for positions that have none. Keeps the sign of -0."""
    return (0.0 if x is None else x for x in tensor.importance)


def features_of(data: bytes) -> list[str]:
    """Returns the names of the features that a reader must support for a valid file."""
    root, _ = slow_reader.read_directory(data)
    found = set(root.get("features", []))
    for entry in root["tensors"]:
        found |= {entry["coding"], f"dtype-{entry['dtype']}"}
        for stream in slow_reader.streams(entry):
            found |= _stream_features(entry, stream)
        if entry["coding"] == "fingerprint":
            if "scale" in entry:
                found |= {"scale", f"scale-{entry['scale']['per']}"}
            if "importance" in entry:
                importance = entry["importance"]
                found |= {"importance", f"importance-{importance['over']}", importance["role"]}
    return sorted(found)


def _stream_features(entry: Json, stream: str) -> set[str]:
    source = entry[stream]
    found = {f"group-{source['group']}"}
    if stream == "mask":
        found |= {"mask", source["kind"]}
    elif stream == "fingerprints":
        found.add(source["quantiser"])
        if source["quantiser"] == "exact" and source["dtype"] != entry["dtype"]:
            found.add("narrow")
    else:
        found.add(f"importance-by-{source['quantiser']}")
    if len(source["codes"]) > 1:
        found.add("codes")
    if "window" in source:
        found.add("windows")
    if source.get("quantiser") == "exact" and source["trim"]:
        found.add("trim")
    return found
