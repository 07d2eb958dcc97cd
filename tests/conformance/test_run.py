"""The runner of the conformance suite: correct programs pass, and each kind of error gives its verdict."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from dataclasses import replace
from datetime import date
from pathlib import Path
from xml.etree import ElementTree

import pytest
from sfp_conformance.driver import Driver, DriverFailure
from sfp_conformance.own import OwnDriver
from sfp_conformance.report import page
from sfp_conformance.run import Results, Settings, known_failures, run
from sfp_conformance.suite import Suite, SuiteError

from sfpformat.errors import OptionError
from sfpformat.limits import Limits

from ..cli.test_main import error_of
from ..cli.test_main import run as sfp
from ..cli.test_pack import Capture
from ..support import c_reader
from ..support.clauses import ROOT, clauses
from ..support.conformance_programs import OWN, lying_program, program
from ..support.programs import needs

SUITE = Suite.of(ROOT / "conformance")
JOBS = sum(case.kind == "job" for case in SUITE.cases)
FILES = len(SUITE.cases) - JOBS
# Validators have no base and no keys.
WITHOUT_BASE = FILES - sum(case.base is not None or case.keys is not None for case in SUITE.cases)


def results_of(settings: Settings) -> Results:
    return run(SUITE, settings, lambda _: None)


def outcomes(results: Results) -> Counter[str]:
    return Counter(outcome.verdict.outcome for outcome in results.outcomes)


@pytest.mark.parametrize("only", ["R-DLT-0", "R-MSK-00", "R-IMP-00"])
def test_the_driver_that_the_guide_names_passes_valid_and_invalid_files(only: str) -> None:
    guide = (ROOT / ".github/guides/reader.md").read_text("utf-8")
    found = re.search(r"--decoder 'python (\S+)'", guide)
    assert found is not None
    driver = Driver([sys.executable, str(ROOT / found[1])])
    results = results_of(Settings({"decoder": driver}, only=only, levels=frozenset((1, 2))))
    assert len(results.outcomes) > 5
    assert outcomes(results) == {"pass": len(results.outcomes)}


@pytest.mark.parametrize("engine", ["python", "numba"])
def test_our_engines_pass_every_level(engine: str, tmp_path: Path, capsys: Capture) -> None:
    junit, html = tmp_path / "r.xml", tmp_path / "r.html"
    words = ("conformance", "run", "--engine", engine, "--json", "--junit", junit, "--html", html)
    assert sfp(*words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"]
    counts = Counter((o["role"], o["outcome"]) for o in found["outcomes"])
    each = {"decoder": FILES, "validator": WITHOUT_BASE, "encoder": JOBS, "round trip": JOBS}
    assert counts == {(role, "pass"): count for role, count in each.items()}
    assert not any(o["notes"] for o in found["outcomes"])
    assert found["processor_seconds"] < 60
    suites = ElementTree.parse(junit).getroot()
    assert [s.get("failures") for s in suites] == ["0", "0", "0", "0"]
    assert "All cases passed" in html.read_text("utf-8")


@needs("make", "cc")
def test_the_reader_in_c_passes_under_sanitizers(tmp_path: Path) -> None:
    reader = str(c_reader.built("sanitized", tmp_path))
    results = results_of(Settings({"decoder": Driver([reader]), "validator": Driver([reader])}))
    assert not results.bad
    assert outcomes(results) == {"pass": FILES + WITHOUT_BASE}


@needs("make", "cc")
def test_a_program_that_takes_one_question_per_call_passes(tmp_path: Path) -> None:
    reader = str(c_reader.built("all", tmp_path))
    results = results_of(Settings({"decoder": Driver([reader], serves=False)}, only="R-PRE-004"))
    assert outcomes(results) == {"pass": len(results.outcomes)}


WRONG = {
    "crash": "def answer(words): os._exit(3) if words[0] == 'decode' else {'ok': False}",
    "timeout": "def answer(words): time.sleep(60)",
    "nonsense": "def answer(words): return ['ok']",
    "wrong code": "def answer(words): return {'ok': False, 'error': 'E_NEW'}",
    "fail": "def answer(words): return {'ok': True, 'tensors': []}",
}


@pytest.mark.parametrize("what", list(WRONG))
def test_each_kind_of_failure_is_reported_as_that_kind(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if what == "timeout":  # each call includes the time to start, because the program ends after it
        monkeypatch.setattr("sfp_conformance.driver.START_SECONDS", 3.0)
    driver = Driver(program(tmp_path, WRONG[what]), seconds=0.7)
    results = results_of(Settings({"decoder": driver}, only="n-MSK-002"))
    assert set(outcomes(results)) == {what}
    assert len(results.bad) == len(results.outcomes) > 1
    assert all(outcome.verdict.words for outcome in results.bad)
    assert results.bad[0].case.id in page(results)


def test_a_decoder_that_loses_the_sign_of_zero_fails(tmp_path: Path) -> None:
    """The decoder reads every -0 as 0."""
    lying = """
        for i, t in enumerate(got.get('tensors', ())):
            path = os.path.join(words[2], f'{i}.bin')
            data = open(path, 'rb').read()
            if t['dtype'] == 'BF16':
                pairs = [data[j:j + 2] for j in range(0, len(data), 2)]
                data = b''.join(b'\\0\\0' if p == b'\\0\\x80' else p for p in pairs)
                open(path, 'wb').write(data)
    """
    results = results_of(Settings({"decoder": Driver(lying_program(tmp_path, lying))}, only="R-REC-001"))
    bad = [outcome for outcome in results.bad if "0080" in outcome.verdict.words]
    assert bad
    assert len(bad) < len(results.outcomes)


def test_an_encoder_that_writes_other_contents_fails(tmp_path: Path) -> None:
    empty = """
        import sfpformat
        def answer(words):
            if words[0] == 'encode':
                sfpformat.Writer(words[3]).close()
            return {'ok': words[0] == 'encode'}
    """
    results = results_of(Settings({"encoder": Driver(program(tmp_path, empty))}, only="e-RAW-001"))
    assert set(outcomes(results)) == {"fail"}


def test_cases_outside_the_given_profile_are_unsupported(tmp_path: Path) -> None:
    nothing = "def answer(words): return {'ok': False, 'unsupported': True}"
    driver = Driver(program(tmp_path, nothing))
    full = results_of(Settings({"decoder": driver}, only="DIR-002", levels=frozenset((1,))))
    assert set(outcomes(full)) == {"fail"}
    core = results_of(Settings({"decoder": driver}, only="DIR-002", levels=frozenset((1,)), profile="core"))
    kinds = {(o.case.profile, o.verdict.outcome) for o in core.outcomes}
    assert kinds == {("core", "fail"), ("full", "unsupported")}


def test_cases_outside_the_profile_that_the_program_names_are_unsupported(tmp_path: Path) -> None:
    little = """
        def answer(words):
            hello = {'ok': True, 'name': 'little', 'profile': 'core'}
            return hello if words == ['hello'] else {'ok': False, 'unsupported': True}
    """
    driver = Driver(program(tmp_path, little))
    results = results_of(Settings({"decoder": driver}, only="DIR-002", levels=frozenset((1,))))
    assert results.programs["decoder"]["name"] == "little"
    kinds = {(o.case.profile, o.verdict.outcome) for o in results.outcomes}
    assert kinds == {("core", "fail"), ("full", "unsupported")}


@clauses("R-PRO-001")
def test_a_reader_of_the_profile_core_that_accepts_other_files_fails(tmp_path: Path) -> None:
    careless = lying_program(tmp_path, "if words == ['hello']: got['profile'] = 'core'")
    results = results_of(Settings({"decoder": Driver(careless)}, only="PRO-001"))
    [outcome] = results.outcomes
    assert outcome.verdict.outcome == "fail"
    assert "R-PRO-001" in outcome.verdict.words
    # A reader that says `full` may be asked about the profile alone.
    full = lying_program(tmp_path, "pass")
    results = results_of(Settings({"decoder": Driver(full)}, only="PRO-001", profile="core"))
    assert set(outcomes(results)) == {"pass"}


def test_a_run_with_only_skipped_cases_does_not_pass(tmp_path: Path) -> None:
    driver = Driver(program(tmp_path, "def answer(words): return {'ok': False, 'skip': 'no GPU here'}"))
    results = results_of(Settings({"decoder": driver}, only="DIR-002"))
    assert set(outcomes(results)) == {"skip"}
    assert not results.bad
    assert not results.passed


def test_a_program_that_uses_too_much_memory_for_a_hostile_file_fails(tmp_path: Path) -> None:
    """The decoder allocates 200 MB for each file, and releases them."""
    greedy = lying_program(tmp_path, "taken = b'x' * 200_000_000; del taken")
    settings = Settings({"decoder": Driver(greedy)}, only="h-LIM-002-bytes", levels=frozenset((3,)))
    results = results_of(settings)
    assert set(outcomes(results)) == {"memory"}
    assert "are allowed" in results.bad[0].verdict.words


def test_a_file_that_is_not_canonical_fails_only_if_the_writer_claims_canonical_form(tmp_path: Path) -> None:
    """The directory of the written file has a key that canonical files lack."""
    lie = """
        if words[0] == 'encode':
            from sfp_conformance.forge import Forge
            file = Forge.of(open(words[3], 'rb').read())
            file.preamble['minor'] = 1
            open(words[3], 'wb').write(file.build())
    """
    claiming = lying_program(tmp_path, lie)
    results = results_of(Settings({"encoder": Driver(claiming)}, only="e-RAW-001-u8"))
    assert set(outcomes(results)) == {"fail"}
    assert "not canonical" in results.bad[0].verdict.words
    modest = lying_program(tmp_path, lie + "\n        got.pop('canonical', None)")
    results = results_of(Settings({"encoder": Driver(modest)}, only="e-RAW-001-u8"))
    assert not results.bad
    assert all("not canonical" in outcome.verdict.notes[0] for outcome in results.outcomes)


def test_with_encoder_and_decoder_the_decoder_reads_the_encoders_files(tmp_path: Path) -> None:
    """The writer is correct and the reader is not, so only the round trip fails."""
    (tmp_path / "reader").mkdir()
    deaf = program(tmp_path / "reader", "def answer(words): return {'ok': False, 'error': 'E_LIMIT'}")
    drivers = {"encoder": Driver(OWN), "decoder": Driver(deaf)}
    results = results_of(Settings(drivers, only="e-REC-001"))
    assert {(o.role, o.verdict.outcome) for o in results.outcomes} == {
        ("encoder", "pass"),
        ("round trip", "fail"),
    }


def test_a_program_over_its_address_space_is_reported_as_a_crash(tmp_path: Path) -> None:
    greedy = "def answer(words): return {'ok': len(bytearray(2_000_000_000)) < 0}"
    driver = Driver(program(tmp_path, greedy), megabytes=500)
    results = results_of(Settings({"decoder": driver}, only="PRE-004"))
    assert set(outcomes(results)) == {"crash"}
    assert "MemoryError" in results.bad[0].verdict.words


def test_expected_failures_pass_and_unexpected_passes_fail(tmp_path: Path) -> None:
    driver = Driver(program(tmp_path, WRONG["fail"]))
    first, *others = [c.id for c in SUITE.cases if c.clauses[0] == "R-MSK-002" and c.kind == "invalid"]
    asked = Settings(
        {"decoder": driver}, levels=frozenset((2,)), only="R-MSK-002", known={first: "to be done"}
    )
    results = results_of(asked)
    assert [outcome.case.id for outcome in results.bad] == others
    own = results_of(replace(asked, drivers={"decoder": Driver(OWN)}))
    assert [outcome.case.id for outcome in own.bad] == [first]
    with pytest.raises(SuiteError, match="of unknown cases"):
        results_of(replace(asked, known={"n-PRE-999-none": "?"}))


def test_the_suite_has_lists_of_the_programs_that_it_knows(tmp_path: Path) -> None:
    """The expected failures of a program are in `known/NAME.toml`, with the name of its answer to hello."""
    body = "def answer(words): return {'ok': words == ['hello'], 'name': 'mine', 'error': 'E_CRC'}"
    case = next(case for case in SUITE.cases if case.clauses[0] == "R-PRE-001" and case.kind == "invalid")
    suite = Suite(tmp_path, (case,), SUITE.clauses)
    settings = Settings({"decoder": Driver(program(tmp_path, body))})
    assert not run(suite, settings, lambda _: None).passed
    (tmp_path / "known").mkdir()
    listed = f'[[known]]\nid = "{case.id}"\nreason = "says E_CRC of it"\n'
    (tmp_path / "known" / "mine.toml").write_text(listed)
    results = run(suite, settings, lambda _: None)
    assert [outcome.known for outcome in results.outcomes] == ["says E_CRC of it"]
    assert not results.bad


def test_expected_failures_without_reason_or_past_their_date_are_refused() -> None:
    entry = {"id": "n-MSK-002-x", "reason": "to be done", "until": date(2026, 1, 1)}
    assert known_failures({"known": [entry]}, date(2026, 1, 1)) == {"n-MSK-002-x": "to be done"}
    with pytest.raises(SuiteError, match="expired on 2026-01-01"):
        known_failures({"known": [entry]}, date(2026, 1, 2))
    with pytest.raises(SuiteError, match="reason"):
        known_failures({"known": [{"id": "n-MSK-002-x"}]}, date(2026, 1, 1))


def test_a_run_that_cannot_start_ends_with_an_error_that_names_the_cause(
    tmp_path: Path, capsys: Capture
) -> None:
    assert "--decoder" in error_of(capsys, "conformance", "run")
    assert "manifest.json" in error_of(
        capsys, "conformance", "run", "--engine", "python", "--suite", tmp_path
    )
    assert "--level" in error_of(capsys, "conformance", "run", "--engine", "python", "--level", "5")
    assert "no case" in error_of(capsys, "conformance", "run", "--engine", "python", "--only", "no such case")
    assert "no such" in error_of(capsys, "conformance", "run", "--decoder", "no-such-program").lower()


def test_a_driver_that_refuses_its_arguments_is_reported_as_a_crash_with_its_message() -> None:
    driver = Driver([sys.executable, "-m", "sfpformat.cli", "conformance", "driver", "--", "serve"])
    results = results_of(Settings({"decoder": driver}, only="n-MSK-002"))
    assert set(outcomes(results)) == {"crash"}
    assert "unknown question 'serve'" in results.bad[0].verdict.words


def test_a_driver_that_ended_is_restarted(tmp_path: Path) -> None:
    ending = """
        def answer(words):
            if words[0] == 'end':
                os._exit(0)
            return {'ok': True}
    """
    driver = Driver(program(tmp_path, ending))
    with pytest.raises(DriverFailure, match="exit status 0"):
        driver.ask(["end"])
    assert driver.ask(["hello"]) == {"ok": True}
    driver.close()


ECHO = """
    def answer(words):
        return {'ok': True, 'limits': LIMITS, 'words': words, 'called': sys.argv[1:], 'process': os.getpid()}
