"""SPEC.md chapter 14: from levels to numbers, bit for bit.

The expected values are computed from neighbouring bit patterns, with Python's binary64 and fractions, or with
single operations on numpy's float32.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sfp_conformance.forge import (
    Part,
    exact,
    f32_bytes,
    hand_file,
    hand_part,
    patterns,
    table,
    table_for,
)
from sfp_conformance.slow_reader import FLOATS, number_of, pattern_of

from sfpformat.dtypes import DTYPES

from ..support.clauses import clauses
from ..support.forge import accepted

NARROW = ["F16", "BF16", "F8_E4M3", "F8_E5M2"]
WIDER = [(narrow, wide) for narrow, kind in FLOATS.items() for wide in kind.widens]


def bits_of(dtype: str) -> int:
    """Bits of a float type."""
    return FLOATS[dtype].bits


def level_of(pattern: int, dtype: str) -> int:
    """The level of a bit pattern: the sign moved from the highest bit to the lowest."""
    top = bits_of(dtype) - 1
    return (pattern << 1 | pattern >> top) & ((1 << bits_of(dtype)) - 1)


def decoded(part: Part, dtype: str) -> list[int]:
    """The bit patterns that reader, validator and slow reader agree on."""
    found = accepted(hand_file(part))["hand"]
    return [int(pattern) for pattern in found.reshape(-1).view(DTYPES[dtype].pattern)]


def exact_part(dtype: str, coded: str, levels: list[int], **entry: Any) -> Part:
    """A tensor of plain levels of the coded dtype."""
    source = exact(coded, **table_for(levels))
    vectors = entry.pop("vectors", None)
    importance = entry.pop("importances", None)
    fields = {"dtype": dtype, "shape": [len(levels)], "segment": 4096, "chunk": 64, "fingerprints": source}
    own = {"fingerprints": levels} | ({} if importance is None else {"importance": importance})
    return hand_part({**fields, **entry}, own, vectors=vectors)


# --------------------------------------------------------------------------------------------------- exact


@clauses("R-REC-001")
@pytest.mark.parametrize("dtype", NARROW)
def test_every_pattern_of_a_narrow_dtype_is_restored(dtype: str) -> None:
    step = 1 if bits_of(dtype) == 8 else 13
    given_patterns = [*range(0, 1 << bits_of(dtype), step)]
    levels = [level_of(pattern, dtype) for pattern in given_patterns]
    assert (
        decoded(exact_part(dtype, dtype, [0, (1 << bits_of(dtype)) - 1, *levels]), dtype)[2:]
        == given_patterns
    )


SPECIAL = {
    "F32": [0, 1 << 31, 1, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001],
    "F64": [
        0,
        1 << 63,
        1,
        (1 << 52) - 1,
        1 << 52,
        0x7FEFFFFFFFFFFFFF,
        0x7FF0000000000000,
        0xFFF0000000000000,
    ],
}
SPECIAL["F32"] += [0xFFC12345, 0xFF812345, 0x7FFFFFFF]
SPECIAL["F64"] += [0x7FF8000000000000, 0x7FF0000000000001, 0xFFF812345678ABCD, 0xFFFFFFFFFFFFFFFF]


@clauses("R-REC-001")
@pytest.mark.parametrize("dtype", ["F32", "F64"])
def test_zeros_subnormals_infinities_and_nans_keep_every_bit(dtype: str) -> None:
    for pattern in SPECIAL[dtype]:
        assert decoded(exact_part(dtype, dtype, [level_of(pattern, dtype)]), dtype) == [pattern]


@clauses("R-REC-006")
@pytest.mark.parametrize(("coded", "dtype"), WIDER)
def test_every_finite_pattern_widens_without_rounding(coded: str, dtype: str) -> None:
    if bits_of(coded) <= 16:
        step = 1 if bits_of(coded) == 8 else 29
        magnitudes = sorted({*range(0, FLOATS[coded].nonfinite, step), FLOATS[coded].nonfinite - 1})
    else:
        magnitudes = [0, 1, 2, 0x7FFFFF, 0x800000, 0x3F800000, 0x3F800001, 0x7F7FFFFF]
    sign = 1 << (bits_of(coded) - 1)
    given_patterns = [pattern | s for pattern in magnitudes for s in (0, sign)]
    found = decoded(exact_part(dtype, coded, [level_of(p, coded) for p in given_patterns]), dtype)
    for pattern, wide in zip(given_patterns, found, strict=True):
        assert number_of(wide, dtype) == number_of(pattern, coded)
        assert bool(wide >> (bits_of(dtype) - 1)) == bool(pattern & sign)


@clauses("R-REC-006")
def test_widening_agrees_with_the_machines_own_conversions() -> None:
    half = list(range(0, 0x7C00, 7))
    found = decoded(exact_part("F32", "F16", [2 * pattern for pattern in half]), "F32")
    assert found == np.array(half, np.uint16).view(np.float16).astype(np.float32).view(np.uint32).tolist()
    brain = list(range(0, 0x7F80, 31))
    found = decoded(exact_part("F32", "BF16", [2 * pattern + 1 for pattern in brain]), "F32")
    assert found == [pattern << 16 | 1 << 31 for pattern in brain]


# ------------------------------------------------------------------------------------------------ rounding


def rounding_cases(dtype: str) -> dict[float, int]:
    """Magnitudes near the midpoints between neighbouring patterns -> the pattern to which each must round."""
    kind = FLOATS[dtype]
    lows: Sequence[int] = range(kind.nonfinite - 1)
    if bits_of(dtype) == 16:
        # Not all subnormals, which would be many: the ends, the border to the normal numbers, and a sample.
        border = 1 << kind.mantissa
        first = sorted({*range(40), *range(border - 20, border + 20), *range(0, kind.nonfinite - 40, 331)})
        lows = [*first, *range(kind.nonfinite - 40, kind.nonfinite - 1)]
    out = {}
    for low in lows:
        below, above = number_of(low, dtype), number_of(low + 1, dtype)
        middle = (below + above) / 2
        nearest = struct.unpack("<I", struct.pack("<f", middle))[0]
        if number_of(nearest, "F32") != middle or nearest < 2:
            continue
        out[middle] = low + (low % 2)
        out[number_of(nearest - 1, "F32")] = low
        out[number_of(nearest + 1, "F32")] = low + 1
        out[above] = low + 1
    # Above the greatest number, half a unit more is the tie with the number that the next pattern would have.
    greatest = number_of(kind.nonfinite - 1, dtype)
    unit = greatest - number_of(kind.nonfinite - 2, dtype)
    tie = greatest + unit / 2
    if tie < 2.0**127:
        pattern = pattern_of(tie, "F32")
        even = kind.nonfinite if (kind.nonfinite - 1) % 2 else kind.nonfinite - 1
        out |= {tie: even, number_of(pattern - 1, "F32"): kind.nonfinite - 1}
        out |= {number_of(pattern + 1, "F32"): kind.nonfinite, 2.0**126: kind.nonfinite}
    return out


@clauses("R-REC-001", "R-REC-002", "R-REC-003")
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("sign", [0, 1])
def test_numbers_round_to_nearest_ties_to_even_and_overflow_as_the_dtype_requires(
    dtype: str, sign: int
) -> None:
    cases = rounding_cases(dtype)
    centroids = sorted(cases)
    levels = [2 * m + sign for m in range(len(centroids))]
    source = {"quantiser": "table", "count": len(centroids), **table_for(levels)}
    part = hand_part(
        {"dtype": dtype, "shape": [len(levels)], "segment": 4096, "fingerprints": source},
        {"fingerprints": levels},
        vectors={"fingerprint centroids": patterns("F32", *centroids)},
    )
    found = decoded(part, dtype)
    top = 1 << (bits_of(dtype) - 1)
    assert found == [cases[x] | (top if sign else 0) for x in centroids]


@clauses("R-REC-003")
def test_f8_e4m3_numbers_that_round_above_448_become_nan() -> None:
    cases = rounding_cases("F8_E4M3")
    assert cases[448.0] == 0x7E
    assert cases[464.0] == 0x7E  # the tie goes to the even mantissa
    assert cases[number_of(pattern_of(464.0, "F32") + 1, "F32")] == 0x7F
    assert number_of(0x7E, "F8_E4M3") == 448
    assert math.isnan(number_of(0x7F, "F8_E4M3"))


@clauses("R-REC-002")
def test_other_dtypes_overflow_as_in_ieee_754() -> None:
    assert rounding_cases("F16")[65520.0] == 0x7C00
    assert rounding_cases("F8_E5M2")[61440.0] == 0x7C
    brain = rounding_cases("BF16")
    assert max(brain.values()) == 0x7F7F
    found = decoded(uniform_part("BF16", [2 * 255, 2 * 255 + 1], 2.0**120 * 1.00390625), "BF16")
    assert found == [0x7F80, 0xFF80]


# --------------------------------------------------------------------------------- quantised, scaled, weighed


def uniform_part(dtype: str, levels: list[int], step: float, **entry: Any) -> Part:
    """A tensor of levels of 32 bits."""
    width = max(max(levels).bit_length(), 1)
    source = {"quantiser": "uniform", "step": f32_bytes(step), **table([width])}
    vectors, marks = entry.pop("vectors", None), entry.pop("importances", None)
    own = {"fingerprints": levels} | ({} if marks is None else {"importance": marks})
    return hand_part(
        {"dtype": dtype, "shape": [len(levels)], "fingerprints": source, **entry}, own, vectors=vectors
    )


@clauses("R-REC-001")
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_negative_number_of_magnitude_0_is_minus_0(dtype: str) -> None:
    assert decoded(uniform_part(dtype, [0, 1], 0.5), dtype) == [0, 1 << (bits_of(dtype) - 1)]


@clauses("R-REC-001")
def test_minus_0_times_a_negative_factor_is_0() -> None:
    scale = {"per": "tensor", "dtype": "F32"}
    part = uniform_part("F32", [0, 1], 0.5, scale=scale, vectors={"scale": patterns("F32", -2.0)})
    assert decoded(part, "F32") == [1 << 31, 0]


@clauses("R-REC-005")
@pytest.mark.parametrize("dtype", FLOATS)
def test_pruned_positions_are_plus_0_whatever_the_factors_are(dtype: str) -> None:
    mask = {"kind": "octets", **table([8])}
    source = {"quantiser": "uniform", "step": f32_bytes(1.0), **table([0], base=3)}
    entry = {"dtype": dtype, "shape": [4], "mask": mask, "fingerprints": source}
    entry |= {"scale": {"per": "tensor", "dtype": "F32"}}
    part = hand_part(
        entry, {"fingerprints": [3, 3]}, mask=[0, 1, 0, 1], vectors={"scale": patterns("F32", -1.0)}
    )
    one = pattern_of(1.0, dtype)
    assert decoded(part, dtype) == [0, one, 0, one]


moderate = st.floats(2.0**-100, 2.0**40, width=32)
signed = st.floats(-(2.0**20), 2.0**20, width=32)


@clauses("R-REC-001")
@given(
    st.sampled_from(sorted(FLOATS)),
    st.lists(st.integers(0, 2**30), min_size=1, max_size=20),
    moderate,
    signed,
    st.lists(st.integers(0, 2**24), min_size=20, max_size=20),
    st.floats(2.0**-60, 2.0**20, width=32),
)
def test_step_scale_and_multiplier_are_single_operations_of_float32_in_that_order(
    dtype: str, levels: list[int], step: float, factor: float, marks: list[int], importance_step: float
) -> None:
    importance = {"over": "all", "role": "multiplier", "quantiser": "uniform", **table([25])}
    importance["step"] = f32_bytes(importance_step)
    part = uniform_part(
        dtype,
        levels,
        step,
        scale={"per": "tensor", "dtype": "F32"},
        importance=importance,
        importances=marks[: len(levels)],
        vectors={"scale": patterns("F32", factor)},
    )
    found = decoded(part, dtype)
    with np.errstate(over="ignore", under="ignore"):
        for level, mark, pattern in zip(levels, marks, found, strict=False):
            x = np.float32(level >> 1) * np.float32(step)
            x = -x if level & 1 else x
            x = x * np.float32(factor)
            x = x * (np.float32(mark) * np.float32(importance_step))
            assert pattern == pattern_of(float(x), dtype)


@clauses("R-REC-001")
def test_a_number_of_more_than_24_bits_is_rounded_before_it_is_multiplied() -> None:
    levels = [2 * m for m in (2**24 + 1, 2**24 + 3, 2**31 - 1, 2**30 + 64)]
    found = decoded(uniform_part("F64", levels, 3.0), "F64")
    rounded = [2**24, 2**24 + 4, 2**31, 2**30]
    assert [number_of(pattern, "F64") for pattern in found] == [float(np.float32(3.0 * m)) for m in rounded]


@clauses("R-REC-001")
def test_products_below_the_normal_numbers_stay_subnormal() -> None:
    least = number_of(1, "F32")
    assert decoded(uniform_part("F32", [2, 3, 2 * 3, 2 * 0x7FFFFF], least), "F32") == [
        1,
        1 | 1 << 31,
        3,
        0x7FFFFF,
    ]
    scale = {"per": "tensor", "dtype": "F32"}
    part = uniform_part(
        "F32", [2 * m for m in range(6)], least, scale=scale, vectors={"scale": patterns("F32", 0.5)}
    )
    assert decoded(part, "F32") == [0, 0, 1, 2, 2, 2]


# ---------------------------------------------------------------------------------------------- multipliers


def exact_importance(
    numbers: list[float], dtype: str = "F32", over: str = "all"
) -> tuple[dict[str, Any], list[int]]:
    """An exact importance as a multiplier, and its levels."""
    levels = [level_of(pattern, dtype) for pattern in patterns(dtype, *numbers)]
    return {"over": over, "role": "multiplier", **exact(dtype, **table_for(levels))}, levels


@clauses("R-REC-004")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("by", [0.0, -1.0, 3.0])
def test_infinities_and_nans_keep_every_bit_under_a_multiplier(dtype: str, by: float) -> None:
    kind = FLOATS[dtype]
    sign = 1 << (kind.bits - 1)
    payload = kind.nonfinite | 1
    kept = [kind.nonfinite, kind.nonfinite | sign, payload, payload | sign, sign - 1, 2 * sign - 1]
    for pattern in kept:
        importance, marks = exact_importance([by])
        levels = [level_of(pattern, dtype)]
        part = exact_part(dtype, dtype, levels, importance=importance, importances=marks)
        assert decoded(part, dtype) == [pattern]


@clauses("R-REC-001", "R-REC-006")
@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False, width=64), min_size=1, max_size=12),
    st.floats(-(2.0**100), 2.0**100, width=32),
)
def test_f64_is_multiplied_in_binary64(numbers: list[float], by: float) -> None:
    for x in numbers:
        importance, marks = exact_importance([by])
        level = level_of(struct.unpack("<Q", struct.pack("<d", x))[0], "F64")
        part = exact_part("F64", "F64", [level], importance=importance, importances=marks)
        product = struct.unpack("<Q", struct.pack("<d", x * by))[0]
        assert decoded(part, "F64") == [product]


@clauses("R-REC-001", "R-REC-002", "R-REC-003")
@given(
    st.sampled_from(["F32", *NARROW]),
    st.randoms(use_true_random=False),
    st.sampled_from(["F32", "F16", "BF16"]),
)
def test_other_dtypes_are_multiplied_in_binary32_and_rounded(dtype: str, random: Any, coded: str) -> None:
    kind = FLOATS[dtype]
    given_patterns = [
        random.randrange(kind.nonfinite) | random.choice([0, 1 << (kind.bits - 1)]) for _ in range(9)
    ]
    by = [random.uniform(-3, 3) * 2.0 ** random.randrange(-14, 12) for _ in given_patterns]
    importance, marks = exact_importance(by, coded)
    part = exact_part(
        dtype, dtype, [level_of(p, dtype) for p in given_patterns], importance=importance, importances=marks
    )
    expected = []
    with np.errstate(over="ignore", under="ignore"):
        for pattern, multiplier in zip(given_patterns, by, strict=True):
            stored = np.float32(number_of(pattern_of(multiplier, coded), coded))
            product = np.float32(number_of(pattern, dtype)) * stored
            expected.append(pattern_of(float(product), dtype))
    assert decoded(part, dtype) == expected


@clauses("R-REC-001")
def test_the_multiplier_of_factors_is_their_rounded_product() -> None:
    rows, columns = [1 / 3, -2.0], [1 / 7, 0.1, 3e-40]
    importance = {"over": "factors", "role": "multiplier", "dtype": "F32"}
    one = level_of(0x3F800000, "F32")
    part = exact_part(
        "F32",
        "F32",
        [one] * 6,
        shape=[2, 3],
        importance=importance,
        vectors={"rows": patterns("F32", *rows), "columns": patterns("F32", *columns)},
    )
    expected = [np.float32(row) * np.float32(column) for row in rows for column in columns]
    assert decoded(part, "F32") == np.array(expected, np.float32).view(np.uint32).tolist()


@clauses("R-REC-001")
def test_an_importance_with_the_role_metadata_multiplies_nothing() -> None:
    importance, marks = exact_importance([5.0, 7.0])
    importance["role"] = "metadata"
    half = level_of(0x3F000000, "F32")
    part = exact_part("F32", "F32", [half] * 2, importance=importance, importances=marks)
    assert decoded(part, "F32") == [0x3F000000] * 2


@clauses("R-REC-001")
def test_an_importance_of_all_positions_skips_those_of_pruned_ones() -> None:
    importance, marks = exact_importance([2.0, 3.0, 4.0, 5.0])
    one = level_of(0x3F800000, "F32")
    source = exact("F32", **table([0], base=one))
    mask = {"kind": "octets", **table([8])}
    entry = {"dtype": "F32", "shape": [4], "mask": mask, "fingerprints": source, "importance": importance}
    part = hand_part(entry, {"fingerprints": [one] * 2, "importance": marks}, mask=[0, 1, 0, 1])
    assert accepted(hand_file(part))["hand"].tolist() == [0.0, 3.0, 0.0, 5.0]
