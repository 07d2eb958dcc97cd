"""A cache of values computed from the bytes of tensors. Its key is the memory of the bytes.

Rules: an entry is removed when the memory is released. Once torch counts a write to the memory, the entry is
out of date and is no longer returned.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import torch

Value = TypeVar("Value")
# Address of the storage, offset in it, and the other inputs of the value.
Key = tuple[object, ...]


class Entry(NamedTuple, Generic[Value]):
    """A value, and the storage and version of its bytes, to detect an entry that is out of date."""

    storage: weakref.ref[torch.UntypedStorage]
    version: int
    value: Value


class ByMemory(Generic[Value]):
    """Maps the memory of bytes to a value computed from them; most recently used last. Thread-safe."""

    def __init__(self) -> None:
        self._entries: OrderedDict[Key, Entry[Value]] = OrderedDict()
        self._lock = threading.RLock()  # reentrant: releasing memory under the lock calls `_evict`

    def __len__(self) -> int:
        return len(self._entries)

    def entry(self, data: torch.Tensor, *more: object) -> Entry[Value] | None:
        """Returns the entry of some bytes; None if there is none, or if the bytes have changed since.

        Args:
            data: the bytes.
            more: the other inputs of the value.
        """
        key, version = _key(data, more), version_of(data)
        with self._lock:
            found = self._entries.get(key)
            if found is None or found.version != version or found.storage() is None:
                return None
            self._entries.move_to_end(key)
            return found

    def put(self, value: Value, data: torch.Tensor, *more: object) -> None:
        """Adds or replaces the value of some bytes; the arguments are as in `entry`."""
        key = _key(data, more)
        storage = weakref.ref(data.untyped_storage(), self._eviction(key))
        with self._lock:
            self._evict(key)
            self._entries[key] = Entry(storage, version_of(data), value)

    def _eviction(self, key: Key) -> Callable[[object], None]:
        """Returns a callback that removes an entry. It keeps no reference to the cache."""
        this = weakref.ref(self)

        def evict(_: object) -> None:
            cache = this()
            if cache is not None:
                cache._evict(key)

        return evict

    def _evict(self, key: Key) -> None:
        with self._lock:
            found = self._entries.pop(key, None)
            if found is not None:
                self._evicted(found.value)

    def _evicted(self, value: Value) -> None:
        """Called under the lock for each value that is removed from the cache."""


def _key(data: torch.Tensor, more: tuple[object, ...]) -> Key:
    return data.untyped_storage()._cdata, int(data.storage_offset()), *more


def version_of(tensor: torch.Tensor) -> int:
    """Returns torch's count of writes to a tensor's memory; 0 for tensors made in inference mode."""
    return 0 if tensor.is_inference() else tensor._version
