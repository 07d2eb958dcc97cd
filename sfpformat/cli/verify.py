"""``sfp verify``: checks a file against the specification."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from ..container.delta_map import DeltaMap
from ..decode.reader import SfpFile
from ..decode.validate import Report, validate, validate_index
from ..deltas.result import DeltaFile
from ..errors import MOST_DETAIL, FileFault, shortened
from ..io.paths import FilePath, file_size, is_index, model_path
from ..limits import Limits
from ..names import quoted
from .console import bytes_words, counted, print_to_stderr, printable, progress, show_json
from .delta_files import ModelTensors, kinds_of, words_of
from .errors import CommandError, message_of, other_kind, path_in_errors, require_file
from .limit_option import add_limits, limits_of
from .model_files import open_model
from .parser import Parser, Subparsers, examples

# Maximum number of faults or notes printed per file; further ones are counted.
_MOST_LINES = 100


def add_parser(subparsers: Subparsers[Parser]) -> Parser:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "verify",
        help="check a file against the specification",
        description="Checks all checksums and all rules of SPEC.md, decodes all tensors, and reports each "
        "fault with its error code, clause, tensor and byte offset. For an index, checks all shards. Also "
        "reports quantised weights that decode to infinity or NaN: the format allows them, but the "
        "original weights of a quantised tensor never have these values.",
        epilog=examples(
            ("sfp verify model.sfp", "exit code 0 without faults, 1 with faults, 2 if a file cannot be read"),
            ("sfp verify model.sfp --canonical", "exit code 1 also if the file is not canonical"),
            ("sfp verify shards/*.sfp --json", "check several files, print JSON"),
            ("sfp verify step-18.sfp --base step-17.safetensors", "check that a delta fits its base"),
        ),
    )
    parser.add_argument("files", metavar="FILE", nargs="+", help=".sfp files, .sfp.index.json, or folders")
    parser.add_argument(
        "--canonical", action="store_true", help="count a file that is not canonical as a fault"
    )
    parser.add_argument(
        "--base",
        metavar="BASE",
        help="compare the checksums of this model, and of the result, with those in FILE, a delta of it",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    add_limits(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand. Returns the exit code."""
    code, results = 0, []
    limits = limits_of(args.limit)
    for name in args.files:
        for number, (path, found) in enumerate(_reports(name, limits)):
            try:
                report = found()
                if args.base is not None and report.ok and number == 0:  # not for each shard of an index
                    _check_with_base(path, args.base, report, limits)
                delta = _delta_of(path, report, limits)
            except (CommandError, OSError) as error:  # the other files and shards are still checked
                code = 2
                results.append(
                    {"file": name if number == 0 else str(path), "ok": False, "error": message_of(error)}
                )
                print_to_stderr(message_of(error))
                continue
            good = report.canonical if args.canonical else report.ok
            code = code if good and not report.not_finite else max(code, 1)
            results.append(_as_json(path, report, delta))
            if not args.json:
                _show(path, report, delta, args.canonical)
    if args.json:
        show_json(results)
    return code


def _delta_of(path: FilePath, report: Report, limits: Limits) -> DeltaMap | None:
    """Returns the map of a delta without faults; None for another file."""
    if not report.ok or is_index(path):
        return None
    with path_in_errors(path), SfpFile(path, limits=limits) as file:
        return file.directory.delta


def _reports(name: str, limits: Limits) -> Iterator[tuple[FilePath, Callable[[], Report]]]:
    """Yields a file, and for an index, also each of its shards: the path, and what makes the report.

    What makes the report raises an error of a file that cannot be read, so that the caller can go on.
    """
    try:
        with path_in_errors(name):
            path = model_path(name)
    except (CommandError, OSError) as error:
        yield Path(name), partial(_raise, error)
        return
    if not is_index(path):
        yield path, partial(_validate, path, limits)
        return
    shards: list[str] = []

    def of_index() -> Report:
        require_file(path)
        with path_in_errors(path):
            report, names = validate_index(path, limits)
        shards.extend(names)
        return report

    yield path, of_index
    for shard in shards:
        yield path.with_name(shard), partial(_validate, path.with_name(shard), limits)


def _raise(error: Exception) -> Report:
    raise error


def _validate(path: FilePath, limits: Limits) -> Report:
    require_file(path)
    with path_in_errors(path), progress(file_size(path), path.name) as shown:
        last = 0

        def advance(done: int, total: int) -> None:
            nonlocal last
            shown.advance(done - last)
            last = done

        return validate(path, limits=limits, progress=advance)


def _check_with_base(path: FilePath, base_path: str, report: Report, limits: Limits) -> None:
    """Makes the result of a delta and its base, and adds the first fault to a report.

    Raises:
        CommandError: the file is not a delta, or the base is not a model.
        OSError: a file cannot be read.
    """
    with open_model(base_path, limits=limits) as base, path_in_errors(path):
        try:
            with DeltaFile(path, ModelTensors(base), limits=limits) as result:
                result.check()
        except FileFault as error:
            report.faults.append(error)


def _as_json(path: FilePath, report: Report, delta: DeltaMap | None) -> dict[str, object]:
    faults = [
        {
            "code": fault.code,
            "clause": fault.clause,
            "tensor": fault.tensor,
            "offset": fault.offset,
            "detail": shortened(fault.detail, MOST_DETAIL),
        }
        for fault in report.faults
    ]
    return {
        "file": str(path),
        "ok": report.ok,
        "canonical": report.canonical,
        "tensors": report.tensors,
        "bytes": report.bytes,
        "faults": faults,
        "notes": report.notes,
        "not_finite": report.not_finite,
        "kind": _kind(path, report),
        "delta": None if delta is None else kinds_of(delta),
        "keyed": report.keyed,
        "error": None,
    }


def _kind(path: FilePath, report: Report) -> str | None:
    """Returns a description of a file that is not an `.sfp` file; None for an `.sfp` file."""
    return next((words for fault in report.faults if (words := other_kind(path, fault))), None)


def _show(path: FilePath, report: Report, delta: DeltaMap | None, with_notes: bool) -> None:
    name = printable(str(path))
    for fault in report.faults[:_MOST_LINES]:
        print(f"{name}: {printable(str(fault))}")
    if len(report.faults) > _MOST_LINES:
        print(f"{name}: {len(report.faults) - _MOST_LINES:,} more faults; --json lists them")
    kind = _kind(path, report)
    if kind is not None:
        print(f"{name}: is {printable(kind)}")
    if with_notes:
        for note in report.notes[:_MOST_LINES]:
            print(f"{name}: not canonical: {printable(shortened(note, MOST_DETAIL))}")
        if len(report.notes) > _MOST_LINES:
            print(f"{name}: {len(report.notes) - _MOST_LINES:,} more notes; --json lists them")
    for tensor, count in list(report.not_finite.items())[:_MOST_LINES]:
        words = (
            f"tensor {quoted(tensor)}: {count:,} quantised weights are infinite or NaN; pack the model again"
        )
        print(f"{name}: {printable(words)}")
    if len(report.not_finite) > _MOST_LINES:
        print(f"{name}: {len(report.not_finite) - _MOST_LINES:,} more such tensors; --json lists them")
    if report.faults:
        print(f"{name}: {len(report.faults)} fault{'s' if len(report.faults) > 1 else ''}")
        return
    canonical = "canonical" if report.canonical else "not canonical"
    what = counted(report.tensors, "tensor") if delta is None else f"a delta: {words_of(delta)}"
    what += f", {counted(report.keyed, 'keyed table')}" if report.keyed else ""
    print(f"{name}: no faults, {canonical}; {what}, {bytes_words(report.bytes)}")
