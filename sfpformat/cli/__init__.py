"""The command ``sfp``: one module per subcommand, each with ``add_parser(subparsers)`` and ``run(args)``.

Rules: a subcommand's module is imported only when it is called, so that ``sfp --help`` is fast. Errors are
printed in one line on stderr, results on stdout. Only this module converts errors to exit codes.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from types import FrameType
from typing import TextIO

from .. import __version__
from ..errors import SfpWarning
from .console import any_output, print_to_stderr
from .errors import CommandError, message_of
from .parser import EXIT_CODES, Parser, examples, split_rules

# Subcommand -> its line in `sfp --help`. Its module has the same name.
COMMANDS = {
    "pack": "convert a safetensors checkpoint to .sfp",
    "prune": "prune an .sfp file further, by its stored importances",
    "learn": "learn the importance of the weights of a transformers model, and prune it",
    "unpack": "convert an .sfp file to safetensors",
    "info": "show the tensors of a file and the size of each part",
    "verify": "check a file against the specification",
    "diff": "compare two files tensor by tensor",
    "delta": "write how a model differs from another one",
    "apply": "make a model from a base and deltas",
    "squash": "make one delta of several",
    "demo": "measure pruning and quantisation on a small language model",
    "bench": "compare size, speed and memory with other packages",
}

# Other packages add subcommands with entry points of this group: modules with ``add_parser`` and ``run``.
COMMANDS_GROUP = "sfpformat.commands"
# Subcommands that packages of this project add -> how to install them.
ADDED = {"conformance": "pip install ./conformance in a clone of the repository"}

_EXAMPLES = examples(
    ("sfp pack model.safetensors -o model.sfp", "lossless"),
    (
        "sfp pack model.safetensors -o model.sfp --prune 0.5 --bits 4",
        "prune half of the weights, quantise the others to 4 bits",
    ),
    ("sfp info model.sfp", "show the size of each part"),
    ("sfp unpack model.sfp -o model.safetensors", "convert back"),
)


_SIGPIPE = 13  # on Linux and macOS; Windows has no such signal


class Interrupted(KeyboardInterrupt):
    """A signal ended the command. As after Ctrl-C, partial output that a later run can resume is kept."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code.

    Args:
        argv: the arguments after the program's name; None uses those of the process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    with any_output():
        return _exit_code(words)


def _exit_code(words: list[str]) -> int:
    """Runs the command, and prints errors on stderr. Returns the exit code."""
    try:
        with _signals_as_interrupts(), _warnings_in_one_line():
            try:
                code = _run(words)
            except SystemExit as end:  # raised by --help and --version
                code = end.code if isinstance(end.code, int) else 0
            sys.stdout.flush()
            return code
    except BrokenPipeError:
        _drop_unwritten()  # nobody reads stdout any more, so no message
        return 128 + _SIGPIPE
    except KeyboardInterrupt as error:
        print_to_stderr(str(error) or "interrupted", "")
        return 128 + (error.number if isinstance(error, Interrupted) else signal.SIGINT)
    except Exception as error:
        if os.environ.get("SFP_DEBUG") == "1":
            traceback.print_exc()
        print_to_stderr(message_of(error))
        _drop_unwritten()
        return error.code if isinstance(error, CommandError) else 2


def _drop_unwritten() -> None:
    """Flushes stdout. If that fails, discards its buffer, because Python would fail again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(words: list[str]) -> int:
    args = parsed(words)
    code: int = args.run(args)
    return code


def parsed(words: list[str]) -> argparse.Namespace:
    """Parses the arguments after the program's name.

    Raises:
        CommandError: they are wrong.
    """
    words, likes = split_rules(words)
    name = next((word for word in words if not word.startswith("-")), None)
    if name is not None and name not in COMMANDS and name not in _added():
        if name in ADDED:
            raise CommandError(f"the command {name!r} needs another package: {ADDED[name]}")
        raise CommandError(f"unknown command {name!r} (see 'sfp --help')")
    args, unknown = _parser(name).parse_known_args(words)
    if unknown:
        raise CommandError(f"unknown arguments: {' '.join(unknown)} (see 'sfp {name} --help')")
    if likes and name != "pack":
        raise CommandError("only 'sfp pack' accepts --like")
    args.likes = likes
    return args


def _parser(name: str | None) -> Parser:
    """Returns the parser of the command line, with the options of the subcommand ``name`` only."""
    parser = Parser(
        prog="sfp",
        description="The .sfp file format for pruned neural networks.",
        epilog=f"{_EXAMPLES}\n\n{EXIT_CODES}",
    )
    parser.add_argument("--version", action="version", version=f"sfp {__version__} (format 1.0)")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command, line in COMMANDS.items():
        if command == name:
            module = importlib.import_module(f"{__name__}.{command}")
            module.add_parser(subparsers).set_defaults(run=module.run)
        else:
            subparsers.add_parser(command, help=line)
    if name not in COMMANDS:  # only here, because searching other packages is slow
        for entry in _added().values():
            module = entry.load()
            module.add_parser(subparsers).set_defaults(run=module.run)
    return parser


@cache
def _added() -> dict[str, EntryPoint]:
    """Returns the subcommands that other packages add."""
    return {entry.name: entry for entry in entry_points(group=COMMANDS_GROUP)}


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Prints each warning of this package once, in one line on stderr. Python handles all other warnings."""
    printed: set[str] = set()

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, SfpWarning):
            if str(message) not in printed:
                printed.add(str(message))
                print_to_stderr(str(message), "warning: ")
        else:
            shown_before(message, category, filename, lineno, file, line)

    with warnings.catch_warnings():
        shown_before = warnings.showwarning
        warnings.showwarning = show
        warnings.simplefilter("always", SfpWarning)
        yield


@contextmanager
def _signals_as_interrupts() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP end the command as Ctrl-C does, with all clean-up.

    A signal that was ignored at the start stays ignored, so that ``nohup`` works. Windows has no SIGHUP.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    existing = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    numbers = [number for number in existing if signal.getsignal(number) != signal.SIG_IGN]
    try:
        before = [signal.signal(number, interrupt) for number in numbers]
    except ValueError:  # not in the main thread, which owns the signal handlers
        yield
        return
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
