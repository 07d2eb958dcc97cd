"""The result of a delta and its base (28.2, 28.3), and bases and numbers that do not fit."""

from __future__ import annotations

from collections.abc import Callable

from sfp_conformance import slow_reader
from sfp_conformance.forge import Forge
from sfp_conformance.slow_reader import BYTES
from sfp_conformance.slow_reader.delta import CHANGED, element, numbers
from sfp_conformance.slow_reader.parts import Plain

from ..encode import elements
from ..numbers import specials
from ..suite import Suite
from .building import Pair, base_of, delta, numbers_part, sample, stepped, without_checksum


def add(suite: Suite) -> None:
    """Adds the cases of this module to the suite."""
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
    for number, name in ((0, "layers.0.weight"), (5, "new"), (6, "other")):
        wrong_file, words = without_checksum(data, number), f"another checksum of {name!r}"
        suite.misfit(f"DLT-012-checksum-{number}", words, good, wrong_file, base, name)
