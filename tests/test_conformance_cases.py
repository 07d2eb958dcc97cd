"""The gates of the golden files: each clause has cases both ways, each case one cause, and readers agree."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

import sfpformat
from conformance.recipes.__main__ import clause_digests, differences, files, main
from conformance.recipes.untestable import UNTESTABLE
from sfpformat.errors import FileFault
from sfpformat.limits import DEFAULT_LIMITS, Limits
from sfpformat.validate import validate

from . import c_reader
from .clauses import ROOT, clauses_of_spec

FOLDER = ROOT / "conformance"
MANIFEST: dict[str, Any] = json.loads((FOLDER / "manifest.json").read_text("utf-8"))
CASES: dict[str, dict[str, Any]] = {case["id"]: case for case in MANIFEST["cases"]}


def limits_of(case: dict[str, Any]) -> Limits:
    return replace(DEFAULT_LIMITS, **case.get("limits", {}))


def data_of(case: dict[str, Any]) -> bytes:
    return (FOLDER / case["file"]).read_bytes()


def test_the_manifest_keeps_its_schema() -> None:
    schema = json.loads((FOLDER / "manifest.schema.json").read_text("utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(MANIFEST)
    assert len(CASES) == len(MANIFEST["cases"])


def test_the_suite_is_large_enough_and_small_enough() -> None:
    kinds = Counter(case["kind"] for case in CASES.values())
    assert sum(kinds.values()) >= 1200
    assert kinds["valid"] >= 300
    assert kinds["invalid"] >= 500
    size = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    assert size < 25 << 20


def test_the_files_are_those_of_the_manifest() -> None:
    for case in CASES.values():
        data = data_of(case)
        assert (len(data), hashlib.sha256(data).hexdigest()) == (case["bytes"], case["sha256"]), case["id"]
    known = {case["file"] for case in CASES.values()}
    there = {p.relative_to(FOLDER).as_posix() for p in (FOLDER / "cases").rglob("*.sfp")}
    assert there == known


def test_every_clause_has_cases_both_ways_or_a_reason() -> None:
    kinds = defaultdict(set)
    for case in CASES.values():
        for clause in case["clauses"]:
            kinds[clause].add(case["kind"])
    for clause in clauses_of_spec():
        if clause.id in UNTESTABLE:
            continue
        assert "valid" in kinds[clause.id], clause.id
        if clause.code:
            assert kinds[clause.id] & {"invalid", "hostile", "future"}, clause.id
    assert set(UNTESTABLE) <= {clause.id for clause in clauses_of_spec()}


def test_every_error_code_is_met() -> None:
    codes = {fault["error"] for case in CASES.values() for fault in case["expect"].get("reject", ())}
    assert codes == {clause.code for clause in clauses_of_spec() if clause.code}


def test_no_case_is_older_than_the_text_of_its_clause() -> None:
    assert MANIFEST["clauses"] == clause_digests()


def test_every_broken_file_has_a_twin_that_is_accepted() -> None:
    for case in CASES.values():
        if case["kind"] != "valid":
            twin = CASES[case["twin"]]
            assert twin["expect"]["accept"]
            assert twin["sha256"] != case["sha256"] or case.get("limits")


def test_recipes_give_the_same_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    made = files()
    assert differences(made) == []
    made["cases/NEW/y-NEW-001-x.sfp"] = b""
    del made["manifest.json"]
    assert differences(made) == ["cases/NEW/y-NEW-001-x.sfp", "manifest.json"]
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "--check" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ readers


def read(case: dict[str, Any], engine: str) -> Iterator[tuple[str, np.ndarray, Any, Any]]:
    """Everything in a file: name, values, mask, importance."""
    with sfpformat.open(data_of(case), limits=limits_of(case), threads=1, engine=engine) as file:
        for name in file:
            yield name, file.get_tensor(name), file.get_mask(name), file.get_importance(name)


def bytes_of(case: dict[str, Any], array: dict[str, Any]) -> bytes:
    whole = (FOLDER / case["file"]).with_suffix(".bin").read_bytes()
    return whole[array["offset"] : array["offset"] + array["bytes"]]


@pytest.mark.parametrize("engine", ["python", "numba"])
def test_our_reader_gives_the_contents_of_valid_files(engine: str) -> None:
    for case in CASES.values():
        if "accept" not in case["expect"]:
            continue
        contents = json.loads((FOLDER / case["file"]).with_suffix(".json").read_text("utf-8"))
        found = list(read(case, engine))
        assert [name for name, *_ in found] == [t["name"] for t in contents["tensors"]]
        for (_, values, mask, importance), tensor in zip(found, contents["tensors"], strict=True):
            assert list(values.shape) == tensor["shape"]
            assert values.tobytes() == bytes_of(case, tensor["values"]), case["id"]
            if "mask" in tensor:
                assert mask.tobytes() == bytes_of(case, tensor["mask"]), case["id"]
            else:
                assert mask.all()
            assert (importance is None) == ("importance" not in tensor)
            if importance is not None:
                assert importance.tobytes() == bytes_of(case, tensor["importance"]), case["id"]


@pytest.mark.parametrize("engine", ["python", "numba"])
def test_our_reader_refuses_broken_files_as_the_manifest_says(engine: str) -> None:
    for case in CASES.values():
        if "accept" in case["expect"]:
            continue
        with pytest.raises(FileFault) as caught:
            list(read(case, engine))
        [expected] = case["expect"]["reject"]
        fault = caught.value
        assert (fault.code, fault.clause) == (expected["error"], expected["clause"]), case["id"]
        assert fault.tensor == expected["tensor"], case["id"]
        assert fault.offset is not None
        assert expected["offset"][0] <= fault.offset <= expected["offset"][1], case["id"]


def test_our_validator_says_what_the_manifest_says() -> None:
    for case in CASES.values():
        report = validate(data_of(case), limits=limits_of(case))
        if "accept" in case["expect"]:
            assert report.ok, case["id"]
            assert report.canonical == case["expect"]["canonical"]
        else:
            clauses = {fault["clause"] for fault in case["expect"]["reject"]}
            assert clauses & {fault.clause for fault in report.faults}, case["id"]


def test_the_reader_in_c_agrees(tmp_path: Path) -> None:
    readers = c_reader.Readers(c_reader.built("all", tmp_path), tmp_path)
    for case in CASES.values():
        reader = readers.reader(limits_of(case))
        accepted = "accept" in case["expect"]
        answer = reader.ask("decode" if accepted else "validate", data_of(case))
        assert answer["ok"] == accepted, (case["id"], answer)
        if not accepted:
            [expected] = case["expect"]["reject"]
            assert (answer["error"], answer["clause"]) == (expected["error"], expected["clause"]), case["id"]
            continue
        contents = json.loads((FOLDER / case["file"]).with_suffix(".json").read_text("utf-8"))
        for number, tensor in enumerate(contents["tensors"]):
            assert reader.written(f"{number}.bin") == bytes_of(case, tensor["values"]), case["id"]
            if "mask" in tensor:
                assert reader.written(f"{number}.mask.bin") == bytes_of(case, tensor["mask"])
            if "importance" in tensor:
                assert reader.written(f"{number}.importance.bin") == bytes_of(case, tensor["importance"])
    readers.end()
