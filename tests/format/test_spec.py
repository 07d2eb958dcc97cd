"""SPEC.md against the tables of the code, and against these tests."""

from __future__ import annotations

import itertools
import re
import struct
from collections import Counter
from collections.abc import Callable
from typing import Any

import cbor2
import ml_dtypes
import msgpack
import numpy as np
import pycddl
import pytest

from sfpformat.coding.mask import KINDS
from sfpformat.container.directory import KNOWN_FEATURES
from sfpformat.container.stream_maps import OVERS, ROLES, SCALES
from sfpformat.dtypes import DTYPES
from sfpformat.errors import CODE_OF_CLAUSE
from sfpformat.limits import DEFAULT_LIMITS
from sfpformat.options import MASKS

from ..support.clauses import ROOT, SPEC, UNTESTED, clauses_of_spec, main, marked_tests, missing, table_rows
from ..support.conformance_cases import manifest
from .test_worked_example import printed_bytes

TEXT = SPEC.read_text()
CLAUSES = clauses_of_spec()
SCHEMA = pycddl.Schema(TEXT.split("```cddl\n", 1)[1].split("```", 1)[0])

# pycddl accepts keys of one alternative together with those of another, so no defect here is of that kind.
# Defect of a directory -> a change of its root and its only tensor that causes the defect.
DEFECTS: dict[str, Callable[[Any, Any], object]] = {
    "no tensors": lambda root, tensor: root.pop("tensors"),
    "empty features": lambda root, tensor: root.update(features=[]),
    "a number in the metadata": lambda root, tensor: root.update(metadata={"a": 1}),
    "no dtype": lambda root, tensor: tensor.pop("dtype"),
    "a shape of strings": lambda root, tensor: tensor.update(shape=["2", "32"]),
    "a segment of 0": lambda root, tensor: tensor.update(segment=0),
    "no fingerprints": lambda root, tensor: tensor.pop("fingerprints"),
    "an unknown quantiser": lambda root, tensor: tensor["fingerprints"].update(quantiser="other"),
    "a step beside exact": lambda root, tensor: tensor["fingerprints"].update(step=b"abcd"),
    "a mask of no kind": lambda root, tensor: tensor["mask"].pop("kind"),
    "a group of 3": lambda root, tensor: tensor["fingerprints"].update(group=3),
}


def directory_of(data: bytes) -> Any:
    """The root of a file's directory."""
    offset, length = struct.unpack_from("<QQ", data, 16)
    return msgpack.unpackb(data[offset : offset + length])


def without_own_keys(value: Any) -> Any:
    """A directory without the keys that begin with ``x-``, which the schema omits."""
    if isinstance(value, dict):
        return {key: without_own_keys(item) for key, item in value.items() if not key.startswith("x-")}
    return [without_own_keys(item) for item in value] if isinstance(value, list) else value


# Clauses with an error code whose tests do not call `refused` with the clause as a string.
GENERAL = {
    "R-CNV-005": "padding is refused by the clause of its place",
    "R-PRO-001": "no reader of a partial profile here",
}


def rows_under(heading: str) -> list[list[str]]:
    """The rows of the tables of a section, without heads and rules."""
    section = TEXT.split(f"\n{heading}\n", 1)[1]
    section = re.split(r"\n#{2,3} ", section, maxsplit=1)[0]
    rows = [cells for _, cells in table_rows(section)]
    return [row for row in rows if not set("".join(row)) <= set("-| ")][1:]


def test_every_clause_has_a_test() -> None:
    assert missing(CLAUSES, marked_tests()) == []
    assert main(["--missing"]) == 0


def test_no_test_names_a_clause_that_does_not_exist() -> None:
    known = {clause.id for clause in CLAUSES}
    named = {clause: test.place for test in marked_tests() for clause in test.ids}
    assert {clause: place for clause, place in named.items() if clause not in known} == {}
    assert set(UNTESTED) <= known


def test_every_clause_with_a_code_has_a_test_that_breaks_it() -> None:
    tests = marked_tests()
    for clause in CODE_OF_CLAUSE:
        broken = [test for test in tests if clause in test.ids and clause in test.strings]
        elsewhere = clause in GENERAL or clause.startswith("R-SHD")
        assert broken or elsewhere, f"no test of {clause} expects it of a broken file"


def test_clause_ids_are_used_once() -> None:
    assert [clause for clause, count in Counter(c.id for c in CLAUSES).items() if count > 1] == []
    assert len(CLAUSES) > 110


def test_the_error_codes_equal_those_of_the_document() -> None:
    assert {clause.id: clause.code for clause in CLAUSES if clause.code} == CODE_OF_CLAUSE


def test_the_codes_are_the_closed_set_of_chapter_20() -> None:
    listed = {
        row[0].strip("`") for row in rows_under("## 20 Strictness and errors") if row[0].startswith("`E_")
    }
    assert set(CODE_OF_CLAUSE.values()) == listed


def test_every_clause_that_is_mentioned_exists() -> None:
    known = {clause.id for clause in CLAUSES}
    assert set(re.findall(r"\[(R-[A-Z]{3}-\d{3})\]", TEXT)) == known
    for path in (ROOT / "sfpformat").rglob("*.py"):
        assert set(re.findall(r"R-[A-Z]{3}-\d{3}", path.read_text())) <= known, path


