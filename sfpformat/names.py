"""Arguments keyed by the names of tensors: unknown names are refused, with the nearest known name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TypeVar

from .errors import MOST_NAME, OptionError, shortened

T = TypeVar("T")

# `difflib` needs about 10 µs a name, and time in proportion to the square of a length; a hint is not worth
# seconds.
_MOST_COMPARED = 20_000
_LONGEST_COMPARED = 256

# How many names a message lists before it only counts them.
MOST_LISTED = 10


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that was probably meant, or None where none is similar.

    A name that differs in case alone comes first, then one that is the same but for whole parts before or
    after it (``module.``, ``.weight``), then the most similar one by `difflib`.

    Args:
        name: unknown.
        known: the names there are, in any order; among equally near ones the first is taken.
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
    """The refusal of an unknown name: ``no tensor is named 'W'; the nearest is 'w'``.

    Args:
        name: unknown.
        known: the names there are.
        kind: what the names are names of, a noun in the singular.
    """
    hint = nearest(name, known)
    return f"no {kind} is named {quoted(name)}" + ("" if hint is None else f"; the nearest is {quoted(hint)}")


def unmatched(pattern: str, known: Iterable[str], aliases: Mapping[str, str] | None = None) -> str:
    """The refusal of a pattern of tensor names, as a shell's, that matches none.

    ``no tensor has a name like 'W'; the nearest is 'w'``, where the pattern is a plain name.

    Args:
        pattern: that matches nothing.
        known: the names there are.
        aliases: other names of tensors -> the names that these are kept under.
    """
    said = f"no tensor has a name like {quoted(pattern)}"
    for other, kept in (aliases or {}).items():
        if fnmatchcase(other, pattern):
            return f"{said}; {quoted(other)} is kept as {quoted(kept)}"
    hint = None if any(mark in pattern for mark in "*?[") else nearest(pattern, known)
    return said if hint is None else f"{said}; the nearest is {quoted(hint)}"


def require_known(
    given: Iterable[str], known: Iterable[str], argument: str | None = None, kind: str = "tensor"
) -> None:
    """Refuses names that name nothing.

    Args:
        given: names that a caller gave.
        known: the names there are.
        argument: the caller's argument, with which the message begins.
        kind: what the names are names of, a noun in the singular.

    Raises:
        OptionError: a given name is not known; the first one is named with the nearest known name, the rest
            are listed up to `MOST_LISTED` and counted.
    """
    there = dict.fromkeys(known)
    unknown = [name for name in given if name not in there]
    if not unknown:
        return
    first, *others = unknown
    said = unknown_name(first, there, kind) if isinstance(first, str) else f"no {kind} is named {first!r}"
    said = f"{argument}: {said}" if argument else said
    raise OptionError(f"{said}; unknown, too: {listed(others)}" if others else said)


def checked_by_name(given: Mapping[str, T] | None, known: Iterable[str], argument: str) -> Mapping[str, T]:
    """What a caller gave for some tensors by their names; nothing for None.

    Args:
        given: by name.
        known: the names there are.
        argument: the caller's argument, for errors.

    Raises:
        OptionError: it is no mapping, or a name is not known.
    """
    if given is None:
        return {}
    require_mapping(given, argument)
    require_known(given, known, argument)
    return given


def require_mapping(given: object, argument: str) -> None:
    """Refuses what is no mapping.

    Raises:
        OptionError: it is something else.
    """
    if not isinstance(given, Mapping):
        raise OptionError(f"{argument}: a {type(given).__name__} is no mapping")


def require_matches(patterns: Iterable[str], known: Iterable[str], argument: str) -> None:
    """Refuses patterns of tensor names, as a shell's, that match nothing.

    Args:
        patterns: that a caller gave.
        known: the names there are.
        argument: the caller's argument, with which the message begins.

    Raises:
        OptionError: a pattern matches no name; it is named with the nearest known name.
    """
    there = list(known)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise OptionError(f"{argument}: {pattern!r} is no pattern of names")
        if not any(fnmatchcase(name, pattern) for name in there):
            raise OptionError(f"{argument}: {unmatched(pattern, there)}")


def listed(names: Sequence[str], most: int = MOST_LISTED) -> str:
    """Names for a message, quoted: the first ``most``, then how many more there are."""
    said = ", ".join(map(quoted, names[:most]))
    return f"{said} and {len(names) - most:,} more" if len(names) > most else said


def quoted(name: object, most: int = MOST_NAME) -> str:
    """A name for a message: in quotes, and of a long one its beginning and its end."""
    if not isinstance(name, str) or len(name) <= most:
        return repr(name)
    return f"{shortened(name, most)!r} ({len(name):,} characters)"
