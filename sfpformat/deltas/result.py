"""The result of a delta and its base, as an open file."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..container.delta_map import DeltaTensor
from ..decode.selection import Index
from ..errors import MissingTensorError, OptionError
from ..io.closing import Closing
from ..io.source import Readable
from ..limits import DEFAULT_LIMITS, Limits
from .checksums import checksum_of
from .reading import Delta, Found, Part, PoolChanges
from .tensors import Array, OpenTensors, Source, Spec, Tensors, patterns_of

# The most deltas of a chain: each holds a file open and needs memory for a few tensors.
MAX_CHAIN = 256


class _Place(NamedTuple):
    """The place of a changed tensor: its pool, and its index in it."""

    pool: PoolChanges
    member: int


class DeltaFile(Closing):
    """The result of a delta and its base, as an open file. A context manager. `sfpformat.open` creates it.

    Each tensor is computed when it is read: the changed blocks of the delta are decoded, and the checksums of
    base and result are compared. It can be the base of another delta.

    Example: ``with sfpformat.open("d.sfp", base="model.safetensors") as f: weight = f.get_tensor("w")``.
    """

    def __init__(
        self,
        readable: Readable,
        base: Source,
        *,
        limits: Limits = DEFAULT_LIMITS,
        engine: str | None = None,
        threads: int | None = None,
    ) -> None:
        """Opens a delta, and compares names, dtypes and shapes with those of the base.

        Args:
            readable: same as for `sfpformat.open`.
            base: same as for `write_delta`.
            limits, engine, threads: same as for `sfpformat.open`.

        Raises:
            BaseMismatchError: the delta was made from another base.
            OptionError: the file is not a delta.
            InvalidFileError, UnsupportedError, LimitError, OSError: as in `sfpformat.open`.
        """
        self._stack = ExitStack()
        self._threads = threads or os.cpu_count() or 1
        try:
            self.delta = self._stack.enter_context(
                Delta(readable, limits=limits, engine=engine, threads=threads)
            )
            self._base: Tensors = self._stack.enter_context(OpenTensors(base, limits)).tensors
            self.delta.require_base(self._base.specs)
            if isinstance(self._base, DeltaFile):
                _require_link(self._base.delta, self.delta)
        except BaseException:
            self.close()
            raise
        kept = [tensor for tensor in self.delta.map.tensors if tensor.kind != "removed"]
        self._tensors = {tensor.name: tensor for tensor in kept}
        self.specs: dict[str, Spec] = {tensor.name: Spec(tensor.dtype, tensor.shape) for tensor in kept}
        self._places: dict[str, _Place] | None = None
        # Block -> its parts and their coded elements, for the next tensors of the same block.
        self._recent: tuple[PoolChanges, int, list[tuple[Part, Found]]] | None = None
        self._checked: set[str] = set()
        self._lock = threading.RLock()

    def close(self) -> None:
        """Closes the delta, and the base if this object opened it."""
        self._stack.close()

    @property
    def base(self) -> Tensors:
        """The tensors of the base."""
        return self._base

    def keys(self) -> list[str]:
        """Returns the names of the tensors of the result."""
        return list(self.specs)

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __contains__(self, name: object) -> bool:
        return name in self.specs

    def __len__(self) -> int:
        return len(self.specs)

    def metadata(self) -> dict[str, str]:
        """Returns the strings of the result."""
        return self.delta.metadata()

    def read(self, name: str) -> Array:
        """Returns a tensor; same as `get_tensor`."""
        return self.get_tensor(name)

    def get_tensor(self, name: str) -> Array:
        """Returns a whole tensor of the result, in its dtype and shape.

        Raises:
            MissingTensorError: the result has no tensor of that name.
            BaseMismatchError: a tensor of the base is not the one from which the delta was made.
            InvalidFileError: delta or base is damaged.
            LimitError: a tensor exceeds a limit.
        """
        tensor = self._tensor(name)
        with self._lock:
            if tensor.kind in ("replaced", "added"):
                array = self.delta.stored(tensor)
                self.delta.require_result(tensor, checksum_of(patterns_of(array, tensor.dtype)))
                return array
            base = self._base.read(name)
            self._require_checked(tensor, base)
            if tensor.kind == "unchanged":
                return base
            out = patterns_of(base, tensor.dtype).copy()
            for start, found in self._changes(name, base):
                out[found.positions.astype(np.int64) + start] = found.values
            self.delta.require_result(tensor, checksum_of(out, self._threads))
        return out.view(tensor.dtype.numpy).reshape(tensor.shape)

    def get_tensors(self, names: Iterable[str] | None = None) -> dict[str, Array]:
        """Returns several tensors. None returns all. Same errors as `get_tensor`."""
        return {name: self.get_tensor(name) for name in (self if names is None else names)}

    def check_base(self) -> None:
        """Compares the checksums of all tensors of the base, removed and replaced ones too (R-DLT-009).

        Reading compares only those of the tensors that it needs.

        Raises:
            BaseMismatchError: the delta was made from another base.
            InvalidFileError: the base is damaged.
        """
        if isinstance(self._base, DeltaFile):  # its results have the right checksums
            self._base.check_base()
            return
        for tensor in self.delta.map.tensors:
            if tensor.kind != "added" and tensor.name not in self._checked:
                self._require_checked(tensor, self._base.read(tensor.name))

    def get_slice(self, name: str) -> DeltaSlice:
        """Returns a lazy tensor: ``f.get_slice("w")[10:20]``.

        Raises:
            MissingTensorError: the result has no tensor of that name.
        """
        return DeltaSlice(self, self._tensor(name))

    def get_changes(self, name: str) -> tuple[NDArray[np.int64], Array]:
        """Returns the changed elements of a tensor.

        Returns:
            Their positions in the flattened tensor, ascending, int64 [n], and their values in the result,
            [n], in the tensor's dtype. A position of a complex number is that of its real or imaginary part,
            and its value a float. All positions of a tensor that is stored whole.

        Raises:
            MissingTensorError, BaseMismatchError, InvalidFileError, LimitError: as in `get_tensor`.
        """
        tensor = self._tensor(name)
        new = patterns_of(self.get_tensor(name), tensor.dtype)
        positions = np.arange(len(new))
        if tensor.kind in ("unchanged", "changed"):
            positions = np.flatnonzero(new != patterns_of(self._base.read(name), tensor.dtype))
        values = new[positions]
        number = tensor.dtype.numpy
        if number.kind == "c":
            number = np.dtype(f"<f{new.itemsize}")
        return positions, values.view(number)

    def _tensor(self, name: str) -> DeltaTensor:
        if name not in self._tensors:
            raise MissingTensorError(f"no tensor {name!r} in the result of the delta")
        return self._tensors[name]

    def _require_checked(self, tensor: DeltaTensor, base: Array) -> None:
        if tensor.name not in self._checked:
            dtype = self._base.specs[tensor.name].dtype
            self.delta.require_checksum(tensor, checksum_of(patterns_of(base, dtype), self._threads))
            self._checked.add(tensor.name)

    def _changes(self, name: str, base: Array) -> Iterator[tuple[int, Found]]:
        """Yields the first element of each part of a tensor, and its coded elements.

        Reads the other tensors of its blocks from the base, because the order of a block depends on them.
        """
        if self._places is None:
            self._places = {
                member.name: _Place(pool, number)
                for pool in self.delta.pools()
                for number, member in enumerate(pool.members)
            }
        pool, own = self._places[name]
        others: dict[int, Array] = {own: base}
        for block in pool.blocks_of(own):
            if self._recent is not None and self._recent[:2] == (pool, block):
                for part, found in self._recent[2]:
                    if part.member == own:
                        yield part.start, found
                continue
            parts = pool.parts(block)
            others = {key: array for key, array in others.items() if key == own or key >= parts[0].member}
            for part in parts:
                if part.member not in others:
                    member = pool.members[part.member]
                    others[part.member] = self._base.read(member.name)
                    self._require_checked(member, others[part.member])
            flat = (
                patterns_of(others[part.member], pool.members[part.member].dtype)[part.start : part.stop]
                for part in parts
            )
            pairs = list(zip(parts, pool.find(block, flat, self.delta.engine), strict=True))
            self._recent = pool, block, pairs
            for part, found in pairs:
                if part.member == own:
                    yield part.start, found


class DeltaSlice:
    """A tensor of the result. It is computed when it is first indexed, and then kept."""

    def __init__(self, file: DeltaFile, tensor: DeltaTensor) -> None:
        self._file, self._tensor = file, tensor
        self._values: Array | None = None

    def get_shape(self) -> list[int]:
        """Returns the tensor's shape."""
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        """Returns the name of the tensor's dtype, such as ``"BF16"``."""
        return self._tensor.dtype.name

    def __getitem__(self, index: Index) -> Array:
        """Returns a copy of the selected part.

        Args:
            index: integers, slices with any step, and ``...``, as in basic numpy indexing.

        Raises:
            IndexError: the index does not fit the shape.
            BaseMismatchError, InvalidFileError, LimitError: as in `DeltaFile.get_tensor`.
        """
        if self._values is None:
            self._values = self._file.get_tensor(self._tensor.name)
        return np.array(self._values[index])


