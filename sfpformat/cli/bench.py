"""``sfp bench``: measures size, speed and memory on a model, and compares sfp with other packages."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import bench_pruning
from .console import bytes_words, counted, printable, progress, show_json, show_table
from .errors import CommandError, checked_target, require_suffix
from .model_files import add_strict_index, open_model
from .parser import Parser, Subparsers, examples

if TYPE_CHECKING:
    from ..bench.measure import Refusal
    from ..bench.results import Result
    from ..bench.settings import Settings
    from ..bench.subject import Subject

_SECTIONS = ("lossless", "sparse", "load", "memory", "startup")
_DEVICE_SECTIONS = ("lossless", "sparse", "load")
_PRESETS = ("default", "speed", "size")
_DEVICE_PRESETS = ("default", "gpu")
_ROUNDS = 7
_DESCRIPTION = """Measures size, encoding speed, decoding speed and memory on a model. Compares all engines
and presets of sfp with the installed peers: zipnn, pcodec, zstandard (level 3), nncodec and safetensors. FILE
is an .sfp or safetensors file, an index of shards, or a folder. The default is the small model of sfp demo.
Memory must hold the model several times.

Contenders run round-robin: each contender runs once per round, and each round starts with the next contender.
The table shows medians, with quartiles in brackets. Before the measurement, each contender must decode every
bit correctly (in the section sparse: every weight within half a step). Contenders that fail are excluded, and
the exit code is 1. Peers compress tensor by tensor. The figures of sfp include opening the file and checking
all checksums, which favours the peers. MB are 10^6 raw bytes."""
_SECTION_WORDS = """sections:
  lossless  the unchanged model, in memory: size, encoding, decoding; against zipnn, pcodec, zstandard
  sparse    matrices pruned to 50 % and 90 %, survivors in levels of 4 bits, one thread; against nncodec
  load      from a path to arrays, with a warm page cache; against safetensors, with the break-even disk speed
  memory    peak memory of loading minus the arrays, in new processes
  startup   time of new processes that import sfpformat, or decode a small file

With --device, the engine cuda decodes tensors to that device. The sections are then lossless, sparse and
load, and times include the copy to the device. This needs torch."""
_PEER_WORDS = """peers:
  pip install 'sfpformat[bench]'                     zstandard, pcodec, safetensors, matplotlib
  pip install --no-deps zipnn==0.5.4 nncodec==2.1.3  without their dependencies; zipnn imports torch and
                                                     safetensors, nncodec only numpy"""


def add_parser(subparsers: Subparsers[Parser]) -> Parser:
    """Adds the subcommand."""
    cases = examples(
        ("sfp bench", "measure on the small model in the package"),
        (
            "sfp bench model.safetensors --dtype bf16 --plot bench.png",
            "cast a model to BF16, measure, and plot",
        ),
        (
            "sfp bench pruning --sparsity 0.7,0.8 --seeds 3 --json",
            "measure the perplexity after pruning by each method",
        ),
        ("sfp bench model.safetensors --device cuda", "decode to tensors on a GPU"),
    )
    parser = subparsers.add_parser(
        "bench",
        help="compare size, speed and memory with other packages",
        description=_DESCRIPTION,
        epilog=f"{_SECTION_WORDS}\n\n{bench_pruning.WORDS}\n\n{_PEER_WORDS}\n\n{cases}",
    )
    parser.add_argument("file", metavar="FILE", nargs="?", help="a model (default: that of sfp demo)")
    parser.add_argument(
        "--only", metavar="SECTIONS", help=f"sections to run, of {','.join(_SECTIONS)} (default: all)"
    )
    parser.add_argument(
        "--rounds", metavar="N", default=_ROUNDS, type=int, help=f"number of rounds (default: {_ROUNDS})"
    )
    parser.add_argument("--dtype", choices=("bf16", "f32"), help="cast the float weights first")
    parser.add_argument("--device", metavar="DEVICE", help="decode to tensors on cuda, or cuda:N")
    parser.add_argument("--engines", metavar="NAMES", help="engines to measure (default: all available)")
    parser.add_argument(
        "--presets", metavar="NAMES", help=f"presets to measure (default: {','.join(_PRESETS)})"
    )
    parser.add_argument(
        "--threads",
        metavar="N",
        type=int,
        help="number of threads in multi-threaded runs (default: all cores)",
    )
    add_strict_index(parser)
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument(
        "--plot", metavar="PICTURE", help="plot size against decoding speed to this .png or .svg file"
    )
    bench_pruning.add_options(parser)
    return parser


@dataclass(frozen=True)
class _Outcome:
    """The results of a section."""

    name: str
    rounds: int
    results: list[Result]
    refusals: list[Refusal]


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand. Returns the exit code."""
    if args.file == bench_pruning.NAME:  # a folder of that name is ./pruning
        return bench_pruning.run(args)
    bench_pruning.require_absent(args)
    known = _SECTIONS if args.device is None else _DEVICE_SECTIONS
    sections = _chosen("section", args.only, known, known)
    _require_device(args)
    picture = _picture(args.plot, args.file, sections)
    with tempfile.TemporaryDirectory(prefix="sfp-bench-") as folder:
        settings = _settings(args, Path(folder))
        subject = _subject(args.file, args.dtype, args.strict_index)
        outcomes = [_run_section(name, subject, settings) for name in sections]
    if args.json:
        show_json(_as_json(subject, settings, outcomes))
    else:
        _show(subject, settings, outcomes)
    if picture is not None:
        from ..bench.size_speed_plot import draw

        results = [result for outcome in outcomes for result in outcome.results]
        draw(results, _title(subject, settings), picture)
    return 1 if any(outcome.refusals for outcome in outcomes) else 0


