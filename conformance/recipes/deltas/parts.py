"""Tensors in parts (28.4): the tensors that parts make, and bases and parts that do not fit."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from sfp_conformance import slow_reader
from sfp_conformance.forge import (
    Forge,
    Part,
    exact,
    f32_bytes,
    hand_file,
    hand_part,
    patterns,
    raw_part,
    table_for,
)
from sfp_conformance.slow_reader.parts import Plain

from .. import gallery
from ..suite import Suite
from . import part_maps
from .building import map_of, without_checksum
from .models import Change, Model, Structures, between, changed, mask, put, split, step, structures_of

_NAMES = ("runs", "octets", "uniform", "table", "group", "empty")


def add(suite: Suite) -> None:
    """Adds the cases of this module to the suite."""
    made = gallery.parts()
    own = [made[name] for name in _NAMES]
    base, model, structures = _base(suite, "DLT-021-base", "the base of deltas with tensors in parts", *own)
    levels = {"uniform": step(5), "table": step(7), "group": step(4), "runs": step(6), "octets": step(3)}
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
    masks = dict.fromkeys(("uniform", "table", "runs", "octets", "group"), mask)
    masks["uniform/importance"] = mask
    suite.applied("DLT-021-masks", "other masks", between(model, changed(model, masks), structures), base)
    vectors: dict[str, Change] = {
        "uniform/vectors": lambda old: [*patterns("F32", 0.5), old[1], *patterns("F32", 2.0), *old[3:]],
        "uniform/importance": step(3),
        "table/vectors": lambda old: [old[0], *patterns("F32", 0.125), *old[2:]],
        "group/importance": lambda old: [p + 0x80 if i % 9 == 0 else p for i, p in enumerate(old)],
    }
    words = "other steps, centroids, factors and importances"
    suite.applied("DLT-021-vectors", words, between(model, changed(model, vectors), structures), base)
    separate = split(suite.cases[base].data, "·")
    separated = between(separate, changed(separate, levels), structures, separator="·")
    suite.applied("DLT-018-separator", "another separator", separated, base)
    suite.applied(
        "DLT-021-block", "blocks of 7", between(model, changed(model, levels), structures, block=7), base
    )
    _other_structures(suite, model, structures, base)
    _zeros(suite)
    _narrow(suite)
    _dense(suite)
    part_maps.add(suite)
    _wrong_bases(suite, good)
    _unfit(suite, good, base, model, structures)


def _base(suite: Suite, name: str, words: str, *parts: Part) -> tuple[str, Model, Structures]:
    """Adds a base, and returns its case, its model in parts and its structures."""
    case = suite.valid(name, words, hand_file(*parts))
    data = suite.cases[case].data
    return case, split(data), structures_of(data)


def _masked(name: str, dtype: str, levels: list[int]) -> Part:
    """Returns a tensor with a mask and levels of BF16."""
    entry: dict[str, Any] = {"name": name, "dtype": dtype, "shape": [4, 24], "chunk": 2}
    entry["mask"] = {"kind": "runs", "polarity": 1, **gallery.RUNS}
    entry["fingerprints"] = exact("BF16", **table_for(levels))
    return hand_part(entry, {"fingerprints": levels}, mask=gallery.MASK)


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
    part = _masked("zeros", "BF16", levels)
    base, model, structures = _base(suite, "DLT-018-zeros-base", "survivors that are zero", part)
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
    pruned = changed(model, {"zeros/mask": lambda old: put(old, alive, 0)})
    words = "one pruned position with a weight"
    suite.misfit("DLT-020-pruned-one", words, good, between(model, pruned, structures), base, "zeros")
    whole = dict(changed(filled, {}))
    whole["zeros/mask"] = Plain.of("BOOL", [4, 24], gallery.MASK)
    words = "a part `mask` although no survivor is zero"
    suite.misfit("DLT-020-mask", words, good, between(model, whole, structures), base, "zeros")
    alone = {"zeros": model["zeros"]}
    told = between(alone, changed(alone, {"zeros": mask}), structures)
    words = "a base whose tensor has a part that the delta does not list"
    suite.misfit("DLT-009-part-unlisted", words, good, told, base, "zeros")


def _narrow(suite: Suite) -> None:
    """A coded dtype that widens, and a base with coding `raw`."""
    words = "weights of a narrower coded dtype"
    part = _masked("w", "F32", gallery.fingerprints("BF16"))
    base, model, structures = _base(suite, "DLT-021-narrow-base", words, part)
    new = changed(model, {"w": lambda old: [p + 77 if p and i % 4 == 0 else p for i, p in enumerate(old)]})
    told = between(model, new, structures)
    suite.applied("DLT-021-narrow", words, told, base)
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
    base, model, structures = _base(suite, "DLT-021-dense-base", "tensors without a mask", *parts)
    changes: dict[str, Change] = {"exact": step(4), "uniform": step(3)}
    told = between(model, changed(model, changes), structures)
    suite.applied("DLT-021-dense", "tensors without a mask in parts", told, base)
    zeros = [0 if i % 3 == 0 else level for i, level in enumerate(levels)]
    entry = {**entry, "fingerprints": exact("BF16", **table_for(zeros))}
    words = "a tensor without a mask, with elements of bit pattern 0"
    part = hand_part(entry, {"fingerprints": zeros})
    base, model, structures = _base(suite, "DLT-018-dense-zeros-base", words, part)
    told = between(model, changed(model, {"exact": step(4)}), structures)
    suite.applied("DLT-018-dense-zeros", words + ", in parts", told, base)


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
            return put(old, at, value(old[at]))

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
    unfit("importance", words, "uniform", {"uniform/importance": lambda old: put(old, old.index(0), 1)})
    unfit(
        "no-importance",
        "a survivor without importance",
        "uniform",
        {"uniform/importance": lambda old: [0] * len(old)},
    )
    words = "an importance whose pattern has the highest bit"

    def signed(old: list[int]) -> list[int]:
        return put(old, next(i for i, p in enumerate(old) if p), (1 << 31) + 2)

    unfit("importance-sign", words, "uniform", {"uniform/importance": signed})
    infinite = 0x7F80
    words = "an infinite importance"
    unfit("infinite", words, "group", {"group/importance": lambda old: put(old, 4, infinite)})
    told = between(model, changed(model, {"group": step(3)}), structures)
    at = slow_reader.delta.names_of(map_of(Forge.of(told))).index("group")
    wrong = without_checksum(told, at)
    suite.misfit("DLT-012-parts", "another checksum of a part", good, wrong, base, "group")
