"""``sfp conformance``: tests any program that reads or writes .sfp with the conformance suite."""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import sys
import time
import tomllib
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfpformat.cli.console import progress, show_json, show_table
from sfpformat.cli.errors import CommandError, path_in_errors, require_suffix
from sfpformat.cli.parser import Parser, Subparsers, examples
from sfpformat.errors import OptionError
from sfpformat.io.atomic import replacing

if TYPE_CHECKING:
    from .driver import Driver
    from .run import Results

# An installed package has the cases in its folder `suite`; a clone has them one folder up.
_PACKAGE = Path(__file__).parent
_FOLDER = _PACKAGE / "suite" if (_PACKAGE / "suite").is_dir() else _PACKAGE.parent
_DESCRIPTION = """Tests programs in any language with the golden files of the conformance suite. The programs
speak the protocol of conformance/README.md. Checks the contents that a decoder returns, the verdict of a
validator, and the files of an encoder: this package must read them, and they must be canonical if the encoder
claims it. If both are given, the decoder must also read the encoder's files. The order of the cases is random
(--seed), and file names do not reveal the case. Exit code 0: all cases passed; 1: a case failed."""
_SHOWN = 30


def add_parser(subparsers: Subparsers[Parser]) -> Parser:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "conformance",
        help="test a reader or writer with the conformance suite",
        description="Tests programs that read or write .sfp files: 'run' with the golden files, 'fuzz' with "
        "damaged files. 'driver' is such a program. The guide is conformance/README.md.",
        epilog=examples(
            ("sfp conformance run --decoder ./my_reader --html report.html", "test with golden files"),
            ("sfp conformance fuzz --decoder ./my_reader --cases 100000", "test with damaged files"),
        ),
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    _add_run(actions)
    _add_fuzz(actions)
    driver = actions.add_parser(
        "driver",
        help="answer the suite's questions with this package",
        description="Answers the questions of the protocol with this package's reader, writer and validator.",
        epilog=examples(
            ("sfp conformance driver -- validate model.sfp", "one question"),
            ("sfp conformance driver --engine numba -- serve", "questions from standard input"),
        ),
    )
    driver.add_argument("--engine", metavar="NAME", help="python, numba or auto")
    driver.add_argument("words", metavar="WORD", nargs="*", help="LIMIT=N ..., then a question or 'serve'")
    return parser


def _add_run(actions: Subparsers[Parser]) -> None:
    parser = actions.add_parser(
        "run",
        help="test programs with the golden files",
        description=_DESCRIPTION,
        epilog=examples(
            ("sfp conformance run --engine python", "this package's own reader, writer and validator"),
            ("sfp conformance run --decoder ./my_reader", "a reader that serves: one question per line"),
            (
                "sfp conformance run --validator 'node check.js' --once --html report.html",
                "one call per file",
            ),
            ("sfp conformance run --decoder ./my_reader --profile core --level 1,2", "a partial reader"),
            (
                "sfp conformance run --decoder ./my_reader --encoder ./my_writer",
                "the reader also reads the writer's files",
            ),
        ),
    )
    parser.add_argument("--decoder", metavar="CMD", help="a program that decodes")
    parser.add_argument("--validator", metavar="CMD", help="a program that validates")
    parser.add_argument("--encoder", metavar="CMD", help="a program that encodes")
    parser.add_argument(
        "--engine", metavar="NAME", help="test this package in all three roles, with this engine"
    )
    parser.add_argument(
        "--suite", metavar="DIR", type=Path, default=_FOLDER, help="folder of the suite (installed)"
    )
    parser.add_argument(
        "--profile", metavar="NAME", help="core, full, or a feature (the programs' answer to hello)"
    )
    parser.add_argument(
        "--level", metavar="N,...", default="1,2,3,4", help="1 valid, 2 invalid, 3 hostile, 4 encoders"
    )
    parser.add_argument(
        "--only", metavar="TEXT", default="", help="only cases with this text in the id or with this clause"
    )
    parser.add_argument(
        "--known",
        metavar="FILE",
        type=Path,
        help="expected failures, in TOML (known/PROGRAM.toml of the suite)",
    )
    parser.add_argument("--once", action="store_true", help="start the program once per question")
    parser.add_argument(
        "--seconds", metavar="S", type=float, help="time limit per answer (the limit of the case)"
    )
    parser.add_argument(
        "--megabytes", metavar="M", type=int, help="limit of the address space of a program (none)"
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="seed of the order of cases (0)")
    parser.add_argument("--junit", metavar="FILE", type=Path, help="write JUnit XML")
    parser.add_argument("--html", metavar="FILE", type=Path, help="write an HTML report")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")