# ------------------------------------------------------------------------------------------------ options


def _chosen(what: str, words: str | None, known: Sequence[str], default: Sequence[str]) -> tuple[str, ...]:
    """Parses a list separated by commas. Returns its names in the order of ``known``.

    Raises:
        CommandError: a name is unknown, or the list is empty.
    """
    if words is None:
        return tuple(default)
    names = {word.strip() for word in words.split(",") if word.strip()}
    for name in sorted(names - set(known)):
        raise CommandError(f"unknown {what} {name!r}; choose from {', '.join(known)}")
    if not names:
        raise CommandError(f"the list of {what}s is empty; choose from {', '.join(known)}")
    return tuple(name for name in known if name in names)


def _picture(path: str | None, source: str | None, sections: Sequence[str]) -> Path | None:
    """Returns the path of the plot, or None without ``--plot``. Called before anything is measured.

    Raises:
        CommandError: the plot cannot be drawn or written.
    """
    if path is None:
        return None
    from ..bench.size_speed_plot import SUFFIXES, why_not

    require_suffix(path, *SUFFIXES, what="--plot")
    if "lossless" not in sections:
        raise CommandError("--plot needs the section lossless")
    reason = why_not()
    if reason is not None:
        raise CommandError(f"--plot: {reason}")
    return checked_target(path, [Path(source)] if source is not None and Path(source).is_file() else [])


def _require_device(args: argparse.Namespace) -> None:
    """Checks ``--device``.

    Raises:
        CommandError: tensors cannot be decoded to the device.
    """
    if args.device is None:
        return
    if args.engines is not None:
        raise CommandError("--device always uses the engine cuda; omit --engines")
    from ..bench.device_runners import why_not

    reason = why_not(args.device)
    if reason is not None:
        raise CommandError(f"--device {args.device}: {reason}")


def _settings(args: argparse.Namespace, folder: Path) -> Settings:
    from ..bench.environment import cores
    from ..bench.settings import Settings
    from ..engines import available, require_name
    from ..options import PRESETS

    if args.rounds < 1:
        raise CommandError(f"--rounds is {args.rounds}, must be at least 1")
    if args.threads is not None and args.threads < 1:
        raise CommandError(f"--threads is {args.threads}, must be at least 1")
    engines = available()
    usable = [name for name, reason in engines.items() if reason is None]
    if args.device is not None:
        usable = ["cuda"]
    chosen = _chosen("engine", args.engines, list(engines), usable)
    for name in chosen:
        require_name(name)
    usual = _PRESETS if args.device is None else _DEVICE_PRESETS
    presets = _chosen("preset", args.presets, list(PRESETS), usual)
    several = args.threads or cores()
    threads = (1, several) if several > 1 else (1,)
    return Settings(chosen, presets, threads, args.rounds, folder, args.device)


