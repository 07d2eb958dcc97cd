"""Generates valid keyed tables from choices: first the code tables, then rows of random symbols.

Rules: as for `generate`. Rows are what a reader finds, so that every row that the code tables can represent
occurs: without weights, with all weights, with gaps beyond the last output.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

from .choices import Choices, Noise
from .forge import Part, f32_bytes, first_levels
from .forge_keyed import Map, bit_array, coded, solved_rows
from .generate_codes import any_classes, any_code
from .slow_reader import f32, lengths, top
from .slow_reader.keyed import array_bytes

# Keys of fuzzed look-ups. A generated table has some of them; the others are unknown to it.
ASKED: tuple[bytes, ...] = (b"a", b"", b"\0", b"a\0", b"na\xc3\xafve", b"\xff\xfe", b"seven..", b"eight...")
ASKED += tuple(bytes(range(97, 97 + n)) for n in (9, 15, 16, 17, 24, 25))
ASKED += tuple(
    b"0123456789abcdef"[i % 16 :] * 2 + bytes([i]) * n for i, n in ((0, 0), (1, 1), (3, 6), (5, 16))
)
ASKED += (b"good", b"first", b"all", b"key", b"x" * 100)  # keys of golden files, mostly
_OUTPUTS, _SEGMENTS, _SEEDS = (1, 2, 5, 3, 17), (8, 64, 16, 1024), (0, 1, 2**31, 2**32 - 1)
_STEPS = (0.25, 1.0, 0.1, 2.0**-149, 2.0**97)
_MOST_BITS = 400  # of all rows but the last; the time of elimination grows with the square
_CUTS = ((32, 2), (64, 1), (96, 2), (32, 256), (65536, 1))


def any_keyed(choices: Choices, name: str) -> tuple[Map, Part]:
    """Generates a keyed table of some of the keys `ASKED`: its map and its bit array."""
    outputs = choices.pick(_OUTPUTS)
    source: Map = {"name": name, "bits": f"{name}.bits", "outputs": outputs, "seed": choices.pick(_SEEDS)}
    if outputs > 1:
        source["gaps"] = _any_code_table(choices, outputs + 1, few=choices.pick((3, 2, 6)))
    source["levels"] = _any_levels(choices)
    if choices.below(2):
        source["importance"] = _with_step(choices, _any_code_table(choices, 1 << 31), 1)
    noise, most = choices.noise(), choices.pick((4, 0, 32))
    source["checks"] = bytes(noise.below(most + 1) for _ in source["levels"]["extra"])
    rows, noise = dict[bytes, str](), choices.noise()
    for key in _some_keys(choices):
        if sum(map(len, rows.values())) < _MOST_BITS:
            rows[key] = _any_row(source, noise)
    return _solved(choices, source, rows)


def _solved(choices: Choices, source: Map, rows: dict[bytes, str]) -> tuple[Map, Part]:
    """Chooses the size of the bit array, and solves its equations. Leaves out keys that do not fit."""
    z = source["segment"] = choices.pick(_SEGMENTS)
    wanted = 2 * sum(map(len, rows.values()))
    source["starts"] = z * (choices.pick((1, 2, 5)) + wanted // z)
    noise = choices.noise()
    free = int.from_bytes(bytes(noise.below(256) for _ in range(array_bytes(source))), "little")
    while (found := solved_rows(source, rows, free)) is None:
        rows = dict(list(rows.items())[:-1])
    source |= {"seed": found[0], "keys": choices.pick((len(rows), 0, 2**64 - 1))}
    if choices.seldom(8):
        source["x-own"] = [{"a": b"\0"}]
    return source, bit_array(source, found[1], *choices.pick(_CUTS))


def _some_keys(choices: Choices) -> list[bytes]:
    """Returns one key, none, several, or all."""
    which = choices.below(4)
    if which != 2:
        return [list(ASKED[:1]), [], [], list(ASKED)][which]
    noise = choices.noise()
    return [key for key in ASKED if noise.below(2)]


def _any_code_table(choices: Choices, bound: int, few: int = 8) -> Map:
    """Generates a code table with at most one code, whose levels are below a bound."""
    base, extra = any_classes(choices, bound, None)
    codes: list[bytes] = []
    if len(extra) > 1:
        codes = [any_code(choices.noise(), set(range(min(len(extra), few))), len(extra))]
    return {"base": base, "extra": bytes(extra), "group": 1, "codes": codes}


def _any_levels(choices: Choices) -> Map:
    if choices.below(2) == 0:
        levels = _any_code_table(choices, 1 << 32)
        return _with_step(choices, {"quantiser": "uniform", **levels}, 2)
    count, noise = choices.pick((1, 2, 5, 30)), choices.noise()
    steps = [noise.below(0x7F000000 // count) + 1 for _ in range(count)]
    patterns = [sum(steps[: i + 1]) - 1 for i in range(count)]
    levels = {"quantiser": "table", "count": count, **_any_code_table(choices, 2 * count)}
    return levels | {"centroids": struct.pack(f"<{count}I", *patterns)}


def _with_step(choices: Choices, table: Map, signs: int) -> Map:
    """Adds a step by which the greatest level is finite."""
    greatest = (top(table) - 1) // signs
    steps = [step for step in _STEPS if math.isfinite(f32(f32(greatest) * f32(step)))]
    return {**table, "step": f32_bytes(choices.pick(steps))}


@dataclass
class _Symbols:
    """A code table from which random levels are drawn: those that its code can represent."""

    source: Map

    def draw(self, noise: Noise) -> tuple[int, int, str]:
        """Returns a random level, its class, and its bits."""
        source = self.source
        codes = lengths(source)
        used = [c for c, size in enumerate(codes[0]) if size] if codes else [0]
        c = used[noise.below(len(used))]
        level = first_levels(source["base"], source["extra"])[c] + noise.below(1 << source["extra"][c])
        return level, *coded(source, level)


def _any_row(source: Map, noise: Noise) -> str:
    """Returns the bits of a random row, as a look-up reads it (17.3)."""
    gaps = _Symbols(source["gaps"]) if "gaps" in source else None
    levels, bits, o, greatest = _Symbols(source["levels"]), "", 0, -1
    while o < source["outputs"]:
        if gaps is not None:
            gap, _, more = gaps.draw(noise)
            o, bits = o + gap, bits + more
        if o < source["outputs"]:
            _, c, more = levels.draw(noise)
            o, bits, greatest = o + 1, bits + more, max(greatest, c)
    if "importance" in source:
        bits += _Symbols(source["importance"]).draw(noise)[2]
    return bits + "0" * (source["checks"][greatest] if greatest >= 0 else 0)
