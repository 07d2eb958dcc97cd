"""Tensors in parts (28.4): structures and lists, and the tensors that parts make."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any

from sfp_conformance import slow_reader
from sfp_conformance.forge import Forge, exact, f32_bytes, hand_file, hand_part, patterns, raw_part, table_for
from sfp_conformance.slow_reader.parts import Plain, parts_of

from .. import gallery
from ..suite import Edit, Suite
from .building import Pair, delta, map_of

Model = dict[str, Plain]  # name -> tensor or part
Structures = dict[str, dict[str, Any]]  # name -> structure
Change = Callable[[list[int]], list[int]]

_NAMES = ("runs", "octets", "uniform", "table", "group", "empty")
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


def _step(every: int) -> Change:
    """Returns a change of the numbers of some survivors by one."""

    def change(old: list[int]) -> list[int]:
        alive = [i for i, p in enumerate(old) if p % 2**31]
        return [p + (-1 if p % 2**31 > 1 else 1) if i in alive[::every] else p for i, p in enumerate(old)]

    return change


def _mask(old: list[int]) -> list[int]:
    """Prunes two survivors, and adds two."""
    alive, gone = ([i for i, p in enumerate(old) if bool(p) == one] for one in (True, False))
    new = list(old)
    for i in (alive[3], alive[-1]):
        new[i] = 0
    for i in (gone[2], gone[-2]):
        new[i] = old[alive[0]]
    return new


def add(suite: Suite) -> None:
    """Adds the cases of this module to the suite."""
    made = gallery.parts()
    base = suite.valid(
        "DLT-021-base", "the base of deltas with tensors in parts", hand_file(*(made[n] for n in _NAMES))
    )
    data = suite.cases[base].data
    model, structures = split(data), structures_of(data)
    levels = {"uniform": _step(5), "table": _step(7), "group": _step(4), "runs": _step(6), "octets": _step(3)}
    good = suite.applied(
        "DLT-021-levels",
        "equal masks, other levels",
        between(model, changed(model, levels), structures),
        base,
        *(f"R-DLT-{n:03d}" for n in (17, 18, 19, 20)),
    )
    same = between(model, model, structures)
    suite.applied("DLT-021-unchanged", "nothing changes", same, base)
    suite.valid("DLT-018-parts", "a list with parts", suite.cases[good].data, "R-DLT-017", "R-DLT-019")
    masks = dict.fromkeys(("uniform", "table", "runs", "octets", "group"), _mask)
    masks["uniform/importance"] = _mask
    suite.applied("DLT-021-masks", "other masks", between(model, changed(model, masks), structures), base)
    vectors: dict[str, Change] = {
        "uniform/vectors": lambda old: [*patterns("F32", 0.5), old[1], *patterns("F32", 2.0), *old[3:]],
        "uniform/importance": _step(3),
        "table/vectors": lambda old: [old[0], *patterns("F32", 0.125), *old[2:]],
        "group/importance": lambda old: [p + 0x80 if i % 9 == 0 else p for i, p in enumerate(old)],
    }
    words = "other steps, centroids, factors and importances"
    suite.applied("DLT-021-vectors", words, between(model, changed(model, vectors), structures), base)
    separated = between(split(data, "·"), changed(split(data, "·"), levels), structures, separator="·")
    suite.applied("DLT-018-separator", "another separator", separated, base)
    suite.applied(
        "DLT-021-block", "blocks of 7", between(model, changed(model, levels), structures, block=7), base
    )
    _other_structures(suite, model, structures, base)
    _zeros(suite)
    _narrow(suite)
    _dense(suite)
    _lists(suite)
    _structures(suite)
    _wrong_bases(suite, good)
    _unfit(suite, good, base, model, structures)


def _other_structures(suite: Suite, model: Model, structures: Structures, base: str) -> None:
    """Importances that appear and disappear, and another number of centroids."""
    own = {name: dict(structure) for name, structure in structures.items()}
    new = dict(model)
    del own["uniform"]["importance"], new["uniform/importance"]
    numbers = new["uniform/vectors"].patterns()
    new["uniform/vectors"] = Plain.of("F32", [len(numbers) - 1], [numbers[0], *numbers[2:]])
    own["runs"]["importance"] = {
        "over": "survivors",
        "role": "metadata",
        "quantiser": "exact",
        "dtype": "F16",
    }
    marks = [0x3C00 + i if p else 0 for i, p in enumerate(new["runs"].patterns())]
    new["runs/importance"] = Plain.of("F16", [4, 24], marks)
    own["table"]["count"], own["table"]["scale"] = 6, {"per": "tensor", "dtype": "F32"}
    factors = new["table/vectors"].patterns()
    numbers = [*factors[:5], *patterns("F32", 9.0), *patterns("F32", 1.5), *factors[29:]]
    new["table/vectors"] = Plain.of("F32", [len(numbers)], numbers)
    own["octets"]["importance"] = {"over": "all", "role": "multiplier", "quantiser": "table", "count": 2}
    new["octets/importance"] = Plain.of("F32", [4, 24], [1 + i % 2 for i in range(96)])
    new["octets/vectors"] = Plain.of("F32", [2], patterns("F32", 0.5, 2.0))
    words = "importances that are added and removed, and other centroids and factors"
    suite.applied("DLT-021-structures", words, between(model, new, own), base)


def _zeros(suite: Suite) -> None:
    """Survivors of bit pattern 0, so that the mask is a part of its own."""
    levels = [0 if i % 5 == 0 else level for i, level in enumerate(gallery.fingerprints("BF16"))]
    entry: dict[str, Any] = {"name": "zeros", "dtype": "BF16", "shape": [4, 24], "chunk": 2}
    entry["mask"] = {"kind": "runs", "polarity": 1, **gallery.RUNS}
    entry["fingerprints"] = exact("BF16", **table_for(levels))
    part = hand_part(entry, {"fingerprints": levels}, mask=gallery.MASK)
    base = suite.valid("DLT-018-zeros-base", "survivors that are zero", hand_file(part))
    data = suite.cases[base].data
    model, structures = split(data), structures_of(data)
    new = changed(model, {"zeros/mask": lambda old: [*old[:9], 1 - old[9] if not old[9] else 1, *old[10:]]})
    good = suite.applied("DLT-018-zeros", "a part `mask` that changes", between(model, new, structures), base)
    words = "survivors that are no longer zero, so that the part `mask` is removed"
    filled = changed(
        model, {"zeros": lambda old: [p or int(m) for p, m in zip(old, gallery.MASK, strict=True)]}
    )
    del filled["zeros/mask"]
    suite.applied("DLT-018-no-zeros", words, between(model, filled, structures), base)
    pruned = changed(model, {"zeros/mask": lambda old: [0 for _ in old]})
    words = "pruned positions with weights"
    suite.misfit("DLT-020-pruned", words, good, between(model, pruned, structures), base, "zeros")
    alive = next(i for i, pattern in enumerate(model["zeros"].patterns()) if pattern)
    pruned = changed(model, {"zeros/mask": lambda old: _at(old, alive, 0)})
    words = "one pruned position with a weight"
    suite.misfit("DLT-020-pruned-one", words, good, between(model, pruned, structures), base, "zeros")
    whole = dict(changed(filled, {}))
    whole["zeros/mask"] = Plain.of("BOOL", [4, 24], gallery.MASK)
    words = "a part `mask` although no survivor is zero"
    suite.misfit("DLT-020-mask", words, good, between(model, whole, structures), base, "zeros")
    alone = {"zeros": model["zeros"]}
    told = between(alone, changed(alone, {"zeros": _mask}), structures)
    words = "a base whose tensor has a part that the delta does not list"
    suite.misfit("DLT-009-part-unlisted", words, good, told, base, "zeros")


def _narrow(suite: Suite) -> None:
    """A coded dtype that widens, and a base with coding `raw`."""
    levels = gallery.fingerprints("BF16")
    entry: dict[str, Any] = {"name": "w", "dtype": "F32", "shape": [4, 24], "chunk": 2}
    entry["mask"] = {"kind": "runs", "polarity": 1, **gallery.RUNS}
    entry["fingerprints"] = exact("BF16", **table_for(levels))
    part = hand_part(entry, {"fingerprints": levels}, mask=gallery.MASK)
    base = suite.valid("DLT-021-narrow-base", "weights of a narrower coded dtype", hand_file(part))
    data = suite.cases[base].data
    model, structures = split(data), structures_of(data)
    new = changed(model, {"w": lambda old: [p + 77 if p and i % 4 == 0 else p for i, p in enumerate(old)]})
    told = between(model, new, structures)
    suite.applied("DLT-021-narrow", "weights of a narrower coded dtype", told, base)
    plain = hand_file(raw_part("w", "F32", [4, 24], model["w"].data, chunk=64))
    raw = suite.valid("DLT-021-raw-base", "the same weights with coding `raw`", plain)
    suite.applied("DLT-021-raw", "a base with coding `raw`", told, raw)


def _dense(suite: Suite) -> None:
    """Tensors without a mask: lossless, and with levels."""
    levels = gallery.fingerprints("BF16")
    count = len(levels)
    entry: dict[str, Any] = {"name": "exact", "dtype": "BF16", "shape": [count], "chunk": 2}
    entry["fingerprints"] = exact("BF16", **table_for(levels))
    other: dict[str, Any] = {"name": "uniform", "dtype": "F16", "shape": [count], "chunk": 2}
    numbers = [2 + i % 7 for i in range(count)]
    other["fingerprints"] = {"quantiser": "uniform", "step": f32_bytes(0.5), **table_for(numbers)}
    parts = [hand_part(entry, {"fingerprints": levels}), hand_part(other, {"fingerprints": numbers})]
    base = suite.valid("DLT-021-dense-base", "tensors without a mask", hand_file(*parts))
    data = suite.cases[base].data
    model, structures = split(data), structures_of(data)
    changes: dict[str, Change] = {"exact": _step(4), "uniform": _step(3)}
    told = between(model, changed(model, changes), structures)
    suite.applied("DLT-021-dense", "tensors without a mask in parts", told, base)
    zeros = [0 if i % 3 == 0 else level for i, level in enumerate(levels)]
    entry = {**entry, "fingerprints": exact("BF16", **table_for(zeros))}
    words = "a tensor without a mask, with elements of bit pattern 0"
    base = suite.valid(
        "DLT-018-dense-zeros-base", words, hand_file(hand_part(entry, {"fingerprints": zeros}))
    )
    data = suite.cases[base].data
    model, structures = split(data), structures_of(data)
    told = between(model, changed(model, {"exact": _step(4)}), structures)
    suite.applied("DLT-018-dense-zeros", words + ", in parts", told, base)


def _edit(key: str, change: Callable[[Any], Any]) -> Edit:
    def edit(file: Forge) -> None:
        map_of(file)[key] = change(map_of(file)[key])

    return edit


def _longer(at: int) -> Callable[[Any], Any]:
    """Returns a change of shapes that adds a dimension to one."""

    def change(old: list[Any]) -> list[Any]:
        return [*old[:at], [*old[at], 1], *old[at + 1 :]]

    return change


def _without(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda structure: structure.pop(key)


def _with(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda structure: structure.update(values)


def _of_importance(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda structure: structure["importance"].update({key: "new"})


def _at(numbers: list[int], at: int, value: int) -> list[int]:
    return [*numbers[:at], value, *numbers[at + 1 :]]


def _lists(suite: Suite) -> None:
    whole = "y-DLT-018-parts"
    file = Forge.of(suite.cases[whole].data)
    names = slow_reader.delta.names_of(map_of(file))
    at = {name: names.index(name) for name in names}
    for key in ("separator", "structures", "structured"):

        def without(file: Forge, key: str = key) -> None:
            del map_of(file)[key]

        suite.invalid(f"DIR-002-parts-{key}", f"a delta in parts without `{key}`", whole, without)
        words = f"`{key}` of the wrong type"
        suite.invalid(f"DIR-003-parts-{key}", words, whole, _edit(key, lambda old: b"text"))
    wrong = _edit("structures", lambda old: [*old, 5])
    suite.invalid("DIR-003-parts-structure", "a structure that is a number", whole, wrong)
    wrong = _edit("structured", lambda old: ["1", *old[1:]])
    suite.invalid("DIR-003-parts-number", "a number of a structure that is a string", whole, wrong)
    words = "structures without the feature"
    suite.invalid("DIR-007-parts", words, whole, lambda file: file.root.update(features=["delta"]))
    suite.invalid(
        "DLT-017-fewer", "fewer numbers than names", whole, _edit("structured", lambda old: old[:-1])
    )
    wrong = _edit("structured", lambda old: _at(old, 0, 100))
    suite.invalid("DLT-017-number", "a structure that does not exist", whole, wrong, tensor=names[0])
    wrong = _edit("structured", lambda old: [2**64 - 1 if n == old[0] else n for n in old])
    suite.invalid("DLT-017-greatest", "the greatest number of a structure", whole, wrong, tensor=names[0])
    for name, part in (("uniform", "importance"), ("uniform", "vectors"), ("table", "vectors")):
        own = f"{name}/{part}"

        def renamed(file: Forge, own: str = own) -> None:
            pairs = zip(map_of(file)["names"], names, strict=True)
            map_of(file)["names"] = [rest + "x" if name == own else rest for rest, name in pairs]

        words = f"the part `{part}` of {name!r} is missing"
        suite.invalid(f"DLT-018-no-{name}-{part}", words, whole, renamed, tensor=own)
        wrong = _edit("shapes", _longer(at[own]))
        words = f"the part `{part}` of {name!r} has another shape"
        suite.invalid(f"DLT-018-shape-{name}-{part}", words, whole, wrong, tensor=own)
    wrong = _edit("structured", lambda old: _at(old, at["uniform/vectors"], old[at["runs"]]))
    words = "a part with a structure"
    suite.invalid("DLT-018-structured-part", words, whole, wrong, tensor="uniform/vectors")
    wrong = _edit("structured", lambda old: _at(old, at["octets"], old[at["runs"]]))
    words = "weights of another dtype than the structure's"
    suite.invalid("DLT-018-dtype", words, whole, wrong, tensor="octets")


def _structures(suite: Suite) -> None:
    whole = "y-DLT-018-parts"
    found = map_of(Forge.of(suite.cases[whole].data))["structures"]
    place = {
        "exact": next(i for i, s in enumerate(found) if s["quantiser"] == "exact"),
        "uniform": next(
            i for i, s in enumerate(found) if s["quantiser"] == "uniform" and s.get("importance")
        ),
        "table": next(i for i, s in enumerate(found) if s["quantiser"] == "table"),
        "group": next(i for i, s in enumerate(found) if s.get("scale", {}).get("per") == "group"),
    }

    def at(kind: str, change: Callable[[dict[str, Any]], object]) -> Edit:
        def edit(file: Forge) -> None:
            change(map_of(file)["structures"][place[kind]])

        return edit

    def invalid(name: str, words: str, kind: str, change: Callable[[dict[str, Any]], object]) -> None:
        suite.invalid(name, words, whole, at(kind, change))

    for key in ("dtype", "mask", "quantiser"):
        invalid(f"DIR-002-structure-{key}", f"a structure without `{key}`", "exact", _without(key))
        words = f"`{key}` of a structure of the wrong type"
        invalid(f"DIR-003-structure-{key}", words, "exact", _with(**{key: b"x"}))
    invalid("DIR-002-structure-count", "a table without `count`", "table", lambda s: s.pop("count"))
    for key in ("scale", "importance"):
        words = f"`{key}` of a structure of the wrong type"
        invalid(f"DIR-003-structure-{key}", words, "uniform", _with(**{key: "x"}))
    invalid("DIR-007-structure-count", "`count` with `uniform`", "uniform", lambda s: s.update(count=2))
    scale = {"per": "tensor", "dtype": "F32"}
    invalid("DIR-007-structure-scale", "a scale with `exact`", "exact", lambda s: s.update(scale=scale))
    words = "a size without groups"
    invalid("DIR-007-structure-size", words, "uniform", lambda s: s["scale"].update(size=3))
    words = "a size of 0"
    invalid("SCL-002-structure", words, "group", lambda s: s["scale"].update(size=0))
    words = "a dtype in an importance with `uniform`"
    invalid("DIR-007-structure-dtype", words, "uniform", lambda s: s["importance"].update(dtype="F32"))
    words = "a quantiser of factors"
    invalid("DIR-007-structure-factors", words, "table", lambda s: s["importance"].update(quantiser="exact"))
    for value in (2, 2**64 - 1):
        invalid(f"DLT-019-{value}", f"a `mask` of {value}", "exact", _with(mask=value))
    words = "an unknown dtype of a structure"
    suite.invalid(
        "TEN-003-structure", words, whole, at("exact", lambda s: s.update(dtype="F31")), tags=["future"]
    )
    invalid("TEN-010-structure", "a structure of integers", "exact", lambda s: s.update(dtype="I32"))
    words = "an unknown quantiser of a structure"
    invalid("QNT-001-structure", words, "exact", lambda s: s.update(quantiser="trellis"))
    for count in (0, 65537):
        words = f"a table of {count} centroids"
        invalid(f"QNT-004-structure-{count}", words, "table", _with(count=count))
    words = "an unknown word in a scale"
    invalid("SCL-001-structure", words, "uniform", lambda s: s["scale"].update(per="plane"))
    words = "factors of F64"
    invalid("SCL-003-structure", words, "uniform", lambda s: s["scale"].update(dtype="F64"))
    for key, clause in (("over", "IMP-001"), ("role", "IMP-002")):
        words = f"an unknown `{key}` of an importance"
        invalid(f"{clause}-structure", words, "uniform", _of_importance(key))
    words = "an exact importance of F64"
    invalid("IMP-003-structure-exact", words, "group", lambda s: s["importance"].update(dtype="F64"))
    words = "an exact importance of an unknown dtype"
    later = at("group", lambda s: s["importance"].update(dtype="F31"))
    suite.invalid("TEN-003-structure-importance", words, whole, later, tags=["future"])
    words = "factors of an importance of F64"
    invalid("IMP-003-structure", words, "table", lambda s: s["importance"].update(dtype="F64"))
    more = {"x-mine": 1}
    file = Forge.of(suite.cases[whole].data)
    for structure in map_of(file)["structures"]:
        structure.update(more)
    suite.valid("DIR-005-structure", "unknown keys in structures", file.build())


def _wrong_bases(suite: Suite, good: str) -> None:
    data = suite.cases[good].data
    weights = split(hand_file(*(gallery.parts()[name] for name in _NAMES)))["group"].data

    def with_base(slug: str, why: str, change: Callable[[dict[str, Any]], None], tensor: str) -> None:
        made = gallery.parts()
        change(made)
        file = hand_file(*(made[name] for name in (*_NAMES, "extra") if name in made))
        base = suite.valid(f"DLT-009-parts-{slug}-base", why, file)
        suite.misfit(f"DLT-009-parts-{slug}", why, good, data, base, tensor)

    def step(made: dict[str, Any]) -> None:
        made["group"].entry["fingerprints"]["step"] = f32_bytes(0.5)

    def unmasked(made: dict[str, Any]) -> None:
        del made["group"]

    def plain(made: dict[str, Any]) -> None:
        made["group"] = raw_part("group", "F32", [4, 24], weights, chunk=64)

    def extra(made: dict[str, Any]) -> None:
        made["extra"] = raw_part("group/vectors", "U8", [1], b"a")

    with_base("step", "another step", step, "group/vectors")
    with_base("missing", "a tensor in parts is missing", unmasked, "group")
    with_base("raw", "a tensor in parts is raw", plain, "group/importance")
    with_base("name", "the name of a part is that of another tensor", extra, "group/vectors")


def _unfit(suite: Suite, good: str, base: str, model: Model, structures: Structures) -> None:
    def unfit(slug: str, why: str, tensor: str, changes: dict[str, Change]) -> None:
        told = between(model, changed(model, changes), structures)
        suite.misfit(f"DLT-020-{slug}", why, good, told, base, tensor)

    def first_alive(value: Callable[[int], int]) -> Change:
        def change(old: list[int]) -> list[int]:
            at = next(i for i, p in enumerate(old) if p)
            return _at(old, at, value(old[at]))

        return change

    unfit("level", "a level above the number of centroids", "table", {"table": first_alive(lambda p: 6)})
    unfit("zero", "a level without a number", "group", {"group": first_alive(lambda p: 1 << 31)})
    words = "a step whose product with the greatest level is not finite"
    big = struct.unpack("<I", f32_bytes(3e38))[0]
    unfit("step", words, "group", {"group/vectors": lambda old: [big, *old[1:]]})
    unfit("step-zero", "a step of 0", "group", {"group/vectors": lambda old: [0, *old[1:]]})
    unfit(
        "order", "centroids out of order", "table", {"table/vectors": lambda old: [old[1], old[0], *old[2:]]}
    )
    nan = 0x7FC00000
    unfit(
        "nan", "a factor that is not a number", "uniform", {"uniform/vectors": lambda old: [*old[:-1], nan]}
    )
    words = "a factor that is not a number of F16"
    unfit("factor", words, "uniform", {"uniform/vectors": lambda old: [*old[:-1], old[-1] + 1]})
    words = "an importance of a pruned position"
    unfit("importance", words, "uniform", {"uniform/importance": lambda old: _at(old, old.index(0), 1)})
    unfit(
        "no-importance",
        "a survivor without importance",
        "uniform",
        {"uniform/importance": lambda old: [0] * len(old)},
    )
    words = "an importance whose pattern has the highest bit"

    def signed(old: list[int]) -> list[int]:
        return _at(old, next(i for i, p in enumerate(old) if p), (1 << 31) + 2)

    unfit("importance-sign", words, "uniform", {"uniform/importance": signed})
    infinite = 0x7F80
    words = "an infinite importance"
    unfit("infinite", words, "group", {"group/importance": lambda old: _at(old, 4, infinite)})
    told = between(model, changed(model, {"group": _step(3)}), structures)
    file = Forge.of(told)
    checksums = map_of(file)["checksums"]
    at = slow_reader.delta.names_of(map_of(file)).index("group")
    map_of(file)["checksums"] = checksums[: 8 * at + 4] + bytes(4) + checksums[8 * at + 8 :]
    suite.misfit("DLT-012-parts", "another checksum of a part", good, file.build(), base, "group")
