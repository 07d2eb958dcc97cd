"""SPEC.md chapters 7 and 17: the contents of the directory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sfp_conformance import slow_reader
from sfp_conformance.forge import Forge, Part, hand_file, hand_part, pack, table

import sfpformat
from conformance.recipes.samples import everything, plain, weights
from sfpformat import FileFault, Limits, Options, Table
from sfpformat.container import messagepack
from sfpformat.numpy import save

from ..support.clauses import clauses
from ..support.forge import accepted, refused, refused_bytes
from ..support.mutations import with_changes
from ..support.strategies import jobs, written

WRONG_TYPES: dict[type, list[object]] = {
    int: ["1", b"1", [1], {"a": 1}],
    str: [1, b"exact", ["exact"], {"a": 1}],
    bytes: [1, "exact", [b""], {"a": 1}],
    list: [1, "exact", b"", {"a": 1}],
    dict: [1, "exact", b"", []],
}


def maps_of(file: Forge) -> Iterator[tuple[str | None, str, dict[str, Any]]]:
    """Every map of a directory, with its tensor and its name; the chunk records do not change."""
    file.root["tensors"] = [part.full_entry() for part in file.parts]
    yield None, "root", file.root
    for entry in file.root["tensors"]:
        yield entry["name"], "entry", entry
        for key in ("mask", "fingerprints", "scale", "importance"):
            if key in entry:
                yield entry["name"], key, entry[key]


def places() -> list[tuple[int, str]]:
    """Each key of each map of `everything`, as the number of the map and the key."""
    found = enumerate(maps_of(Forge.of(everything())))
    return [(number, key) for number, (_, _, fields) in found for key in fields]


def field_of(file: Forge, number: int) -> tuple[str | None, str, dict[str, Any]]:
    """The map with that number, and its tensor."""
    return list(maps_of(file))[number]


# Keys that are optional whatever the other keys are.
OPTIONAL = {("root", "metadata"), ("entry", "mask"), ("entry", "scale"), ("entry", "importance")}


@clauses("R-DIR-002")
def test_an_entry_without_a_required_key_is_refused() -> None:
    checked = 0
    for number, key in places():
        file = Forge.of(everything())
        tensor, where, fields = field_of(file, number)
        if (where, key) in OPTIONAL or key in ("vectors", "size", "tensors"):
            continue
        del fields[key]
        error = refused_bytes(file.build(), "R-DIR-002", tensor=None if key == "name" else tensor)
        assert key in error.detail
        checked += 1
    refused_bytes(Forge(directory=pack({"metadata": {"a": "b"}})).build(), "R-DIR-002")
    assert checked > 100


@clauses("R-DIR-003")
def test_every_value_of_another_type_is_refused() -> None:
    for number, key in places():
        kind = type(field_of(Forge.of(everything()), number)[2][key])
        for wrong in WRONG_TYPES[kind]:
            file = Forge.of(everything())
            tensor, _, fields = field_of(file, number)
            fields[key] = wrong
            refused_bytes(file.build(), "R-DIR-003", tensor=None if key == "name" else tensor)


@clauses("R-DIR-003")
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("features", "delta"),
        ("features", [1]),
        ("metadata", ["a"]),
        ("metadata", {"a": 1}),
        ("metadata", {"a": b"b"}),
        ("tensors", {}),
        ("tensors", [1]),
        ("tensors", ["name"]),
    ],
)
def test_a_root_value_of_another_type_is_refused(key: str, value: object) -> None:
    def edit(file: Forge) -> None:
        file.root[key] = value

    refused("R-DIR-003", edit, everything())


@clauses("R-DIR-003")
@pytest.mark.parametrize(("key", "value"), [("shape", ["4", 24]), ("shape", [4, [24]])])
def test_a_shape_of_anything_but_integers_is_refused(key: str, value: object) -> None:
    def edit(file: Forge) -> None:
        file.part("runs").entry[key] = value

    refused("R-DIR-003", edit, everything(), tensor="runs")


@clauses("R-DIR-003")
def test_a_code_that_is_not_binary_is_refused() -> None:
    def edit(file: Forge) -> None:
        codes = file.part("runs").entry["mask"]["codes"]
        codes[0] = "x" * len(codes[0])

    refused("R-DIR-003", edit, everything(), tensor="runs")


@clauses("R-DIR-001")
@pytest.mark.parametrize("value", [b"\x90", b"\x01", b"\xa0", b"\xc4\x00"])
def test_a_directory_that_is_no_map_is_refused(value: bytes) -> None:
    def edit(file: Forge) -> None:
        file.directory = value

    refused("R-DIR-001", edit, everything())


@clauses("R-DIR-004")
@pytest.mark.parametrize(("key", "value"), [("features", []), ("metadata", {})])
def test_an_empty_list_of_features_and_empty_metadata_are_refused(key: str, value: object) -> None:
    def edit(file: Forge) -> None:
        file.root[key] = value

    refused("R-DIR-004", edit, everything())


@clauses("R-DIR-002", "R-DIR-004")
def test_the_writer_omits_empty_features_and_metadata() -> None:
    root, _ = slow_reader.read_directory(save({"a": weights(4, 4)}))
    assert set(root) == {"tensors"}
    root, _ = slow_reader.read_directory(save({}, {"k": "v"}))
    assert root == {"metadata": {"k": "v"}, "tensors": []}


UNKNOWN = {"x-mine": {"a": [1, "b", b"c"]}, "A": 0, "zz": "later"}


@clauses("R-DIR-005", "R-DIR-006")
def test_unknown_keys_do_not_change_the_result_in_any_map() -> None:
    expected = {name: array.tobytes() for name, array in accepted(everything()).items()}
    for number in range(len(list(maps_of(Forge.of(everything()))))):
        file = Forge.of(everything())
        field_of(file, number)[2].update(UNKNOWN)
        assert {name: array.tobytes() for name, array in accepted(file.build()).items()} == expected


@clauses("R-DIR-005")
@pytest.mark.parametrize("where", ["root", "entry", "mask", "fingerprints", "scale", "importance"])
def test_unknown_keys_are_returned_to_the_user(where: str) -> None:
    file = Forge.of(everything())
    entry = file.part("uniform").entry
    fields = {"root": file.root, "entry": entry}.get(where) or entry[where]
    fields.update(UNKNOWN)
    with sfpformat.open(file.build()) as opened:
        unknown: Any = opened.info("uniform").unknown
        kept = {"root": opened.directory.other, "entry": unknown}.get(where) or unknown[where]
        assert kept == UNKNOWN


@clauses("R-DIR-006", "R-FEA-003")
def test_the_writer_writes_the_keys_and_words_of_the_document_and_no_other() -> None:
    forge = Forge.of(everything())
    known = {
        "root": {"metadata", "tensors"},
        "entry": {"name", "dtype", "shape", "coding", "segment", "chunk", "chunks", "vectors"}
        | {"mask", "fingerprints", "scale", "importance"},
        "mask": {"kind", "polarity", "base", "extra", "codes", "group", "window"},
        "fingerprints": {
            "quantiser",
            "dtype",
            "trim",
            "step",
            "count",
            "base",
            "extra",
            "codes",
            "group",
            "window",
        },
        "scale": {"per", "size", "dtype"},
        "importance": {"over", "role", "quantiser", "dtype", "trim", "step", "count"}
        | {"base", "extra", "codes", "group", "window"},
    }
    for _, where, fields in maps_of(forge):
        assert set(fields) <= known[where]


@clauses("R-TEN-001")
def test_a_name_that_occurs_twice_is_refused() -> None:
    def edit(file: Forge) -> None:
        file.part("octets").entry["name"] = "runs"

    refused("R-TEN-001", edit, everything(), tensor="runs")


@clauses("R-TEN-001")
def test_names_that_differ_only_in_how_they_are_composed_are_two_names() -> None:
    names = ["é", "e\u0301", "É", " ", "a/../b", "\x1b[31m"]
    data = save({name: np.full(3, i, np.uint8) for i, name in enumerate(names)})
    assert [int(array[0]) for array in accepted(data).values()] == list(range(len(names)))


@clauses("R-TEN-002")
def test_an_empty_name_is_refused() -> None:
    def edit(file: Forge) -> None:
        file.part("flags").entry["name"] = ""

    refused_bytes_of = Forge.of(everything())
    edit(refused_bytes_of)
    refused_bytes(refused_bytes_of.build(), "R-TEN-002", tensor="")


@clauses("R-TEN-003")
@pytest.mark.parametrize("dtype", ["", "f32", "F4", "F6_E2M3", "F128", "BF16 ", "x-mine"])
def test_a_dtype_that_is_not_registered_is_refused(dtype: str) -> None:
    def edit(file: Forge) -> None:
        file.part("raw").entry["dtype"] = dtype

    refused("R-TEN-003", edit, everything(), tensor="raw")


@clauses("R-TEN-004")
@pytest.mark.parametrize("coding", ["", "RAW", "zip", "x-mine"])
def test_a_coding_that_is_not_registered_is_refused(coding: str) -> None:
    def edit(file: Forge) -> None:
        file.part("raw").entry["coding"] = coding

    refused("R-TEN-004", edit, everything(), tensor="raw")


@clauses("R-TEN-005")
@pytest.mark.parametrize(
    "shape",
    [[2**48 + 1], [2**24, 2**24, 2], [0, 2**48 + 1], [2**25, 0, 2**24], [2**64 - 1] * 32, [0, 2**64 - 1]],
)
def test_a_shape_of_more_than_2_to_the_48_positions_is_refused(shape: list[int]) -> None:
    def edit(file: Forge) -> None:
        file.part("empty").entry["shape"] = shape

    refused("R-TEN-005", edit, everything(), tensor="empty")


@clauses("R-TEN-005")
@pytest.mark.parametrize("shape", [[0], [0, 0], [2**48, 0], [0, 2**24, 2**24], [1, 0, 1, 1, 5]])
def test_an_empty_tensor_may_have_any_shape_within_the_bound(shape: list[int]) -> None:
    for name in ("empty", "raw"):
        file = Forge.of(everything())
        part = file.part(name)
        part.entry["shape"], part.chunks = shape, []
        found = accepted(file.build())[name]
        assert list(found.shape) == shape
        with sfpformat.open(file.build()) as opened:
            assert list(opened.get_mask(name).shape) == shape


@clauses("R-TEN-006")
@pytest.mark.parametrize("segment", [0, 1, 31, 33, 48, 65535, 65568, 2**32, 2**64 - 32])
def test_a_segment_that_is_no_multiple_of_32_up_to_65536_is_refused(segment: int) -> None:
    def edit(file: Forge) -> None:
        file.part("runs").entry["segment"] = segment

    refused("R-TEN-006", edit, everything(), tensor="runs")


@clauses("R-TEN-007")
@pytest.mark.parametrize(("segment", "chunk"), [(32, 0), (32, 2**19 + 1), (65536, 257), (32, 2**64 - 1)])
def test_a_chunk_of_no_segment_or_of_more_than_2_to_the_24_positions_is_refused(
    segment: int, chunk: int
) -> None:
    def edit(file: Forge) -> None:
        file.part("runs").entry |= {"segment": segment, "chunk": chunk}

    refused("R-TEN-007", edit, everything(), tensor="runs")


@clauses("R-TEN-006", "R-TEN-007")
@pytest.mark.parametrize(("segment", "chunk"), [(32, 1), (32, 2**19), (65536, 256)])
def test_the_least_and_the_greatest_segments_and_chunks_are_accepted(segment: int, chunk: int) -> None:
    file = Forge.of(everything())
    part = file.part("flags")
    part.entry |= {"segment": segment, "chunk": chunk}
    accepted(file.build())
    array = weights(70)
    data = save({"a": array}, options=Options(coding="fingerprint", segment=segment, chunk=segment * chunk))
    root, _ = slow_reader.read_directory(data)
    assert root["tensors"][0]["segment"] == segment
    assert root["tensors"][0]["chunk"] == chunk
    assert accepted(data)["a"].tobytes() == array.tobytes()


@clauses("R-TEN-008")
@pytest.mark.parametrize("change", ["one less", "one more", "half a record", "none", "empty tensor"])
def test_chunk_records_of_another_number_are_refused(change: str) -> None:
    def edit(file: Forge) -> None:
        part = file.part("runs")
        records = part.full_entry()["chunks"]
        edited = {
            "one less": records[:-8],
            "one more": records + records[-8:],
            "half a record": records[:-4],
            "none": b"",
            "empty tensor": records,
        }
        part.entry["chunks"] = edited[change]
        if change == "empty tensor":
            part.entry["shape"] = [0, 24]

    refused("R-TEN-008", edit, everything(), tensor="runs")


@clauses("R-TEN-008")
def test_a_tensor_of_2_to_the_48_positions_without_chunks_is_refused() -> None:
    def edit(file: Forge) -> None:
        file.part("empty").entry["shape"] = [2**48]

    refused("R-TEN-008", edit, everything(), tensor="empty")


@clauses("R-DIR-002")
def test_vectors_without_a_vector_chunk_are_refused() -> None:
    def edit(file: Forge) -> None:
        file.part("coded").vectors = None

    refused("R-DIR-002", edit, everything(), tensor="coded")


@clauses("R-DIR-007")
@pytest.mark.parametrize("name", ["runs", "empty"])
def test_a_vector_chunk_without_vectors_is_refused(name: str) -> None:
    def edit(file: Forge) -> None:
        file.part(name).vectors = bytearray(64)

    refused("R-DIR-007", edit, everything(), tensor=name)


@clauses("R-DIR-007")
def test_an_empty_tensor_with_centroids_has_a_vector_chunk() -> None:
    data = save({"a": np.zeros((0, 2), np.float32)}, options=Options(Table(centroids=3)))
    root, _ = slow_reader.read_directory(data)
    assert "vectors" in root["tensors"][0]
    accepted(data)


@clauses("R-TEN-010")
@pytest.mark.parametrize("dtype", ["BOOL", "U32", "I32", "C64", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"])
def test_fingerprints_of_a_dtype_that_cannot_be_coded_are_refused(dtype: str) -> None:
    def edit(file: Forge) -> None:
        file.part("runs").entry["dtype"] = dtype

    refused("R-TEN-010", edit, everything(), tensor="runs")


@clauses("R-DIR-007")
@pytest.mark.parametrize("key", ["mask", "fingerprints", "scale", "importance"])
def test_a_raw_tensor_with_streams_is_refused(key: str) -> None:
    def edit(file: Forge) -> None:
        file.part("raw").entry[key] = file.part("uniform").entry[key]

    refused("R-DIR-007", edit, everything(), tensor="raw")


@clauses("R-DIR-007")
def test_a_raw_tensor_with_a_vector_chunk_is_refused() -> None:
    def edit(file: Forge) -> None:
        file.part("raw").vectors = bytearray(64)

    refused("R-DIR-007", edit, everything(), tensor="raw")


@clauses("R-TEN-012")
@pytest.mark.parametrize("size", [0, 7, 9, 16])
def test_vectors_of_anything_but_one_record_are_refused(size: int) -> None:
    def edit(file: Forge) -> None:
        part = file.part("coded")
        records = part.full_entry()["vectors"] * 2
        part.entry["vectors"] = records[:size]

    refused("R-TEN-012", edit, everything(), tensor="coded")


def tiny(dtype: str, level: int, **streams: Any) -> Part:
    """A tensor of one position whose level has no bits."""
    kinds = {"F32": 4, "F64": 8}
    source = {"quantiser": "exact", "dtype": dtype, "trim": 0, **table([0], base=level)}
    assert kinds[dtype]
    return hand_part(
        {"dtype": dtype, "shape": [], "fingerprints": source, **streams}, {"fingerprints": [level]}
    )


@clauses("R-DIR-002")
def test_a_tensor_of_rank_0_with_levels_of_no_bits_is_read() -> None:
    found = accepted(hand_file(tiny("F32", 2 * 0x3FC00000 + 1)))["hand"]
    assert found.shape == ()
    assert found == np.float32(-1.5)


# ------------------------------------------------------------------------------------------- the quick way


def judgement(data: bytes, limits: Limits) -> object:
    """The result of opening a file: the contents of the directory, or the fault with its text and offset."""
    try:
        with sfpformat.open(data, limits=limits) as file:
            directory = file.directory
            kept = [(entry.name, entry.other) for entry in directory.tensors.values()]
            return directory.to_bytes(), directory.other, kept, directory.offsets()
    except FileFault as error:
        return type(error), error.clause, error.detail, error.tensor, error.offset


def assert_same_verdict(data: bytes, limits: Limits = sfpformat.DEFAULT_LIMITS) -> None:
    """Asserts that opening a file has the same result with and without the fast path."""
    quickly = judgement(data, limits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(messagepack, "decode_quickly", lambda data, limits: None)
        assert judgement(data, limits) == quickly


@clauses("R-DIR-002", "R-DIR-003", "R-STR-002")
@settings(max_examples=300)
@given(st.integers(0, 2**64 - 1), st.integers(1, 3))
def test_the_fast_path_and_the_strict_parser_give_the_same_verdict_on_changed_directories(
    seed: int, changes: int
) -> None:
    data = with_changes(everything(), seed, changes)
    assert_same_verdict(data)
    assert_same_verdict(data, Limits(depth=5, name_bytes=7, rank=2, tensors=9))


@clauses("R-DIR-005", "R-MSG-001", "R-MSG-003")
@pytest.mark.parametrize("value", [True, None, -1, 1.5, "\0", [True], {"a": -1}, [0] * 70, {"": [[b"a"]]}])
def test_the_fast_path_and_the_strict_parser_give_the_same_verdict_on_any_value(value: object) -> None:
    for number, key in [*places(), (0, "x-a"), (1, "x-a"), (6, "x-a")]:
        file = Forge.of(everything())
        field_of(file, number)[2][key] = value
        assert_same_verdict(file.build())


@given(jobs())
def test_ordinary_files_take_the_fast_path(job: Any) -> None:
    for data in (everything(), plain(), written(job)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(messagepack, "decode", None)
            sfpformat.open(data).close()


def test_records_know_the_keys_of_their_maps() -> None:
    with sfpformat.open(everything()) as file:
        entries = list(file.directory.tensors.values())
    records = [r for e in entries for r in (e.mask, e.fingerprints, e.scale, e.importance) if r is not None]
    assert len(records) > 15
    for record in records:
        assert set(record.keys) == set(record.to_map())
        assert len(record.keys) == len(record.to_map())
