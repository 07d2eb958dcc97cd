"""Chapters 8 and 9: windows, symbols of a fixed width, escaped levels."""

from __future__ import annotations

from functools import partial
from typing import Any

from sfp_conformance.forge import (
    Forge,
    Taken,
    exact,
    f32_bytes,
    hand_file,
    hand_part,
    patterns,
    segment_bits,
    table,
    window_bits,
    windowed,
)

from .crowds import COUNT, TWO_CLASSES, crowd
from .edits import masked, of_chunk, of_map, one_file, opened
from .gallery import ONE, spread
from .suite import Suite

PREFIX = "fingerprints prefix"
WINDOWS = {"fingerprints": [3, 0, 2]}


def add(suite: Suite) -> None:
    """Adds the cases of this module to the suite."""
    _widths(suite)
    _segments(suite)
    _streams(suite)
    _tables(suite)
    _planes(suite)
    _canonical(suite)
    _crowd(suite)


def _levels(classes: int, extra: int, count: int = 70) -> list[int]:
    return [c << extra | i * 7 % (1 << extra) for i, c in enumerate(spread(count, classes))]


def _widths(suite: Suite) -> None:
    for width in (1, 2, 3, 4):
        least = max((1 << width) - 1, 2)
        for classes in (least, least + 1, 40, 255, 256):
            windows = classes - (1 << width) + 2
            numbers = [0, windows - 1, windows // 2]
            source = exact("F16", **windowed([6] * classes, width))
            data = one_file(source, _levels(classes, 6), "F16", codes={"fingerprints": numbers})
            words = f"{classes} classes, symbols of {width} bits"
            suite.valid(f"TAB-011-{width}-bits-{classes}-classes", words, data, "R-TAB-012", "R-PLN-001")


def _segments(suite: Suite) -> None:
    source = exact("F16", **windowed([3] * 10, 2))
    for count in (1, 31, 32, 33, 63, 64, 65, 96, 97):
        levels = _levels(10, 3, count)
        data = one_file(source, levels, "F16", codes={"fingerprints": [0, 4, 7, 2]})
        suite.valid(f"PLN-005-{count}-levels", f"{count} levels in windows", data, "R-PLN-003")
    for slug, level, window in (("none", 25, 2), ("all", 75, 0)):
        levels = [level] * 64
        data = one_file(source, levels, "F16", codes={"fingerprints": [window] * 2})
        suite.valid(f"PLN-005-{slug}-escaped", f"{slug} of the levels are escaped", data)
    source = exact("F32", trim=1, **windowed([8, 8, 9, 10], 1))
    data = one_file(
        source,
        [(i * 16) % 1024 for i in range(70)],
        "F32",
        codes=WINDOWS,
        trims={"fingerprints": [3, 2, 1]},
    )
    suite.valid("PLN-001-windows-and-trims", "windows, trims, classes of several widths", data, "R-IDX-006")
    mask = [int(p % 3 == 0 and not 32 <= p < 64) for p in range(96)]
    data = one_file(
        exact("BF16", **windowed([4] * 12, 3)),
        _levels(12, 4, sum(mask)),
        "BF16",
        mask=mask,
        mask_map={"kind": "octets", **table([8])},
        codes={"fingerprints": [1, 0, 5]},
    )
    suite.valid("PLN-001-windows-and-a-mask", "windows, and a segment without survivors", data)
    # Segments of many steps of a vector register, and an odd number of bits before each.
    levels = _levels(30, 8, 1000)
    data = one_file(
        exact("BF16", **windowed([8] * 30, 3)),
        levels,
        "BF16",
        segment=320,
        codes={"fingerprints": [0, 11, 3, 5]},
    )
    suite.valid("PLN-001-windows-of-long-segments", "four segments of up to 320 levels", data)


def _streams(suite: Suite) -> None:
    bits = [int(p % 3 == 0 or p % 7 == 1) for p in range(70)]
    for kind, polarity in (("runs", {"polarity": 1}), ("octets", {})):
        of_mask = windowed([0] * 256 if kind == "octets" else [1] * 40, 3)
        data = masked(bits, {"kind": kind, **polarity, **of_mask}, codes={"mask": [0, 5, 30]})
        suite.valid(f"TAB-011-{kind}", f"a mask of {kind} in windows", data)
    uniform = {"quantiser": "uniform", "step": f32_bytes(0.25), **windowed([1] * 20, 4)}
    centroids = {"vectors": {"fingerprint centroids": patterns("F32", *range(9))}}
    counted = {"quantiser": "table", "count": 9, **windowed([1] * 9, 3)}
    for slug, source, classes, more in (("uniform", uniform, 20, {}), ("table", counted, 9, centroids)):
        given: dict[str, Any] = {**more, "codes": {"fingerprints": [0, 2, 1]}}
        data = one_file(source, _levels(classes, 1), "F32", **given)
        suite.valid(f"TAB-011-{slug}", f"levels of {slug} in windows", data)
    importance = {
        "over": "survivors",
        "role": "multiplier",
        "quantiser": "uniform",
        "step": f32_bytes(0.5),
        **windowed([0] * 16, 3),
    }
    data = one_file(
        exact("F32", **windowed([16] * 30, 2)),
        _levels(30, 16),
        "F32",
        importance=importance,
        importance_levels=_levels(16, 0),
        codes={"fingerprints": [0, 20, 3], "importance": [0, 9, 4]},
    )
    suite.valid("TAB-011-importance", "weights and a multiplier in windows", data)


def _tables(suite: Suite) -> None:
    base = "y-TAB-011-3-bits-40-classes"
    for window in (0, 5, 255, 2**64 - 1):
        change = of_map("one", "fingerprints", window=window)
        words = f"symbols of {window} bits in a window"
        suite.invalid(f"TAB-011-{window}", words, base, change, tensor="one")
    for slug, words, changes in (
        ("6-classes", "6 classes, windows of 7", {"extra": b"\6" * 6}),
        ("2-classes", "2 classes, windows of 3", {"extra": b"\6" * 2, "window": 2}),
        ("one-class", "windows, and one class", {"extra": b"\6", "window": 1}),
        ("257-classes", "257 classes in windows", {"extra": bytes(257)}),
        ("pairs", "windows, and two levels per symbol", {"group": 2}),
    ):
        change = of_map("one", "fingerprints", **changes)
        suite.invalid(f"TAB-012-{slug}", words, base, change, tensor="one")
    change = of_map("one", "fingerprints", codes=[b"\x21\2"])
    suite.invalid("TAB-009-code-and-window", "a code and windows", base, change, tensor="one")
    change = of_map("one", "fingerprints", window="3")
    suite.invalid("DIR-003-window-a-string", "`window` is a string", base, change, tensor="one")
    change = of_map("table", "importance", window=3)
    words = "`window` in an importance of factors"
    suite.invalid("DIR-007-window-of-factors", words, ONE["table"], change, tensor="table")
    for number in (34, 35, 2**32 - 1):

        def change_number(taken: Taken, number: int = number) -> None:
            taken.quantities["fingerprints code"][1] = number

        words = f"a segment in window {number} of 34"
        change = of_chunk("one", change_number)
        suite.invalid(f"IDX-005-window-{number}", words, base, change, tensor="one")


def _planes(suite: Suite) -> None:
    source = exact("F16", **windowed([6] * 40, 3))
    levels = [i * 7 % 40 << 6 | i for i in range(63)] + [i * 7 % 40 << 6 for i in range(63, 70)]
    data = one_file(source, levels, "F16", codes={"fingerprints": [0, 5, 20]})
    base = suite.valid("PLN-005-some-escaped", "escaped levels in every segment", data)
    sizes = opened(data, "one").sizes
    for segment in (0, len(sizes) - 1):
        count = sizes[segment]

        def edit(taken: Taken, how: str, segment: int = segment, count: int = count) -> None:
            bits = taken.planes[PREFIX][segment]
            if how == "symbol":  # the first level that is not escaped is escaped now, without a class
                i = next(i for i in range(count) if "0" in bits[i : 3 * count : count])
                bits = "".join("1" if k < 3 * count and k % count == i else bit for k, bit in enumerate(bits))
            elif how == "symbols-only":
                bits = bits[: 3 * count]
            elif how == "cut":
                bits = bits[: 3 * count - 1]
            else:
                bits = bits + "0" if how == "longer" else bits[:-1]
            taken.planes[PREFIX][segment] = bits
            taken.recount()

        for how, words in (
            ("longer", "a bit more than symbols and escaped classes"),
            ("shorter", "a bit less than symbols and escaped classes"),
            ("symbol", "one more escaped level than classes of escaped levels"),
            ("symbols-only", "no classes of escaped levels"),
            ("cut", "a bit less than the symbols"),
        ):
            change = of_chunk("one", partial(edit, how=how))
            slug = f"PLN-003-window-{segment}-{how}"
            suite.invalid(slug, f"segment {segment}: {words}", base, change, tensor="one")
        for number in (40, 63):

            def last_class(taken: Taken, number: int = number, segment: int = segment) -> None:
                bits = taken.planes[PREFIX][segment]
                taken.planes[PREFIX][segment] = bits[:-6] + format(number, "06b")[::-1]

            words = f"segment {segment}: an escaped level of class {number} of 40"
            change = of_chunk("one", last_class)
            suite.invalid(f"PLN-005-{segment}-class-{number}", words, base, change, tensor="one")


def _canonical(suite: Suite) -> None:
    source = exact("F16", **windowed([0] * 8, 2))
    levels = [0, 1, 1, 2, 7] + [6] * 5 + [5, 7, 7]
    for slug, window, canonical in (("best", 5, True), ("other", 0, ("R-CAN-010",))):
        data = one_file(source, levels, "F16", codes={"fingerprints": [window]})
        words = f"{slug} window of the levels 0 to 7"
        suite.valid(f"CAN-010-{slug}", words, data, "R-CAN-001", canonical=canonical)
    for slug, window, canonical in (("first", 0, True), ("second", 5, ("R-CAN-010",))):
        data = one_file(source, [0, 1, 6, 7], "F16", codes={"fingerprints": [window]})
        words = f"{slug} of two windows with equal numbers of levels"
        suite.valid(f"CAN-010-{slug}-of-equals", words, data, canonical=canonical)
    data = one_file(source, levels, "F16", codes={"fingerprints": [5]})

    def escape(taken: Taken) -> None:
        assert segment_bits(source, levels, 5, 0)[0] == taken.planes["fingerprints prefix"][0]
        taken.planes["fingerprints prefix"][0] = window_bits(source, levels, 5, escaped=(6,))
        taken.recount()

    file = Forge.of(data)
    of_chunk("one", escape)(file)
    words = "a level inside its window is escaped"
    suite.valid("CAN-011-inside", words, file.build(), "R-CAN-001", canonical=("R-CAN-011",))


def _crowd(suite: Suite) -> None:
    entry = {
        "name": TWO_CLASSES,
        "dtype": "F16",
        "shape": [4, 10],
        "fingerprints": exact("F16", **windowed([11] * 9, 3)),
    }
    own = hand_part(entry, {"fingerprints": _levels(9, 11, 40)}, codes={"fingerprints": [1, 0]})
    parts = [own if part.entry["name"] == TWO_CLASSES else part for part in crowd()]
    words = f"one of {COUNT} plain tensors has windows"
    base = suite.valid("PLN-001-crowd-with-windows", words, hand_file(*parts), "R-TAB-011")
    wrong: dict[str, dict[str, object]] = {
        "TAB-009-crowd-window": {"codes": [b"\x11"]},
        "TAB-011-crowd": {"window": 5},
        "TAB-012-crowd": {"window": 4},
        "DIR-003-crowd-window": {"window": "3"},
    }
    for slug, changes in wrong.items():
        change = of_map(TWO_CLASSES, "fingerprints", **changes)
        words = f"one of {COUNT} plain tensors, with windows, has {changes}"
        suite.invalid(slug, words, base, change, tensor=TWO_CLASSES)