def _add_fuzz(actions: Subparsers[Parser]) -> None:
    parser = actions.add_parser(
        "fuzz",
        help="compare a decoder with this package on generated and damaged files",
        description="Generates files of every kind, damages them and the golden files in a few places, with "
        "or without repaired lengths and checksums, and compares a decoder with this package. If they "
        "differ, Hypothesis shrinks the file.",
        epilog=examples(
            ("sfp conformance fuzz --decoder ./reader", "10,000 files, generated by Hypothesis"),
            ("sfp conformance fuzz --decoder ./reader --save finds", "save the files that differ, as cases"),
            (
                "sfp conformance fuzz --decoder ./reader --cases 1000000 --fast",
                "files from a random generator",
            ),
        ),
    )
    parser.add_argument("--decoder", metavar="CMD", required=True, help="a program that decodes")
    parser.add_argument("--cases", metavar="N", type=int, default=10_000, help="number of files (10,000)")
    parser.add_argument(
        "--seed", metavar="N", type=int, default=0, help="the same seed gives the same files (0)"
    )
    parser.add_argument(
        "--fast", action="store_true", help="generate files at random; Hypothesis only shrinks them"
    )
    parser.add_argument(
        "--save", metavar="DIR", type=Path, help="save the files that differ as cases in this folder"
    )
    parser.add_argument(
        "--suite", metavar="DIR", type=Path, help="folder of the suite, whose files are damaged (installed)"
    )
    parser.add_argument("--seconds", metavar="S", type=float, default=10.0, help="time limit per answer (10)")
    parser.add_argument(
        "--megabytes", metavar="M", type=int, help="limit of the address space of the program (none)"
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON")


def run(args: argparse.Namespace) -> int:
    """Runs the chosen action. Returns the exit status."""
    return {"driver": _driver, "run": _run, "fuzz": _fuzz}[args.action](args)


def _fuzz(args: argparse.Namespace) -> int:
    if importlib.util.find_spec("hypothesis") is None:
        raise CommandError("fuzzing needs Hypothesis; run: pip install hypothesis")
    from .driver import Driver
    from .finds import doubt, save
    from .fuzz import Duel, as_json, fuzz
    from .scratch import scratch
    from .suite import Suite

    golden = []
    if args.suite is not None or _FOLDER.is_dir():
        suite = Suite.of(args.suite or _FOLDER)
        golden = [case.data() for case in suite.cases if case.kind == "valid" and not case.limits]
    driver = Driver(shlex.split(args.decoder), args.seconds, args.megabytes)
    begin = time.monotonic()
    try:
        with (
            scratch() as folder,
            progress(args.cases, "files", steps=True) as shown,
        ):
            duel = Duel(driver, Path(folder))
            results = fuzz(duel, golden, args.cases, seed=args.seed, fast=args.fast, advance=shown.advance)
    finally:
        driver.close()
    told = as_json(results, time.monotonic() - begin)
    for find, entry in zip(results.finds, told["finds"], strict=True):
        entry["doubt"] = doubt(find.example)
        entry["saved"] = save(find, args.save) if args.save is not None else []
    if args.json:
        show_json(told)
    else:
        _show_finds(told)
    return 1 if results.finds else 0


def _show_finds(told: dict[str, Any]) -> None:
    for find in told["finds"]:
        print(f"{find['kind']}: {find['words']}")
        print(f"    {find['bytes']} bytes; {find['damage'] or 'a valid file'}")
        for line in (find["doubt"], ", ".join(find["saved"])):
            if line:
                print(f"    {line}")
    said = ", ".join(f"{n} {word}" for word, n in told["reference"].items())
    print(f"{told['files']} files, {told['files_per_second']} per second; verdicts of the reference: {said}")
    print(f"both refused {told['both_refused']} files, {told['same_code']} of them with the same code")
    count = len(told["finds"])
    print(f"{count} kinds of differences" if count else "no differences")


def _driver(args: argparse.Namespace) -> int:
    from .own import serve

    return serve(args.engine, list(args.words), sys.stdin)


def _run(args: argparse.Namespace) -> int:
    for path, what, suffixes in (
        (args.junit, "--junit", (".xml",)),
        (args.html, "--html", (".html", ".htm")),
    ):
        if path is not None:
            require_suffix(path, *suffixes, what=what)
    from .own import compile_once
    from .report import junit, page
    from .run import Settings, as_json, known_failures, run
    from .suite import Suite

    suite = Suite.of(args.suite)
    known = None
    if args.known is not None:
        with path_in_errors(args.known):
            known = known_failures(tomllib.loads(args.known.read_text("utf-8")), datetime.now(UTC).date())
    levels = frozenset(_levels(args.level))
    settings = Settings(_drivers(args), args.profile, levels, args.only, args.seed, known)
    if args.engine is not None:
        compile_once(args.engine, (case for case in suite.cases if case.kind == "job"))
    with progress(len(suite.cases) * len(settings.drivers), "cases", steps=True) as shown:
        results = run(suite, settings, shown.advance)
    for path, data in ((args.junit, junit), (args.html, lambda r: page(r).encode())):
        if path is not None:
            with path_in_errors(path), replacing(path) as file:
                file.write(data(results))
    if args.json:
        show_json(as_json(results))
    else:
        _show(results)
    return 0 if results.passed else 1


def _levels(text: str) -> list[int]:
    words = text.split(",")
    if not all(word in ("1", "2", "3", "4") for word in words):
        raise CommandError(f"--level {text!r} is not a list of numbers from 1 to 4, separated by commas")
    return [int(word) for word in words]


def _drivers(args: argparse.Namespace) -> dict[str, Driver]:
    from .driver import Driver

    own = [
        sys.executable,
        "-m",
        "sfpformat.cli",
        "conformance",
        "driver",
        "--engine",
        args.engine or "",
        "--",
    ]
    commands: dict[str, Sequence[str]] = {}
    for role in ("decoder", "validator", "encoder"):
        given = getattr(args, role)
        if given is not None:
            commands[role] = shlex.split(given)
        elif args.engine is not None:
            commands[role] = own
    if not commands or not all(commands.values()):
        raise OptionError("nothing to test; give --decoder, --validator, --encoder or --engine")
    return {
        role: Driver(words, args.seconds, args.megabytes, not args.once) for role, words in commands.items()
    }


def _show(results: Results) -> None:
    from .judge import BAD, PASS, SKIP, UNSUPPORTED
    from .report import counted

    for outcome in results.bad[:_SHOWN]:
        print(f"{outcome.verdict.outcome}: {outcome.role}: {outcome.case.id}")
        print(f"    {outcome.case.why}; {outcome.words}")
    if len(results.bad) > _SHOWN:
        print(f"... and {len(results.bad) - _SHOWN} more; --json, --junit or --html list all")
    columns = (PASS, UNSUPPORTED, SKIP, *BAD)
    rows = []
    for role in dict.fromkeys(outcome.role for outcome in results.outcomes):
        counts = counted(outcome for outcome in results.outcomes if outcome.role == role)
        rows.append([role, *(str(counts[word]) for word in columns)])
    show_table(["role", *columns], rows)
    notes = sum(len(outcome.verdict.notes) for outcome in results.outcomes)
    if notes:
        words = "note" if notes == 1 else "notes"
        print(
            f"{notes} {words}: an unexpected clause, tensor, offset or encoding; listed by --json and --html"
        )
    print(
        f"{len(results.outcomes)} questions in {results.seconds:.1f} s, "
        f"{results.processor:.1f} s of processor time"
    )
