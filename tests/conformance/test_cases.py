"""Reader, validator, plain reader and writer give for every golden file the results of the manifest."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from sfp_conformance import slow_reader

from sfpformat.decode.validate import validate
from sfpformat.errors import FileFault
from sfpformat.limits import Limits

from ..support.c_reader import Readers, built
from ..support.conformance_cases import (
    FOLDER,
    applied,
    cases,
    data_of,
    encoded,
    expected_contents,
    limits_of,
    looked_up,
    read_contents,
    refusal,
    wrong_refusal,
)
from ..support.programs import needs

AREAS = sorted({case["id"].split("-")[1] for case in cases("ynihf")})


@pytest.mark.parametrize("area", AREAS)
def test_reader_and_validator_give_the_verdict_of_the_manifest(area: str) -> None:
    for case in (case for case in cases("ynihf") if case["id"].split("-")[1] == area):
        data, limits = data_of(case), limits_of(case)
        if "base" in case or "keys" in case:
            continue
        report = validate(data, limits=limits, engine="python")
        if case["expected"]["outcome"] == "accept":
            assert read_contents(data, limits) == expected_contents(case), case["id"]
            assert report.ok, case["id"]
            continue
        error = refusal(data, limits)
        assert error is not None, case["id"]
        wrong = wrong_refusal(case, error.code, error.clause, error.tensor, error.offset)
        assert wrong is None, wrong
        assert (error.clause, error.tensor) in {(f.clause, f.tensor) for f in report.faults}, case["id"]


def test_deltas_give_the_results_of_the_manifest_and_leave_a_wrong_base_unchanged() -> None:
    with_base = [case for case in cases("yn") if "base" in case]
    assert len(with_base) > 40
    for case in with_base:
        assert validate(data_of(case), engine="python").ok, case["id"]
        if case["expected"]["outcome"] == "accept":
            assert applied(case) == expected_contents(case), case["id"]
            continue
        with pytest.raises(FileFault) as raised:
            applied(case)
        error = raised.value
        wrong = wrong_refusal(case, error.code, error.clause, error.tensor, error.offset)
        assert wrong is None, wrong


@pytest.mark.parametrize("engine", ["python", "numba"])
def test_look_ups_in_keyed_tables_give_the_answers_of_the_manifest(engine: str) -> None:
    with_keys = [case for case in cases("y") if "keys" in case]
    assert len(with_keys) > 5
    for case in with_keys:
        assert looked_up(case, engine) == expected_contents(case), case["id"]


def test_the_validator_reports_canonical_form_and_the_broken_clauses() -> None:
    told = [case for case in cases("y") if "canonical" in case["expected"]]
    assert len(told) > 20
    for case in told:
        report = validate(data_of(case), engine="python")
        expected = case["expected"]["canonical"]
        assert report.canonical == expected["is"], case["id"]
        assert sorted({note[1:10] for note in report.notes}) == sorted(expected["clauses"]), case["id"]


def test_every_job_produces_a_file_with_the_requested_contents(tmp_path: Path) -> None:
    for case in cases("e"):
        data = encoded(case, tmp_path)
        slow_reader.read(data)
        found = read_contents(data, Limits())
        for tensor in found["tensors"]:
            tensor.pop("mask", None)  # the writer chooses which zeros are pruned
        assert found == expected_contents(case), case["id"]
        assert validate(data, engine="python").canonical, case["id"]
        if "written" in case["expected"]:
            assert hashlib.sha256(data).hexdigest() == case["expected"]["written"]["sha256"], case["id"]


@needs("make", "cc")
def test_the_reader_in_c_gives_the_verdict_of_the_manifest(tmp_path: Path) -> None:
    for folder in ("build", "served"):
        (tmp_path / folder).mkdir()
    readers = Readers(built("all", tmp_path / "build"), tmp_path / "served")
    for case in cases("ynihf"):
        reader = readers.reader(limits_of(case))
        base = (FOLDER / case["base"]).read_bytes() if "base" in case else None
        command = "look-up" if "keys" in case else "validate" if base is None else "apply"
        answer = reader.ask(command, data_of(case), base, case.get("keys"))
        if case["expected"]["outcome"] == "accept":
            assert answer["ok"], (case["id"], answer)
            if command != "validate":
                for number, tensor in enumerate(expected_contents(case)["tensors"]):
                    kept = {"": tensor, "mask.": tensor.get("mask"), "importance.": tensor.get("importance")}
                    for what, array in kept.items():
                        if array is not None:
                            found = hashlib.sha256(reader.written(f"{number}.{what}bin")).hexdigest()
                            assert found == array["sha256"], case["id"]
            continue
        assert not answer["ok"], case["id"]
        wrong = wrong_refusal(case, answer["error"], answer["clause"], answer["tensor"], answer["offset"])
        assert wrong is None, wrong
    readers.end()
