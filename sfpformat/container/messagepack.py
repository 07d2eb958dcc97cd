"""The directory's encoding (SPEC.md chapter 6): a strict subset of MessagePack, with one encoding per value.

The `msgpack` package writes it. `decode` is our own parser, because the strict subset protects against
hostile files: the parser checks which encoding was used, records the offset of each value, and checks that
the bytes of a value exist before it allocates memory for them.

`decode_quickly` is a fast path for ordinary directories: it uses the `msgpack` package and is six times as
fast. It returns the result of `decode`, or None on any problem; only `decode` raises errors.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import chain
from typing import NamedTuple, cast

import msgpack

from ..errors import fault
from ..limits import Limits


class Map(dict[str, object]):
    """A decoded map with the offsets of the map and of its values in the directory.

    Attributes:
        offset: offset of the map's first byte in the directory.
        at: key -> offset of the key's value in the directory.
    """

    __slots__ = ("at", "offset")  # an empty map has one byte in a file; it must not take hundreds in memory

    def __init__(self, offset: int) -> None:
        super().__init__()
        self.offset = offset
        self.at: dict[str, int] = {}


def encode(value: dict[str, object]) -> bytes:
    """Returns the encoding of a value that consists of maps, lists, strings, bytes and integers from 0."""
    packed: bytes = msgpack.packb(_sorted(value), use_bin_type=True)
    return packed


def depth_of(value: object) -> int:
    """Returns the nesting depth of maps and lists; 1 for a map or list of other values."""
    if isinstance(value, dict):
        value = list(value.values())
    return 1 + max(map(depth_of, value), default=0) if isinstance(value, (list, tuple)) else 0


def _sorted(value: object) -> object:
    """Returns the value with the keys of all maps in ascending order of their UTF-8 bytes (R-MSG-004)."""
    if isinstance(value, dict):  # strings compare by code point, which is the order of UTF-8
        return {key: _sorted(value[key]) for key in sorted(value)}
    if isinstance(value, (list, tuple)):
        return [_sorted(item) for item in value]
    return value


# The greatest length of an array in `decode_quickly`, except in `_LONG`: more than the default limit on ranks
# and the greatest number of codes. `msgpack` allocates memory for the length that a file claims, for up to
# 1,024 nested arrays. With this bound, this memory is at most half a megabyte (R-MSG-008).
_SHORT = 64


class _Long(NamedTuple):
    """The keys of a map whose values are long: arrays of any length, and maps that have such arrays."""

    arrays: Collection[str] = ()
    maps: Mapping[str, _Long] = {}


_LONG = _Long(("tensors",), {"delta": _Long(("dtypes", "names", "shapes", "structured"))})


def decode_quickly(data: bytes, limits: Limits) -> dict[str, object] | None:
    """Fast path of `decode`: returns the same value without offsets. None unless it is valid and ordinary.

    A directory is ordinary if its value is a map in which only arrays with one element for each tensor have
    more than 64 elements. On None, the caller must use `decode`, which returns the value or raises the error.

    `msgpack` accepts more than the strict subset. Therefore the value is packed again: the packer has only
    one encoding per value. If the bytes are equal, they have the shortest encodings (R-MSG-002), valid UTF-8
    (R-MSG-003, except U+0000), no duplicate key (R-MSG-005: the later pair would have replaced the earlier
    one), and exactly one whole value (R-MSG-006, R-MSG-007). `_is_allowed` checks the other requirements:
    types (R-MSG-001), U+0000, the order of keys (R-MSG-004) and depth.
    """
    try:
        value = _unpack(data)
        same = msgpack.packb(value, use_bin_type=True) == data
    except Exception:  # msgpack documents many classes; `decode` raises the error
        return None
    return value if same and _is_allowed(value, limits.depth) else None


def _unpack(data: bytes) -> dict[str, object]:
    """Unpacks a directory with `msgpack`. Raises an exception of any kind if it is not a map."""
    unpacker = msgpack.Unpacker(max_buffer_size=len(data), max_array_len=_SHORT)
    unpacker.feed(data)
    return _unpack_map(unpacker, _LONG)


def _unpack_map(unpacker: msgpack.Unpacker, long: _Long) -> dict[str, object]:
    """Unpacks a map, and the elements of its long arrays one by one."""
    out: dict[str, object] = {}
    for _ in range(unpacker.read_map_header()):
        key = unpacker.unpack()
        if key in long.arrays:
            out[key] = [unpacker.unpack() for _ in range(unpacker.read_array_header())]
        elif key in long.maps:
            out[key] = _unpack_map(unpacker, long.maps[key])
        else:
            out[key] = unpacker.unpack()
    return out


def _is_allowed(root: dict[str, object], depth: int) -> bool:
    """Returns whether types, keys, strings and depth of a value are in the subset (see `decode_quickly`)."""
    # Checks all values of one depth together, with built-in functions, because these are fast.
    dicts: list[dict[object, object]] = [cast("dict[object, object]", root)]
    lists: list[list[object]] = []
    while dicts or lists:
        if depth == 0 or not all(map(_are_sorted, set(map(tuple, dicts)))):
            return False
        values = list(chain(chain.from_iterable(map(dict.values, dicts)), chain.from_iterable(lists)))
        # Exact types, because True is an instance of int.
        kinds = set(map(type, values))
        if not kinds <= _TYPES:
            return False
        if min([value for value in values if type(value) is int], default=0) < 0:
            return False
        if str in kinds and "\0" in "".join([value for value in values if type(value) is str]):
            return False
        dicts = [value for value in values if type(value) is dict]
        lists = [value for value in values if type(value) is list]
        depth -= 1
    return True


# The types of a directory's values (R-MSG-001).
_TYPES = {int, str, bytes, dict, list}


def _are_sorted(keys: tuple[object, ...]) -> bool:
    """Returns whether keys are ascending strings without U+0000.

    Compares code points, whose order is that of UTF-8.
    """
    names = [key for key in keys if type(key) is str]
    return len(names) == len(keys) and names == sorted(names) and "\0" not in "".join(names)


def decode(data: bytes, limits: Limits) -> object:
    """Decodes a directory.

    Raises:
        InvalidFileError: E_ENCODING, E_TRUNCATED or E_TRAILING by R-MSG-001 to R-MSG-007.
        LimitError: the nesting is deeper than ``limits.depth``.
    """
    reader = _Reader(data, limits)
    value = reader.value(1)
    if reader.at != len(data):
        raise fault("R-MSG-006", "the directory has bytes after its value", offset=reader.at)
    return value


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
        """Returns the next ``size`` bytes."""
        if size > len(self.data) - self.at:
            raise fault("R-MSG-007", "a value extends past the end of the directory", offset=self.at)
        self.at += size
        return self.data[self.at - size : self.at]

    def head(self) -> tuple[str, int]:
        """Returns the kind of the next value, and its integer, or its length in bytes or elements."""
        start = self.at
        byte = self.data[start] if start < len(self.data) else self.take(1)[0]
        self.at = start + 1
        if byte <= 0x7F:
            return "int", byte
        if byte <= 0x8F:
            return "map", byte & 0x0F
        if byte <= 0x9F:
            return "array", byte & 0x0F
        if byte <= 0xBF:
            return "str", byte & 0x1F
        if byte not in _HEADS:
            raise fault("R-MSG-001", f"a value has a type that is not allowed (0x{byte:02X})", offset=start)
        kind, size, least = _HEADS[byte]
        number = int.from_bytes(self.take(size), "big")  # as MessagePack defines; SFP is little-endian
        if number < least:
            words = f"the {kind} {number}" if kind == "int" else f"a {kind} of length {number}"
            raise fault("R-MSG-002", f"{words} has a shorter encoding", offset=start)
        return kind, number

    def value(self, depth: int) -> object:
        """Returns the next value. ``depth`` is its nesting depth if it is a map or an array."""
        start = self.at
        kind, number = self.head()
        if kind == "int":
            return number
        if kind == "bin":
            return self.take(number)
        if kind == "str":
            return self.text(self.take(number), start)
        self.limits.require("depth", depth, start)
        # An element has at least one byte, a pair two: refuses a length that exceeds the remaining bytes.
        if number * (2 if kind == "map" else 1) > len(self.data) - self.at:
            words = f"the {kind} of length {number} extends past the end of the directory"
            raise fault("R-MSG-007", words, offset=start)
        if kind == "array":
            return [self.value(depth + 1) for _ in range(number)]
        return self.map(number, depth, start)

    def map(self, pairs: int, depth: int, start: int) -> Map:
        """Reads the pairs of a map and checks the keys."""
        out = Map(start)
        last: bytes | None = None
        for _ in range(pairs):
            at = self.at
            kind, size = self.head()
            if kind != "str":
                raise fault("R-MSG-001", "a map's key is not a string", offset=at)
            raw = self.take(size)
            if raw == last:
                raise fault("R-MSG-005", f"the key {self.text(raw, at)!r} occurs twice", offset=at)
            if last is not None and raw < last:
                raise fault("R-MSG-004", f"the key {self.text(raw, at)!r} is out of order", offset=at)
            last, key = raw, self.text(raw, at)
            out.at[key] = self.at
            out[key] = self.value(depth + 1)
        return out

    @staticmethod
    def text(raw: bytes, start: int) -> str:
        """Decodes UTF-8 bytes. Raises R-MSG-003 for invalid UTF-8 and U+0000."""
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            raise fault("R-MSG-003", "a string is not UTF-8", offset=start) from None
        if "\0" in text:
            raise fault("R-MSG-003", "a string contains U+0000", offset=start)
        return text
