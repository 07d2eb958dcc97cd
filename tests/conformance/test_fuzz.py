"""Generated and damaged files: all readers return the same results. Files with other results are minimised.

There are a few thousand files, to limit the time of a test run; ``sfp conformance fuzz`` tests a decoder with
any number of files by the same code.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sfp_conformance import slow_reader
from sfp_conformance.choices import Choices, Noise, Thrown
from sfp_conformance.contents import contents
from sfp_conformance.driver import Driver
from sfp_conformance.examples import Example, example
from sfp_conformance.finds import doubt
from sfp_conformance.forge import Forge, Part
from sfp_conformance.fuzz import SMALL, Duel, Results, fuzz, look_ups, reference
from sfp_conformance.generate_keyed import ASKED, any_keyed
from sfp_conformance.slow_reader import keyed
from sfp_conformance.strategies import choosing, damaged_files, examples, valid_files
from sfp_conformance.suite import Suite

import sfpformat
from conformance.recipes.__main__ import regressions
from sfpformat.decode.reader import SfpFile
from sfpformat.decode.validate import validate
from sfpformat.errors import FileFault

from ..cli.test_main import error_of
from ..cli.test_main import run as sfp
from ..cli.test_pack import Capture
from ..support import c_reader
from ..support.clauses import ROOT
from ..support.conformance_programs import lying_program
from ..support.programs import needs

FOLDER = ROOT / "conformance"
SUITE = Suite.of(FOLDER)
GOLDEN = [case.data() for case in SUITE.cases if case.kind == "valid" and not case.limits]


def fuzzed(
    command: list[str], folder: Path, cases: int, *, fast: bool, golden: Sequence[bytes] = GOLDEN
) -> Results:
    driver = Driver(command)
    try:
        return fuzz(Duel(driver, folder), golden, cases, seed=1, fast=fast)
    finally:
        driver.close()


# -------------------------------------------------------------------------------------------- our own readers


@settings(max_examples=200)
@given(valid_files())
def test_all_readers_return_the_same_contents_for_every_generated_file(data: bytes) -> None:
    plain = slow_reader.read(data)
    report = validate(data, engine="python")
    assert report.ok, report.faults
    for engine in ("python", "numba"):
        with sfpformat.open(data, engine=engine, threads=1) as file:
            assert list(file) == list(plain.tensors)
            for name, tensor in plain.tensors.items():
                assert file.get_tensor(name).tobytes() == tensor.data, (engine, name)
                assert file.get_mask(name).reshape(-1).tolist() == tensor.mask, (engine, name)
                _same_importance(file.get_importance(name), tensor)
        _same_look_ups(data, plain, engine)


def _same_look_ups(data: bytes, plain: slow_reader.File, engine: str) -> None:
    wanted = keyed.look_ups(plain.root, plain.tensors, list(ASKED)) if "keyed" in plain.root else {}
    found = {told["name"]: arrays["values"] for told, arrays in look_ups(data, engine)}
    assert found == {name: tensor.data for name, tensor in wanted.items()}, engine


def _same_importance(found: np.ndarray | None, tensor: slow_reader.Tensor) -> None:
    if found is None:
        assert set(tensor.importance) <= {None}
        return
    wanted = np.array([x or 0.0 if x is None else x for x in tensor.importance], np.float32)
    assert found.tobytes() == wanted.tobytes()


@settings(max_examples=300)
@given(examples(GOLDEN, valid=False))
def test_all_readers_give_the_same_verdict_on_damaged_files(made: Example) -> None:
    found = [judged(made.data, engine) for engine in ("python", "numba")]
    assert found[0] == found[1]
    assert doubt(made) is None


def judged(data: bytes, engine: str) -> object:
    """The fault of a file, or its contents."""
    try:
        with SfpFile(data, limits=SMALL, engine=engine, threads=1) as file:  # `open` refuses deltas
            read = [(name, file.get_tensor(name).tobytes(), file.get_mask(name).tobytes()) for name in file]
        return read, look_ups(data, engine)
    except FileFault as fault:
        return fault.code, fault.clause, fault.tensor, fault.offset


@settings(max_examples=60)
@given(damaged_files())
def test_what_a_validator_accepts_a_reader_reads(data: bytes) -> None:
    if validate(data, limits=SMALL, engine="python").ok:
        assert not isinstance(reference(data), FileFault)


@settings(max_examples=30)
@given(valid_files())
def test_every_truncated_file_is_refused(data: bytes) -> None:
    for length in (*range(min(len(data), 96)), *range(96, len(data), 97)):
        fault = reference(data[:length])
        assert isinstance(fault, FileFault)
        assert fault.code in ("E_TRUNCATED", "E_MAGIC")


def keyed_files() -> st.SearchStrategy[bytes]:
    """Strategy for files of one keyed table."""
    made = choosing(lambda choices: any_keyed(choices, "k"))
    return made.map(lambda table: Forge({"features": ["keyed"], "keyed": [table[0]]}, [table[1]]).build())


@settings(max_examples=150)
@given(keyed_files())
def test_all_readers_find_the_same_weights_in_every_generated_keyed_table(data: bytes) -> None:
    plain = slow_reader.read(data)
    assert validate(data, engine="python").ok
    for engine in ("python", "numba"):
        _same_look_ups(data, plain, engine)


def test_generated_keyed_tables_are_of_all_kinds() -> None:
    tables = [any_keyed(Thrown(seed), "k") for seed in range(200)]
    maps = [source for source, _ in tables]
    known = [len(keyed_known(source, part)) for source, part in tables]
    assert {source["outputs"] for source in maps} >= {1, 2, 5}
    assert {source["levels"]["quantiser"] for source in maps} == {"uniform", "table"}
    assert {"importance" in source for source in maps} == {True, False}
    assert {len(source["levels"]["extra"]) > 9 for source in maps} == {True, False}
    assert {max(source["checks"]) for source in maps} >= {0, 4, 32}
    assert {0, 1} <= set(known)
    assert max(known) > 4


def keyed_known(source: dict[str, Any], part: Part) -> list[bytes]:
    data = b"".join(part.chunks)
    return [key for key in ASKED if keyed.look_up(source, data, key)[1]]


# ------------------------------------------------------------------------------------------------ the choices


class Zeros(Choices):
    """Choices that are always the simplest."""

    def _number(self, bound: int) -> int:
        return 0


def test_the_simplest_choices_make_the_simplest_file() -> None:
    made = example(Zeros(), valid=True)
    with sfpformat.open(made.data) as file:
        [name] = file
        assert file.get_tensor(name).shape == (1,)
    assert len(made.data) < 400


def test_equal_seeds_give_equal_files_and_other_seeds_other_files() -> None:
    files = [example(Thrown(seed), GOLDEN).data for seed in ("1/7", "1/7", "1/8")]
    assert files[0] == files[1]
    assert files[0] != files[2]


def test_noise_is_the_same_for_a_seed_and_zero_for_seed_0() -> None:
    assert [Noise(0).below(100) for _ in range(5)] == [0] * 5
    first, second = ([noise.below(1000) for _ in range(50)] for noise in (Noise(3), Noise(3)))
    assert first == second
    assert len(set(first)) > 40


# ------------------------------------------------------------------------------------------ a foreign program


@needs("make", "cc")
@pytest.mark.parametrize(("fast", "files"), [(False, 300), (True, 2000)])
def test_the_reader_in_c_and_the_reference_agree(fast: bool, files: int, tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "files").mkdir()
    program = str(c_reader.built("sanitized", tmp_path / "c"))
    found = fuzzed([program], tmp_path / "files", files, fast=fast)
    assert [find.parting for find in found.finds] == []
    assert found.files == files
    codes = {ours for ours, _ in found.said}
    assert {"valid", "E_ENCODING", "E_LAYOUT", "E_RESERVED"} <= codes


NO_TRAILING = "if got.get('clause') == 'R-PRE-008': got = {'ok': True, 'tensors': []}"
NO_NEGATIVE_ZERO = """
    for i, t in enumerate(got.get('tensors', ())):
        if t['dtype'] == 'F16':
            path = os.path.join(words[2], f'{i}.bin')
            data = open(path, 'rb').read()
            pairs = [data[j:j + 2] for j in range(0, len(data), 2)]
            open(path, 'wb').write(b''.join(b'\\0\\0' if p == b'\\0\\x80' else p for p in pairs))
