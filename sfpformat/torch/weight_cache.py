"""A bounded LRU cache of decoded weights.

Rules: cached tensors are read-only; operators read them and return new tensors. The key is the memory of the
compressed bytes, so that tied layers and copies of a graph share an entry. The entry is released together
with the bytes.
"""

from __future__ import annotations

import itertools
import weakref

import torch

from .by_memory import ByMemory

_tokens = itertools.count(1)
_caches: weakref.WeakValueDictionary[str, KeptWeights] = weakref.WeakValueDictionary()


class KeptWeights(ByMemory[torch.Tensor]):
    """An LRU cache of decoded weights with a limit in bytes. Thread-safe.

    Copies of a module share it. Unpickling creates an empty one with the same limit.

    Attributes:
        limit: maximum bytes of decoded weights, over all devices; 0 keeps nothing.
        token: the key by which operators find it in this process; "" if it keeps nothing.
    """

    def __init__(self, limit: int = 0) -> None:
        super().__init__()
        self.limit = limit
        self.token = str(next(_tokens)) if limit > 0 else ""
        self._bytes = 0
        if self.token:
            _caches[self.token] = self

    def __deepcopy__(self, memo: dict[int, object]) -> KeptWeights:
        return self

    def __reduce__(self) -> tuple[type[KeptWeights], tuple[int]]:
        return KeptWeights, (self.limit,)

    @property
    def nbytes(self) -> int:
        """The number of bytes of weights in the cache now."""
        return self._bytes

    def find(self, data: torch.Tensor, dtype: torch.dtype, compute: torch.dtype) -> torch.Tensor | None:
        """Returns the cached weight of these bytes in these dtypes, or None. Do not write to it."""
        found = self.entry(data, dtype, compute)
        return None if found is None else found.value

    def keep(
        self, data: torch.Tensor, dtype: torch.dtype, compute: torch.dtype, weight: torch.Tensor
    ) -> None:
        """Caches a weight and evicts the least recently used ones. Ignores a weight larger than the limit."""
        if weight.nbytes > self.limit:
            return
        with self._lock:
            self.put(weight, data, dtype, compute)
            self._bytes += weight.nbytes
            while self._bytes > self.limit:
                self._evict(next(iter(self._entries)))

    def _evicted(self, value: torch.Tensor) -> None:
        self._bytes -= value.nbytes


def cache_of(token: str) -> KeptWeights | None:
    """Returns the cache with that token, or None: a graph may outlive it or come from another process."""
    return _caches.get(token)