def open_chain(
    base: Source,
    deltas: Sequence[Readable],
    *,
    limits: Limits = DEFAULT_LIMITS,
    engine: str | None = None,
    threads: int | None = None,
) -> DeltaFile:
    """Opens the result of several deltas, each of which has the result of the one before as its base.

    Args:
        base: the base of the first delta, as for `write_delta`.
        deltas: one to 256 deltas, in order.
        limits, engine, threads: same as for `sfpformat.open`.

    Raises:
        BaseMismatchError: the deltas are out of order, or the first was made from another base.
        OptionError: there is no delta, or there are too many; use fewer, or squash them.
        InvalidFileError, UnsupportedError, LimitError, OSError: as in `sfpformat.open`.
    """
    if not 1 <= len(deltas) <= MAX_CHAIN:
        raise OptionError(f"a chain of {len(deltas)} deltas; give 1 to {MAX_CHAIN}, or squash them")
    found: DeltaFile | None = None
    try:
        for readable in deltas:
            under = found
            found = DeltaFile(
                readable, base if under is None else under, limits=limits, engine=engine, threads=threads
            )
            if under is not None:
                found._stack.callback(under.close)
    except BaseException:
        if found is not None:
            found.close()
        raise
    assert found is not None
    return found


def _require_link(first: Delta, second: Delta) -> None:
    """Checks that the base of a delta is the result of the one before, by their checksums."""
    results = {tensor.name: tensor.result for tensor in first.map.tensors if tensor.kind != "removed"}
    for tensor in second.map.tensors:
        if tensor.kind != "added":
            second.require_checksum(tensor, results[tensor.name])
