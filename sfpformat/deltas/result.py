"""The result of a delta and its base, as an open file."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..coding.changes import Patterns, kind_of
from ..coding.mask import Mask
from ..coding.quantisers import F32
from ..container.delta_map import DeltaTensor
from ..decode.parts import Parts, parts_of
from ..decode.selection import Selection
from ..errors import FileFault, MissingTensorError, placed
from ..io.closing import Closing
from ..io.source import Readable
from ..limits import DEFAULT_LIMITS, Limits
from .checksums import checksum_of
from .parts import in_parts, names_of_parts, result_specs
from .reading import Delta, Found, Part, PoolChanges
from .result_slice import DeltaSlice, write_selected
from .tensors import Array, OpenTensors, Source, Spec, Tensors, gathered, patterns_of, selected


class _Place(NamedTuple):
    """The place of a changed tensor: its pool, and its index in it."""

    pool: PoolChanges
    member: int


class DeltaFile(Closing):
    """The result of a delta and its base, as an open file. A context manager. `sfpformat.open` creates it.

    Each tensor is computed when it is read: the changed blocks of the delta are decoded, and the checksums of
    base and result are compared. Slices (`DeltaSlice`) decode less and compare less. It can be the base of
    another delta.

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
            self._whole_base: Tensors = self._stack.enter_context(OpenTensors(base, limits)).tensors
            self._base = in_parts(self._whole_base, self.delta)
            self.delta.require_base(self._base.specs)
            self._linked: set[str] = set()
            if isinstance(self._whole_base, DeltaFile):
                self._linked = self.delta.require_follows(self._whole_base.delta)
        except BaseException:
            self.close()
            raise
        kept = [tensor for tensor in self.delta.map.tensors if tensor.kind != "removed"]
        self._tensors = {tensor.name: tensor for tensor in kept}
        self.specs: dict[str, Spec] = result_specs(self.delta.map)
        self._places: dict[str, _Place] | None = None
        # Pool -> its last block, with its parts and their coded elements, for the next tensors of the block.
        self._recent: dict[PoolChanges, tuple[int, list[tuple[Part, Found]]]] = {}
        self._recent_parts: tuple[str, Parts] | None = None
        self._checked: set[str] = set()
        self._lock = threading.RLock()

    def close(self) -> None:
        """Closes the delta, and the base if this object opened it."""
        self._stack.close()

    def on_close(self, action: Callable[[], object]) -> None:
        """Calls a function when this object is closed, such as ``close`` of a base that nobody else uses."""
        self._stack.callback(action)

    @property
    def base(self) -> Tensors:
        """The tensors of the base."""
        return self._whole_base

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
        return self._whole(tensor)[0] if tensor.structure is None else self._in_parts(tensor).values()

    def _whole(self, tensor: DeltaTensor) -> tuple[Array, list[tuple[int, Found]]]:
        """Returns a listed tensor, and the first element and the changes of each of its parts in the delta.

        Compares the checksums of the tensor and of those whose elements are in the same blocks.
        """
        name = tensor.name
        with self._lock:
            if tensor.kind in ("replaced", "added"):
                array = self.delta.stored(tensor)
                self.delta.require_result(tensor, checksum_of(patterns_of(array, tensor.dtype)))
                return array, []
            base = self._base.read(name)
            self._require_checked(tensor, base)
            if tensor.kind == "unchanged":
                return base, []
            out = patterns_of(base, tensor.dtype).copy()
            pool, own = self._place(name)
            changes = []
            for block in pool.blocks_of(own):
                if pool.changed[block]:
                    self._require_parts_checked(pool, pool.parts(block))
                    changes += self._changes_of(pool, own, block, int(pool.blocks_of(own)[-1]), base)
            for start, found in changes:
                out[found.positions.astype(np.int64) + start] = found.values
            self.delta.require_result(tensor, checksum_of(out, self._threads))
        return out.view(tensor.dtype.numpy).reshape(tensor.shape), changes

    def read_part(self, name: str, selection: Selection) -> Array:
        """Returns selected elements of a tensor; like `DeltaSlice`."""
        tensor = self._tensor(name)
        if selection.contiguous and selection.size == math.prod(tensor.shape):
            return np.array(self.get_tensor(name)).reshape(selection.shape)
        if tensor.structure is not None:
            flat = self._in_parts(tensor).values().reshape(-1)
            return gathered(selection, flat.dtype, lambda start, stop: flat[start:stop])
        if tensor.kind in ("replaced", "added"):
            return selected(self.delta.file, name, selection)
        out = self._base.read_part(name, selection)
        if tensor.kind == "changed":
            pattern = kind_of(tensor.dtype).pattern
            self._write_changes(tensor, selection, out.reshape(-1).view(pattern), lambda found: found.values)
        return out

    def changed_part(self, name: str, selection: Selection) -> NDArray[np.bool_]:
        """Returns which of the selected elements of a tensor change; like `DeltaSlice.get_changed`."""
        tensor = self._tensor(name)
        if tensor.structure is not None:
            new = self.read_part(name, selection)
            if self._whole_base.specs[name].dtype != self.specs[name].dtype:
                return np.ones(selection.shape, np.bool_)
            old, size = self._whole_base.read_part(name, selection), new.dtype.itemsize
            return np.asarray(old.view(f"u{size}") != new.view(f"u{size}"))
        if tensor.kind != "changed":
            return np.full(selection.shape, tensor.kind != "unchanged")
        pool, _ = self._place(name)
        out = np.zeros((selection.size, pool.width), np.bool_)
        self._write_changes(
            tensor, selection, out.reshape(-1), lambda found: np.ones_like(found.values, bool)
        )
        return np.asarray(out.any(1).reshape(selection.shape))

    def _write_changes(
        self,
        tensor: DeltaTensor,
        selection: Selection,
        out: NDArray[np.generic],
        values: Callable[[Found], NDArray[np.generic]],
    ) -> None:
        """Writes what ``values`` returns for the changes among selected elements of a changed tensor.

        Decodes only the blocks that contain them. ``out`` has the selected elements, [elements].
        """
        with self._lock:
            pool, own = self._place(tensor.name)
            blocks = pool.blocks_with(own, selection)
            for block in blocks[pool.changed[blocks] > 0].tolist():
                for start, found in self._changes_of(pool, own, block, int(blocks[-1])):
                    write_selected(
                        out, selection, pool.width, found.positions.astype(np.int64) + start, values(found)
                    )

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
        if isinstance(self._whole_base, DeltaFile):  # its results have the checksums that were compared
            self._whole_base.check_base()
        for tensor in self.delta.map.tensors:
            if tensor.kind != "added" and tensor.name not in self._checked | self._linked:
                self._require_checked(tensor, self._base.read(tensor.name))

    def check(self, names: Iterable[str] | None = None) -> None:
        """Compares the checksums of tensors of the result and of their base, one tensor at a time.

        For tensors of which only slices are read: their checksums are not compared otherwise.

        Args:
            names: the tensors. None checks all, and all tensors of the base.

        Raises:
            MissingTensorError, BaseMismatchError, InvalidFileError, LimitError: as in `get_tensor`.
        """
        for name in self if names is None else names:
            self.get_tensor(name)
        if names is None:
            self.check_base()

    def get_slice(self, name: str) -> DeltaSlice:
        """Returns a lazy tensor: ``f.get_slice("w")[10:20]``.

        Raises:
            MissingTensorError: the result has no tensor of that name.
        """
        self._tensor(name)
        return DeltaSlice(self, name, self.specs[name])

    # ---------------------------------------------------------------------------------- masks, importances

    def parts(self, name: str) -> Parts | None:
        """Returns a tensor with its mask, levels, importance and vectors.

        Returns:
            The parts. None if the tensor is no more than its elements.

        Raises:
            MissingTensorError, BaseMismatchError, InvalidFileError, LimitError: as in `get_tensor`.
        """
        tensor = self._tensor(name)
        if tensor.structure is not None:
            return self._in_parts(tensor)
        if tensor.kind in ("replaced", "added"):
            self.get_tensor(name)  # compares the checksum
            return parts_of(self.delta.file.file_of(name), name)
        return None

    def get_mask(self, name: str) -> Mask:
        """Returns the mask of a tensor, as `SfpFile.get_mask`. All True without a mask.

        Raises:
            MissingTensorError, BaseMismatchError, InvalidFileError, LimitError: as in `get_tensor`.
        """
        found, shape = self.parts(name), self.specs[name].shape
        return np.ones(shape, np.bool_) if found is None else found.survivors.reshape(shape)

    def get_importance(self, name: str) -> F32 | None:
        """Returns the importance of every position, as `SfpFile.get_importance`.

        Raises:
            MissingTensorError, BaseMismatchError, InvalidFileError, LimitError: as in `get_tensor`.
        """
        found = self.parts(name)
        importances = None if found is None else found.importances()
        return None if importances is None else importances.reshape(self.specs[name].shape)

    def get_survivors(self, name: str) -> tuple[NDArray[np.int64], Array]:
        """Returns positions and weights of the survivors, as `SfpFile.get_survivors`.

        Raises:
            MissingTensorError, BaseMismatchError, InvalidFileError, LimitError: as in `get_tensor`.
        """
        positions = np.flatnonzero(self.get_mask(name))
        return positions, self.get_tensor(name).reshape(-1)[positions]

    def _in_parts(self, tensor: DeltaTensor) -> Parts:
        """Returns a tensor that the delta lists as parts. Keeps it for the next call."""
        separator = self.delta.map.separator
        assert tensor.structure is not None
        assert separator is not None
        with self._lock:
            if self._recent_parts is None or self._recent_parts[0] != tensor.name:
                self._recent_parts = None
                names = names_of_parts(tensor, separator, self._tensors)
                arrays = {part: self._whole(self._tensors[name])[0] for part, name in names.items()}
                found = Parts.of_arrays(tensor.structure, tensor.shape, arrays)
                with placed(tensor=tensor.name, base=self.delta.offset):
                    found.require_valid()
                self._recent_parts = tensor.name, found
            return self._recent_parts[1]

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
        if tensor.structure is not None:
            values, changed = self.get_tensor(name).reshape(-1), self.get_slice(name).get_changed()
            positions = np.flatnonzero(changed)
            return positions, values[positions]
        array, changes = self._whole(tensor)
        new = patterns_of(array, tensor.dtype)
        positions = np.arange(len(new) if tensor.kind in ("replaced", "added") else 0)
        if changes:
            positions = np.concatenate([found.positions.astype(np.int64) + start for start, found in changes])
        values = new[positions]
        number = tensor.dtype.numpy
        if number.kind == "c":
            number = np.dtype(f"<f{new.itemsize}")
        return positions, values.view(number)

    def _tensor(self, name: str) -> DeltaTensor:
        if name not in self.specs:
            raise MissingTensorError(f"no tensor {name!r} in the result of the delta")
        return self._tensors[name]

    def _require_checked(self, tensor: DeltaTensor, base: Array) -> None:
        if tensor.name not in self._checked:
            dtype = self._base.specs[tensor.name].dtype
            self.delta.require_checksum(tensor, checksum_of(patterns_of(base, dtype), self._threads))
            self._checked.add(tensor.name)

    def _place(self, name: str) -> _Place:
        if self._places is None:
            self._places = {
                member.name: _Place(pool, number)
                for pool in self.delta.pools()
                for number, member in enumerate(pool.members)
            }
        return self._places[name]

    def _changes_of(
        self, pool: PoolChanges, own: int, block: int, last: int, base: Array | None = None
    ) -> list[tuple[int, Found]]:
        """Returns the first element and the changes of the parts of one tensor in a block.

        Reads the other elements of the block from the base, because the order of a block depends on them.

        Args:
            pool: the pool.
            own: the tensor's index in the pool.
            block: the block.
            last: the last block that the caller needs.
            base: the tensor in the base, or None to read only its elements in the block.
        """
        if pool not in self._recent or self._recent[pool][0] != block:
            parts = pool.parts(block)
            flats = []
            for part in parts:
                member = pool.members[part.member]
                if base is not None and part.member == own:
                    flats.append(patterns_of(base, member.dtype)[part.start : part.stop])
                else:
                    flats.append(self._elements(member, pool.width, part))
            try:
                found = list(pool.find(block, flats, self.delta.engine, last))
            except FileFault:
                self._require_parts_checked(pool, parts)  # a wrong base is reported first
                raise
            pairs = [
                (part, _without_same(one, flat)) for part, one, flat in zip(parts, found, flats, strict=True)
            ]
            self._recent[pool] = block, pairs
        return [(part.start, found) for part, found in self._recent[pool][1] if part.member == own]

    def _elements(self, member: DeltaTensor, width: int, part: Part) -> Patterns:
        """Reads the elements of a part from the base."""
        low, high = part.start // width, -(-part.stop // width)  # whole positions
        selection = Selection((high - low,), np.array([low]), range(high - low))
        array = self._base.read_part(member.name, selection)
        return patterns_of(array, member.dtype)[part.start - low * width : part.stop - low * width]

    def _require_parts_checked(self, pool: PoolChanges, parts: list[Part]) -> None:
        for part in parts:
            member = pool.members[part.member]
            if member.name not in self._checked:
                self._require_checked(member, self._base.read(member.name))


def _without_same(found: Found, base: Patterns) -> Found:
    """Returns the coded elements that differ from the base's. A dense bucket codes those that do not, too."""
    differ = found.values != base[found.positions]
    return Found(found.positions[differ], found.values[differ])
