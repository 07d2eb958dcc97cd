"""Chapter 9: planes, trims, symbols for two levels."""

from __future__ import annotations

from sfp_conformance.forge import Taken, exact, table, table_for

from .edits import bit_flip, of_chunk, one_file, opened
from .gallery import ONE
from .suite import Suite


def add(suite: Suite) -> None:
    """Adds the cases of this module to the suite."""
    _pairs(suite)
    _lengths(suite)
    _tails(suite)
    _trims(suite)
    _counts(suite)


def _pairs(suite: Suite) -> None:
    source = exact("F16", **table([0, 0], [2, 2, 2, 2], group=2))
    for count in (1, 2, 3, 31, 32, 33, 63, 65):
        data = one_file(source, [i % 2 for i in range(count)], "F16")
        base = suite.valid(f"PLN-002-{count}-levels", f"{count} levels, two per symbol", data)
        if count % 2:
            last = (count - 1) // 32

            def other(taken: Taken, last: int = last) -> None:
                bits = taken.planes["fingerprints prefix"][last]
                taken.planes["fingerprints prefix"][last] = bits[:-2] + "1" + bits[-1]

            words = f"{count} levels: the second class of the last symbol is 1"
            slug = f"PLN-002-{count}-second-class"
            suite.invalid(slug, words, base, of_chunk("one", other), tensor="one")


def _lengths(suite: Suite) -> None:
    streams: dict[str, tuple[str, ...]] = {
        "runs": ("mask", "fingerprints"),
        "uniform": ("mask", "fingerprints"),
        "coded": ("mask", "fingerprints"),
        "group": ("importance",),
        "octets": ("mask", "fingerprints"),
    }
    for name, owned in streams.items():
        taken = opened(suite.cases[ONE[name]].data, name)
        for plane in (f"{stream} {what}" for stream in owned for what in ("prefix", "residual")):
            if plane not in taken.values:
                continue
            for segment in (0, len(taken.sizes) - 1):
                for slug, words in (("longer", "a bit more"), ("shorter", "a bit less")):

                    def change(
                        taken: Taken, plane: str = plane, segment: int = segment, slug: str = slug
                    ) -> None:
                        bits = taken.planes[plane][segment]
                        taken.planes[plane][segment] = bits + "0" if slug == "longer" else bits[:-1]
                        taken.recount()

                    case = f"PLN-003-{name}-{plane}-{segment}-{slug}"
                    why = f"{words} in the {plane} plane of segment {segment}"
                    suite.invalid(case, why, ONE[name], of_chunk(name, change), tensor=name)


def _tails(suite: Suite) -> None:
    for name in ("runs", "octets", "uniform", "coded", "group", "table"):
        for plane, (start, sizes) in opened(suite.cases[ONE[name]].data, name).planes.items():
            end = start + sum(sizes)
            places = {"first": end, "last": -(-end // 128) * 128 - 1} if end % 128 else {}
            for slug, bit in places.items():
                words = f"the {slug} bit after the {plane} plane is set"
                case = f"PLN-004-{name}-{plane}-{slug}"
                suite.invalid(case, words, ONE[name], bit_flip(name, bit), tensor=name)


def _trims(suite: Suite) -> None:
    for trim in (0, 1, 7, 8, 14):
        levels = [(i % 2) | ((i * 37 % 2 ** (16 - trim - 1)) << (trim + 1)) for i in range(50)]
        source = exact("F16", trim=1, **table([16]))
        data = one_file(source, levels, "F16", trims={"fingerprints": [trim, 0]})
        suite.valid(f"PLN-001-trim-{trim}", f"trims of {trim} and 0", data, "R-QNT-008", "R-IDX-006")
    source = exact("F32", trim=1, **table([8, 8, 9, 10], [2, 2, 2, 2]))
    levels = [(i * 16) % 1024 for i in range(70)]
    data = one_file(source, levels, "F32", trims={"fingerprints": [3, 2, 1]})
    suite.valid("PLN-001-trims-of-classes-that-differ", "trims with classes of several widths", data)


def _counts(suite: Suite) -> None:
    for count in (1, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129):
        levels = [(i * 7919 + 1) % 3000 for i in range(count)]
        for chunk in (1, 2):
            data = one_file(exact("F32", **table_for([0, 2999])), levels, "F32", chunk=chunk)
            words = f"{count} positions in segments of 32, {chunk} per chunk"
            suite.valid(f"PLN-001-{count}-positions-{chunk}-a-chunk", words, data, "R-CHK-001")
