"""SPEC.md chapter 6: the directory's encoding."""

from __future__ import annotations

import random
import struct
import tracemalloc

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sfp_conformance import slow_reader
from sfp_conformance.forge import Forge, Pairs, Raw, pack

from conformance.recipes.directory import CLAIMS, FORBIDDEN, LONG
from conformance.recipes.samples import everything, plain
from sfpformat.container import messagepack
from sfpformat.container.messagepack import Map
from sfpformat.errors import FileFault
from sfpformat.limits import DEFAULT_LIMITS

from ..support.clauses import clauses
from ..support.forge import accepted, fault_of, refused, refused_bytes

text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40)
values = st.recursive(
    st.integers(0, 2**64 - 1)
    | st.sampled_from([0, 127, 128, 255, 256, 65535, 65536, 2**32 - 1, 2**32])
    | text
    | st.binary(max_size=300),
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(text, inner, max_size=20),
    max_leaves=30,
)


@clauses("R-MSG-001", "R-MSG-002", "R-MSG-003", "R-MSG-004", "R-MSG-005", "R-MSG-006", "R-MSG-007")
@given(st.dictionaries(text, values, max_size=20))
def test_every_value_has_one_encoding_and_both_readers_read_it_back(value: dict[str, object]) -> None:
    data = messagepack.encode(value)
    assert data == pack(value)
    assert messagepack.decode(data, DEFAULT_LIMITS) == value
    assert slow_reader.MessagePack(data).value() == value


@clauses("R-MSG-002")
@pytest.mark.parametrize("size", [0, 15, 16, 31, 32, 255, 256, 65535, 65536])
def test_strings_binaries_arrays_and_maps_of_any_size_are_read_back(size: int) -> None:
    value: dict[str, object] = {
        "text": "x" * size,
        "binary": bytes(size),
        "array": [7] * size,
        "map": {format(i, "05d"): 1 for i in range(size)},
    }
    assert messagepack.decode(messagepack.encode(value), DEFAULT_LIMITS) == value


@clauses("R-MSG-004")
def test_a_map_records_the_offsets_of_its_values() -> None:
    decoded = messagepack.decode(pack({"a": {"b": 1}, "c": "d"}), DEFAULT_LIMITS)
    assert isinstance(decoded, Map)
    inner = decoded["a"]
    assert isinstance(inner, Map)
    assert (decoded.offset, decoded.at, inner.offset, inner.at) == (0, {"a": 3, "c": 9}, 3, {"b": 6})


def with_value(raw: bytes) -> bytes:
    """A file with an unknown key in its root that has these bytes as its value."""
    file = Forge.of(plain())
    file.root["x-a"] = Raw(raw)
    return file.build()


@clauses("R-MSG-001")
@pytest.mark.parametrize("kind", FORBIDDEN)
def test_types_outside_the_subset_are_refused(kind: str) -> None:
    error = refused_bytes(with_value(FORBIDDEN[kind]), "R-MSG-001")
    assert error.offset == with_value(FORBIDDEN[kind]).rindex(b"x-a") + 3


@clauses("R-MSG-001")
@pytest.mark.parametrize("key", [1, b"a", [], Raw(b"\xc0")])
def test_a_key_that_is_no_string_is_refused(key: object) -> None:
    def edit(file: Forge) -> None:
        file.root["x-a"] = Pairs([(key, 1)])

    refused("R-MSG-001", edit, plain())


@clauses("R-MSG-002")
@pytest.mark.parametrize("kind", LONG)
def test_an_encoding_that_is_not_the_shortest_is_refused(kind: str) -> None:
    refused_bytes(with_value(LONG[kind]), "R-MSG-002")


@clauses("R-MSG-003")
@pytest.mark.parametrize(
    "raw",
    [
        b"\xff",
        b"\x80",
        b"\xc3",
        b"\xc0\xaf",  # overlong
        b"\xe0\x80\xaf",
        b"\xed\xa0\x80",  # a surrogate
        b"\xf4\x90\x80\x80",  # beyond U+10FFFF
        b"\xf8\x88\x80\x80\x80",
        b"a\0b",
        b"\0",
    ],
)
def test_strings_that_are_not_utf_8_or_hold_a_nul_are_refused(raw: bytes) -> None:
    refused_bytes(with_value(bytes([0xA0 + len(raw)]) + raw), "R-MSG-003")
    refused_bytes(with_value(b"\x81" + bytes([0xA0 + len(raw)]) + raw + b"\1"), "R-MSG-003")


