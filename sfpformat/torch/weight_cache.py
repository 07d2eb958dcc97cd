"""A bounded LRU cache of decoded weights.

Rules: cached tensors are read-only; operators read them and return new tensors. The key is the memory of the
compressed bytes, so that tied layers and copies of a graph share an entry. The entry is released together
with the bytes.
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

_tokens = itertools.count(1)
_caches: weakref.WeakValueDictionary[str, KeptWeights] = weakref.WeakValueDictionary()


class _Entry(NamedTuple):
    """A decoded weight, with the storage and version of its bytes, which show whether it is up to date."""

    storage: weakref.ref[torch.UntypedStorage]
    version: int
    weight: torch.Tensor


class KeptWeights:
    """An LRU cache of decoded weights with a limit in bytes. Thread-safe.

    Copies of a module share it. Unpickling creates an empty one with the same limit.

    Attributes:
        limit: maximum bytes of decoded weights, over all devices; 0 keeps nothing.
        token: the key by which operators find it in this process; "" if it keeps nothing.
    """

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit
        self.token = str(next(_tokens)) if limit > 0 else ""
        self._entries: OrderedDict[Key, _Entry] = OrderedDict()
        self._bytes = 0
        self._lock = threading.RLock()  # reentrant: releasing memory under the lock calls `_evict`
        if self.token:
            _caches[self.token] = self

    def __deepcopy__(self, memo: dict[int, object]) -> KeptWeights:
        return self

    def __reduce__(self) -> tuple[type[KeptWeights], tuple[int]]:
        return KeptWeights, (self.limit,)

    @property
    def nbytes(self) -> int:
        """The bytes that are kept now."""
        return self._bytes

    def find(self, data: torch.Tensor, dtype: torch.dtype, compute: torch.dtype) -> torch.Tensor | None:
        """Returns the cached weight of these bytes in these dtypes, or None. Do not write to it."""
        key, version = _key(data, dtype, compute), version_of(data)
        with self._lock:
            found = self._entries.get(key)
            if found is None or found.version != version or found.storage() is None:
                return None
            self._entries.move_to_end(key)
            return found.weight

    def keep(
        self, data: torch.Tensor, dtype: torch.dtype, compute: torch.dtype, weight: torch.Tensor
    ) -> None:
        """Caches a weight and evicts the least recently used ones. Ignores a weight larger than the limit."""
        if weight.nbytes > self.limit:
            return
        key = _key(data, dtype, compute)
        there = weakref.ref(data.untyped_storage(), self._eviction(key))
        with self._lock:
            self._evict(key)
            self._entries[key] = _Entry(there, version_of(data), weight)
            self._bytes += weight.nbytes
            while self._bytes > self.limit:
                self._evict(next(iter(self._entries)))

    def _eviction(self, key: Key) -> Callable[[object], None]:
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
                self._bytes -= found.weight.nbytes


def cache_of(token: str) -> KeptWeights | None:
    """Returns the cache with that token, or None: a graph may outlive it or come from another process."""
    return _caches.get(token)


def _key(data: torch.Tensor, dtype: torch.dtype, compute: torch.dtype) -> Key:
    return data.untyped_storage()._cdata, int(data.storage_offset()), dtype, compute


def version_of(tensor: torch.Tensor) -> int:
    """Returns torch's count of writes to a tensor's memory; 0 for tensors made in inference mode."""
    return 0 if tensor.is_inference() else tensor._version
