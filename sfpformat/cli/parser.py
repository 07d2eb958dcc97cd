"""The command-line parser: argparse with one-line errors, and with examples in each help text."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from typing import Any, NoReturn, Protocol

from .errors import CommandError

EXIT_CODES = """exit codes:
  0    success: no faults, no differences
  1    faults or differences were found
  2    an error: wrong usage, a file that cannot be read or written, or another failure
  130  interrupted by Ctrl-C (143 by SIGTERM, 129 by SIGHUP, 141 by a closed pipe)

environment variables:
  SFP_DEBUG=1  print the traceback of an error
  NO_COLOR=1   print without colours"""

HELP_WIDTH = 100
_LIKE = "--like"


class SupportsWrite(Protocol):
    """A file that accepts text."""

    def write(self, text: str, /) -> object:
        """Writes text."""


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `CommandError` and rejects abbreviated options."""

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("allow_abbrev", False)
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        paragraphs = (settings.get("description") or "").split("\n\n")
        settings["description"] = "\n\n".join(textwrap.fill(text, HELP_WIDTH) for text in paragraphs)
        super().__init__(**settings)

    def error(self, message: str) -> NoReturn:
        """Raises `CommandError` with the message. The method of argparse would print it and exit."""
        raise CommandError(f"{message} (see '{self.prog} --help')")

    def _print_message(self, message: str, file: SupportsWrite | None = None) -> None:
        """Writes a help text. Unlike the method of argparse, it does not suppress write errors."""
        (file or sys.stderr).write(message)


Subparsers = argparse._SubParsersAction  # argparse has no public name for it


def examples(*pairs: tuple[str, str]) -> str:
    """Formats the examples of a help text: command lines, each with its description."""
    return "examples:\n" + "\n".join(f"  # {words}\n  {line}" for line, words in pairs)


def split_rules(words: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Splits arguments at each ``--like``.

    Returns:
        The arguments before the first ``--like``, and those after each, up to the next.
    """
    parts: list[list[str]] = [[]]
    for word in words:
        if word == _LIKE:
            parts.append([])
        elif word.startswith(_LIKE + "="):
            parts.append([word[len(_LIKE) + 1 :]])
        else:
            parts[-1].append(word)
    if any(word in ("-h", "--help") for part in parts[1:] for word in part):
        parts[0].append("--help")
    return parts[0], parts[1:]
