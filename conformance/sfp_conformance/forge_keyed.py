"""Builds bit arrays of keyed tables from rows of bits, after SPEC.md chapter 17, by Gaussian elimination."""

from __future__ import annotations

from typing import Any

from .forge import Part, raw_part
from .slow_reader import codewords, lengths
from .slow_reader.keyed import array_bytes, positions_of

Map = dict[str, Any]
Row = dict[int, int]  # output -> level
_SEEDS = 100


def coded(source: Map, level: int) -> tuple[int, str]:
    """Returns the class of a level, and its codeword and residual as bits."""
    extra = source["extra"]
    first = [source["base"] + sum(1 << e for e in extra[:c]) for c in range(len(extra))]
    c = max(c for c in range(len(extra)) if first[c] <= level)
    word = ""
    if source["codes"]:
        word = next(word for word, symbol in codewords(lengths(source)[0]).items() if symbol == c)
    residual = format(level - first[c], f"0{extra[c]}b")[::-1] if extra[c] else ""
    return c, word + residual


def row_bits(source: Map, row: Row, importance: int = 0) -> str:
    """Returns the bits of a row (17.3). The last gap leads to output C."""
    bits, before, greatest, outputs = "", -1, 0, source["outputs"]
    for o, level in sorted(row.items()):
        if outputs > 1:
            bits += coded(source["gaps"], o - before - 1)[1]
        c, word = coded(source["levels"], level)
        bits, before, greatest = bits + word, o, max(greatest, c)
    if before + 1 < outputs:
        bits += coded(source["gaps"], outputs - before - 1)[1]
    if "importance" in source:
        bits += coded(source["importance"], importance)[1]
    return bits + "0" * (source["checks"][greatest] if row else 0)


def solved_rows(source: Map, rows: dict[bytes, str], free: int) -> tuple[int, int] | None:
    """Returns a seed, and the bit array in which each key has its row; None if no seed of a hundred does.

    Args:
        source: the map of the table; its seed is the first that is tried.
        rows: key -> the bits of its row.
        free: the bit array before: bits that no equation determines keep these values.
    """
    size = 8 * array_bytes(source)
    for seed in range(source["seed"], min(source["seed"] + _SEEDS, 1 << 32)):
        lines: dict[int, int] = {}  # lowest bit -> equation: bits of the array, then the wanted bit
        for key, row in rows.items():
            places = positions_of({**source, "seed": seed}, key)
            for t, bit in enumerate(row):
                line = int(bit) << size
                for place in places:
                    line ^= 1 << (place + t)
                while line and (low := (line & -line).bit_length() - 1) in lines:
                    line ^= lines[low]
                if line:
                    lines[low] = line
        if size not in lines:
            break
    else:
        return None
    array = free
    for low in sorted(lines, reverse=True):
        rest = lines[low] & ((1 << size) - 1)
        wanted = lines[low] >> size
        if (rest & array).bit_count() % 2 != wanted:
            array ^= 1 << low
    return seed, array


def bit_array(source: Map, array: int, segment: int = 32, chunk: int = 2) -> Part:
    """Returns the tensor of the bit array of a table."""
    data = array.to_bytes(array_bytes(source), "little")
    return raw_part(source["bits"], "U8", [len(data)], data, segment=segment, chunk=chunk)
