"""Decoded weights that are kept for the next call, a bounded number of bytes of them.

Rules: what is kept is never given away to be written to; operators read it and return something else. It is
found by the memory of the compressed bytes, so that tied layers and copies of a graph share it, and is let
go with them.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import torch

Key = tuple[int, int, torch.dtype, torch.dtype]

_numbers = itertools.count(1)
_all: weakref.WeakValueDictionary[str, KeptWeights] = weakref.WeakValueDictionary()


class _Kept(NamedTuple):
    """A decoded weight, and what tells whether it still is what the bytes mean."""

    bytes_there: weakref.ref[torch.UntypedStorage]
    version: int
    weight: torch.Tensor


class KeptWeights:
    """The weights that were used last, at most so many bytes. Safe in several threads.

    Copies of a module share it; a pickle begins anew.

    Attributes:
        limit: bytes of decoded weights, on whatever device; 0 keeps nothing.
        token: what operators find it by in this process; "" where nothing is kept.
    """

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit
        self.token = str(next(_numbers)) if limit > 0 else ""
        self._kept: OrderedDict[Key, _Kept] = OrderedDict()
        self._bytes = 0
        self._lock = threading.RLock()  # memory that is let go while it is held comes back to `_forget`
        if self.token:
            _all[self.token] = self

    def __deepcopy__(self, memo: dict[int, object]) -> KeptWeights:
        return self

    def __reduce__(self) -> tuple[type[KeptWeights], tuple[int]]:
        return KeptWeights, (self.limit,)

    @property
    def nbytes(self) -> int:
        """Bytes that are kept now."""
        return self._bytes

    def find(self, data: torch.Tensor, dtype: torch.dtype, compute: torch.dtype) -> torch.Tensor | None:
        """The weight of these bytes in these dtypes, if it is kept. Not to be written to."""
        key, version = _key(data, dtype, compute), version_of(data)
        with self._lock:
            found = self._kept.get(key)
            if found is None or found.version != version or found.bytes_there() is None:
                return None
            self._kept.move_to_end(key)
            return found.weight

    def keep(
        self, data: torch.Tensor, dtype: torch.dtype, compute: torch.dtype, weight: torch.Tensor
    ) -> None:
        """Keeps a weight and lets those go that were not used for longest; does not keep one too large."""
        if weight.nbytes > self.limit:
            return
        key = _key(data, dtype, compute)
        there = weakref.ref(data.untyped_storage(), self._forgetter(key))
        with self._lock:
            self._forget(key)
            self._kept[key] = _Kept(there, version_of(data), weight)
            self._bytes += weight.nbytes
            while self._bytes > self.limit:
                self._forget(next(iter(self._kept)))

    def _forgetter(self, key: Key) -> Callable[[object], None]:
        mine = weakref.ref(self)

        def forget(_: object) -> None:
            kept = mine()
            if kept is not None:
                kept._forget(key)

        return forget

    def _forget(self, key: Key) -> None:
        with self._lock:
            found = self._kept.pop(key, None)
            if found is not None:
                self._bytes -= found.weight.nbytes


def kept_by(token: str) -> KeptWeights | None:
    """What has that token in this process, or None: a graph may outlive it, or come from another process."""
    return _all.get(token)


def _key(data: torch.Tensor, dtype: torch.dtype, compute: torch.dtype) -> Key:
    return data.untyped_storage()._cdata, int(data.storage_offset()), dtype, compute


def version_of(tensor: torch.Tensor) -> int:
    """How often memory was written to, as torch counts it; 0 for tensors made in inference mode."""
    return 0 if tensor.is_inference() else tensor._version
