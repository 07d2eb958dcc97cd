"""Taking typed fields out of the directory's maps (R-DIR-002, R-DIR-003)."""

from __future__ import annotations

from typing import TypeVar

from ..errors import fault
from .messagepack import Map

T = TypeVar("T")

_WORDS = {int: "an integer", str: "a string", bytes: "binary", list: "an array", Map: "a map"}


def typed(value: object, kind: type[T], what: str, offset: int) -> T:
    """The value, when it has the type that SPEC.md gives it."""
    if not isinstance(value, kind):
        raise fault("R-DIR-003", f"{what} is not {_WORDS[kind]}", offset=offset)
    return value


def required(source: Map, key: str, kind: type[T]) -> T:
    """The value of a key that must be there."""
    if key not in source:
        raise fault("R-DIR-002", f"the key {key!r} is missing", offset=source.offset)
    return typed(source[key], kind, key, source.at[key])


def optional(source: Map, key: str, kind: type[T]) -> T | None:
    """The value of a key that may be missing."""
    return required(source, key, kind) if key in source else None
