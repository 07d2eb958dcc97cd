"""Prints the output of commands: with rich on a terminal, else as plain text."""

from __future__ import annotations

import codecs
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Protocol

# Replacements for characters that the encoding of an output lacks, such as that of LANG=C or code page 1252.
_PLAIN = {"→": "->", "×": "x", "–": "-", "−": "-", "…": "...", "±": "+-", "≤": "<=", "≥": ">=", "µ": "u"}
_PLAIN_ERRORS = "sfpformat.plain"


def _plain_characters(error: UnicodeError) -> tuple[str, int]:
    """Error handler for `codecs`. Replaces characters that the encoding lacks by ASCII, or escapes them."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    unknown = error.object[error.start : error.end]
    plain = [_PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in unknown]
    return "".join(plain), error.end


codecs.register_error(_PLAIN_ERRORS, _plain_characters)


@contextmanager
def any_output() -> Iterator[None]:
    """Makes stdout and stderr accept all text, in any encoding. Closed outputs discard it."""
    before: list[tuple[Any, str | None]] = []
    outputs = {"stdout": sys.stdout, "stderr": sys.stderr}
    with ExitStack() as opened:
        try:
            for name, stream in outputs.items():
                if stream is None:  # closed: print(file=None) would write to the other output
                    setattr(sys, name, opened.enter_context(open(os.devnull, "w", encoding="utf-8")))
                elif hasattr(stream, "reconfigure"):
                    before.append((stream, stream.errors))
                    stream.reconfigure(errors=_PLAIN_ERRORS)
            yield
        finally:
            for stream, errors in before:
                with suppress(OSError, ValueError):  # it may be closed by now
                    stream.reconfigure(errors=errors)
            for name, stream in outputs.items():
                setattr(sys, name, stream)


class Progress(Protocol):
    """Reports the progress of work."""

    def advance(self, amount: int) -> None:
        """Adds an amount of finished work, in bytes or steps."""

    def at(self, words: str) -> None:
        """Sets the description of the current work."""


class _Silent:
    def advance(self, amount: int) -> None:
        pass

    def at(self, words: str) -> None:
        pass


_SECONDS = 30.0  # between the lines of progress without a terminal


class _Lines:
    """Prints progress as lines on stderr: one at the start and at the end, and others at intervals."""

    def __init__(self, total: int, words: str) -> None:
        self._total, self._words, self._doing, self._done = total, words, "", 0
        self._begun = self._last = time.monotonic()
        self._print(f"{words} ...")

    def advance(self, amount: int) -> None:
        self._done += amount
        self._print_if_due()

    def at(self, words: str) -> None:
        self._doing = words
        self._print_if_due()

    def end(self) -> None:
        """Prints the time of the work."""
        self._print(f"{self._words}: {time.monotonic() - self._begun:.0f} s")

    def _print_if_due(self) -> None:
        now = time.monotonic()
        if now - self._last >= _SECONDS:
            self._last = now
            done = f"{self._done} of {self._total}" if self._total > 1 else ""
            parts = ", ".join(part for part in (done, self._doing) if part)
            self._print(f"{self._words}: {parts} after {now - self._begun:.0f} s")

    def _print(self, words: str) -> None:
        with suppress(OSError, ValueError):  # stderr may be closed
            print(f"sfp: {printable(words)}", file=sys.stderr, flush=True)


@contextmanager
def progress(
    total: int, words: str, *, steps: bool = False, show: bool = True, lines: bool = False
) -> Iterator[Progress]:
    """Shows a progress bar on stderr if it is a terminal.

    Args:
        total: the total amount of work, in bytes or in steps.
        words: description of the work.
        steps: whether ``total`` is in steps.
        show: whether to show the bar; if false, this function shows nothing.
        lines: whether to print lines if stderr is not a terminal: at the start and the end of the work, and
            every 30 seconds.
    """
    if not show or not sys.stderr.isatty():
        if not (show and lines):
            yield _Silent()
            return
        printed = _Lines(total, words)
        yield printed
        printed.end()
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    done = MofNCompleteColumn() if steps else DownloadColumn()
    columns = (BarColumn(), done, TimeRemainingColumn(), TextColumn("{task.description}"))
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(escape(words), total=total)

        class _Shown:
            def advance(self, amount: int) -> None:
                bar.advance(task, amount)

            def at(self, words: str) -> None:
                bar.update(task, description=escape(printable(words)))

        yield _Shown()


def printable(text: str) -> str:
    """Escapes all unprintable characters. Names in untrusted files could otherwise control the terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def print_to_stderr(words: str, kind: str = "error: ") -> None:
    """Prints a message in one line on stderr."""
    with suppress(OSError):  # stderr may be closed
        print(f"sfp: {kind}{printable(' '.join(words.split()))}", file=sys.stderr)


def show_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """Prints a table on stdout.

    Args:
        header: the names of the columns.
        rows: the cells of each row. This function escapes unprintable characters.
        left: the number of text columns, which come first. The other columns are numbers, aligned right.
    """
    cells = [[printable(cell) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        for line in _plain([list(header), *cells], left):
            print(line)
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, word in enumerate(header):
        table.add_column(word, justify="left" if i < left else "right", overflow="fold")
    for row in cells:
        table.add_row(*map(Text, row))
    Console().print(table)


def _plain(rows: list[list[str]], left: int) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        padded = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(padded).rstrip()


def show_json(value: object) -> None:
    """Prints a value as JSON on stdout. The value must not contain NaNs or infinities."""
    print(json.dumps(value, indent=1, allow_nan=False))


def bytes_words(size: int) -> str:
    """Formats a size in bytes, such as ``90.9 MB`` (10^6 bytes)."""
    value, unit = float(size), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5 or unit == "TB":
            break
        value /= 1000
    return f"{size} B" if unit == "B" else f"{value:.3g} {unit}" if value < 100 else f"{value:.0f} {unit}"


def counted(count: int, noun: str) -> str:
    """Formats a number of things: ``1 tensor``, ``2,000 tensors``."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def seconds_words(seconds: float) -> str:
    """Formats a duration: ``12.3 s``, or two digits below 1 s, such as ``0.043 s``."""
    return f"{seconds:.1f} s" if seconds >= 1 else f"{max(seconds, 0.001):.2g} s"


def number(value: float | None, digits: int = 2, unit: str = "") -> str:
    """Formats a number with ``digits`` decimals. Returns a dash for None."""
    return "–" if value is None else f"{value:.{digits}f}{unit}"


def percent(part: float | None) -> str:
    """Formats a share from 0 to 1 in percent. Returns a dash for None."""
    return number(None if part is None else 100 * part, 1, " %")