def test_withdrawn_ids_are_listed_and_not_used_again() -> None:
    sentence = TEXT.split("the withdrawn ids ", 1)[1].split("stay unused", 1)[0]
    withdrawn = set(re.findall(r"R-[A-Z]{3}-\d{3}", sentence))
    known = {clause.id for clause in CLAUSES}
    assert withdrawn
    assert not withdrawn & known
    assert set(re.findall(r"R-[A-Z]{3}-\d{3}", TEXT)) == known | withdrawn


def test_every_clause_by_which_a_reader_rejects_has_an_error_code() -> None:
    for clause in CLAUSES:
        if clause.reader.startswith("rejects"):
            assert clause.code, clause.id


def test_the_dtypes_equal_the_registry() -> None:
    found = {}
    for names, bits, is_float, nonfinite, widens in rows_under("### 25.1 Dtypes"):
        all_names = re.findall(r"`(\w+)`", names)
        widths = [int(width) for width in bits.split(",")]
        for i, name in enumerate(all_names):
            pattern = int(nonfinite, 16) if nonfinite else None
            kinds = tuple(kind.strip() for kind in widens.split(",") if kind.strip())
            found[name] = (widths[min(i, len(widths) - 1)], is_float == "yes", pattern, kinds)
    ours = {d.name: (d.bits, d.is_float, d.nonfinite, d.widens_to) for d in DTYPES.values()}
    assert found == ours


def test_the_floats_have_the_layout_of_the_table() -> None:
    rows = {row[0].strip("`"): row[1:] for row in rows_under("### 25.2 Floats")}
    assert set(rows) == {d.name for d in DTYPES.values() if d.is_float}
    for name, (exponent, mantissa, bias, _, infinities) in rows.items():
        dtype = DTYPES[name]
        about = ml_dtypes.finfo(dtype.numpy)
        assert (dtype.exponent_bits, about.nmant) == (int(exponent), int(mantissa))
        assert float(about.smallest_normal) == 2.0 ** (1 - int(bias))
        pattern = np.array([dtype.nonfinite], dtype.pattern)
        assert bool(np.isinf(pattern.view(dtype.numpy).astype(np.float64))[0]) == (infinities == "yes")


def test_the_default_limits_equal_the_table() -> None:
    rows = {row[0]: row[1] for row in rows_under("## 19 Limits") if len(row) == 3}
    listed = {}
    for name, default in rows.items():
        power = re.fullmatch(r"2\^(\d+)", default)
        listed[name.replace(" ", "_")] = 1 << int(power[1]) if power else int(default.replace(",", ""))
    ours = {name: getattr(DEFAULT_LIMITS, name) for name in listed}
    assert listed == ours
    assert set(listed) == set(DEFAULT_LIMITS.__dataclass_fields__)


def test_the_schema_accepts_the_directory_of_every_valid_golden_file() -> None:
    accepted = 0
    for case in manifest()["cases"]:
        # One valid file has keys of later versions, which the schema omits like the writer's own keys.
        if case["id"].startswith("y-") and case["id"] != "y-DIR-005-in-every-map":
            data = (ROOT / "conformance" / case["file"]).read_bytes()
            SCHEMA.validate_cbor(cbor2.dumps(without_own_keys(directory_of(data))))
            accepted += 1
    assert accepted > 600


@pytest.mark.parametrize("defect", sorted(DEFECTS))
def test_the_schema_refuses_a_directory_with_a_defect(defect: str) -> None:
    root = directory_of(printed_bytes(1))
    SCHEMA.validate_cbor(cbor2.dumps(root))
    DEFECTS[defect](root, root["tensors"][0])
    with pytest.raises(pycddl.ValidationError):
        SCHEMA.validate_cbor(cbor2.dumps(root))


def test_clause_ids_ascend_within_each_table() -> None:
    for one, other in itertools.pairwise(CLAUSES):
        if one.id[:5] == other.id[:5] and other.line == one.line + 1:
            assert one.id < other.id


@pytest.mark.parametrize(
    ("registry", "words"),
    [
        ("features", KNOWN_FEATURES),
        ("codings", ("raw", "fingerprint")),
        ("mask kinds", KINDS),
        ("quantisers", ("exact", "uniform", "table")),
        ("scale, `per`", SCALES),
        ("importance, `over`", OVERS),
        ("importance, `role`", ROLES),
    ],
)
def test_the_words_equal_the_registry(registry: str, words: tuple[str, ...]) -> None:
    [row] = [row for row in rows_under("### 25.3 Words") if row[0] == registry]
    assert tuple(re.findall(r"`([\w-]+)`", row[1])) == tuple(words)


def test_the_writer_can_be_asked_for_every_mask_kind() -> None:
    assert set(MASKS) == {"auto", "none", *KINDS}


def test_every_link_inside_the_document_leads_to_a_heading() -> None:
    anchors = set()
    for heading in re.findall(r"^#{1,4} (.+)$", TEXT, re.MULTILINE):
        kept = re.sub(r"[^\w\- ]", "", heading.lower())
        anchors.add(kept.replace(" ", "-"))
    links = re.findall(r"\]\(#([^)]+)\)", TEXT)
    assert links
    assert [link for link in links if link not in anchors] == []


def test_every_link_to_a_file_leads_to_one() -> None:
    links = re.findall(r"\]\((?!#|https?:)([^)#]+)", TEXT)
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_chapters_are_numbered_in_order_and_listed() -> None:
    headings = re.findall(r"^## (\d+) (.+)$", TEXT, re.MULTILINE)
    assert [int(number) for number, _ in headings] == list(range(1, len(headings) + 1))
    listed = re.findall(r"\[(\d+) ([^\]]+)\]\(#", TEXT.split("## 1 ")[0])
    assert listed == headings
