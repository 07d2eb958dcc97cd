"""Chapter 10: masks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from sfp_conformance.forge import Taken, flat_code, table

from .edits import masked, of_chunk, of_map
from .gallery import ONE, PLAIN
from .suite import Suite

PATTERNS: dict[str, Callable[[int], int]] = {
    "none": lambda p: 0,
    "all": lambda p: 1,
    "first": lambda p: int(p == 0),
    "last": lambda p: int(p == 68),
    "every-other": lambda p: p % 2,
    "two-of-four": lambda p: int(p % 4 in (1, 2)),
    "half": lambda p: int(p < 32),
    "borders": lambda p: int(p in (0, 31, 32, 63, 64, 68)),
    "all-but-one": lambda p: int(p != 40),
}
RUNS = table([0, 1, 2, 3, 4], [2, 2, 2, 3, 3])
OCTETS = table([0] * 256, flat_code(256))


def add(suite: Suite) -> None:
    """Adds the cases of this module to the suite."""
    for slug, bit in PATTERNS.items():
        bits = [bit(p) for p in range(69)]
        for polarity in (0, 1):
            wide = {"kind": "runs", "polarity": polarity, **table([6])}
            data = masked(bits, {"kind": "runs", "polarity": polarity, **table([5])})
            suite.valid(f"MSK-002-{slug}-{polarity}-one-class", f"{slug} kept, runs of 5 bits", data)
            many = table([0, 1, 2, 3, 4, 5], [2, 2, 2, 3, 4, 4])
            data = masked(bits, {**wide, **many})
            suite.valid(f"MSK-002-{slug}-{polarity}", f"{slug} kept, polarity {polarity}", data, "R-MSK-004")
        for words, own in (("raw", table([8])), ("coded", OCTETS)):
            data = masked(bits, {"kind": "octets", **own})
            suite.valid(
                f"MSK-005-{slug}-{words}", f"{slug} kept, octets {words}", data, "R-DIR-007", "R-MSK-006"
            )
    _words(suite)
    _runs_past_the_end(suite)
    _octets(suite)


def _words(suite: Suite) -> None:
    for slug, kind in (("empty", ""), ("capital", "Runs"), ("private", "x-mine"), ("bitmap", "bitmap")):
        change = of_map("runs", "mask", kind=kind)
        suite.invalid(
            f"MSK-001-{slug}", f"the kind {kind!r}", ONE["runs"], change, tensor="runs", tags=["future"]
        )
    for polarity in (2, 255, 2**64 - 1):
        change = of_map("runs", "mask", polarity=polarity)
        suite.invalid(f"MSK-002-{polarity}", f"the polarity {polarity}", ONE["runs"], change, tensor="runs")


def _runs_past_the_end(suite: Suite) -> None:
    for count in (32, 33, 40, 69):
        bits = [int(p % 5 == 1 or p == count - 1) for p in range(count)]
        for polarity in (0, 1):
            data = masked(bits, {"kind": "runs", "polarity": polarity, **table([5])})
            base = suite.valid(f"MSK-004-{count}-polarity-{polarity}", "runs that reach the end", data)
            last = (count - 1) // 32
            size = count - 32 * last
            own = [p for p in range(size) if bits[32 * last + p] == polarity]
            before = own[-2] if len(own) > 1 else -1
            for slug, end in (("just", size), ("far", before + 32)):
                level = end - before - 1
                if not own or not 0 <= level < 32 or end < size:
                    continue

                def change(taken: Taken, last: int = last, level: int = level) -> None:
                    plane = taken.planes["mask residual"]
                    plane[last] = plane[last][:-5] + format(level, "05b")[::-1]

                words = f"a minority position of {end} in a segment of {size}"
                case = f"MSK-004-{count}-{polarity}-{slug}"
                suite.invalid(case, words, base, of_chunk("one", change), tensor="one")


def _octets(suite: Suite) -> None:
    def flip(taken: Taken, segment: int, bit: int) -> None:
        plane = taken.planes["mask residual"]
        bits = plane[segment]
        plane[segment] = bits[:bit] + str(1 - int(bits[bit])) + bits[bit + 1 :]

    for bit in (0, 1, 7, 31):
        change = of_chunk("plain", partial(flip, segment=0, bit=bit))
        words = f"mask bit {bit} is flipped, so that the number of survivors differs from the index"
        suite.invalid(f"MSK-005-bit-{bit}", words, PLAIN, change, tensor="plain")
    for count in (1, 7, 33, 39, 41):
        bits = [p % 2 for p in range(count)]
        base = suite.valid(
            f"MSK-006-{count}",
            "a last octet with unused bits",
            masked(bits, {"kind": "octets", **table([8])}),
        )
        segment = (count - 1) // 32
        for bit in {count - 32 * segment, 8 * -(-(count - 32 * segment) // 8) - 1}:
            change = of_chunk("one", partial(flip, segment=segment, bit=bit))
            words = f"bit {bit} of the segment's octets, which has no position, is set"
            suite.invalid(f"MSK-006-{count}-bit-{bit}", words, base, change, tensor="one")
