"""SPEC.md chapters 11, 12 and 13: quantisers, scales, importance."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sfp_conformance import slow_reader
from sfp_conformance.forge import Forge, Part, exact, f32_bytes, hand_file, hand_part, patterns, table

import sfpformat
from conformance.recipes.samples import everything, weights
from sfpformat import Options, Table
from sfpformat.numpy import load, save

from ..support.clauses import clauses
from ..support.forge import accepted, refused

NOT_A_NUMBER = 0x7FC00000
INFINITY = 0x7F800000
MINUS_INFINITY = 0xFF800000

Edit = Callable[[Forge], None]


def entry_edit(name: str, key: str, **changes: object) -> Edit:
    """An edit of one of a tensor's maps."""

    def edit(file: Forge) -> None:
        file.part(name).entry[key].update(changes)

    return edit


def vector_edit(name: str, vector: str, index: int, pattern: int) -> Edit:
    """An edit of an element of a vector."""

    def edit(file: Forge) -> None:
        part, pos = file.part(name), 0
        assert part.vectors is not None
        for found, count, dtype in slow_reader.vectors(part.entry):
            size = slow_reader.BYTES[dtype]
            if found == vector:
                assert count > index
                at = pos + index * size
                part.vectors[at : at + size] = pattern.to_bytes(size, "little")
            pos = slow_reader.align(pos + count * size, 16)

    return edit


# ---------------------------------------------------------------------------------------------- quantisers


@clauses("R-QNT-001")
@pytest.mark.parametrize("stream", ["fingerprints", "importance"])
@pytest.mark.parametrize("word", ["", "Exact", "trellis", "x-mine"])
def test_a_quantiser_that_is_not_registered_is_refused(stream: str, word: str) -> None:
    refused("R-QNT-001", entry_edit("uniform", stream, quantiser=word), everything(), tensor="uniform")


@clauses("R-QNT-002")
@pytest.mark.parametrize("dtype", ["F64", "F16", "U32", "I32", "BOOL", "F8_E8M0", "C64"])
def test_a_coded_dtype_that_does_not_widen_to_the_tensors_is_refused(dtype: str) -> None:
    # F16 widens, but not to BF16.
    name = "octets" if dtype == "F16" else "runs"
    refused("R-QNT-002", entry_edit(name, "fingerprints", dtype=dtype), everything(), tensor=name)


@clauses("R-TEN-003")
@pytest.mark.parametrize(("name", "stream"), [("runs", "fingerprints"), ("group", "importance")])
def test_a_coded_dtype_that_is_not_registered_is_refused(name: str, stream: str) -> None:
    refused("R-TEN-003", entry_edit(name, stream, dtype="F4"), everything(), tensor=name)


