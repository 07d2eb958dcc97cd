"""The map `delta` of a file (28.1), without a base."""

from __future__ import annotations

import math
from typing import Any

from sfp_conformance.forge import Forge, raw_part

from ..gallery import PLAIN
from ..suite import Edit, Suite
from .building import Pair, delta, edit_of, map_of, sample


def add(suite: Suite) -> None:
    """Adds the cases of this module to the suite."""
    whole = suite.valid(
        "DLT-001-every-kind",
        "a delta with tensors of every kind",
        delta(sample(), base="step 7", metadata={"step": "8"}),
        *(f"R-DLT-{n:03d}" for n in (2, 3, 4, 6, 7, 8, 16)),
        "R-DIR-002",
    )
    _maps(suite, whole)


def _at_first(key: str, value: object) -> Edit:
    """Returns an edit that replaces the first element of a list of the map."""
    return edit_of(key, lambda old: [value, *old[1:]])


def _edit(**values: Any) -> Edit:
    return lambda file: file.root["delta"].update(values)


def _maps(suite: Suite, whole: str) -> None:
    blank = Forge(
        {
            "features": ["delta"],
            "delta": {"block": 1, "names": [], "shared": b"", "dtypes": [], "shapes": [], "kinds": b""}
            | {"checksums": b"", "pools": []},
        }
    )
    empty = suite.valid("DLT-001-no-tensors", "a delta of an empty model", blank.build(), "R-DLT-005")
    for key in ("block", "names", "shared", "dtypes", "shapes", "kinds", "checksums", "pools"):

        def without(file: Forge, key: str = key) -> None:
            del file.root["delta"][key]

        suite.invalid(f"DIR-002-delta-{key}", f"a delta without `{key}`", whole, without)
        words = f"`{key}` of the wrong type"
        suite.invalid(f"DIR-003-delta-{key}", words, whole, _edit(**{key: "text"}))
    suite.invalid("DIR-003-delta-base", "`base` of the wrong type", whole, _edit(base=b"text"))
    for key in ("dtype", "tensors", "counts", "gaps", "differences"):

        def no_key(file: Forge, key: str = key) -> None:
            del file.root["delta"]["pools"][0][key]

        def wrong(file: Forge, key: str = key) -> None:
            file.root["delta"]["pools"][0][key] = b"text"

        suite.invalid(f"DIR-002-pool-{key}", f"a pool without `{key}`", whole, no_key)
        suite.invalid(f"DIR-003-pool-{key}", f"a pool with `{key}` of the wrong type", whole, wrong)
    items: dict[str, Any] = {"names": 1, "dtypes": 1, "shapes": 1, "pools": "pool"}
    for key, value in items.items():
        edit = _at_first(key, value)
        suite.invalid(
            f"DIR-003-delta-element-of-{key}", f"an element of `{key}` of the wrong type", whole, edit
        )
    edit = edit_of("shapes", lambda old: [["5"], *old[1:]])
    suite.invalid("DIR-003-delta-size", "a size that is a string", whole, edit, tensor="layers.0.weight")
    suite.invalid(
        "DIR-002-delta", "the feature without the map", whole, lambda file: file.root.pop("delta") and None
    )
    suite.invalid(
        "DIR-007-delta", "the map without the feature", whole, lambda file: file.root.pop("features") and None
    )
    suite.invalid("DIR-003-delta", "a map that is an array", whole, lambda file: file.root.update(delta=[]))
    suite.invalid(
        "DIR-007-delta-of-a-model", "the map in a model", PLAIN, lambda file: file.root.update(delta={})
    )
    more = {"x-mine": 1, "x-later": {"a": b"b"}}
    suite.valid(
        "DIR-005-in-a-delta",
        "unknown keys in the map of a delta and of a pool",
        _edited(suite, whole, lambda file: [m.update(more) for m in (map_of(file), *map_of(file)["pools"])]),
    )
    for key, change in {
        "dtypes": lambda old: old[1:],
        "shapes": lambda old: [*old, [1]],
        "kinds": lambda old: old[1:],
        "shared": lambda old: old + b"\0",
        "checksums": lambda old: old + bytes(8),
    }.items():
        suite.invalid(
            f"DLT-001-{key}", f"`{key}` of another length than `names`", whole, edit_of(key, change)
        )
    cut = edit_of("checksums", lambda old: old[:-1])
    suite.invalid("DLT-001-checksums-cut", "`checksums` of a part of eight bytes", whole, cut)
    _names(suite, whole)
    first: dict[str, tuple[str, str, Any]] = {
        "TEN-003-delta": ("dtypes", "an unknown dtype", "BF17"),
        "TEN-005-delta": ("shapes", "more than 2^48 positions", [2**24, 2**24 + 1]),
    }
    for name, (key, words, value) in first.items():
        edit = _at_first(key, value)
        tags = ["future"] if key == "dtypes" else []
        suite.invalid(
            name + "-first", f"the delta lists {words}", whole, edit, tensor="layers.0.weight", tags=tags
        )
    for kind in (b"\5", b"\xff"):

        def of_kind(file: Forge, kind: bytes = kind) -> None:
            map_of(file)["kinds"] = kind + map_of(file)["kinds"][1:]

        words = f"the kind {kind[0]}"
        suite.invalid(f"DLT-003-{kind[0]}", words, whole, of_kind, tensor="layers.0.weight")
    for i, (name, at) in enumerate((("gone", 7), ("new", 10), ("same", 9))):

        def mixed(file: Forge, at: int = at) -> None:
            old = map_of(file)["checksums"]
            map_of(file)["checksums"] = old[: 4 * at] + b"\1" + old[4 * at + 1 :]

        words = f"a checksum that does not fit {name!r}"
        suite.invalid(f"DLT-004-{i}-{name}", words, whole, mixed, tensor=name)
    for block in (0, 2**24 + 1, 2**64 - 1):
        suite.invalid(f"DLT-005-{block}", f"a block of {block}", empty, _edit(block=block))
    suite.valid("DLT-005-greatest", "a block of 2^24", _edited(suite, empty, _edit(block=2**24)))
    _pools(suite, whole)


