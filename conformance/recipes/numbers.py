"""Chapter 14: numbers at the limits of their dtypes, and all kinds of reconstruction."""

from __future__ import annotations

from typing import Any

from sfp_conformance.forge import exact, f32_bytes, patterns, table, table_for
from sfp_conformance.slow_reader import FLOATS

from .edits import one_file
from .suite import Suite


def specials(dtype: str) -> list[int]:
    """Returns bit patterns of both signs: zero, subnormal, normal, greatest, infinite, NaNs with payloads."""
    kind = FLOATS[dtype]
    half = 1 << kind.bits - 1
    own = [0, 1, (1 << kind.mantissa) - 1, 1 << kind.mantissa, kind.nonfinite - 1, kind.nonfinite]
    own += [kind.nonfinite + 1, half - 1, half - 2]
    kept = sorted({p for p in own if p < half})
    return kept + [p | half for p in kept]


def levels_of(dtype: str, found: list[int]) -> list[int]:
    """Returns the levels of an exact stream for bit patterns."""
    bits = FLOATS[dtype].bits
    return [p << 1 & ((1 << bits) - 1) | p >> (bits - 1) for p in found]


def whole(dtype: str) -> dict[str, Any]:
    """Returns a code table that covers all bit patterns of a dtype."""
    bits = FLOATS[dtype].bits
    return table([bits]) if bits <= 56 else table([56] * 256, [8] * 256)


def add(suite: Suite) -> None:
    """Adds the cases of this module to the suite."""
    for dtype in FLOATS:
        levels = levels_of(dtype, specials(dtype))
        data = one_file(exact(dtype, **whole(dtype)), levels, dtype)
        words = f"{dtype}: zeros, subnormals, infinities, NaNs with payloads, each of both signs"
        suite.valid(f"REC-001-{dtype}-specials", words, data, "R-REC-004", "R-CNV-001")
        mask = [i % 2 for i in range(2 * len(levels))]
        given = {"mask": mask, "mask_map": {"kind": "octets", **table([8])}}
        data = one_file(exact(dtype, **whole(dtype)), levels, dtype, **given)
        suite.valid(
            f"REC-005-{dtype}-pruned",
            f"{dtype}: the same numbers between pruned positions",
            data,
            "R-REC-001",
        )
        _multiplied(suite, dtype, levels)
        _rounded(suite, dtype)
        for narrow in FLOATS:
            if dtype in FLOATS[narrow].widens:
                _widened(suite, dtype, narrow)
    _signs(suite)


def _multiplied(suite: Suite, dtype: str, levels: list[int]) -> None:
    factors = [0.0, 1.0, 0.5, 3.4028234663852886e38, 1.401298464324817e-45, 1 / 3]
    marks = levels_of("F32", patterns("F32", *[factors[i % 6] for i in range(len(levels))]))
    given = {"over": "survivors", "role": "multiplier", **exact("F32", **table_for([0, 0xFEFFFFFE]))}
    data = one_file(exact(dtype, **whole(dtype)), levels, dtype, importance=given, importance_levels=marks)
    words = f"{dtype}: a multiplier does not change infinities and NaNs"
    suite.valid(f"REC-004-{dtype}-multiplied", words, data, "R-REC-001", "R-IMP-003")


def _rounded(suite: Suite, dtype: str) -> None:
    kind = FLOATS[dtype]
    clause = "003" if dtype == "F8_E4M3" else "002"
    steps = {"third": 1 / 3, "one": 1.0, "odd": 1 + 2.0**-23, "huge": 2.0**90, "tiny": 2.0**-149}
    greatest = 2.0 ** ((1 << kind.exponent - 1) - 1)
    steps["near-the-end"] = min(greatest / 2**15, 2.0**109)
    steps["ties"] = min(greatest, 2.0**120) / 2 ** (kind.mantissa + 3)
    for slug, step in steps.items():
        source = {"quantiser": "uniform", "step": f32_bytes(step), **table([18])}
        levels = [0, 1, 2, 3, 5, 17, 2**9, 2**11 + 6, 2**12 + 2, 2**17 - 2, 2**17, 2**17 + 1, 2**18 - 1]
        words = f"{dtype}: multiples of {step:g}, rounded"
        suite.valid(f"REC-{clause}-{dtype}-{slug}", words, one_file(source, levels, dtype), "R-REC-001")


def _widened(suite: Suite, dtype: str, narrow: str) -> None:
    first = FLOATS[narrow].nonfinite
    own = [0, 1, 2, 3, first - 1, first - 2, first // 2]
    own += [p | 1 << FLOATS[narrow].bits - 1 for p in own]
    source = exact(narrow, **table_for([0, 2 * first - 1]))
    data = one_file(source, levels_of(narrow, own), dtype)
    words = f"{narrow} widened to {dtype}: subnormals, greatest, both zeros"
    suite.valid(f"REC-006-{narrow}-to-{dtype}", words, data, "R-QNT-002", "R-TAB-008")


def _signs(suite: Suite) -> None:
    source = {"quantiser": "uniform", "step": f32_bytes(0.5), **table([3])}
    for per, factor in (("tensor", -0.0), ("tensor", 0.0), ("tensor", -1.0)):
        data = one_file(
            source,
            list(range(8)),
            scale={"per": per, "dtype": "F32"},
            vectors={"scale": patterns("F32", factor)},
        )
        words = f"levels 0 and 1, plus and minus zero, times {factor}"
        suite.valid(
            f"REC-001-zeros-times-{'minus' if str(factor)[0] == '-' else 'plus'}-{abs(factor):g}", words, data
        )
    columns = patterns("F32", 1.0, -0.0, 3e38)
    for role in ("multiplier", "metadata"):
        importance = {"over": "factors", "role": role, "dtype": "F32"}
        small = {"rows": patterns("F32", -0.0, 1.0, -0.5), "columns": columns}
        data = one_file(source, [*range(8), 3], shape=[3, 3], importance=importance, vectors=small)
        suite.valid(f"IMP-005-factors-{role}", f"factors of either sign, as {role}", data, "R-IMP-004")
