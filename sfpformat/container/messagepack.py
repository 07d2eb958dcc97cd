"""The directory's encoding (SPEC.md chapter 6): a strict subset of MessagePack, one encoding a value.

Writing is the `msgpack` package's. Reading is our own, because the subset is what keeps hostile files out:
the reader must see which encoding was used, where each value lies, and that a length is covered by bytes
before anything is allocated for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgpack

from ..errors import fault
from ..limits import Limits


class Map(dict[str, object]):
    """A decoded map that knows where in the directory it and its values lie.

    Attributes:
        offset: of the map's first byte, from the directory's start.
        at: key -> offset of the key's value.
    """

    __slots__ = ("at", "offset")  # an empty map takes a byte of a file: it must not take hundreds of memory

    def __init__(self, offset: int) -> None:
        super().__init__()
        self.offset = offset
        self.at: dict[str, int] = {}


def encode(value: Mapping[str, object]) -> bytes:
    """The one encoding of a value made of maps, lists, strings, bytes and non-negative integers."""
    packed: bytes = msgpack.packb(_sorted(value), use_bin_type=True)
    return packed


def _sorted(value: object) -> object:
    """The value with the keys of all maps in ascending order of their UTF-8 bytes (R-MSG-004)."""
    if isinstance(value, Mapping):
        return {key: _sorted(value[key]) for key in sorted(value, key=lambda k: k.encode())}
    if isinstance(value, (list, tuple)):
        return [_sorted(item) for item in value]
    return value


def decode(data: bytes, limits: Limits) -> object:
    """Decodes a directory.

    Raises:
        InvalidFileError: E_ENCODING, E_TRUNCATED or E_TRAILING by R-MSG-001 to R-MSG-007.
        LimitError: when it is deeper than ``limits.depth``.
    """
    reader = _Reader(data, limits)
    value = reader.value(1)
    if reader.at != len(data):
        raise fault("R-MSG-006", "bytes follow the directory's value", offset=reader.at)
    return value


class _Nowhere(dict[str, int]):
    """The places of values whose places nobody kept."""

    def __missing__(self, key: str) -> int:
        return 0


_NOWHERE = _Nowhere()
# Lists that `decode_quickly` takes have at most so many elements: the package makes room for as many as a
# list claims, and lists that claim much may be nested.
_QUICK_ELEMENTS = 1 << 14


class _NotQuick(Exception):
    """A directory that the quick way does not take."""


class _QuickMap(Map):
    """A map of `decode_quickly`; ``depth`` counts it and the maps and lists inside."""

    __slots__ = ("depth",)

    def __init__(self, pairs: list[tuple[Any, Any]]) -> None:
        dict.__init__(self, pairs)
        self.offset, self.at = 0, _NOWHERE
        self.depth = 1
        last = ""
        for number, (key, value) in enumerate(pairs):
            if type(key) is not str or "\0" in key or (number and key <= last):
                raise _NotQuick
            last = key
            self.depth = max(self.depth, 1 + _depth(value))


def _depth(value: Any) -> int:
    """How deep a value is; only what the subset has, and no list in a list."""
    kind = type(value)
    if kind is str:
        if "\0" in value:
            raise _NotQuick
        return 0
    if kind is bytes:
        return 0
    if kind is int:
        if value < 0:
            raise _NotQuick
        return 0
    if kind is _QuickMap:
        return int(value.depth)
    if kind is not list:
        raise _NotQuick
    deepest = 0
    for item in value:
        if type(item) is list:
            raise _NotQuick
        deepest = max(deepest, _depth(item))
    return 1 + deepest


def decode_quickly(data: bytes, limits: Limits) -> Map | None:
    """A directory decoded by the `msgpack` package, its values' places not kept; None where that may not do.

    What is not None is what `decode` gives. R-MSG-002, R-MSG-006 and R-MSG-007 hold because encoding it again
    gives the same bytes; the others, and the limit of depth, are looked at here. None says nothing: `decode`
    judges.
    """
    try:
        root = msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            object_pairs_hook=_QuickMap,
            max_array_len=min(len(data), _QUICK_ELEMENTS),
            max_map_len=min(len(data), _QUICK_ELEMENTS),
        )
        if type(root) is not _QuickMap or root.depth > limits.depth:
            return None
        return root if msgpack.packb(root, use_bin_type=True) == data else None
    except (_NotQuick, ValueError, TypeError, OverflowError, msgpack.exceptions.UnpackException):
        return None


# Head byte -> (kind, bytes of the length or integer that follows, least value that needs this encoding).
_HEADS: dict[int, tuple[str, int, int]] = {
    0xC4: ("bin", 1, 0),
    0xC5: ("bin", 2, 1 << 8),
    0xC6: ("bin", 4, 1 << 16),
    0xCC: ("int", 1, 1 << 7),
    0xCD: ("int", 2, 1 << 8),
    0xCE: ("int", 4, 1 << 16),
    0xCF: ("int", 8, 1 << 32),
    0xD9: ("str", 1, 1 << 5),
    0xDA: ("str", 2, 1 << 8),
    0xDB: ("str", 4, 1 << 16),
    0xDC: ("array", 2, 1 << 4),
    0xDD: ("array", 4, 1 << 16),
    0xDE: ("map", 2, 1 << 4),
    0xDF: ("map", 4, 1 << 16),
}


class _Reader:
    """A bounds-checked cursor over the directory's bytes."""

    def __init__(self, data: bytes, limits: Limits) -> None:
        self.data = data
        self.limits = limits
        self.at = 0

    def take(self, size: int) -> bytes:
        """The next ``size`` bytes."""
        if size > len(self.data) - self.at:
            raise fault("R-MSG-007", "a value runs over the end of the directory", offset=self.at)
        self.at += size
        return self.data[self.at - size : self.at]

    def head(self) -> tuple[str, int]:
        """The kind of the next value, and its integer, or its length in bytes or elements."""
        start = self.at
        byte = self.take(1)[0]
        if byte <= 0x7F:
            return "int", byte
        if byte <= 0x8F:
            return "map", byte & 0x0F
        if byte <= 0x9F:
            return "array", byte & 0x0F
        if byte <= 0xBF:
            return "str", byte & 0x1F
        if byte not in _HEADS:
            raise fault("R-MSG-001", f"a type that is not allowed (0x{byte:02X})", offset=start)
        kind, size, least = _HEADS[byte]
        number = int.from_bytes(self.take(size), "big")  # MessagePack's own order
        if number < least:
            raise fault("R-MSG-002", f"{kind} {number} has a shorter encoding", offset=start)
        return kind, number

    def value(self, depth: int) -> object:
        """The next value; maps and arrays inside it count as deeper."""
        start = self.at
        kind, number = self.head()
        if kind == "int":
            return number
        if kind == "bin":
            return self.take(number)
        if kind == "str":
            return self.text(self.take(number), start)
        self.limits.require("depth", depth, start)
        # An element has a byte at least, a pair two: nothing is built for more than the bytes can hold.
        if number * (2 if kind == "map" else 1) > len(self.data) - self.at:
            raise fault("R-MSG-007", f"{kind} of {number} runs over the end", offset=start)
        if kind == "array":
            return [self.value(depth + 1) for _ in range(number)]
        return self.map(number, depth, start)

    def map(self, pairs: int, depth: int, start: int) -> Map:
        """The pairs of a map, keys checked."""
        out = Map(start)
        last: bytes | None = None
        for _ in range(pairs):
            at = self.at
            kind, size = self.head()
            if kind != "str":
                raise fault("R-MSG-001", "a map's key is not a string", offset=at)
            raw = self.take(size)
            if raw == last:
                raise fault("R-MSG-005", f"the key {self.text(raw, at)!r} comes twice", offset=at)
            if last is not None and raw < last:
                raise fault("R-MSG-004", f"the key {self.text(raw, at)!r} is out of order", offset=at)
            last, key = raw, self.text(raw, at)
            out.at[key] = self.at
            out[key] = self.value(depth + 1)
        return out

    @staticmethod
    def text(raw: bytes, start: int) -> str:
        """The string of some UTF-8 bytes."""
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            raise fault("R-MSG-003", "a string is not UTF-8", offset=start) from None
        if "\0" in text:
            raise fault("R-MSG-003", "a string contains U+0000", offset=start)
        return text
