"""Models whose tensors are in parts (28.4), and deltas between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sfp_conformance import slow_reader
from sfp_conformance.forge import Forge
from sfp_conformance.slow_reader.parts import Plain, parts_of

from .building import Pair, delta, map_of

Model = dict[str, Plain]  # name -> tensor or part
Structures = dict[str, dict[str, Any]]  # name -> structure
Change = Callable[[list[int]], list[int]]

_BLOCK = 200


def structure_of(entry: dict[str, Any]) -> dict[str, Any]:
    """Returns the structure of a tensor of a file."""
    source = entry["fingerprints"]
    out: dict[str, Any] = {"dtype": entry["dtype"], "mask": int("mask" in entry)}
    out["quantiser"] = source["quantiser"]
    if "count" in source:
        out["count"] = source["count"]
    if "scale" in entry:
        out["scale"] = entry["scale"]
    if "importance" in entry:
        kept = ("over", "role", "quantiser", "count", "dtype")
        out["importance"] = {key: entry["importance"][key] for key in kept if key in entry["importance"]}
    return out


def split(data: bytes, separator: str = "/") -> Model:
    """Returns the parts of all tensors of a file."""
    file, out = slow_reader.read(data), {}
    for entry in file.root["tensors"]:
        for part, plain in parts_of(entry, file.tensors[entry["name"]]).items():
            out[entry["name"] + separator + part if part else entry["name"]] = plain
    return out


def structures_of(data: bytes) -> Structures:
    """Returns the structures of all tensors of a file."""
    file = slow_reader.read(data)
    coded = [entry for entry in file.root["tensors"] if entry["coding"] == "fingerprint"]
    return {entry["name"]: structure_of(entry) for entry in coded}


def changed(model: Model, changes: Mapping[str, Change]) -> Model:
    """Returns a model in which the bit patterns of some tensors or parts are changed."""
    out = dict(model)
    for name, change in changes.items():
        new = change(model[name].patterns())
        shape = model[name].shape if len(new) == len(model[name].patterns()) else [len(new)]
        out[name] = Plain.of(model[name].dtype, shape, new)
    return out


def between(
    base: Model,
    new: Model,
    structures: Structures,
    *,
    separator: str = "/",
    block: int = _BLOCK,
) -> bytes:
    """Builds a delta between two models in parts."""
    pairs = []
    for name in dict.fromkeys([*base, *new]):
        old, now = base.get(name), new.get(name)
        some = now or old
        assert some is not None
        kind = 2 if old and now and (old.dtype, old.shape) != (now.dtype, now.shape) else None
        data = [None if one is None else one.data for one in (old, now)]
        pairs.append(Pair(name, some.dtype, some.shape, data[0], data[1], kind))
    file = Forge.of(delta(pairs, block=block))
    kept = list({repr(one): one for one in structures.values()}.values())
    numbers = [kept.index(structures[pair.name]) + 1 if pair.name in structures else 0 for pair in pairs]
    file.root["features"] = ["delta", "delta-parts"]
    map_of(file).update(separator=separator, structures=kept, structured=numbers)
    return file.build()


def step(every: int) -> Change:
    """Returns a change of the numbers of some survivors by one."""

    def change(old: list[int]) -> list[int]:
        alive = [i for i, p in enumerate(old) if p % 2**31]
        return [p + (-1 if p % 2**31 > 1 else 1) if i in alive[::every] else p for i, p in enumerate(old)]

    return change


def mask(old: list[int]) -> list[int]:
    """Prunes two survivors, and adds two."""
    alive, gone = ([i for i, p in enumerate(old) if bool(p) == one] for one in (True, False))
    new = list(old)
    for i in (alive[3], alive[-1]):
        new[i] = 0
    for i in (gone[2], gone[-2]):
        new[i] = old[alive[0]]
    return new


def put(numbers: list[int], at: int, value: int) -> list[int]:
    """Returns numbers of which one is replaced."""
    return [*numbers[:at], value, *numbers[at + 1 :]]
