"""The runner of the conformance suite: good programs pass, and each way to be wrong is told as what it is."""

from __future__ import annotations

import json
import random
import sys
import textwrap
from collections import Counter
from datetime import date
from pathlib import Path
from xml.etree import ElementTree

import pytest

from sfpformat.conformance.driver import Driver, DriverFailure
from sfpformat.conformance.fuzz import fuzz
from sfpformat.conformance.mutate import Pieces, damaged
from sfpformat.conformance.report import page
from sfpformat.conformance.run import Results, Settings, known_failures, run
from sfpformat.conformance.suite import Suite, SuiteError

from . import c_reader
from .clauses import ROOT
from .test_cli import error_of
from .test_cli import run as sfp
from .test_cli_pack import Capture

SUITE = Suite.of(ROOT / "conformance")
JOBS = sum(case.kind == "job" for case in SUITE.cases)
FILES = len(SUITE.cases) - JOBS
OWN = [sys.executable, "-m", "sfpformat.cli", "conformance", "serve", "--engine", "python", "--"]


def program(folder: Path, body: str) -> list[str]:
    """A driver that serves: ``answer(words)`` gives a dictionary."""
    path = folder / "driver.py"
    path.write_text(
        f"import json, os, sys, time\nsys.path.insert(0, {str(ROOT)!r})\n"
        + textwrap.dedent(body)
        + "\nfor line in sys.stdin:\n"
        + "    print(json.dumps(answer(line.rstrip('\\n').split('\\t'))), flush=True)\n"
    )
    return [sys.executable, str(path)]


def results_of(drivers: dict[str, Driver], **settings: object) -> Results:
    return run(SUITE, Settings(drivers, **settings), lambda _: None)  # type: ignore[arg-type]


def outcomes(results: Results) -> Counter[str]:
    return Counter(outcome.verdict.outcome for outcome in results.outcomes)


