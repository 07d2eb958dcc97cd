"""The directory (SPEC.md chapter 7): converts its maps to validated records, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate

from ..errors import FileFault, fault, placed
from ..limits import Limits
from . import messagepack
from .delta_map import FEATURE, DeltaMap
from .delta_parts import PARTS_FEATURE
from .entry import TensorEntry
from .fields import Fields, place_of, require_absent, required, typed
from .keyed_map import KEYED_FEATURE, KeyedMap, keyed_maps
from .plain_entries import Outline, PlainTensors, looks_plain, plain_tensors
from .preamble import SIZE

KNOWN_FEATURES = (FEATURE, PARTS_FEATURE, KEYED_FEATURE)  # SPEC.md 25.3
_KNOWN_KEYS = frozenset(("tensors", "metadata", "features", "delta", "keyed"))
# The least number of plain tensors for which checking them together is faster.
_WORTH_COLUMNS = 8


class Entries(Mapping[str, TensorEntry]):
    """Mapping from name to entry, in file order. Creates the entries of plain tensors lazily."""

    def __init__(self, items: dict[str, TensorEntry | Fields], limits: Limits) -> None:
        """Keeps the items; `__getitem__` replaces a map by the entry that it creates.

        Args:
            items: entries, or maps that `plain_tensors` has validated with these limits.
            limits: the limits of the reader.
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
    """The contents of a file's directory.

    Attributes:
        tensors: name -> entry, in file order.
        metadata: the user's strings.
        features: names of features that a reader must support, ascending.
        other: root keys that this version does not know, with their values (R-DIR-005).
        stored: bytes of the chunks of each tensor, in file order. None: they are computed from the entries.
        plain: the plain tensors in columns, if there are many; else None.
        delta: how the file differs from its base, or None if it is not a delta.
        keyed: the keyed tables.
    """

    tensors: Mapping[str, TensorEntry]
    metadata: dict[str, str] = field(default_factory=dict)
    features: tuple[str, ...] = ()
    other: dict[str, object] = field(default_factory=dict)
    stored: list[int] | None = field(default=None, compare=False)
    plain: PlainTensors | None = field(default=None, compare=False)
    delta: DeltaMap | None = None
    keyed: tuple[KeyedMap, ...] = ()

    def outline(self, name: str) -> Outline:
        """Returns the outline of a tensor. Does not create the entry of a plain tensor."""
        plain = None if self.plain is None else self.plain.outline(name)
        if plain is not None:
            return plain
        entry = self.tensors[name]
        return Outline(entry.dtype, entry.shape, entry.decoded_bytes, entry.stored_bytes)

    def to_bytes(self) -> bytes:
        """Returns the directory's bytes."""
        root: dict[str, object] = {
            **self.other,
            "tensors": [entry.to_map() for entry in self.tensors.values()],
        }
        if self.metadata:
            root["metadata"] = self.metadata
        if self.features:
            root["features"] = sorted(self.features, key=str.encode)
        if self.delta is not None:
            root["delta"] = self.delta.to_map()
        if self.keyed:
            root["keyed"] = [table.to_map() for table in self.keyed]
        return messagepack.encode(root)

    @classmethod
    def from_bytes(cls, data: bytes, chunks_end: int, limits: Limits) -> Directory:
        """Parses a directory. The caller has compared its checksum.

        Args:
            data: the bytes of the directory; offsets in faults are relative to its start.
            chunks_end: the directory's offset in the file, where the last chunk must end (R-LAY-003).
            limits: the limits of the reader.

        Raises:
            InvalidFileError, UnsupportedError, LimitError: the directory is damaged or refused.
        """
        ordinary = messagepack.decode_quickly(data, limits)
        if ordinary is not None:
            try:
                return cls.from_map(ordinary, chunks_end, limits)
            except FileFault:
                ordinary = None  # the slow parser raises the fault again, with its offset
        root = messagepack.decode(data, limits)
        if not isinstance(root, dict):
            raise fault("R-DIR-001", "the directory is not a map", offset=0)
        return cls.from_map(root, chunks_end, limits)

    @classmethod
    def from_map(cls, root: Fields, chunks_end: int, limits: Limits) -> Directory:
        """Reads the root map of a directory. Same arguments and errors as `from_bytes`."""
        features = _features(root)
        source, keyed = _delta(root, features), _keyed(root, features)
        metadata = _metadata(root)
        maps = _tensor_maps(root, limits)
        tensors, stored, plain = _in_columns(maps, limits) or _one_by_one(maps, limits)
        if chunks_end != SIZE + sum(stored):
            words = f"the chunks end at byte {SIZE + sum(stored)}, the directory begins at byte {chunks_end}"
            raise fault("R-LAY-003", words)
        other = {key: value for key, value in root.items() if key not in _KNOWN_KEYS}
        delta = None
        if source is not None:
            delta = DeltaMap.from_map(source, tensors, limits, parts=PARTS_FEATURE in features)
        tables = () if keyed is None else keyed_maps(keyed, place_of(root, KEYED_FEATURE), tensors)
        return cls(tensors, metadata, features, other, stored, plain, delta, tables)

    def offsets(self) -> dict[str, int]:
        """Returns name -> file offset of the tensor's first chunk (R-LAY-001)."""
        sizes = self.stored or [entry.stored_bytes for entry in self.tensors.values()]
        return dict(zip(self.tensors, accumulate(sizes, initial=SIZE), strict=False))