"""
FEW_DIMENSIONS = """
    if got.get('ok') and any(len(t['shape']) >= 3 for t in got.get('tensors', ())):
        got = {'ok': False, 'error': 'E_LIMIT', 'clause': 'R-LIM-002'}
"""
NOTHING_KNOWN = """
    for i, t in enumerate(got.get('tensors', ()) if words[0] == 'look-up' else ()):
        path = os.path.join(words[3], f'{i}.bin')
        data = open(path, 'rb').read()
        if t['dtype'] == 'BOOL' and 1 in data:
            open(path, 'wb').write(bytes(len(data)))
"""
CRASHING = "if got.get('clause') == 'R-CHK-003': os._exit(3)"


@pytest.mark.parametrize(
    ("lie", "kind", "about", "fast", "files"),
    [
        (NO_NEGATIVE_ZERO, "contents", "values", True, 800),
        (FEW_DIMENSIONS, "refuses", "R-LIM-002", False, 800),
        (NOTHING_KNOWN, "look-up", "values", True, 800),
        (CRASHING, "crash", "", True, 100),
    ],
    ids=["negative zeros", "many dimensions", "unknown keys", "a crash"],
)
def test_a_wrong_reader_is_detected_and_the_file_is_shrunk(
    lie: str, kind: str, about: str, fast: bool, files: int, tmp_path: Path
) -> None:
    (tmp_path / "files").mkdir()
    command = lying_program(tmp_path, lie)
    # Without golden files: a seed takes others of them when their number changes.
    found = fuzzed(command, tmp_path / "files", files, fast=fast, golden=())
    [find] = found.finds
    assert find.parting.key == (kind, about)
    assert len(find.example.data) <= 640
    assert doubt(find.example) is None


def test_a_difference_is_saved_as_a_case_with_its_twin(tmp_path: Path, capsys: Capture) -> None:
    command = " ".join(lying_program(tmp_path, NO_TRAILING))
    words = ("--cases", 600, "--fast", "--save", tmp_path / "finds", "--json")
    assert sfp("conformance", "fuzz", "--decoder", command, *words) == 1
    [find] = json.loads(capsys.readouterr().out)["finds"]
    assert find["kind"] == "accepts"
    assert "R-PRE-008" in find["words"]
    assert find["doubt"] is None
    saved = sorted(path.name for path in (tmp_path / "finds").iterdir())
    assert saved == find["saved"]
    entries = [json.loads((tmp_path / "finds" / name).read_bytes()) for name in saved if "entry" in name]
    assert regressions(tmp_path / "finds") == entries
    broken, twin = entries
    assert broken["expected"]["errors"][0]["clause"] == "R-PRE-008"
    assert broken["twin"] == twin["id"]
    assert len((tmp_path / "finds" / f"{broken['id']}.sfp").read_bytes()) == broken["bytes"] == find["bytes"]
    assert contents((tmp_path / "finds" / f"{twin['id']}.sfp").read_bytes())
    schema = json.loads((FOLDER / "manifest.schema.json").read_bytes())
    case = {**schema["$defs"]["case"], "$defs": schema["$defs"]}
    for entry in entries:
        jsonschema.Draft202012Validator(case).validate(entry)


def test_a_run_without_differences_exits_with_0(tmp_path: Path, capsys: Capture) -> None:
    command = " ".join(lying_program(tmp_path, "pass"))
    assert sfp("conformance", "fuzz", "--decoder", command, "--cases", 20, "--seed", 5) == 0
    said = capsys.readouterr().out
    assert "20 files" in said
    assert "no differences" in said


def test_fuzzing_without_a_program_is_refused(capsys: Capture) -> None:
    assert "no-such-program" in error_of(capsys, "conformance", "fuzz", "--decoder", "no-such-program")
