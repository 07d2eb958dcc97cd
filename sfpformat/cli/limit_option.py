"""The option ``--limit``, which changes the limits of readers (SPEC.md chapter 19)."""

from __future__ import annotations

import argparse
from dataclasses import fields

from ..errors import OptionError
from ..limits import DEFAULT_LIMITS, Limits
from ..names import unknown_name
from .errors import CommandError

_NAMES = tuple(field.name for field in fields(Limits))


def add_limits(parser: argparse.ArgumentParser, words: str = "change a limit of the reader") -> None:
    """Adds the option. Users can give it several times."""
    parser.add_argument(
        "--limit",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help=f"{words}: {', '.join(_NAMES)}",
    )


def limits_of(given: list[str]) -> Limits:
    """Returns the default limits with the given changes. The last value of a name counts.

    Args:
        given: words such as ``expansion=1000000``.

    Raises:
        CommandError: a name is unknown, or a value is invalid.
    """
    changes = {name: getattr(DEFAULT_LIMITS, name) for name in _NAMES}
    for words in given:
        name, equals, value = words.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            raise CommandError(f"--limit {words!r} is not NAME=VALUE")
        if name not in _NAMES:
            raise CommandError(
                f"--limit: {unknown_name(name, _NAMES, 'limit')}; choose from {', '.join(_NAMES)}"
            )
        try:
            changes[name] = int(value)
        except ValueError:
            raise CommandError(f"--limit {words!r}: {value!r} is not a whole number") from None
    try:
        return Limits(**changes)
    except OptionError as error:
        raise CommandError(f"--limit: {error}") from error