def _edited(suite: Suite, twin: str, edit: Edit) -> bytes:
    file = Forge.of(suite.cases[twin].data)
    edit(file)
    return file.build()


def _names(suite: Suite, whole: str) -> None:
    def named(*names: str, sizes: bytes) -> Edit:
        return lambda file: map_of(file).update(
            names=[*names, *map_of(file)["names"][len(names) :]], shared=sizes
        )

    plain = Forge.of(suite.cases[whole].data)
    kept = map_of(plain)["shared"]
    twice = named("layers.0.weight", "", sizes=bytes([0, 15]) + kept[2:])
    suite.invalid("DLT-002-twice", "a name twice in the list", whole, twice, tensor="layers.0.weight")
    empty = named("", "layers.0.bias", sizes=bytes([0, 0, *kept[2:]]))
    suite.invalid("TEN-002-delta-empty", "an empty name in the list", whole, empty, plainly="", tensor="")
    suite.invalid(
        "DLT-016-first",
        "the first name shares a byte",
        whole,
        edit_of("shared", lambda old: b"\1" + old[1:]),
    )
    suite.invalid(
        "DLT-016-more",
        "more bytes than the name before has",
        whole,
        edit_of("shared", lambda old: bytes([0, 16]) + old[2:]),
    )
    cut = named("é.0.weight", "\u00a9", sizes=bytes([0, 1]) + kept[2:])
    suite.invalid("DLT-016-character", "a cut inside a character", whole, cut)
    split = [Pair("héllo", "U8", [1], b"a", b"a"), Pair("hé", "U8", [1], b"b", b"b")]
    split += [Pair("hé" + "x" * 400, "U8", [1], b"a", b"a"), Pair("hé" + "x" * 401, "U8", [1], b"b", b"b")]
    suite.valid("DLT-016-long", "names that share whole characters, and 255 bytes", delta(split))
    for limit, names in (("name_bytes", "layers.0.weight"), ("tensors", None), ("rank", "layers.0.weight")):
        force = {limit: {"name_bytes": 14, "tensors": 6, "rank": 1}[limit]}
        only = [
            Pair("layers.0.weight", "U8", [1, 1], b"a", b"a"),
            *(Pair(f"t{i}", "U8", [1], b"a", b"a") for i in range(6)),
        ]
        base = suite.valid(f"DLT-002-within-{limit}", f"a list near the limit {limit}", delta(only))
        suite.invalid(
            f"LIM-002-delta-{limit}",
            f"a list above the limit {limit}",
            base,
            lambda file: file.root.update({"metadata": {"a": "b"}}),
            plainly=None,
            tensor=names,
            in_force=force,
        )