_Tensors = tuple[Mapping[str, TensorEntry], list[int], PlainTensors | None]


def _one_by_one(maps: list[Fields], limits: Limits) -> _Tensors:
    """Creates the entries of all maps. Returns the entries, the bytes of each one's chunks, and None."""
    tensors: dict[str, TensorEntry] = {}
    for item in maps:
        try:
            entry = TensorEntry.from_map(item, limits)
            if entry.name in tensors:
                raise fault("R-TEN-001", "another tensor has this name too", offset=place_of(item, "name"))
        except FileFault as error:
            error.place(_name_if_any(item), None)
            raise
        tensors[entry.name] = entry
    return tensors, [entry.stored_bytes for entry in tensors.values()], None


def _in_columns(maps: list[Fields], limits: Limits) -> _Tensors | None:
    """Fast path of `_one_by_one`: checks plain tensors in columns and creates their entries lazily.

    Returns None if there are few plain tensors, or on any problem.
    """
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
    """Returns the first fault of each tensor entry of a directory; empty if it cannot be parsed."""
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
        raise fault("R-DIR-004", "the list 'features' is empty; its key must be absent", offset=at)
    raw = [name.encode() for name in names]
    if raw != sorted(set(raw)):
        raise fault("R-FEA-002", "the features are not in ascending order", offset=at)
    for name in names:
        if name not in KNOWN_FEATURES:
            words = f"the file needs the feature {name!r}, which this version does not support"
            raise fault("R-FEA-001", words, offset=at)
    if FEATURE in names and KEYED_FEATURE in names:
        raise fault("R-KEY-013", "a file with keyed tables cannot be a delta", offset=at)
    return tuple(names)


def _delta(root: Fields, features: tuple[str, ...]) -> Fields | None:
    """Returns the map `delta`, which is present exactly with its feature."""
    if FEATURE in features:
        return required(root, "delta", dict)
    require_absent(root, ("delta",), f"needs the feature {FEATURE!r}")
    return None


def _keyed(root: Fields, features: tuple[str, ...]) -> list[object] | None:
    """Returns the array `keyed`, which is present exactly with its feature."""
    if KEYED_FEATURE not in features:
        require_absent(root, (KEYED_FEATURE,), f"needs the feature {KEYED_FEATURE!r}")
        return None
    return required(root, KEYED_FEATURE, list)


def _metadata(root: Fields) -> dict[str, str]:
    if "metadata" not in root:
        return {}
    pairs: Mapping[str, object] = required(root, "metadata", dict)
    at = place_of(root, "metadata")
    if not pairs:
        raise fault("R-DIR-004", "the map 'metadata' is empty; its key must be absent", offset=at)
    return {key: typed(value, str, f"metadata {key!r}", at) for key, value in pairs.items()}
