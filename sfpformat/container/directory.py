"""The directory (SPEC.md chapter 7): records that are valid once they exist, to and from its maps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate

from ..errors import FileFault, fault, placed
from ..limits import Limits
from . import messagepack
from .entry import TensorEntry
from .fields import Fields, place_of, required, typed
from .plain import Outline, PlainTensors, looks_plain, plain_tensors
from .preamble import SIZE

KNOWN_FEATURES: frozenset[str] = frozenset()  # version 1.0 defines none (SPEC.md chapter 21)
_KNOWN_KEYS = frozenset(("tensors", "metadata", "features"))
# From so many on it pays to check plain tensors together.
_WORTH_COLUMNS = 8


class Entries(Mapping[str, TensorEntry]):
    """Name -> entry, in the order of the file; entries of plain tensors are made when they are asked for."""

    def __init__(self, items: dict[str, TensorEntry | Fields], limits: Limits) -> None:
        """Args:
        items: entries, or maps of which `plain_tensors` has seen that they are valid within the limits.
        """
        self._items = items
        self._limits = limits

    def __getitem__(self, name: str) -> TensorEntry:
        item = self._items[name]
        if isinstance(item, TensorEntry):
            return item
        entry = TensorEntry.from_map(item, self._limits)
        self._items[name] = entry
        return entry

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


@dataclass(frozen=True)
class Directory:
    """All that a file says about its tensors.

    Attributes:
        tensors: name -> entry, in the order of the file.
        stored: bytes of the chunks of each tensor, in that order.
        plain: the plain ones among them in columns, where there are many; else None.
        metadata: the user's own strings.
        features: names that a reader must know, ascending.
        other: root keys that this version does not know (R-DIR-005).
    """

    tensors: Mapping[str, TensorEntry]
    metadata: dict[str, str] = field(default_factory=dict)
    features: tuple[str, ...] = ()
    other: dict[str, object] = field(default_factory=dict)
    stored: list[int] | None = field(default=None, compare=False)
    plain: PlainTensors | None = field(default=None, compare=False)

    def outline(self, name: str) -> Outline:
        """That of a tensor; makes no entry of a plain one."""
        plain = None if self.plain is None else self.plain.outline(name)
        if plain is not None:
            return plain
        entry = self.tensors[name]
        return Outline(entry.dtype, entry.shape, entry.decoded_bytes, entry.stored_bytes)

    def to_bytes(self) -> bytes:
        """The directory's bytes."""
        root: dict[str, object] = {
            **self.other,
            "tensors": [entry.to_map() for entry in self.tensors.values()],
        }
        if self.metadata:
            root["metadata"] = self.metadata
        if self.features:
            root["features"] = sorted(self.features, key=str.encode)
        return messagepack.encode(root)

    @classmethod
    def from_bytes(cls, data: bytes, chunks_end: int, limits: Limits) -> Directory:
        """Reads a directory whose checksum has been checked.

        Args:
            data: its bytes; offsets in faults are relative to them.
            chunks_end: the directory's offset in the file, where the last chunk must end (R-LAY-003).
            limits: what it may claim.

        Raises:
            InvalidFileError, UnsupportedError, LimitError.
        """
        ordinary = messagepack.decode_quickly(data, limits)
        if ordinary is not None:
            try:
                return cls.from_map(ordinary, chunks_end, limits)
            except FileFault:
                ordinary = None  # a fault has a place, which only the other way knows
        root = messagepack.decode(data, limits)
        if not isinstance(root, dict):
            raise fault("R-DIR-001", "the directory is not a map", offset=0)
        return cls.from_map(root, chunks_end, limits)

    @classmethod
    def from_map(cls, root: Fields, chunks_end: int, limits: Limits) -> Directory:
        """Reads the root of a directory; see `from_bytes`."""
        features = _features(root)
        if "keyed" in root:
            raise fault("R-KEY-001", "the file has keyed tables", offset=place_of(root, "keyed"))
        metadata = _metadata(root)
        maps = _tensor_maps(root, limits)
        tensors, stored, plain = _in_columns(maps, limits) or _one_by_one(maps, limits)
        if chunks_end != SIZE + sum(stored):
            raise fault("R-LAY-003", "the chunks' lengths do not add up to where the directory begins")
        other = {key: value for key, value in root.items() if key not in _KNOWN_KEYS}
        return cls(tensors, metadata, features, other, stored, plain)

    def offsets(self) -> dict[str, int]:
        """Name -> file offset of the tensor's first chunk (R-LAY-001)."""
        sizes = self.stored or [entry.stored_bytes for entry in self.tensors.values()]
        return dict(zip(self.tensors, accumulate(sizes, initial=SIZE), strict=False))


