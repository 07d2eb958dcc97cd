"""Chapter 28: deltas, alone and with their base."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sfp_conformance.forge import Entry, Forge, Part, exact, hand_part, raw_part, table, table_for
from sfp_conformance.slow_reader import BYTES
from sfp_conformance.slow_reader.delta import (
    ADDED,
    CHANGED,
    REMOVED,
    REPLACED,
    STORED,
    UNCHANGED,
    element,
    order,
)

from .encode import elements
from .gallery import PLAIN
from .numbers import specials
from .suite import Edit, Suite

Dense = Callable[[int, int], bool]  # number of levels and of elements of a bucket -> whether it is dense


@dataclass
class Pair:
    """A tensor in the base and in the result: bytes, or None if it does not exist."""

    name: str
    dtype: str
    shape: list[int]
    base: bytes | None
    new: bytes | None
    kind: int | None = None

    @property
    def told(self) -> int:
        """The kind: the given one, or what the bytes say."""
        if self.kind is not None:
            return self.kind
        if self.base is None or self.new is None:
            return ADDED if self.base is None else REMOVED
        return UNCHANGED if self.base == self.new else CHANGED


def few(levels: int, size: int) -> bool:
    """Makes a bucket dense if more than half of its elements change."""
    return 2 * levels > size


def coded(
    block: int, dtype: str, old: bytes, new: bytes, dense: Dense
) -> tuple[list[int], list[int], list[int]]:
    """Codes the elements of a pool (28.2). Returns counts, gaps and levels."""
    w, e = element(dtype)
    size = w // 8
    counts: list[int] = []
    gaps: list[int] = []
    levels: list[int] = []
    for first in range(0, len(old) // size, block):
        buckets: list[list[int]] = [[] for _ in range(1 << e)]
        for at in range(first, min(first + block, len(old) // size)):
            b, n = (int.from_bytes(data[at * size :][:size], "little") for data in (old, new))
            d = (order(n, w, e) - order(b, w, e)) % (1 << w)
            key = ((b - 1) % (1 << (w - 1))) >> (w - 1 - e) if e else 0
            buckets[key].append(2 * d % (1 << w) if d < 1 << (w - 1) else 2 * ((1 << w) - d) - 1)
        for bucket in buckets:
            places = [i for i, level in enumerate(bucket) if level]
            whole = bool(bucket) and dense(len(places), len(bucket))
            counts.append(2 * len(bucket) + 1 if whole else 2 * len(places))
            levels += bucket if whole else [bucket[i] for i in places]
            gaps += (
                [] if whole else [i - before - 1 for before, i in zip([-1, *places], places, strict=False)]
            )
    return counts, gaps, levels


def numbers_part(name: str, dtype: str, shape: list[int], numbers: list[int]) -> Part:
    """Encodes a tensor of numbers."""
    if not numbers or (dtype == "F64" and max(numbers) - min(numbers) >= 1 << 56):
        size = BYTES[dtype]
        patterns = [n >> 1 | (n & 1) << (8 * size - 1) for n in numbers]
        raw = b"".join(pattern.to_bytes(size, "little") for pattern in patterns)
        return raw_part(name, dtype, shape, raw, chunk=64)
    one_class = max(numbers) == min(numbers)
    own = table([0], base=numbers[0]) if one_class else table_for(numbers)
    entry: Entry = {
        "name": name,
        "dtype": dtype,
        "shape": shape,
        "chunk": 64,
        "fingerprints": exact(dtype, **own),
    }
    return hand_part(entry, {"fingerprints": numbers})


def shared(names: list[str]) -> list[int]:
    """Returns the number of bytes that each name shares with the one before, in whole characters."""
    out = []
    for before, name in zip(["", *names], names, strict=False):
        size = 0
        while size < min(len(before), len(name), 255) and before[size] == name[size]:
            size += 1
        while len(name[:size].encode()) > 255:
            size -= 1
        out.append(len(name[:size].encode()))
    return out


def delta(
    pairs: list[Pair],
    *,
    block: int = 32,
    dense: Dense = few,
    pools: list[tuple[str, int]] | None = None,
    base: str | None = None,
    metadata: dict[str, str] | None = None,
) -> bytes:
    """Builds a delta from tensors.

    Args:
        pools: dtype and number of tensors of each pool; None makes one pool for each dtype.
    """
    changed = [pair for pair in pairs if pair.told == CHANGED]
    if pools is None:
        dtypes = list(dict.fromkeys(pair.dtype for pair in changed))
        pools = [(dtype, sum(pair.dtype == dtype for pair in changed)) for dtype in dtypes]
    rest = {dtype: [pair for pair in changed if pair.dtype == dtype] for dtype, _ in pools}
    parts: list[Part] = []
    maps: list[dict[str, Any]] = []
    for number, (dtype, count) in enumerate(pools):
        members, rest[dtype] = rest[dtype][:count], rest[dtype][count:]
        old, new = (
            b"".join(own) for own in zip(*((p.base or b"", p.new or b"") for p in members), strict=True)
        )
        counts, gaps, levels = coded(block, dtype, old, new, dense)
        names = {key: f"{key} {number}" for key in ("counts", "gaps", "differences")}
        w, e = element(dtype)
        parts.append(numbers_part(names["counts"], "F32", [len(counts) >> e, 1 << e], counts))
        parts.append(numbers_part(names["gaps"], "F32", [len(gaps)], gaps))
        parts.append(numbers_part(names["differences"], STORED[w], [len(levels)], levels))
        maps.append({"dtype": dtype, "tensors": count, **names})
    for pair in pairs:
        if pair.told in (REPLACED, ADDED):
            parts.append(raw_part(pair.name, pair.dtype, pair.shape, pair.new or b"", chunk=64))
    names_ = [pair.name for pair in pairs]
    sizes = shared(names_)
    root: dict[str, Any] = {
        "features": ["delta"],
        "delta": {
            "block": block,
            "names": [name.encode()[size:].decode() for name, size in zip(names_, sizes, strict=True)],
            "shared": bytes(sizes),
            "dtypes": [pair.dtype for pair in pairs],
            "shapes": [pair.shape for pair in pairs],
            "kinds": bytes(pair.told for pair in pairs),
            "checksums": b"".join(
                struct.pack(
                    "<II", *(zlib.crc32(data) if data is not None else 0 for data in (pair.base, pair.new))
                )
                for pair in pairs
            ),
            "pools": maps,
            **({} if base is None else {"base": base}),
        },
        **({} if metadata is None else {"metadata": metadata}),
    }
    return Forge(root, parts).build()


def base_of(pairs: list[Pair]) -> bytes:
    """Returns the file of the base."""
    parts = [raw_part(p.name, p.dtype, p.shape, p.base, chunk=64) for p in pairs if p.base is not None]
    return Forge({}, parts).build()


def stepped(dtype: str, raw: bytes, every: int, seed: int = 3) -> bytes:
    """Returns elements of which about one in ``every`` differs from ``raw``, mostly by a few units."""
    w, _ = element(dtype)
    size, state, out = w // 8, seed, b""
    for at in range(0, len(raw), size):
        pattern = int.from_bytes(raw[at : at + size], "little")
        state = (state * 1103515245 + 12345) % 2**31
        if (state >> 8) % every == 0:
            step = 1 + (state >> 16) % (300 if state % 11 == 0 else 4)
            pattern = (
                pattern ^ 1 if dtype == "BOOL" else (pattern + (step if state & 64 else -step)) % (1 << w)
            )
        out += pattern.to_bytes(size, "little")
    return out


def sample() -> list[Pair]:
    """Returns tensors of every kind, in several dtypes."""
    weights = elements("BF16", 100)
    return [
        Pair("layers.0.weight", "BF16", [5, 20], weights, stepped("BF16", weights, 3)),
        Pair("layers.0.bias", "F32", [7], elements("F32", 7), stepped("F32", elements("F32", 7), 2)),
        Pair("layers.1.weight", "BF16", [30], weights[:60], stepped("BF16", weights[:60], 1, 5)),
        Pair("gone", "F16", [2], bytes(4), None),
        Pair("same", "I32", [2, 3], bytes(range(24)), bytes(range(24))),
        Pair("new", "U8", [3], None, b"abc"),
        Pair("other", "I16", [4], elements("I16", 4), bytes(range(8)), REPLACED),
    ]


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
    _applied(suite)


def _at_first(key: str, value: object) -> Edit:
    """Returns an edit that replaces the first element of a list of the map."""
    return _changed(key, lambda old: [value, *old[1:]])


def _edit(**values: Any) -> Edit:
    return lambda file: file.root["delta"].update(values)


def _changed(key: str, change: Callable[[Any], Any]) -> Edit:
    """Returns an edit that replaces the value of a key of the map by a function of it."""

    def edit(file: Forge) -> None:
        file.root["delta"][key] = change(file.root["delta"][key])

    return edit


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
    edit = _changed("shapes", lambda old: [["5"], *old[1:]])
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
        _edited(suite, whole, lambda file: [m.update(more) for m in (_map(file), *_map(file)["pools"])]),
    )
    for key, change in {
        "dtypes": lambda old: old[1:],
        "shapes": lambda old: [*old, [1]],
        "kinds": lambda old: old[1:],
        "shared": lambda old: old + b"\0",
        "checksums": lambda old: old + bytes(8),
    }.items():
        suite.invalid(
            f"DLT-001-{key}", f"`{key}` of another length than `names`", whole, _changed(key, change)
        )
    cut = _changed("checksums", lambda old: old[:-1])
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
            _map(file)["kinds"] = kind + _map(file)["kinds"][1:]

        words = f"the kind {kind[0]}"
        suite.invalid(f"DLT-003-{kind[0]}", words, whole, of_kind, tensor="layers.0.weight")
    for i, (name, at) in enumerate((("gone", 7), ("new", 10), ("same", 9))):

        def mixed(file: Forge, at: int = at) -> None:
            old = _map(file)["checksums"]
            _map(file)["checksums"] = old[: 4 * at] + b"\1" + old[4 * at + 1 :]

        words = f"a checksum that does not fit {name!r}"
        suite.invalid(f"DLT-004-{i}-{name}", words, whole, mixed, tensor=name)
    for block in (0, 2**24 + 1, 2**64 - 1):
        suite.invalid(f"DLT-005-{block}", f"a block of {block}", empty, _edit(block=block))
    suite.valid("DLT-005-greatest", "a block of 2^24", _edited(suite, empty, _edit(block=2**24)))
    _pools(suite, whole)


def _map(file: Forge) -> dict[str, Any]:
    found: dict[str, Any] = file.root["delta"]
    return found


def _edited(suite: Suite, twin: str, edit: Edit) -> bytes:
    file = Forge.of(suite.cases[twin].data)
    edit(file)
    return file.build()


def _names(suite: Suite, whole: str) -> None:
    def named(*names: str, sizes: bytes) -> Edit:
        return lambda file: _map(file).update(
            names=[*names, *_map(file)["names"][len(names) :]], shared=sizes
        )

    plain = Forge.of(suite.cases[whole].data)
    kept = _map(plain)["shared"]
    twice = named("layers.0.weight", "", sizes=bytes([0, 15]) + kept[2:])
    suite.invalid("DLT-002-twice", "a name twice in the list", whole, twice, tensor="layers.0.weight")
    empty = named("", "layers.0.bias", sizes=bytes([0, 0, *kept[2:]]))
    suite.invalid("TEN-002-delta-empty", "an empty name in the list", whole, empty, plainly="", tensor="")
    suite.invalid(
        "DLT-016-first",
        "the first name shares a byte",
        whole,
        _changed("shared", lambda old: b"\1" + old[1:]),
    )
    suite.invalid(
        "DLT-016-more",
        "more bytes than the name before has",
        whole,
        _changed("shared", lambda old: bytes([0, 16]) + old[2:]),
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
        return lambda file: _map(file)["pools"][number].update(values)

    for tensors in (1, 3, 2**64 - 1):
        words = f"a pool of {tensors} tensors, where 2 are changed"
        suite.invalid(f"DLT-006-{tensors}", words, whole, pool(0, tensors=tensors))
    suite.invalid("DLT-006-dtype", "a pool of a dtype without changed tensors", whole, pool(0, dtype="F16"))
    suite.invalid("DLT-006-none", "no pools", whole, _edit(pools=[]))
    more = _changed("pools", lambda old: [*old, {**old[0], "tensors": 0}])
    suite.invalid("DLT-006-empty", "a pool without tensors", whole, more)
    for key in ("counts", "gaps", "differences"):
        name = f"{key} 0"
        words = f"a pool whose `{key}` does not exist"
        suite.invalid(f"DLT-007-{key}-missing", words, whole, pool(0, **{key: "nothing"}), tensor="nothing")

        def retyped(file: Forge, name: str = name) -> None:
            part = file.part(name)
            size = part.entry["shape"]
            file.parts[file.parts.index(part)] = raw_part(
                name, "I32", size, bytes(4 * _product(size)), chunk=64
            )

        def reshaped(file: Forge, name: str = name, key: str = key) -> None:
            size = _product(file.part(name).entry["shape"])
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


def _product(sizes: list[int]) -> int:
    out = 1
    for size in sizes:
        out *= size
    return out


# ------------------------------------------------------------------------------------------ with a base


def _applied(suite: Suite) -> None:
    pairs = sample()
    base = suite.valid("DLT-013-base", "the base of the deltas below", base_of(pairs))
    good = suite.applied(
        "DLT-013-every-kind",
        "every kind of tensor",
        delta(pairs),
        base,
        "R-DLT-009",
        "R-DLT-010",
        "R-DLT-011",
        "R-DLT-012",
        "R-DLT-014",
        "R-DLT-015",
    )
    suite.applied("DLT-013-all-dense", "dense buckets alone", delta(pairs, dense=lambda *_: True), base)
    suite.applied("DLT-013-all-sparse", "sparse buckets alone", delta(pairs, dense=lambda *_: False), base)
    for block in (1, 7, 2**24):
        suite.applied(f"DLT-013-block-{block}", f"blocks of {block}", delta(pairs, block=block), base)
    pools = [("BF16", 1), ("F32", 1), ("BF16", 1)]
    suite.applied("DLT-013-two-pools", "two pools of a dtype", delta(pairs, pools=pools), base)
    none = Pair("none", "BF16", [0, 3], b"", b"", CHANGED)
    own_base = suite.valid("DLT-013-empty-base", "an empty tensor", base_of([*pairs[:1], none, *pairs[2:3]]))
    suite.applied(
        "DLT-013-empty", "an empty tensor in a pool", delta([*pairs[:1], none, *pairs[2:3]]), own_base
    )
    for dtype in BYTES:
        w, e = element(dtype)
        raw = elements(dtype, 60)
        if e and dtype in ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"):
            raw += b"".join(p.to_bytes(w // 8, "little") for p in specials(dtype)) + bytes(w)
        size = len(raw) // BYTES[dtype]
        own = [Pair("w", dtype, [size], raw, stepped(dtype, raw, 4))]
        of_dtype = suite.valid(f"DLT-013-{dtype}-base", f"{dtype}", base_of(own))
        suite.applied(f"DLT-013-{dtype}", f"differences of {dtype}", delta(own), of_dtype)
        if e:
            flipped = bytes(byte ^ (0x80 if i % (w // 8) == w // 8 - 1 else 0) for i, byte in enumerate(raw))
            signs = [Pair("w", dtype, [size], raw, flipped)]
            suite.applied(f"DLT-013-{dtype}-signs", f"{dtype} with the other sign", delta(signs), of_dtype)
    _wrong_bases(suite, good, pairs)
    _unfit(suite, good, base)


def _wrong_bases(suite: Suite, good: str, pairs: list[Pair]) -> None:
    def with_base(slug: str, why: str, change: Callable[[list[Pair]], object], tensor: str) -> None:
        own = [Pair(**vars(pair)) for pair in pairs]
        change(own)
        base = suite.valid(f"DLT-009-{slug}-base", why, base_of(own))
        suite.misfit(f"DLT-009-{slug}", why, good, suite.cases[good].data, base, tensor)

    def element_of(number: int) -> Callable[[list[Pair]], object]:
        def change(own: list[Pair]) -> None:
            data = own[number].base or b""
            own[number].base = data[:-1] + bytes([data[-1] ^ 1])

        return change

    for number, name in ((0, "layers.0.weight"), (3, "gone"), (4, "same"), (6, "other")):
        with_base(
            f"element-of-{name.split('.')[0]}", f"another element of {name!r}", element_of(number), name
        )
    with_base("missing", "a tensor is missing", lambda own: own.pop(4), "same")
    with_base("extra", "one more tensor", lambda own: own.append(Pair("more", "U8", [1], b"a", None)), "more")
    with_base("shape", "another shape", lambda own: setattr(own[4], "shape", [3, 2]), "same")
    with_base("dtype", "another dtype", lambda own: setattr(own[4], "dtype", "U32"), "same")

    def replaced_otherwise(own: list[Pair]) -> None:
        own[6].dtype, own[6].shape = "F64", [1]
        element_of(6)(own)

    with_base("replaced-otherwise", "another replaced tensor, of another dtype", replaced_otherwise, "other")
    with_base("added", "the base has an added tensor", lambda own: setattr(own[5], "base", b"abc"), "new")

    def result(own: list[Pair]) -> None:
        own[2].base = own[2].new

    with_base("applied-before", "the base has the result", result, "layers.1.weight")
    other = base_of([*pairs[:6], Pair("other", "F64", [1], pairs[6].base, None)])
    base = suite.valid("DLT-009-replaced-base", "a replaced tensor of another dtype and shape", other)
    suite.applied("DLT-009-replaced", "a replaced tensor of another dtype and shape", delta(pairs), base)


def _unfit(suite: Suite, good: str, base: str) -> None:
    data = suite.cases[good].data

    def numbers_of(name: str) -> list[int]:
        from sfp_conformance import slow_reader
        from sfp_conformance.slow_reader.delta import Plain, numbers

        found = slow_reader.read(data).tensors[name]
        return numbers(Plain(found.dtype, list(found.shape), found.data))

    def rewritten(name: str, change: Callable[[list[int]], list[int]]) -> bytes:
        file = Forge.of(data)
        part = file.part(name)
        new = change(numbers_of(name))
        shape = part.entry["shape"] if len(part.entry["shape"]) == 2 else [len(new)]
        file.parts[file.parts.index(part)] = numbers_part(name, part.entry["dtype"], shape, new)
        return file.build()

    for key in ("differences", "gaps"):
        for slug, change in (("fewer", lambda old: old[:-1]), ("more", lambda old: [*old, 1])):
            words = f"`{key}` with one number {slug}"
            suite.misfit(
                f"DLT-010-{key}-{slug}", words, good, rewritten(f"{key} 0", change), base, f"{key} 0"
            )
    far = rewritten("gaps 0", lambda old: [*old[:-1], old[-1] + 1000])
    suite.misfit("DLT-011-gap-beyond", "a gap that leads out of its bucket", good, far, base, "differences 0")

    def moved(old: list[int]) -> list[int]:
        """Moves a level from a dense bucket to another one."""
        dense = [i for i, count in enumerate(old) if count % 2 and count > 2]
        old[dense[0]] -= 2
        old[dense[1]] += 2
        return old

    counts = rewritten("counts 0", moved)
    suite.misfit(
        "DLT-011-dense", "dense buckets with too few and too many levels", good, counts, base, "differences 0"
    )

    def fewer(old: list[int]) -> list[int]:
        """Takes a level from the last bucket of the first block, which is dense."""
        last = max(i for i in range(256) if old[i])
        assert old[last] % 2
        old[last] -= 2
        return old

    file = Forge.of(rewritten("counts 0", fewer))
    end = sum(count // 2 for count in numbers_of("counts 0")[:256])
    left = numbers_of("differences 0")
    del left[end - 1]
    part = file.part("differences 0")
    file.parts[file.parts.index(part)] = numbers_part("differences 0", "BF16", [len(left)], left)
    words = "a dense bucket with too few levels"
    suite.misfit("DLT-011-dense-fewer", words, good, file.build(), base, "differences 0")

    def emptied(old: list[int]) -> list[int]:
        """Gives all levels of a block to a dense bucket without elements."""
        size = 256
        total = sum(count // 2 for count in old[:size] if count % 2)
        first = next(i for i in range(size) if old[i] == 0)
        old = [0 if i < size and count % 2 else count for i, count in enumerate(old)]
        old[first] = 2 * total + 1
        return old

    unused = rewritten("counts 0", emptied)
    suite.misfit("DLT-011-left", "levels of a bucket without elements", good, unused, base, "differences 0")
    wrong = rewritten("differences 0", lambda old: [old[0] ^ 3, *old[1:]])
    suite.misfit("DLT-012-level", "another level", good, wrong, base, "layers.0.weight")
    file = Forge.of(data)
    checksums = _map(file)["checksums"]
    for number, name in ((0, "layers.0.weight"), (5, "new"), (6, "other")):
        _map(file)["checksums"] = checksums[: 8 * number + 4] + bytes(4) + checksums[8 * number + 8 :]
        suite.misfit(
            f"DLT-012-checksum-{number}", f"another checksum of {name!r}", good, file.build(), base, name
        )