@pytest.mark.parametrize("engine", ["python", "numba"])
def test_our_engines_pass_every_level(engine: str, tmp_path: Path, capsys: Capture) -> None:
    junit, html = tmp_path / "r.xml", tmp_path / "r.html"
    words = ("conformance", "run", "--engine", engine, "--json", "--junit", junit, "--html", html)
    assert sfp(*words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"]
    counts = Counter((o["role"], o["outcome"]) for o in found["outcomes"])
    assert counts == {("decoder", "pass"): FILES, ("validator", "pass"): FILES, ("encoder", "pass"): JOBS}
    assert not any(o["notes"] for o in found["outcomes"])
    assert found["seconds"] < 60
    suites = ElementTree.parse(junit).getroot()
    assert [s.get("failures") for s in suites] == ["0", "0", "0"]
    assert "All is well" in html.read_text("utf-8")


def test_the_reader_in_c_passes_under_sanitizers(tmp_path: Path) -> None:
    reader = str(c_reader.built("sanitized", tmp_path))
    results = results_of({"decoder": Driver([reader]), "validator": Driver([reader])})
    assert not results.bad
    assert outcomes(results) == {"pass": 2 * FILES}


def test_a_program_may_take_one_question_a_call(tmp_path: Path) -> None:
    reader = str(c_reader.built("all", tmp_path))
    results = results_of({"decoder": Driver([reader], serves=False)}, only="R-PRE-004")
    assert outcomes(results) == {"pass": len(results.outcomes)}


WRONG = {
    "crash": "def answer(words): os._exit(3) if words[0] == 'decode' else {'ok': False}",
    "timeout": "def answer(words): time.sleep(60)",
    "nonsense": "def answer(words): return ['ok']",
    "wrong code": "def answer(words): return {'ok': False, 'error': 'E_NEW'}",
    "fail": "def answer(words): return {'ok': True, 'tensors': []}",
}


@pytest.mark.parametrize("what", list(WRONG))
def test_each_way_to_be_wrong_is_told(what: str, tmp_path: Path) -> None:
    driver = Driver(program(tmp_path, WRONG[what]), seconds=0.7)
    results = results_of({"decoder": driver}, only="R-MSK-002", levels=frozenset((2,)))
    assert set(outcomes(results)) == {what}
    assert len(results.bad) == len(results.outcomes) > 1
    assert all(outcome.verdict.words for outcome in results.bad)
    assert results.bad[0].case.id in page(results)


def test_contents_are_compared_bit_by_bit(tmp_path: Path) -> None:
    """A decoder that takes every -0 for 0."""
    lying = """
        import subprocess
        own = subprocess.Popen(OWN + ['serve'], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        def answer(words):
            own.stdin.write('\\t'.join(words) + '\\n'); own.stdin.flush()
            got = json.loads(own.stdout.readline())
            for i, t in enumerate(got.get('tensors', ())):
                path = os.path.join(words[2], f'{i}.bin')
                data = open(path, 'rb').read()
                if t['dtype'] == 'BF16':
                    pairs = [data[j:j + 2] for j in range(0, len(data), 2)]
                    data = b''.join(b'\\0\\0' if p == b'\\0\\x80' else p for p in pairs)
                    open(path, 'wb').write(data)
            return got
    """.replace("OWN", repr(OWN))
    results = results_of({"decoder": Driver(program(tmp_path, lying))}, only="R-REC-001")
    bad = [outcome for outcome in results.bad if "0080" in outcome.verdict.words]
    assert bad
    assert len(bad) < len(results.outcomes)


def test_a_wrong_encoder_is_found(tmp_path: Path) -> None:
    empty = """
        import sfpformat
        def answer(words):
            if words[0] == 'encode':
                sfpformat.Writer(words[3]).close()
            return {'ok': words[0] == 'encode'}
    """
    results = results_of({"encoder": Driver(program(tmp_path, empty))}, only="e-RAW-001")
    assert set(outcomes(results)) == {"fail"}


def test_a_partial_reader_is_judged_on_its_profile(tmp_path: Path) -> None:
    nothing = "def answer(words): return {'ok': False, 'unsupported': True}"
    driver = Driver(program(tmp_path, nothing))
    full = results_of({"decoder": driver}, only="DIR-002", levels=frozenset((1,)))
    assert set(outcomes(full)) == {"fail"}
    core = results_of({"decoder": driver}, only="DIR-002", levels=frozenset((1,)), profile="core")
    kinds = {(o.case.profile, o.verdict.outcome) for o in core.outcomes}
    assert kinds == {("core", "fail"), ("full", "unsupported")}


def test_a_program_that_takes_too_much_memory_ends(tmp_path: Path) -> None:
    greedy = "def answer(words): return {'ok': len(bytearray(2_000_000_000)) < 0}"
    driver = Driver(program(tmp_path, greedy), megabytes=500)
    results = results_of({"decoder": driver}, only="PRE-004")
    assert set(outcomes(results)) == {"crash"}
    assert "MemoryError" in results.bad[0].verdict.words


def test_expected_failures_pass_and_unexpected_passes_fail(tmp_path: Path) -> None:
    driver = Driver(program(tmp_path, WRONG["fail"]))
    first, *others = [c.id for c in SUITE.cases if c.clauses[0] == "R-MSK-002" and c.kind == "invalid"]
    settings = {"only": "R-MSK-002", "levels": frozenset((2,))}
    results = results_of({"decoder": driver}, known={first: "to be done"}, **settings)
    assert [outcome.case.id for outcome in results.bad] == others
    own = results_of({"decoder": Driver(OWN)}, known={first: "to be done"}, **settings)
    assert [outcome.case.id for outcome in own.bad] == [first]
    with pytest.raises(SuiteError, match="of no case"):
        results_of({"decoder": driver}, known={"n-XXX-001-x": "?"}, **settings)


def test_lists_of_expected_failures_need_reasons_and_run_out() -> None:
    entry = {"id": "n-MSK-002-x", "reason": "to be done", "until": date(2026, 1, 1)}
    assert known_failures({"known": [entry]}, date(2026, 1, 1)) == {"n-MSK-002-x": "to be done"}
    with pytest.raises(SuiteError, match="until 2026-01-01"):
        known_failures({"known": [entry]}, date(2026, 1, 2))
    with pytest.raises(SuiteError, match="reason"):
        known_failures({"known": [{"id": "n-MSK-002-x"}]}, date(2026, 1, 1))


def test_a_command_that_cannot_run_is_told(tmp_path: Path, capsys: Capture) -> None:
    assert "--decoder" in error_of(capsys, "conformance", "run")
    assert "manifest.json" in error_of(
        capsys, "conformance", "run", "--engine", "python", "--suite", tmp_path
    )
    assert "--level" in error_of(capsys, "conformance", "run", "--engine", "python", "--level", "5")
    assert "no case" in error_of(capsys, "conformance", "run", "--engine", "python", "--only", "nothing")
    assert "no such" in error_of(capsys, "conformance", "run", "--decoder", "no-such-program").lower()


def test_a_driver_that_ended_is_started_again(tmp_path: Path) -> None:
    ending = """
        def answer(words):
            if words[0] == 'end':
                os._exit(0)
            return {'ok': True}
    """
    driver = Driver(program(tmp_path, ending))
    with pytest.raises(DriverFailure, match="ended with status 0"):
        driver.ask(["end"])
    assert driver.ask(["hello"]) == {"ok": True}
    driver.close()


# ------------------------------------------------------------------------------------------------- fuzzing


def test_the_reader_in_c_and_the_reference_agree_on_damaged_files(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "files").mkdir()
    driver = Driver([str(c_reader.built("sanitized", tmp_path / "c"))])
    found = fuzz(driver, SUITE, 2000, 1, tmp_path / "files", None, lambda _: None)
    assert found["finds"] == []
    assert found["files"] == 2000
    assert found["reference"]["valid"] > 100
    assert len(found["reference"]) > 9


def test_a_disagreement_is_made_small_and_kept(tmp_path: Path, capsys: Capture) -> None:
    """A reader that does not mind bytes after the end."""
    lying = """
        import subprocess
        own = subprocess.Popen(OWN + ['serve'], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        def answer(words):
            own.stdin.write('\\t'.join(words) + '\\n'); own.stdin.flush()
            got = json.loads(own.stdout.readline())
            return {'ok': True, 'tensors': []} if got.get('clause') == 'R-PRE-008' else got
    """.replace("OWN", repr(OWN))
    command = " ".join(program(tmp_path, lying))
    words = ("--cases", 300, "--save", tmp_path / "finds", "--json")
    assert sfp("conformance", "fuzz", "--decoder", command, *words) == 1
    found = json.loads(capsys.readouterr().out)
    [find] = found["finds"]
    assert find["kind"] == "accepts"
    assert "R-PRE-008" in find["words"]
    data = (tmp_path / "finds" / find["file"]).read_bytes()
    assert len(data) == find["bytes"] < 400
    assert json.loads((tmp_path / "finds" / find["file"]).with_suffix(".json").read_text()) == find
    assert sfp("conformance", "fuzz", "--decoder", command, "--cases", 3, "--seed", 5) in (0, 1)
    assert "files" in capsys.readouterr().out


def test_the_same_seed_gives_the_same_files() -> None:
    [data] = [case.data() for case in SUITE.cases if case.id == "y-DIR-002-uniform"]
    first, second = ([damaged(data, random.Random(seed)) for _ in range(1)] for seed in (7, 7))
    assert first == second
    assert Pieces.of(data).build() == data