_Tensors = tuple[Mapping[str, TensorEntry], list[int], PlainTensors | None]


def _one_by_one(maps: list[Fields], limits: Limits) -> _Tensors:
    """The entries of all maps, and the bytes of each one's chunks."""
    tensors: dict[str, TensorEntry] = {}
    for item in maps:
        try:
            entry = TensorEntry.from_map(item, limits)
            if entry.name in tensors:
                raise fault("R-TEN-001", "the name comes twice", offset=place_of(item, "name"))
        except FileFault as error:
            error.place(_name_if_any(item), None)
            raise
        tensors[entry.name] = entry
    return tensors, [entry.stored_bytes for entry in tensors.values()], None


def _in_columns(maps: list[Fields], limits: Limits) -> _Tensors | None:
    """As `_one_by_one`, plain tensors in columns; None where that does not pay, or an entry is at fault."""
    are_plain = [looks_plain(item) for item in maps]
    if sum(are_plain) < _WORTH_COLUMNS:
        return None
    plain = plain_tensors([item for item, is_plain in zip(maps, are_plain, strict=True) if is_plain], limits)
    if plain is None:
        return None
    if all(are_plain):
        items: dict[str, TensorEntry | Fields] = dict(zip(plain.names, maps, strict=True))
        return (
            (Entries(items, limits), plain.stored_bytes.tolist(), plain) if len(items) == len(maps) else None
        )
    items, stored = {}, []
    columns = zip(plain.names, plain.stored_bytes.tolist(), strict=True)
    for item, is_plain in zip(maps, are_plain, strict=True):
        if is_plain:
            name, size = next(columns)
            items[name] = item
            stored.append(size)
            continue
        try:
            entry = TensorEntry.from_map(item, limits)
        except FileFault:
            return None
        items[entry.name] = entry
        stored.append(entry.stored_bytes)
    return (Entries(items, limits), stored, plain) if len(items) == len(maps) else None


def entry_faults(data: bytes, limits: Limits) -> list[FileFault]:
    """The faults of all tensor entries of a directory, one each; none where no entry can be looked at."""
    faults = []
    try:
        root = messagepack.decode(data, limits)
        maps = _tensor_maps(root, limits) if isinstance(root, dict) else []
    except FileFault:
        return []
    for item in maps:
        try:
            with placed(tensor=_name_if_any(item)):
                TensorEntry.from_map(item, limits)
        except FileFault as error:
            faults.append(error)
    return faults


def _tensor_maps(root: Fields, limits: Limits) -> list[Fields]:
    maps = required(root, "tensors", list)
    limits.require("tensors", len(maps), place_of(root, "tensors"))
    for item in maps:
        if not isinstance(item, dict):
            raise fault("R-DIR-003", "a tensor entry is not a map", offset=place_of(root, "tensors"))
    return maps


def _name_if_any(entry: Fields) -> str | None:
    name = entry.get("name")
    return name if isinstance(name, str) else None


def _features(root: Fields) -> tuple[str, ...]:
    if "features" not in root:
        return ()
    names = required(root, "features", list)
    at = place_of(root, "features")
    if not all(isinstance(name, str) for name in names):
        raise fault("R-DIR-003", "a feature is not a string", offset=at)
    if not names:
        raise fault("R-DIR-004", "an empty list of features", offset=at)
    raw = [name.encode() for name in names]
    if raw != sorted(set(raw)):
        raise fault("R-FEA-002", "the features are not in ascending order", offset=at)
    for name in names:
        if name not in KNOWN_FEATURES:
            raise fault("R-FEA-001", f"the file needs the feature {name!r}", offset=at)
    return tuple(names)


def _metadata(root: Fields) -> dict[str, str]:
    if "metadata" not in root:
        return {}
    pairs: Mapping[str, object] = required(root, "metadata", dict)
    at = place_of(root, "metadata")
    if not pairs:
        raise fault("R-DIR-004", "an empty map of metadata", offset=at)
    return {key: typed(value, str, f"metadata {key!r}", at) for key, value in pairs.items()}
