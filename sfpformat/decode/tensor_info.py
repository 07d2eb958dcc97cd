"""Information about a tensor for callers, from its directory entry."""

from __future__ import annotations

from dataclasses import dataclass

from ..container.entry import TensorEntry


@dataclass(frozen=True)
class TensorInfo:
    """Information about a tensor from the file's directory; no tensor data is read.

    Attributes:
        name, shape: name and shape of the tensor.
        dtype: name of the dtype, as in safetensors, such as ``BF16``.
        coding: ``raw`` or ``fingerprint``.
        quantiser: ``exact``, ``uniform``, ``table``, or None for a raw tensor.
        mask: ``runs``, ``octets``, or None.
        importance: ``survivors``, ``all``, ``factors``, or None.
        role: the role of the importance: ``multiplier``, ``metadata``, or None.
        stored_bytes: size of the tensor's chunks in the file, in bytes.
        decoded_bytes: size of the decoded tensor, in bytes.
        unknown: keys of the directory entry that this version does not know, with their values. For unknown
            keys inside ``mask``, ``fingerprints``, ``scale`` or ``importance``: the name of that map -> a
            dict of them.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    coding: str
    quantiser: str | None
    mask: str | None
    importance: str | None
    role: str | None
    stored_bytes: int
    decoded_bytes: int
    unknown: dict[str, object]

    @classmethod
    def of(cls, entry: TensorEntry) -> TensorInfo:
        """Returns the information of a directory entry."""
        fingerprints, mask, importance = entry.fingerprints, entry.mask, entry.importance
        return cls(
            entry.name,
            entry.shape,
            entry.dtype.name,
            entry.coding,
            fingerprints.quantiser.NAME if fingerprints else None,
            mask.kind if mask else None,
            importance.over if importance else None,
            importance.role if importance else None,
            entry.stored_bytes,
            entry.decoded_bytes,
            dict(entry.other),
        )