def _pools(suite: Suite, whole: str) -> None:
    def pool(number: int, **values: Any) -> Edit:
        return lambda file: map_of(file)["pools"][number].update(values)

    for tensors in (1, 3, 2**64 - 1):
        words = f"a pool of {tensors} tensors, where 2 are changed"
        suite.invalid(f"DLT-006-{tensors}", words, whole, pool(0, tensors=tensors))
    suite.invalid("DLT-006-dtype", "a pool of a dtype without changed tensors", whole, pool(0, dtype="F16"))
    suite.invalid("DLT-006-none", "no pools", whole, _edit(pools=[]))
    more = edit_of("pools", lambda old: [*old, {**old[0], "tensors": 0}])
    suite.invalid("DLT-006-empty", "a pool without tensors", whole, more)
    for key in ("counts", "gaps", "differences"):
        name = f"{key} 0"
        words = f"a pool whose `{key}` does not exist"
        suite.invalid(f"DLT-007-{key}-missing", words, whole, pool(0, **{key: "nothing"}), tensor="nothing")

        def retyped(file: Forge, name: str = name) -> None:
            part = file.part(name)
            size = part.entry["shape"]
            file.parts[file.parts.index(part)] = raw_part(
                name, "I32", size, bytes(4 * math.prod(size)), chunk=64
            )

        def reshaped(file: Forge, name: str = name, key: str = key) -> None:
            size = math.prod(file.part(name).entry["shape"])
            file.part(name).entry["shape"] = [size] if key == "counts" else [1, size]

        suite.invalid(f"DLT-007-{key}-dtype", f"`{key}` of another dtype", whole, retyped, tensor=name)
        suite.invalid(f"DLT-007-{key}-shape", f"`{key}` of another rank", whole, reshaped, tensor=name)
    block = _edit(block=65)
    suite.invalid("DLT-007-blocks", "`counts` of another number of blocks", whole, block, tensor="counts 0")
    for name in ("new", "other"):

        def gone(file: Forge, name: str = name) -> None:
            file.parts.remove(file.part(name))

        def shaped(file: Forge, name: str = name) -> None:
            entry = file.part(name).entry
            entry["shape"] = [*entry["shape"], 1]

        def typed(file: Forge, name: str = name) -> None:
            entry = file.part(name).entry
            entry["dtype"] = {"U8": "I8", "I16": "U16"}[entry["dtype"]]

        suite.invalid(f"DLT-008-{name}-missing", f"the tensor {name!r} is missing", whole, gone, tensor=name)
        suite.invalid(
            f"DLT-008-{name}-shape", f"the tensor {name!r} has another shape", whole, shaped, tensor=name
        )
        suite.invalid(
            f"DLT-008-{name}-dtype", f"the tensor {name!r} has another dtype", whole, typed, tensor=name
        )

    def extra(file: Forge) -> None:
        file.parts.append(raw_part("stranger", "U8", [1], b"a"))

    suite.invalid("DLT-008-extra", "a tensor that the delta does not use", whole, extra)
    suite.invalid("DLT-008-twice", "a tensor that two pools use", whole, pool(1, gaps="gaps 0"))
