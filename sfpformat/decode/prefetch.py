"""Reads ahead in remote files, and decodes tensors when they arrive.

Rules: tensors are decoded in groups, in the order of the plan, so that some are decoded while the next ones
arrive. Local files are not read ahead: the system does that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np

from ..container.entry import TensorEntry
from ..errors import MissingTensorError, OptionError
from ..io.closing import Closing
from ..io.remote.ahead import DEFAULT_MEMORY, Progress, Range, ReadAhead
from .jobs import fill_gaps
from .selection import Index, select

V = TypeVar("V")

# A tensor's name; or its name and an index, as for `SfpFile.get_slice`.
Item = str | tuple[str, Index]
Report = Callable[[Progress], None]

# Stored bytes of tensors that are decoded together: enough to keep all threads busy.
_GROUP_BYTES = 32 << 20


class Prefetchable(Protocol):
    """A file, or a model in shards."""

    @property
    def is_remote(self) -> bool:
        """Whether reads are requests to a server."""

    def keys(self) -> list[str]:
        """Returns the names of the tensors, in file order."""

    def __contains__(self, name: object) -> bool:
        """Returns whether there is a tensor of a name."""

    def entry(self, name: str) -> TensorEntry:
        """Returns the directory entry of a tensor."""

    def unplanned(self, name: str, chunks: Sequence[int] | None = None) -> list[Range]:
        """Returns what has to be fetched for some chunks of a tensor, or for all of them."""

    def forget(self, names: Iterable[str]) -> None:
        """Releases what was fetched for tensors."""


class Prefetch(Closing, Generic[V]):
    """Tensors and slices that are read ahead; a context manager and an iterator.

    `SfpFile.prefetch` creates it. Iterating yields each item and its tensor, in the order of the items.
    Without iterating, other reads of the file use what was read ahead: best in this order, each item once.
    """

    def __init__(
        self,
        file: Prefetchable,
        tensors: Callable[[Sequence[str]], Mapping[str, V]],
        part: Callable[[str, Index], V],
        items: Iterable[Item] | None = None,
        memory: int = DEFAULT_MEMORY,
        progress: Report | None = None,
    ) -> None:
        """Starts the first requests. Arguments and errors as for `SfpFile.prefetch`.

        Args:
            file: the file.
            tensors: decodes whole tensors.
            part: decodes a slice.
            items, memory, progress: as for `SfpFile.prefetch`.
        """
        if isinstance(memory, bool) or not isinstance(memory, int) or memory < 1:
            raise OptionError(f"memory is {memory!r}, must be a whole number of bytes, at least 1")
        if isinstance(items, str):
            raise OptionError(f"items is the string {items!r}, must be a list of names or of (name, index)")
        self._file, self._tensors, self._part, self._progress = file, tensors, part, progress
        self._items = file.keys() if items is None else list(items)
        for item in self._items:
            _require_item(file, item)
        ranges = [one for item in self._items for one in _ranges_of(file, item)] if file.is_remote else []
        self._begin = time.monotonic()
        self._ahead = ReadAhead(ranges, memory, progress) if ranges else None

    @property
    def reads_ahead(self) -> bool:
        """Whether anything is fetched: the file is remote, and not all bytes are in memory yet."""
        return self._ahead is not None

    def __iter__(self) -> Iterator[tuple[Item, V]]:
        """Decodes the items and yields each with its tensor: a group of tensors at a time, or a slice.

        Raises:
            InvalidFileError, LimitError: the file is damaged or refused.
            RemoteError, OSError: a request failed.
        """
        total = sum(self._file.entry(_name_of(item)).stored_bytes for item in self._items)
        done = 0
        for group in self._groups():
            if isinstance(group, tuple):
                yield group, self._part(*group)
                done += self._file.entry(group[0]).stored_bytes
            else:
                yield from self._tensors(group).items()
                self._file.forget(group)
                done += sum(self._file.entry(name).stored_bytes for name in group)
            if self._ahead is None and self._progress is not None:
                self._progress(Progress(done, total, time.monotonic() - self._begin))

    def groups(self) -> Iterator[list[str]]:
        """Yields names in groups, if all items are names; the caller decodes a group before the next one."""
        for group in self._groups():
            assert not isinstance(group, tuple)
            yield group
            self._file.forget(group)

    def _groups(self) -> Iterator[list[str] | tuple[str, Index]]:
        names: list[str] = []
        size = 0
        for item in self._items:
            name = _name_of(item)
            more = self._file.entry(name).stored_bytes
            if names and (isinstance(item, tuple) or size + more > _GROUP_BYTES):
                yield names
                names, size = [], 0
            if isinstance(item, tuple):
                yield item
            else:
                names.append(name)
                size += more
        if names:
            yield names

    def close(self) -> None:
        """Cancels requests, and releases the memory of what was not read."""
        if self._ahead is not None:
            self._ahead.close()


def _name_of(item: Item) -> str:
    return item if isinstance(item, str) else item[0]


def _require_item(file: Prefetchable, item: Item) -> None:
    """Checks an item.

    Raises:
        MissingTensorError: there is no tensor of that name.
        IndexError: the index does not fit the shape.
        OptionError: the item is neither a name nor a name with an index.
    """
    if not isinstance(item, str):
        if not (isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)):
            raise OptionError(f"{item!r} is neither the name of a tensor nor a pair (name, index)")
        select(file.entry(item[0]).shape, item[1])
    elif item not in file:
        raise MissingTensorError(f"no tensor {item!r} in the file")


def _ranges_of(file: Prefetchable, item: Item) -> list[Range]:
    """Returns what has to be fetched for an item that `_require_item` checked."""
    if isinstance(item, str):
        return file.unplanned(item)
    name, index = item
    entry = file.entry(name)
    selection = select(entry.shape, index)
    if not selection.size:
        return []
    segments = selection.segments(entry.segment)
    chunks: list[int] = np.unique(fill_gaps(segments) // entry.chunk).tolist()
    return file.unplanned(name, [-1, *chunks] if entry.vectors is not None else chunks)
