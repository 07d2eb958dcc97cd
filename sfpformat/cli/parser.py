"""The command-line parser: argparse, with one-line errors and examples in every help."""

from __future__ import annotations

import argparse
import sys
import textwrap
from typing import Any, NoReturn, Protocol

from .trouble import Trouble

EXIT_CODES = """exit codes:
  0    all went well; what was compared is identical
  1    faults were found, or what was compared differs
  2    wrong usage, a file that cannot be read or written, or another failure
  130  interrupted by Ctrl-C (143 by SIGTERM, 129 by SIGHUP, 141 by a closed pipe)

SFP_DEBUG=1 shows where an error came from; NO_COLOR=1 leaves out colours."""


HELP_WIDTH = 100


class SupportsWrite(Protocol):
    """A file that accepts text."""

    def write(self, text: str, /) -> object:
        """Writes text."""


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `Trouble` and does not accept abbreviated options."""

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("allow_abbrev", False)
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        paragraphs = (settings.get("description") or "").split("\n\n")
        settings["description"] = "\n\n".join(textwrap.fill(text, HELP_WIDTH) for text in paragraphs)
        super().__init__(**settings)

    def error(self, message: str) -> NoReturn:
        """Raises `Trouble` with the message, where argparse would print it and exit."""
        raise Trouble(f"{message} (see '{self.prog} --help')")

    def _print_message(self, message: str, file: SupportsWrite | None = None) -> None:
        """Writes a help text. Unlike argparse's method, it does not suppress write errors."""
        (file or sys.stderr).write(message)


Subparsers = argparse._SubParsersAction  # argparse has no public name for it


def examples(*pairs: tuple[str, str]) -> str:
    """Formats the examples of a help text: command lines, each with its description."""
    return "examples:\n" + "\n".join(f"  # {words}\n  {line}" for line, words in pairs)
