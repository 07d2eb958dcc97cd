"""The directory (SPEC.md chapter 7): records that are valid once they exist, to and from its maps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate

from ..errors import FileFault, fault, placed
from ..limits import Limits
from . import messagepack
from .entry import TensorEntry
from .fields import Fields, place_of, required, typed
from .preamble import SIZE

KNOWN_FEATURES: frozenset[str] = frozenset()  # version 1.0 defines none (SPEC.md chapter 21)
_KNOWN_KEYS = frozenset(("tensors", "metadata", "features"))


@dataclass(frozen=True)
class Directory:
    """All that a file says about its tensors.

    Attributes:
        tensors: name -> entry, in the order of the file.
        metadata: the user's own strings.
        features: names that a reader must know, ascending.
        other: root keys that this version does not know (R-DIR-005).
    """

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str] = field(default_factory=dict)
    features: tuple[str, ...] = ()
    other: dict[str, object] = field(default_factory=dict)

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
        tensors: dict[str, TensorEntry] = {}
        for item in _tensor_maps(root, limits):
            try:
                entry = TensorEntry.from_map(item, limits)
                if entry.name in tensors:
                    raise fault("R-TEN-001", "the name comes twice", offset=place_of(item, "name"))
            except FileFault as error:
                error.place(_name_if_any(item), None)
                raise
            tensors[entry.name] = entry
        if chunks_end != SIZE + sum([entry.stored_bytes for entry in tensors.values()]):
            raise fault("R-LAY-003", "the chunks' lengths do not add up to where the directory begins")
        other = {key: value for key, value in root.items() if key not in _KNOWN_KEYS}
        return cls(tensors, metadata, features, other)

    def offsets(self) -> dict[str, int]:
        """Name -> file offset of the tensor's first chunk (R-LAY-001)."""
        sizes = [entry.stored_bytes for entry in self.tensors.values()]
        return dict(zip(self.tensors, accumulate(sizes, initial=SIZE), strict=False))


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
