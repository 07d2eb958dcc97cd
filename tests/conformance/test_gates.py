"""The golden files cover SPEC.md, and equal what their recipes create."""

from __future__ import annotations

import json

import jsonschema

from conformance.recipes import suite
from conformance.recipes.__main__ import clause_digests, differences, files_of, stale
from sfpformat.errors import CODE_OF_CLAUSE

from ..support.conformance_cases import FOLDER, cases, manifest
from ..support.conformance_gates import borders_missing, uncovered


def test_rebuilding_gives_the_same_bytes() -> None:
    assert differences(files_of(list(suite().cases.values()), clause_digests())) == []


def test_no_case_is_stale() -> None:
    assert stale(manifest()) == []


def test_every_clause_has_a_file_that_keeps_it_and_one_that_breaks_it_or_a_reason() -> None:
    assert uncovered() == []


def test_limit_values_of_every_field_are_accepted_and_values_beyond_are_refused() -> None:
    assert borders_missing() == []


def test_the_twin_of_every_refused_file_is_accepted() -> None:
    accepted = {case["id"] for case in cases("yf") if case["expected"]["outcome"] == "accept"}
    refused = [case for case in cases("nihf") if case["expected"]["outcome"] != "accept"]
    assert {case["twin"] for case in refused} <= accepted


def test_the_manifest_matches_its_schema() -> None:
    schema = json.loads((FOLDER / "manifest.schema.json").read_bytes())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(manifest())


def test_the_suite_is_large_enough_and_small_enough() -> None:
    wanted = {"y": 300, "n": 500, "i": 60, "h": 60, "f": 40, "e": 240}
    assert all(len(cases(kind)) >= least for kind, least in wanted.items())
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 25 << 20


def test_every_error_code_occurs_in_a_case() -> None:
    codes = {error["code"] for case in cases("nhif") for error in case["expected"].get("errors", ())}
    assert codes == set(CODE_OF_CLAUSE.values())