"""


@pytest.mark.parametrize("takes_limits", [True, False])
def test_limits_are_sent_with_a_question_or_to_a_separate_process(takes_limits: bool, tmp_path: Path) -> None:
    driver = Driver(program(tmp_path, ECHO.replace("LIMITS", str(takes_limits))))
    plain = driver.ask(["validate", "file"])
    limited = [driver.ask(["validate", "file"], {"rank": rank, "depth": 9}) for rank in (1, 2, 1)]
    driver.close()
    wanted = [["depth=9", f"rank={rank}"] for rank in (1, 2, 1)]
    assert plain["words"] == ["validate", "file"]
    if takes_limits:
        assert [answer["words"] for answer in limited] == [[*given, "validate", "file"] for given in wanted]
        assert {answer["process"] for answer in limited} == {plain["process"]}
    else:
        assert [answer["called"] for answer in limited] == [[*given, "serve"] for given in wanted]
        assert all(answer["words"] == ["validate", "file"] for answer in limited)
        assert len({answer["process"] for answer in [plain, *limited]}) == 3


def test_our_driver_accepts_limits_at_its_start_and_with_each_question() -> None:
    """A limit in a question applies only to this question, and overrides the limits of the start."""
    path = str(next(case.path for case in SUITE.cases if case.id == "y-LAY-001-all-kinds"))
    strict = OwnDriver("python", Limits(rank=1))
    assert strict.answer(["validate", path])["error"] == "E_LIMIT"
    assert strict.answer(["rank=2", "validate", path])["ok"]
    assert strict.answer(["rank=2", "tensors=1", "validate", path])["error"] == "E_LIMIT"
    assert strict.answer(["validate", path])["error"] == "E_LIMIT"
    for words, trouble in ((["ranks=2", "validate", path], "ranks"), (["rank=2"], "no question")):
        with pytest.raises(OptionError, match=trouble):
            strict.answer(words)
