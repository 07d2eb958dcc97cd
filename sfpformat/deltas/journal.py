"""Old elements of arrays that are being changed, to restore the arrays after an error (R-DLT-015)."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..coding.changes import Patterns, write_changes
from ..errors import PartlyChangedError
from ..io.closing import Closing
from ..names import listed
from .checksums import PART

# Bytes of old elements that are kept in memory. More go to a temporary file.
_IN_MEMORY = 4 << 20


def _few(positions: NDArray[np.uint32]) -> Iterator[slice]:
    """Yields slices of a few positions each: numpy copies the positions that it is given, as int64."""
    for start in range(0, len(positions), PART // 8):
        yield slice(start, start + PART // 8)


@dataclass(frozen=True)
class _Record:
    """Old elements in the file.

    Attributes:
        name: the tensor.
        view: the elements that are being changed.
        offset: offset of the record in the file.
        count: number of changed positions, uint32, which precede their elements; None: all elements, without
            positions.
    """

    name: str
    view: Patterns
    offset: int
    count: int | None


class Journal(Closing):
    """Keeps old elements of arrays. A context manager, which forgets them at its end. Thread-safe."""

    def __init__(self) -> None:
        with ExitStack() as stack:
            self._file = stack.enter_context(tempfile.SpooledTemporaryFile(_IN_MEMORY))
            self._stack = stack.pop_all()  # `close` closes the file
        self._records: list[_Record] = []
        self._lock = threading.Lock()

    def close(self) -> None:
        """Forgets all elements."""
        self._stack.close()

    def keep(self, name: str, view: Patterns, positions: NDArray[np.uint32] | None = None) -> None:
        """Keeps elements that the caller changes next.

        Args:
            name: the tensor that they belong to.
            view: the elements, [n].
            positions: the positions that are changed, uint32. None stands for all.

        Raises:
            OSError: the temporary file cannot be written. The caller must not change the elements.
        """
        # Positions take more bytes than elements that stay.
        if positions is not None and len(positions) * (4 + view.itemsize) >= view.nbytes:
            positions = None
        with self._lock:
            offset = self._file.seek(0, 2)
            if positions is None:
                self._write(view)
            else:
                self._write(positions)
                for some in _few(positions):
                    self._write(view[positions[some]])
            count = None if positions is None else len(positions)
            self._records.append(_Record(name, view, offset, count))

    def _write(self, array: NDArray[np.generic]) -> None:
        data = array.view(np.uint8).data
        for start in range(0, len(data), PART):
            self._file.write(data[start : start + PART])

    def restore(self) -> None:
        """Writes all kept elements back, also after errors.

        Raises:
            PartlyChangedError: some could not be read. Names their tensors.
        """
        failed: list[str] = []
        for record in self._records:
            try:
                self._restore(record)
            except Exception:  # the others are still restored
                failed.append(record.name)
        if failed:
            names = tuple(dict.fromkeys(failed))
            raise PartlyChangedError(
                f"the delta was applied to a part of {listed(names)}, whose old elements cannot be read; "
                "load the tensors again. All others have the elements of the base",
                names,
            )

    def _restore(self, record: _Record) -> None:
        self._file.seek(record.offset)
        if record.count is None:
            self._read_into(record.view)
            return
        positions, old = np.empty(record.count, np.uint32), np.empty(record.count, record.view.dtype)
        self._read_into(positions)
        self._read_into(old)
        write_changes(record.view, positions, old)

    def _read_into(self, out: NDArray[np.unsignedinteger]) -> None:
        """Reads all elements of an array, in parts."""
        size = PART // out.itemsize
        for start in range(0, len(out), size):
            part = out[start : start + size]
            data = self._file.read(part.nbytes)
            if len(data) != part.nbytes:
                raise OSError("the temporary file is too short")
            part[...] = np.frombuffer(data, out.dtype)
