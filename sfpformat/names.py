"""Checks arguments that are keyed by tensor names. Errors suggest the nearest known name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TypeVar

from .errors import MOST_NAME, OptionError, shortened

T = TypeVar("T")

# `difflib` takes about 10 µs per name, and its time grows with the square of the length. These bounds keep
# the search for a hint well below seconds.
_MOST_COMPARED = 20_000
_LONGEST_COMPARED = 256

# The greatest number of names that a message lists. It gives only the number of the others.
MOST_LISTED = 10


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Returns the known name that is most similar to an unknown one, or None if none is similar.

    Prefers a name that differs only in case, then a name that differs only by whole parts at one end, such as
    ``module.`` or ``.weight``, then the name that `difflib` finds most similar.

    Args:
        name: the unknown name.
        known: the known names. Of equally similar names, the first is returned.
    """
    candidates = list(known)
    folded = name.casefold()
    for candidate in candidates:
        if candidate.casefold() == folded:
            return candidate
    for candidate in candidates:
        one, other = f".{name}.", f".{candidate}."
        if name and candidate and (one in other or other in one):
            return candidate
    if len(name) > _LONGEST_COMPARED:
        return None
    short = [candidate for candidate in candidates[:_MOST_COMPARED] if len(candidate) <= _LONGEST_COMPARED]
    close = get_close_matches(name, short, n=1, cutoff=0.6)
    return close[0] if close else None


def unknown_name(name: str, known: Iterable[str], kind: str = "tensor") -> str:
    """Returns the message for an unknown name: ``no tensor is named 'W'; the nearest is 'w'``.

    Args:
        name: the unknown name.
        known: the known names.
        kind: the kind of object that the names denote, a singular noun.
    """
    hint = nearest(name, known)
    return f"no {kind} is named {quoted(name)}" + ("" if hint is None else f"; the nearest is {quoted(hint)}")


def unmatched(pattern: str, known: Iterable[str], aliases: Mapping[str, str] | None = None) -> str:
    """Returns the message for a shell-style pattern that matches no tensor name.

    For a pattern without wildcards: ``no tensor name matches 'W'; the nearest is 'w'``.

    Args:
        pattern: the pattern without a match.
        known: the known names.
        aliases: other name of a tensor -> its stored name.
    """
    message = f"no tensor name matches {quoted(pattern)}"
    for other, kept in (aliases or {}).items():
        if fnmatchcase(other, pattern):
            return f"{message}; {quoted(other)} is stored as {quoted(kept)}"
    hint = None if any(mark in pattern for mark in "*?[") else nearest(pattern, known)
    return message if hint is None else f"{message}; the nearest is {quoted(hint)}"


def require_known(
    given: Iterable[str], known: Iterable[str], argument: str | None = None, kind: str = "tensor"
) -> None:
    """Checks that names are known.

    Args:
        given: the names that the caller passed.
        known: the known names.
        argument: the name of the caller's argument, with which the message begins; None omits it.
        kind: the kind of object that the names denote, a singular noun.

    Raises:
        OptionError: a name is not known. The message suggests the nearest known name for the first unknown
            name, and lists up to `MOST_LISTED` others.
    """
    names = dict.fromkeys(known)
    unknown = [name for name in given if name not in names]
    if not unknown:
        return
    first, *others = unknown
    message = unknown_name(first, names, kind) if isinstance(first, str) else f"no {kind} is named {first!r}"
    message = f"{argument}: {message}" if argument else message
    raise OptionError(f"{message}; also unknown: {listed(others)}" if others else message)


def checked_by_name(given: Mapping[str, T] | None, known: Iterable[str], argument: str) -> Mapping[str, T]:
    """Checks a mapping that is keyed by tensor names, and returns it. None becomes an empty mapping.

    Args:
        given: name -> value, or None.
        known: the known names.
        argument: the name of the caller's argument, for messages.

    Raises:
        OptionError: the argument is not a mapping, or a name is not known.
    """
    if given is None:
        return {}
    require_mapping(given, argument)
    require_known(given, known, argument)
    return given


def require_mapping(given: object, argument: str) -> None:
    """Checks that an argument is a mapping.

    Raises:
        OptionError: the argument is not a mapping.
    """
    if not isinstance(given, Mapping):
        raise OptionError(f"{argument} is a {type(given).__name__}, must be a mapping")


def require_matches(patterns: Iterable[str], known: Iterable[str], argument: str) -> None:
    """Checks that each shell-style pattern matches a tensor name.

    Args:
        patterns: the patterns that the caller passed.
        known: the known names.
        argument: the name of the caller's argument; the message begins with it.

    Raises:
        OptionError: a pattern is not a string or matches no name. The message suggests the nearest name.
    """
    names = list(known)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise OptionError(f"{argument}: {pattern!r} is not a string")
        if not any(fnmatchcase(name, pattern) for name in names):
            raise OptionError(f"{argument}: {unmatched(pattern, names)}")


def listed(names: Sequence[str], most: int = MOST_LISTED) -> str:
    """Returns a list of quoted names for a message: the first ``most``, then the number of the others."""
    return joined([*map(quoted, names[:most])], len(names) - most, ", ")


def joined(parts: Sequence[str], left_out: int, separator: str = "; ") -> str:
    """Returns the parts of a list for a message, and the number of those that are left out, if positive."""
    message = separator.join(parts)
    return f"{message} and {left_out:,} more" if left_out > 0 else message


def quoted(name: object, most: int = MOST_NAME) -> str:
    """Returns a quoted name for a message. A long name is shortened to its beginning and its end."""
    if not isinstance(name, str) or len(name) <= most:
        return repr(name)
    return f"{shortened(name, most)!r} ({len(name):,} characters)"