def _subject(file: str | None, dtype: str | None, strict_index: bool) -> Subject:
    from ..bench.subject import CASTS, Subject, cast

    if file is None:
        from ..demo.bundled import weights

        name, tensors = "the model of sfp demo", weights()
    else:
        with open_model(file, strict_index=strict_index) as model:
            name = model.path.name
            tensors = {tensor: model.read(tensor) for tensor in model.specs}
    if not any(array.size for array in tensors.values()):
        raise CommandError(f"{file}: all tensors are empty; name a model with weights")
    return Subject(name, cast(tensors, CASTS[dtype] if dtype else None))


def _run_section(name: str, subject: Subject, settings: Settings) -> _Outcome:
    from ..bench.sections import SECTIONS

    section = SECTIONS[name]
    rounds = section.rounds(settings)
    runners = section.runners(subject, settings)
    with progress(len(runners) * (rounds + 1), name, steps=True) as shown:

        def at(words: str) -> None:
            shown.advance(1)
            shown.at(f"{name}: {words}")

        return _Outcome(name, rounds, *section.run(runners, rounds, at))


# ------------------------------------------------------------------------------------------------- output


def _as_json(subject: Subject, settings: Settings, outcomes: Sequence[_Outcome]) -> dict[str, object]:
    from ..bench.environment import facts, not_installed
    from ..bench.results import refusal_json

    return {
        "environment": facts(),
        "model": {
            "name": subject.name,
            "tensors": len(subject.tensors),
            "weights": subject.weights,
            "raw_bytes": subject.raw_bytes,
            "dtypes": subject.dtypes,
        },
        "rounds": {outcome.name: outcome.rounds for outcome in outcomes},
        "threads": list(settings.threads),
        "device": settings.device,
        "results": [result.to_json() for outcome in outcomes for result in outcome.results],
        "refused": [
            refusal_json(outcome.name, refusal) for outcome in outcomes for refusal in outcome.refusals
        ],
        "not_installed": not_installed(),
    }


def _rounds(count: int) -> str:
    return f"{count} round{'s' if count > 1 else ''}"


def _title(subject: Subject, settings: Settings) -> str:
    dtypes = ", ".join(subject.dtypes[:3])
    return (
        f"{printable(subject.name)}: {subject.weights / 1e6:.3g} M weights, {dtypes}, lossless\n"
        f"medians and quartiles of {_rounds(settings.rounds)}"
    )


def _show(subject: Subject, settings: Settings, outcomes: Sequence[_Outcome]) -> None:
    from ..bench.environment import facts, not_installed
    from ..bench.sections import SECTIONS
    from ..bench.tables import table

    here = facts()
    print(
        f"{printable(subject.name)}: {counted(len(subject.tensors), 'tensor')}, "
        f"{counted(subject.weights, 'weight')}, "
        f"{bytes_words(subject.raw_bytes)} of {', '.join(subject.dtypes)}; Python {here['python']}, "
        f"{here['machine']}, {here['cores']} cores"
        + (f", decoded on {settings.device}" if settings.device else "")
    )
    for outcome in outcomes:
        print(f"\n{outcome.name}: {SECTIONS[outcome.name].about}; {_rounds(outcome.rounds)}\n")
        if outcome.results:
            header, rows = table(outcome.name, outcome.results)
            show_table(header, rows, left=2 if "case" in header else 1)
        elif not outcome.refusals:
            print("not measured: the model has no matrices")
        for refusal in outcome.refusals:
            print(printable(f"EXCLUDED: {refusal.contender.words}: {refusal.reason}"))
    missing = not_installed()
    if missing:
        print()
    for peer, reason in missing.items():
        print(f"{peer}: {reason}")