@clauses("R-MSG-004")
@pytest.mark.parametrize("keys", [("b", "a"), ("aa", "a"), ("é", "z"), ("a", "")])
def test_keys_out_of_order_are_refused(keys: tuple[str, str]) -> None:
    def edit(file: Forge) -> None:
        file.root["x-a"] = Pairs([(keys[0], 1), (keys[1], 2)])

    refused("R-MSG-004", edit, plain())
    mended = Forge.of(plain())
    mended.root["x-a"] = Pairs([(keys[1], 2), (keys[0], 1)])
    accepted(mended.build())


@clauses("R-MSG-005")
def test_a_key_that_occurs_twice_is_refused_in_any_map() -> None:
    file = Forge.of(everything())
    for name in ("mask", "fingerprints", "importance", "scale"):
        broken = Forge.of(everything())
        entry = broken.part("uniform").entry
        pairs = sorted(entry[name].items())
        entry[name] = Pairs([pairs[0], *pairs])
        refused_bytes(broken.build(), "R-MSG-005")
    pairs = sorted(file.part("uniform").full_entry().items())
    file.root["tensors"] = [Pairs([*pairs, pairs[-1]])]
    refused_bytes(file.build(), "R-MSG-005")


@clauses("R-MSG-006")
@pytest.mark.parametrize("more", [b"\0", b"\x80", b"\xc1", bytes(100)])
def test_bytes_after_the_value_are_refused(more: bytes) -> None:
    def edit(file: Forge) -> None:
        file.directory = file.directory_bytes() + more

    refused("R-MSG-006", edit, plain())


@clauses("R-MSG-007")
def test_a_directory_that_ends_too_early_is_refused_wherever_it_ends() -> None:
    whole = Forge.of(plain()).directory_bytes()
    for length in range(len(whole)):
        broken = Forge.of(plain())
        broken.directory = whole[:length]
        refused_bytes(broken.build(), "R-MSG-007")


@clauses("R-MSG-007", "R-MSG-008")
@pytest.mark.parametrize("kind", CLAIMS)
def test_a_count_that_exceeds_the_bytes_is_refused_before_memory_is_allocated(kind: str) -> None:
    data = with_value(CLAIMS[kind])
    tracemalloc.start()
    error = fault_of(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert error.clause == "R-MSG-007"
    assert peak < 1 << 20


@clauses("R-MSG-008")
def test_a_map_needs_two_bytes_for_each_pair() -> None:
    # The map claims five pairs, and nine bytes are left: enough for five elements, but not for five pairs.
    refused_bytes(with_value(b"\x85" + b"\xa0" * 9), "R-MSG-007")


@clauses("R-MSG-002", "R-MSG-004", "R-MSG-005")
def test_directories_of_the_writer_have_the_canonical_encoding() -> None:
    (at,) = struct.unpack_from("<Q", everything(), 16)
    root, _ = slow_reader.read_directory(everything())
    assert pack(root) == everything()[at:]


# ------------------------------------------------------------------------------------------- the quick way


def assert_fast_path_agrees(data: bytes) -> None:
    """Asserts that the fast path returns the same as the strict reader for bytes that it accepts."""
    quick = messagepack.decode_quickly(data, DEFAULT_LIMITS)
    if quick is not None:
        assert quick == messagepack.decode(data, DEFAULT_LIMITS)
        assert messagepack.encode(quick) == data  # so the types are the same too, where True equals 1


loose = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-100, 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.text(max_size=3) | st.integers(0, 5), inner, max_size=5)
    ),
    max_leaves=20,
)


@clauses("R-MSG-001", "R-MSG-002", "R-MSG-003", "R-MSG-004", "R-MSG-005", "R-MSG-006", "R-MSG-007")
@given(loose | st.dictionaries(text, values, max_size=20), st.booleans())
def test_the_fast_path_accepts_nothing_that_the_strict_parser_refuses(value: object, tuples: bool) -> None:
    assert_fast_path_agrees(msgpack.packb(value, use_bin_type=tuples, strict_types=False))


@clauses("R-MSG-001", "R-MSG-002", "R-MSG-003", "R-MSG-004", "R-MSG-005", "R-MSG-006", "R-MSG-007")
@given(st.integers(0, 2**32), st.integers(1, 4))
def test_the_fast_path_and_the_strict_parser_agree_on_changed_directories(seed: int, changes: int) -> None:
    rng = random.Random(seed)
    data = bytearray(directory_of(rng.choice([plain(), everything()])))
    for _ in range(changes):
        at = rng.randrange(len(data))
        what = rng.randrange(3)
        if what == 0:
            data[at] = rng.choice([rng.randrange(256), 0xC0, 0xC4, 0xD9, 0xDC, 0xDE, 0x80, 0x90, 0xA0])
        elif what == 1:
            del data[at]
        else:
            data.insert(at, rng.randrange(256))
    assert_fast_path_agrees(bytes(data))