@clauses("R-QNT-002")
@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"])
@pytest.mark.parametrize("coded", ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"])
def test_a_coded_dtype_widens_as_in_the_registry(dtype: str, coded: str) -> None:
    one = 2 * slow_reader.pattern_of(1.0, coded)
    entry = {"dtype": dtype, "shape": [2], "fingerprints": exact(coded, **table([1], base=one))}
    part = hand_part(entry, {"fingerprints": [one, one + 1]})
    if coded == dtype or dtype in slow_reader.FLOATS[coded].widens:
        assert accepted(hand_file(part))["hand"].astype(np.float64).tolist() == [1.0, -1.0]
        return
    right = hand_part({**entry, "fingerprints": exact(dtype, **table([0]))}, {"fingerprints": [0, 0]})

    def edit(file: Forge) -> None:
        file.parts = [part]

    refused("R-QNT-002", edit, hand_file(right), tensor="hand")


@clauses("R-QNT-003")
@pytest.mark.parametrize("stream", ["fingerprints", "importance"])
@pytest.mark.parametrize(
    "pattern", [0, 0x80000000, 0xBF800000, INFINITY, MINUS_INFINITY, NOT_A_NUMBER, 0x7F800001]
)
def test_a_step_that_is_not_a_finite_number_above_0_is_refused(stream: str, pattern: int) -> None:
    edit = entry_edit("uniform", stream, step=struct.pack("<I", pattern))
    refused("R-QNT-003", edit, everything(), tensor="uniform")


@clauses("R-QNT-003")
@pytest.mark.parametrize("size", [0, 3, 5, 8])
def test_a_step_of_anything_but_4_bytes_is_refused(size: int) -> None:
    edit = entry_edit("uniform", "fingerprints", step=(f32_bytes(1.0) * 2)[:size])
    refused("R-QNT-003", edit, everything(), tensor="uniform")


@clauses("R-QNT-003")
@pytest.mark.parametrize("pattern", [1, 0x00800000])
def test_the_least_steps_are_accepted(pattern: int) -> None:
    file = Forge.of(everything())
    file.part("uniform").entry["fingerprints"]["step"] = struct.pack("<I", pattern)
    accepted(file.build())


@clauses("R-QNT-004")
@pytest.mark.parametrize(("name", "stream"), [("table", "fingerprints"), ("coded", "importance")])
@pytest.mark.parametrize("count", [0, 65537, 2**64 - 1])
def test_a_number_of_centroids_that_is_0_or_above_65536_is_refused(
    name: str, stream: str, count: int
) -> None:
    refused("R-QNT-004", entry_edit(name, stream, count=count), everything(), tensor=name)


def many_centroids(count: int) -> Part:
    """A tensor with this many centroids and one survivor, whose magnitude is the last centroid."""
    source = {"quantiser": "table", "count": count, **table([1], base=2 * count - 2)}
    entry = {"dtype": "F32", "shape": [1], "fingerprints": source}
    numbers = list(range(count))
    return hand_part(entry, {"fingerprints": [2 * count - 2]}, vectors={"fingerprint centroids": numbers})


@clauses("R-QNT-004", "R-QNT-007")
@pytest.mark.parametrize("count", [1, 65536])
def test_the_fewest_and_the_most_centroids_are_accepted(count: int) -> None:
    found = accepted(hand_file(many_centroids(count)))["hand"]
    assert found.view(np.uint32).tolist() == [count - 1]


CENTROIDS = [("table", "fingerprint centroids"), ("coded", "importance centroids")]


@clauses("R-QNT-005")
@pytest.mark.parametrize(("name", "vector"), CENTROIDS)
@pytest.mark.parametrize("pattern", [0x80000000, 0x80000001, 0xBF800000, MINUS_INFINITY, 0xFFC00000])
def test_a_centroid_with_the_sign_bit_is_refused(name: str, vector: str, pattern: int) -> None:
    refused("R-QNT-005", vector_edit(name, vector, 0, pattern), everything(), tensor=name)


@clauses("R-QNT-005")
@pytest.mark.parametrize(("name", "vector"), CENTROIDS)
@pytest.mark.parametrize("pattern", [INFINITY, NOT_A_NUMBER, 0x7F800001])
def test_a_centroid_that_is_not_finite_is_refused(name: str, vector: str, pattern: int) -> None:
    refused("R-QNT-005", vector_edit(name, vector, 2, pattern), everything(), tensor=name)


@clauses("R-QNT-005")
def test_a_centroid_of_a_tensor_without_elements_is_checked_too() -> None:
    data = save({"w": np.zeros((0, 4), np.float32)}, options=Options(Table(centroids=4)))
    refused("R-QNT-005", vector_edit("w", "fingerprint centroids", 0, INFINITY), data, tensor="w")


@clauses("R-QNT-007")
@pytest.mark.parametrize(("name", "vector"), CENTROIDS)
def test_centroids_that_do_not_ascend_are_refused(name: str, vector: str) -> None:
    part = Forge.of(everything()).part(name)
    found = slow_reader.read_vectors(part.full_entry(), bytes(part.vectors or b""))[vector]
    second = slow_reader.pattern_of(found[1], "F32")
    for pattern in (second, second + 1):
        refused("R-QNT-007", vector_edit(name, vector, 0, pattern), everything(), tensor=name)
    file = Forge.of(everything())
    vector_edit(name, vector, 0, second - 1)(file)
    accepted(file.build())


@clauses("R-QNT-006")
def test_a_step_whose_product_with_the_greatest_number_is_infinite_is_refused() -> None:
    # The table codes numbers up to 3; three times the greatest step allowed is the greatest binary32.
    source = {"quantiser": "uniform", "step": f32_bytes(1.0), **table([3])}
    part = hand_part({"dtype": "F32", "shape": [2], "fingerprints": source}, {"fingerprints": [7, 6]})
    greatest = slow_reader.number_of(INFINITY - 1, "F32")
    limit = next(
        pattern
        for pattern in range(slow_reader.pattern_of(greatest / 3, "F32") + 3, 0, -1)
        if slow_reader.f32(3 * slow_reader.number_of(pattern, "F32")) <= greatest
    )
    part.entry["fingerprints"]["step"] = struct.pack("<I", limit)
    found = accepted(hand_file(part))["hand"]
    assert np.isfinite(found).all()
    edit = entry_edit("hand", "fingerprints", step=struct.pack("<I", limit + 1))
    refused("R-QNT-006", edit, hand_file(part), tensor="hand")


@clauses("R-QNT-006")
def test_the_number_of_the_bound_is_that_of_the_table_not_of_its_levels_in_use() -> None:
    edit = entry_edit("uniform", "fingerprints", base=2**32 - 1 - 2**6, step=f32_bytes(2.0**97))
    refused("R-QNT-006", edit, everything(), tensor="uniform")


@clauses("R-QNT-006", "R-TAB-008")
def test_the_greatest_uniform_level_is_read() -> None:
    source = {"quantiser": "uniform", "step": f32_bytes(2.0**96), **table([1], base=2**32 - 2)}
    part = hand_part(
        {"dtype": "F32", "shape": [2], "fingerprints": source}, {"fingerprints": [2**32 - 1] * 2}
    )
    # m = 2^31 - 1 rounds to 2^31 in binary32.
    assert accepted(hand_file(part))["hand"].tolist() == [-(2.0**127)] * 2


# -------------------------------------------------------------------------------------------------- scales


@clauses("R-SCL-001")
@pytest.mark.parametrize("per", ["", "Row", "block", "x-mine"])
def test_a_scale_with_an_unknown_per_is_refused(per: str) -> None:
    refused("R-SCL-001", entry_edit("uniform", "scale", per=per), everything(), tensor="uniform")


@clauses("R-SCL-002")
@pytest.mark.parametrize("size", [0])
def test_a_group_of_no_position_is_refused(size: int) -> None:
    refused("R-SCL-002", entry_edit("group", "scale", size=size), everything(), tensor="group")


@clauses("R-DIR-002", "R-DIR-007")
def test_a_group_without_a_size_and_a_size_without_groups_are_refused() -> None:
    def without(file: Forge) -> None:
        del file.part("group").entry["scale"]["size"]

    refused("R-DIR-002", without, everything(), tensor="group")
    refused("R-DIR-007", entry_edit("uniform", "scale", size=7), everything(), tensor="uniform")


@clauses("R-DIR-007")
@pytest.mark.parametrize(
    ("name", "where", "key"),
    [
        ("runs", "fingerprints", "step"),
        ("octets", "fingerprints", "count"),
        ("uniform", "fingerprints", "trim"),
        ("table", "fingerprints", "step"),
        ("group", "importance", "count"),
        ("uniform", "importance", "dtype"),
        ("coded", "importance", "step"),
        ("table", "importance", "base"),
        ("table", "importance", "quantiser"),
    ],
)
def test_a_key_of_another_quantiser_is_refused(name: str, where: str, key: str) -> None:
    refused("R-DIR-007", entry_edit(name, where, **{key: 1}), everything(), tensor=name)


@clauses("R-DIR-005")
def test_a_key_of_another_map_is_unknown_and_accepted() -> None:
    file = Forge.of(everything())
    file.part("uniform").entry["scale"]["polarity"] = 1
    file.part("uniform").entry["mask"]["step"] = b"none"
    accepted(file.build())


def scaled(entry: dict[str, object], factors: list[int], count: int) -> Part:
    """A tensor of this many ones with a scale."""
    source = {"quantiser": "uniform", "step": f32_bytes(1.0), **table([0], base=2)}
    return hand_part(
        {"dtype": "F32", "fingerprints": source, **entry},
        {"fingerprints": [2] * count},
        vectors={"scale": factors},
    )


@clauses("R-SCL-002")
@pytest.mark.parametrize("size", [1, 5, 6, 2**31, 2**32, 2**63, 2**64 - 1])
def test_groups_of_any_size_are_read(size: int) -> None:
    factors = [i + 1.0 for i in range(-(-6 // size))]
    scale = {"per": "group", "size": size, "dtype": "F32"}
    part = scaled({"shape": [6], "scale": scale}, patterns("F32", *factors), 6)
    assert accepted(hand_file(part))["hand"].tolist() == [factors[p // size] for p in range(6)]


@clauses("R-SCL-001", "R-REC-001")
@pytest.mark.parametrize("shape", [[], [6], [1, 6], [6, 1], [2, 3], [3, 2, 1], [1, 1, 2, 3]])
@pytest.mark.parametrize("per", ["tensor", "row", "column"])
def test_each_position_has_the_factor_of_its_tensor_row_or_column(shape: list[int], per: str) -> None:
    count = int(np.prod(shape))
    rows = shape[0] if len(shape) > 1 else 1
    columns = count // rows
    factors = [float(i + 1) for i in range({"tensor": 1, "row": rows, "column": columns}[per])]
    scale = {"per": per, "dtype": "BF16"}
    part = scaled({"shape": shape, "scale": scale}, patterns("BF16", *factors), count)
    place = {"tensor": lambda p: 0, "row": lambda p: p // columns, "column": lambda p: p % columns}[per]
    found = accepted(hand_file(part))["hand"]
    assert found.reshape(-1).tolist() == [factors[place(p)] for p in range(count)]


@clauses("R-SCL-003")
@pytest.mark.parametrize("dtype", ["", "F64", "F8_E4M3", "U16", "f32", "x-mine"])
def test_scale_factors_of_another_dtype_are_refused(dtype: str) -> None:
    refused("R-SCL-003", entry_edit("uniform", "scale", dtype=dtype), everything(), tensor="uniform")


@clauses("R-SCL-004")
@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("uniform", 0x7C00),
        ("uniform", 0xFC00),
        ("uniform", 0x7E00),
        ("group", 0x7F80),
        ("coded", NOT_A_NUMBER),
    ],
)
def test_a_scale_factor_that_is_not_finite_is_refused(name: str, pattern: int) -> None:
    refused("R-SCL-004", vector_edit(name, "scale", 0, pattern), everything(), tensor=name)


@clauses("R-DIR-007")
@pytest.mark.parametrize("name", ["runs", "octets"])
def test_a_scale_with_an_exact_quantiser_is_refused(name: str) -> None:
    def edit(file: Forge) -> None:
        file.part(name).entry["scale"] = {"per": "tensor", "dtype": "F32"}
        file.part(name).vectors = bytearray(64)

    refused("R-DIR-007", edit, everything(), tensor=name)


@clauses("R-SCL-006")
@pytest.mark.parametrize("sign", [0, 0x80000000])
def test_a_factor_whose_product_with_the_greatest_weight_is_infinite_is_refused(sign: int) -> None:
    entry = Forge.of(everything()).part("coded").entry["fingerprints"]
    greatest = ((slow_reader.top(entry) - 1) // 2) * slow_reader.step_of(entry)
    limit = slow_reader.pattern_of(slow_reader.number_of(INFINITY - 1, "F32") / greatest, "F32")
    while slow_reader.pattern_of(greatest * slow_reader.number_of(limit + 1, "F32"), "F32") < INFINITY:
        limit += 1
    while slow_reader.pattern_of(greatest * slow_reader.number_of(limit, "F32"), "F32") >= INFINITY:
        limit -= 1
    file = Forge.of(everything())
    vector_edit("coded", "scale", 0, sign | limit)(file)
    accepted(file.build())
    edit = vector_edit("coded", "scale", 0, sign | (limit + 1))
    refused("R-SCL-006", edit, everything(), tensor="coded")


@clauses("R-SCL-006")
def test_by_table_the_greatest_weight_is_the_last_centroid() -> None:
    def edit(file: Forge) -> None:
        vector_edit("table", "fingerprint centroids", 4, INFINITY - 1)(file)
        vector_edit("table", "scale", 3, 0x3C01)(file)

    refused("R-SCL-006", edit, everything(), tensor="table")


# ---------------------------------------------------------------------------------------------- importance


@clauses("R-IMP-001")
@pytest.mark.parametrize("over", ["", "All", "pruned", "x-mine"])
def test_an_importance_with_an_unknown_over_is_refused(over: str) -> None:
    refused("R-IMP-001", entry_edit("uniform", "importance", over=over), everything(), tensor="uniform")


@clauses("R-IMP-002")
@pytest.mark.parametrize("role", ["", "Metadata", "divisor", "x-mine"])
@pytest.mark.parametrize("name", ["uniform", "table", "group"])
def test_an_importance_of_another_role_is_refused(name: str, role: str) -> None:
    refused("R-IMP-002", entry_edit(name, "importance", role=role), everything(), tensor=name)


@clauses("R-IMP-003")
@pytest.mark.parametrize("name", ["table", "group"])
@pytest.mark.parametrize("dtype", ["F64", "F8_E4M3", "F8_E5M2", "U16", "BOOL"])
def test_an_importance_of_another_dtype_is_refused(name: str, dtype: str) -> None:
    refused("R-IMP-003", entry_edit(name, "importance", dtype=dtype), everything(), tensor=name)


@clauses("R-IMP-004")
@pytest.mark.parametrize("vector", ["rows", "columns"])
@pytest.mark.parametrize("pattern", [INFINITY, MINUS_INFINITY, NOT_A_NUMBER])
def test_an_importance_factor_that_is_not_finite_is_refused(vector: str, pattern: int) -> None:
    refused("R-IMP-004", vector_edit("table", vector, 1, pattern), everything(), tensor="table")


@clauses("R-IMP-005")
@pytest.mark.parametrize(("row", "column"), [(2.0**64, 2.0**64), (-(2.0**127), 3.0), (2.0**65, -(2.0**63))])
def test_importance_factors_whose_product_is_infinite_are_refused(row: float, column: float) -> None:
    def edit(file: Forge) -> None:
        vector_edit("table", "rows", 1, slow_reader.pattern_of(row, "F32"))(file)
        vector_edit("table", "columns", 5, slow_reader.pattern_of(column, "F32"))(file)

    refused("R-IMP-005", edit, everything(), tensor="table")
    file = Forge.of(everything())
    vector_edit("table", "rows", 1, slow_reader.pattern_of(row / 8, "F32"))(file)
    vector_edit("table", "columns", 5, slow_reader.pattern_of(column / 8, "F32"))(file)
    accepted(file.build())


@clauses("R-IMP-006")
def test_an_importance_step_whose_product_with_the_greatest_level_is_infinite_is_refused() -> None:
    entry = Forge.of(everything()).part("uniform").entry["importance"]
    level = slow_reader.top(entry) - 1
    greatest = slow_reader.number_of(INFINITY - 1, "F32")
    limit = slow_reader.pattern_of(greatest / level, "F32")
    while slow_reader.pattern_of(level * slow_reader.number_of(limit + 1, "F32"), "F32") < INFINITY:
        limit += 1
    while slow_reader.pattern_of(level * slow_reader.number_of(limit, "F32"), "F32") >= INFINITY:
        limit -= 1
    file = Forge.of(everything())
    entry_edit("uniform", "importance", step=struct.pack("<I", limit))(file)
    accepted(file.build())
    edit = entry_edit("uniform", "importance", step=struct.pack("<I", limit + 1))
    refused("R-IMP-006", edit, everything(), tensor="uniform")


@clauses("R-IMP-001", "R-IMP-002", "R-IMP-003")
@pytest.mark.parametrize("role", ["metadata", "multiplier"])
@pytest.mark.parametrize("over", ["survivors", "all"])
@pytest.mark.parametrize("quantiser", ["uniform", "exact"])
def test_the_importance_that_is_read_is_the_one_that_was_given(role: str, over: str, quantiser: str) -> None:
    array, given = weights(9, 11), np.abs(weights(9, 11, density=1.0, seed=3))
    how = sfpformat.ImportanceOptions(role=role, over=over, quantiser=quantiser, bits=12)
    options = sfpformat.Options(coding="fingerprint", importance=how)
    data = save({"a": array}, options=options, importances={"a": given})
    accepted(data)
    with sfpformat.open(data) as file:
        found = file.get_importance("a")
        mask = file.get_mask("a")
    assert found is not None
    kept = mask if over == "survivors" else np.ones_like(mask)
    assert not found[~kept].any()
    if quantiser == "exact":
        assert found[kept].tobytes() == given[kept].tobytes()
    else:
        assert np.abs(found[kept] - given[kept]).max() <= given.max() / 4095 * 0.51


@pytest.mark.parametrize("engine", ["python", "numba"])
@pytest.mark.parametrize("mask", ["auto", "none", "runs"])
@pytest.mark.parametrize("share", [0.0005, 0.01, 0.5])
@pytest.mark.parametrize("scale", [None, "row"])
def test_a_table_of_centroids_decodes_zeros_as_zeros(
    share: float, mask: str, scale: str | None, engine: str
) -> None:
    rng = np.random.default_rng(5)
    weights = (rng.standard_normal((64, 128)) * (rng.random((64, 128)) >= share)).astype(np.float32)
    options = Options(Table(centroids=5, scale=scale), mask=mask)
    found: NDArray[Any] = load(save({"w": weights}, options=options, engine=engine))["w"]
    assert not found[weights == 0].any()
    assert np.square(found - weights).sum() < 0.1 * np.square(weights).sum()
