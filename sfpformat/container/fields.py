"""Reads typed fields from the directory's maps (R-DIR-002, R-DIR-003, R-DIR-007)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from ..errors import fault
from .messagepack import Map

Fields = dict[str, object]  # a map of the directory: a `Map`, or a plain dict from the fast parser
T = TypeVar("T")

_WORDS = {int: "an integer", str: "a string", bytes: "binary", list: "an array", dict: "a map", Map: "a map"}


def place_of(source: Fields, key: str | None = None) -> int:
    """Returns the offset of a map, or of the value of a key; 0 if the map was parsed without offsets."""
    if not isinstance(source, Map):
        return 0
    return source.offset if key is None else source.at[key]


def typed(value: object, kind: type[T], what: str, offset: int) -> T:
    """Returns the value. Raises R-DIR-003 unless it has the type ``kind``."""
    if not isinstance(value, kind):
        raise fault("R-DIR-003", f"{what} is not {_WORDS[kind]}", offset=offset)
    return value


def required(source: Fields, key: str, kind: type[T]) -> T:
    """Returns the value of a required key. Raises R-DIR-002 if it is missing, R-DIR-003 for a wrong type."""
    value = source.get(key)  # None only if it is missing: no value of a directory is None
    if isinstance(value, kind):
        return value
    if key not in source:
        raise fault("R-DIR-002", f"the key {key!r} is missing", offset=place_of(source))
    return typed(value, kind, key, place_of(source, key))


def require_absent(source: Fields, keys: Iterable[str], reason: str) -> None:
    """Raises R-DIR-007 if the map has one of the keys. ``reason`` completes "the key 'k' …"."""
    for key in keys:
        if key in source:
            raise fault("R-DIR-007", f"the key {key!r} {reason}", offset=place_of(source, key))