def directory_of(file: bytes) -> bytes:
    offset, length = struct.unpack_from("<QQ", file, 16)
    return file[offset : offset + length]


@pytest.mark.parametrize("file", [plain(), everything()], ids=["plain", "everything"])
def test_the_fast_path_accepts_the_directories_of_the_writer(file: bytes) -> None:
    assert messagepack.decode_quickly(directory_of(file), DEFAULT_LIMITS) is not None


@clauses("R-MSG-001", "R-MSG-002")
@pytest.mark.parametrize("kind", [*FORBIDDEN, *LONG])
def test_the_fast_path_returns_nothing_for_a_forbidden_type_or_a_long_encoding(kind: str) -> None:
    raw = {**FORBIDDEN, **LONG}[kind]
    for data in (b"\x81\xa1a" + raw, b"\x81\xa1a\x91" + raw, b"\x81\xa7tensors\x91" + raw):
        assert messagepack.decode_quickly(data, DEFAULT_LIMITS) is None


@clauses("R-MSG-001", "R-MSG-003", "R-MSG-004", "R-MSG-005", "R-MSG-006", "R-MSG-007")
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x81\x01\x01",  # keys that are not strings
        b"\x81\xc4\x01a\x01",
        b"\x81\x90\x01",
        b"\x82\xa1b\x01\xa1a\x01",  # keys out of order, twice
        b"\x82\xa1a\x01\xa1a\x01",
        b"\x81\xa1x\x82\xa1b\x01\xa1a\x01",
        b"\x82\xa7tensors\x90\xa7tensors\x90",
        b"\x81\xa1\x00\x01",  # U+0000, in a key and in a string
        b"\x81\xa1a\xa1\x00",
        b"\x81\xa1a\xa1\xff",  # no UTF-8, a surrogate
        b"\x81\xa1a\xa3\xed\xa0\x80",
        b"\x81\xa1a\x01\x01",  # bytes behind, bytes missing
        b"\x81\xa1a\xa2a",
        b"\x81\xa7tensors\x91",
    ],
)
def test_the_fast_path_returns_nothing_for_a_directory_that_is_refused(data: bytes) -> None:
    with pytest.raises(FileFault):
        messagepack.decode(data, DEFAULT_LIMITS)
    assert messagepack.decode_quickly(data, DEFAULT_LIMITS) is None


@clauses("R-DIR-001")
@pytest.mark.parametrize("data", [b"\x01", b"\x90", b"\xa0", b"\xc4\x00"])
def test_the_fast_path_returns_nothing_for_a_root_that_is_not_a_map(data: bytes) -> None:
    assert not isinstance(messagepack.decode(data, DEFAULT_LIMITS), Map)
    assert messagepack.decode_quickly(data, DEFAULT_LIMITS) is None


@clauses("R-MSG-008")
def test_the_fast_path_accepts_long_arrays_only_with_an_element_for_each_tensor() -> None:
    for key, size, quick in (
        ("a", 64, True),
        ("a", 65, False),
        ("tensors", 70_000, True),
        ("names", 65, False),
    ):
        data = pack({key: [{"b": [1]}] * size})
        assert (messagepack.decode_quickly(data, DEFAULT_LIMITS) is not None) == quick
        assert_fast_path_agrees(data)
    for key, size, quick in (("pools", 64, True), ("pools", 65, False), ("shapes", 70_000, True)):
        data = pack({"delta": {key: [[1, 2]] * size}, "tensors": []})
        assert (messagepack.decode_quickly(data, DEFAULT_LIMITS) is not None) == quick
        assert_fast_path_agrees(data)
    for data in (pack({"delta": [1]}), pack({"delta": 1}), pack({"delta": {"names": {"a": 1}}})):
        assert messagepack.decode_quickly(data, DEFAULT_LIMITS) is None


@clauses("R-LIM-002")
def test_the_fast_path_returns_nothing_beyond_the_limit_of_depth() -> None:
    def nested(depth: int) -> bytes:
        value: object = 1
        for _ in range(depth):
            value = {"a": value}
        return bytes(msgpack.packb(value))

    assert messagepack.decode_quickly(nested(DEFAULT_LIMITS.depth), DEFAULT_LIMITS) is not None
    assert messagepack.decode_quickly(nested(DEFAULT_LIMITS.depth + 1), DEFAULT_LIMITS) is None


def test_nested_lists_that_claim_much_take_little_memory() -> None:
    data = b"\x81\xa1a" + b"\xdd\x00\x03\xff\xff" * 1000 + bytes(300_000)
    tracemalloc.start()
    try:
        assert messagepack.decode_quickly(data, DEFAULT_LIMITS) is None
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
