"""SPEC.md chapter 20: strictness and errors."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from sfp_conformance.forge import Forge

import sfpformat
from conformance.recipes.samples import everything
from sfpformat import FileFault, SfpError
from sfpformat.decode.validate import validate
from sfpformat.errors import CODE_OF_CLAUSE, fault, placed

from ..support.clauses import clauses
from ..support.forge import accepted, refused


def damage(file: Forge, name: str, k: int = 0) -> None:
    """Breaks a chunk's checksum."""
    part = file.part(name)
    part.entry["chunks"] = part.full_entry()["chunks"]
    part.chunks[k][0] ^= 1


@clauses("R-STR-001")
@pytest.mark.parametrize("ask", ["get_tensor", "get_mask", "get_importance", "get_survivors"])
@pytest.mark.parametrize("threads", [1, 4])
def test_a_tensor_with_one_damaged_chunk_is_refused(ask: str, threads: int) -> None:
    file = Forge.of(everything())
    damage(file, "uniform", 1)
    with sfpformat.open(file.build(), threads=threads) as opened:
        for _ in range(2):
            with pytest.raises(FileFault, match="R-LAY-004") as caught:
                getattr(opened, ask)("uniform")
            assert caught.value.tensor == "uniform"
            assert caught.value.offset == file.start_of("uniform") + len(
                (file.part("uniform").vectors or b"") + file.part("uniform").chunks[0]
            )


@clauses("R-STR-001", "R-LAY-004")
def test_a_slice_over_an_intact_and_a_damaged_chunk_is_refused() -> None:
    file = Forge.of(everything())
    damage(file, "runs", 1)
    with sfpformat.open(file.build()) as opened:
        for index in (slice(None), np.s_[1:3], np.s_[::3], np.s_[:, 5], np.s_[-1, 0]):
            with pytest.raises(FileFault, match="R-LAY-004"):
                opened.get_slice("runs")[index]


@clauses("R-STR-002")
def test_an_error_names_code_clause_tensor_and_place() -> None:
    def edit(file: Forge) -> None:
        file.part("flags").chunks[0][3] = 9

    error = refused("R-RAW-004", edit, everything(), tensor="flags")
    place = Forge.of(everything()).start_of("flags") + 3
    assert str(error) == f"E_RANGE [R-RAW-004] {error.detail} (tensor 'flags', byte {place})"
    assert isinstance(error, SfpError)


@clauses("R-STR-002")
@pytest.mark.parametrize("clause", sorted(CODE_OF_CLAUSE))
def test_every_fault_has_the_code_of_its_clause_and_can_be_pickled(clause: str) -> None:
    error = fault(clause, "words", tensor="t", offset=5)
    assert error.code == CODE_OF_CLAUSE[clause]
    assert str(error) == f"{error.code} [{clause}] words (tensor 't', byte 5)"
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), type(again)) == (str(error), type(error))


@clauses("R-STR-002")
def test_the_place_of_a_fault_is_added_up_on_its_way_out() -> None:
    with pytest.raises(FileFault) as caught, placed(tensor="t", base=100), placed(base=20):
        raise fault("R-RAW-004", "words", offset=3)
    assert (caught.value.tensor, caught.value.offset) == ("t", 123)
    with pytest.raises(FileFault) as caught, placed(tensor="outer"), placed(tensor="inner"):
        raise fault("R-RAW-004", "words")
    assert (caught.value.tensor, caught.value.offset) == ("inner", None)


@clauses("R-STR-004")
def test_strings_that_look_like_code_stay_strings() -> None:
    texts = [
        "__import__('os').abort()",
        "c__builtin__\neval\n",
        "{{7*7}}",
        "../../etc/passwd",
        "%n",
        "\x1b[2J",
    ]
    file = Forge.of(everything())
    file.root["metadata"] = {text: text for text in texts}
    for text, part in zip(texts, file.parts, strict=False):
        part.entry["name"] = text
    with sfpformat.open(file.build()) as opened:
        assert opened.metadata() == {text: text for text in texts}
        assert opened.keys()[: len(texts)] == texts


@clauses("R-STR-006")
def test_the_validator_reports_a_fault_in_every_tensor_and_chunk() -> None:
    file = Forge.of(everything())
    damage(file, "runs", 0)
    part = file.part("runs")
    part.chunks[1][-1] ^= 1
    file.part("flags").chunks[0][0] = 7
    vectors = file.part("coded").vectors
    assert vectors is not None
    vectors[-1] = 1
    damage(file, "group", 1)
    report = validate(file.build())
    assert [(fault.clause, fault.tensor) for fault in report.faults] == [
        ("R-RAW-004", "flags"),
        ("R-LAY-004", "runs"),
        ("R-LAY-004", "runs"),
        ("R-LAY-004", "group"),
        ("R-VEC-002", "coded"),
    ]
    assert report.tensors == len(file.parts)
    assert report.bytes == len(file.build())


@clauses("R-STR-006")
def test_the_validator_reports_faults_of_several_entries() -> None:
    file = Forge.of(everything())
    file.part("runs").entry["segment"] = 33
    file.part("octets").entry["mask"]["kind"] = "x-mine"
    file.part("coded").entry["dtype"] = "F4"
    found = {(fault.clause, fault.tensor) for fault in validate(file.build()).faults}
    assert found == {("R-TEN-006", "runs"), ("R-MSK-001", "octets"), ("R-TEN-003", "coded")}


@clauses("R-STR-006")
def test_the_validator_reports_its_progress() -> None:
    steps: list[tuple[int, int]] = []
    report = validate(everything(), progress=lambda done, whole: steps.append((done, whole)))
    assert report.ok
    assert steps == sorted(steps)
    assert steps[-1] == (len(everything()), len(everything()))


@clauses("R-STR-001")
def test_tensors_without_faults_are_returned_from_a_file_with_faulty_tensors() -> None:
    file = Forge.of(everything())
    good = accepted(everything())
    for name in ("runs", "group"):
        damage(file, name)
    with sfpformat.open(file.build()) as opened:
        for name in opened:
            if name not in ("runs", "group"):
                assert opened.get_tensor(name).tobytes() == good[name].tobytes()
