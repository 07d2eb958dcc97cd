"""Pruned and quantised tensors as parts: mask, levels, importance and vectors in arrays (SPEC.md 28.4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ..coding.changes import Patterns
from ..coding.mask import Mask
from ..coding.planes import Levels
from ..coding.quantisers import (
    F32,
    Exact,
    Uniform,
    float_patterns,
    levels_to_patterns,
    patterns_to_levels,
)
from ..container.delta_parts import IMPORTANCE, MASK, VECTORS, Structure
from ..container.entry import TensorEntry
from ..dtypes import Dtype
from ..errors import FileFault, fault
from .reader import SfpFile, require_within_limits
from .tensor import TensorDecoder, Values, require_valid_vectors, scale_index

# A part of a number quantiser has the pattern of the number plus 1, which is below the sign.
MAX_PART_NUMBER = (1 << 31) - 2
_MAGNITUDE = np.uint32((1 << 31) - 1)


@dataclass(frozen=True)
class Parts:
    """A tensor as its parts.

    Attributes:
        structure: what the parts mean.
        shape: the shape of the tensor.
        weights: the elements of the part `weights`, bit patterns in its dtype, [N].
        mask: the part `mask`, True for survivors, [N]; None if survivors are the weights that are not zero.
        importance: the elements of the part `importance`, bit patterns, [N]; None without.
        vectors: the elements of the part `vectors`, [n].
    """

    structure: Structure
    shape: tuple[int, ...]
    weights: Patterns
    mask: Mask | None
    importance: Patterns | None
    vectors: F32

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """Returns the parts as arrays in their dtypes and shapes: part -> array; "" is the part `weights`."""
        out: dict[str, NDArray[np.generic]] = {
            "": self.weights.view(self.structure.weights.numpy).reshape(self.shape)
        }
        if self.mask is not None:
            out[MASK] = self.mask.reshape(self.shape)
        if self.importance is not None:
            out[IMPORTANCE] = self.importance.view(self._importance_dtype.numpy).reshape(self.shape)
        if len(self.vectors):
            out[VECTORS] = self.vectors
        return out

    @classmethod
    def of_arrays(
        cls, structure: Structure, shape: tuple[int, ...], arrays: Mapping[str, NDArray[np.generic]]
    ) -> Parts:
        """Returns a tensor from its parts, as `arrays` returns them."""
        flat = {part: np.ascontiguousarray(array).reshape(-1) for part, array in arrays.items()}
        importance = flat.get(IMPORTANCE)
        if importance is not None:
            importance = importance.view(f"<u{importance.itemsize}")
        return cls(
            structure,
            shape,
            float_patterns(flat[""], structure.weights),
            flat[MASK].view(np.bool_) if MASK in flat else None,
            importance,
            np.asarray(flat.get(VECTORS, np.zeros(0)), np.float32),
        )

    @classmethod
    def of_elements(cls, array: NDArray[np.generic], dtype: Dtype) -> Parts:
        """Returns a tensor without mask, quantiser and importance, whose elements are its weights."""
        flat = np.ascontiguousarray(array, dtype.numpy).reshape(-1)
        structure = Structure(dtype, False, Exact.NAME)
        return cls(structure, array.shape, float_patterns(flat, dtype), None, None, np.zeros(0, np.float32))

    # ------------------------------------------------------------------------------------- meaning

    @cached_property
    def survivors(self) -> Mask:
        """The mask: True for survivors, [N]."""
        if not self.structure.masked:
            return np.ones(len(self.weights), np.bool_)
        return np.asarray(self.weights != 0) if self.mask is None else self.mask

    @cached_property
    def entry(self) -> TensorEntry:
        """The entry of the tensor, without chunks; its tables have one level, the greatest."""
        steps, own = self.vectors[: self.structure.steps], self.structure.importance
        step = importance_step = np.float32(1)
        if self.structure.quantiser == Uniform.NAME:
            step, steps = steps[0], steps[1:]
        if own is not None and own.quantiser == Uniform.NAME:
            importance_step = steps[0]
        greatest = int(self.levels(None).max(initial=0))
        of_importance = self.importance_levels(None)
        greatest_importance = 0 if of_importance is None else int(of_importance.max(initial=0))
        return self.structure.entry("", self.shape, (step, importance_step), (greatest, greatest_importance))

    @cached_property
    def named_vectors(self) -> dict[str, F32]:
        """The vectors without the steps, by their names in the vector chunk."""
        out, at = {}, self.structure.steps
        for vector in self.structure.vector_list(self.shape):
            out[vector.name] = self.vectors[at : at + vector.size]
            at += vector.size
        return out

    def levels(self, block: slice | None) -> Levels:
        """Returns the levels of the survivors of a block of positions (None: all), uint64 or narrower."""
        block = slice(None) if block is None else block
        return _levels(self.weights[block][self.survivors[block]], self.structure.quantiser)

    @property
    def importance_mask(self) -> Mask | None:
        """The positions that have an importance of their own, [N]; None without a part `importance`."""
        own = self.structure.importance
        if self.importance is None or own is None:
            return None
        return self.survivors if own.over == "survivors" else np.ones(len(self.weights), np.bool_)

    def importance_levels(self, block: slice | None) -> Levels | None:
        """Returns the stored levels of the importances of a block. None without a part `importance`."""
        own, stored = self.structure.importance, self.importance_mask
        if self.importance is None or stored is None or own is None:
            return None
        block = slice(None) if block is None else block
        patterns = self.importance[block][stored[block]]
        if own.quantiser == Exact.NAME:
            return np.asarray(patterns_to_levels(patterns), np.uint64)
        return np.asarray(patterns.astype(np.uint64) - np.uint64(1))

    def importances(self) -> F32 | None:
        """Returns the importance of each position, float32 [N]; 0 if none is stored. None without any."""
        own, entry = self.structure.importance, self.entry
        if own is None:
            return None
        if own.quantiser is None:
            rows, columns = np.divmod(np.arange(len(self.weights)), max(entry.columns, 1))
            vectors = self.named_vectors
            return vectors["importance rows"][rows] * vectors["importance columns"][columns]
        assert entry.importance is not None
        assert entry.importance.quantiser is not None
        levels, stored = self.importance_levels(None), self.importance_mask
        assert levels is not None
        assert stored is not None
        out = np.zeros(len(self.weights), np.float32)
        centroids = self.named_vectors.get("importance centroids")
        out[stored] = entry.importance.quantiser.importance_values(levels, centroids)
        return out

    def values(self) -> Values:
        """Returns the tensor (SPEC.md chapter 14), in its dtype and shape."""
        entry, own = self.entry, self.structure.importance
        assert entry.fingerprints is not None
        where = np.flatnonzero(self.survivors)
        scale = multiplier = None
        if self.structure.scale is not None:
            scale = self.named_vectors["scale"][scale_index(entry, where)]
        if own is not None and own.role == "multiplier":
            importances = self.importances()
            assert importances is not None
            multiplier = importances[where]
        out = np.zeros(len(self.weights), self.structure.dtype.numpy)
        out[where] = entry.fingerprints.quantiser.fingerprint_values(
            self.levels(None).astype(np.uint64),
            self.structure.dtype,
            self.named_vectors.get("fingerprint centroids"),
            scale,
            multiplier,
        )
        return out.reshape(self.shape)

    def require_valid(self) -> None:
        """Checks that a tensor can have these parts.

        Raises:
            InvalidFileError: R-DLT-020.
        """
        try:
            self._require_valid()
        except FileFault as error:
            detail = f"the parts are not those of a tensor: {error.detail} ({error.clause})"
            raise fault("R-DLT-020", detail) from None

    def _require_valid(self) -> None:
        zero, alive = self.weights == 0, self.survivors
        if (~zero & ~alive).any():
            raise fault("R-DLT-020", "a pruned position has a weight")
        if self.mask is not None and not (zero & alive).any():
            raise fault("R-DLT-020", "the part mask is not needed")
        if self.structure.quantiser != Exact.NAME:
            _require_numbers(self.weights[alive] & _MAGNITUDE, "level")
        stored, own = self.importance_mask, self.structure.importance
        if self.importance is not None and stored is not None and own is not None:
            if (self.importance != 0)[~stored].any():
                raise fault("R-DLT-020", "a position without importance has one")
            if own.quantiser != Exact.NAME:
                _require_numbers(self.importance[stored], "importance")
        self.entry.require_valid_streams()
        for vector in self.structure.vector_list(self.shape):
            _require_stored(self.named_vectors[vector.name], vector.dtype)
        require_valid_vectors(self.entry, self.named_vectors)

    @property
    def _importance_dtype(self) -> Dtype:
        assert self.structure.importance is not None
        found = self.structure.importance.stored
        assert found is not None
        return found


def _require_numbers(patterns: Patterns, what: str) -> None:
    """Checks that survivors have a level or an importance."""
    if not ((patterns != 0) & (patterns <= _MAGNITUDE)).all():
        raise fault("R-DLT-020", f"the pattern of a survivor's {what} has no number")


def _require_stored(vector: F32, dtype: Dtype) -> None:
    """Checks that the numbers of a vector are numbers of its dtype."""
    with np.errstate(over="ignore", invalid="ignore"):
        same = vector.astype(dtype.numpy).astype(np.float32).view(np.uint32) == vector.view(np.uint32)
    if not same.all():
        raise fault("R-DLT-020", f"a number of a vector is not of {dtype.name}")


def _levels(patterns: Patterns, quantiser: str) -> Levels:
    if quantiser == Exact.NAME:
        return np.asarray(patterns_to_levels(patterns), np.uint64)
    numbers = (patterns & _MAGNITUDE).astype(np.uint64) - np.uint64(1)
    return np.asarray((numbers << np.uint64(1)) | (patterns >> np.uint32(31)).astype(np.uint64))


def parts_of(file: SfpFile, name: str) -> Parts | None:
    """Decodes a tensor of a file into its parts.

    Returns:
        The parts. None if the tensor is no more than its elements, or has levels that parts cannot have.

    Raises:
        MissingTensorError: there is no tensor of that name.
        InvalidFileError: the file is damaged.
        LimitError: the tensor exceeds a limit.
    """
    entry = file.entry(name)
    structure = Structure.of(entry)
    if structure is None:
        return None
    require_within_limits(file, entry)
    decoder = file.decoder(entry)
    collected = _Collected(entry, structure)
    for k in range(len(entry.chunks)):
        collected.add(file, decoder, k)
    return collected.parts(decoder)


class _Collected:
    """The parts of a tensor while its chunks are decoded."""

    def __init__(self, entry: TensorEntry, structure: Structure) -> None:
        self._entry, self._structure = entry, structure
        self._weights = np.zeros(entry.positions, structure.weights.pattern)
        self._mask = None if entry.mask is None else np.zeros(entry.positions, np.bool_)
        stored = None if structure.importance is None else structure.importance.stored
        self._importance = None if stored is None else np.zeros(entry.positions, stored.pattern)
        self._greatest = 0

    def add(self, file: SfpFile, decoder: TensorDecoder, k: int) -> None:
        """Decodes chunk k."""
        entry = self._entry
        chunk = decoder.open_chunk(file.read_checked(entry, k), k)
        first, stop = entry.segments_of_chunk(k)
        start, size = entry.positions_of_chunk(k)
        mask = decoder.mask(chunk, 0, stop - first)
        own = slice(start, start + size)
        alive = slice(None) if mask is None else mask
        levels = decoder.levels(chunk, "fingerprints", 0, stop - first)
        self._weights[own][alive] = self._weights_of(levels)
        if mask is not None and self._mask is not None:
            self._mask[own] = mask
        if self._importance is not None:
            assert entry.importance is not None
            levels = decoder.levels(chunk, "importance", 0, stop - first)
            where = alive if entry.importance.over == "survivors" else slice(None)
            self._importance[own][where] = self._importances_of(levels)

    def _weights_of(self, levels: Levels) -> Patterns:
        assert self._entry.fingerprints is not None
        quantiser = self._entry.fingerprints.quantiser
        if isinstance(quantiser, Exact):
            exact = levels_to_patterns(levels, quantiser.dtype)
            return exact if quantiser.dtype == self._entry.dtype else _widened(exact, quantiser, self._entry)
        numbers = (levels >> np.uint64(1)) + np.uint64(1)
        self._greatest = max(self._greatest, int(numbers.max(initial=0)) - 1)
        return np.asarray(numbers | (levels & np.uint64(1)) << np.uint64(31), np.uint32)

    def _importances_of(self, levels: Levels) -> Patterns:
        assert self._entry.importance is not None
        quantiser = self._entry.importance.quantiser
        if isinstance(quantiser, Exact):
            return levels_to_patterns(levels, quantiser.dtype)
        self._greatest = max(self._greatest, int(levels.max(initial=0)))
        return np.asarray(levels + np.uint64(1), np.uint32)

    def parts(self, decoder: TensorDecoder) -> Parts | None:
        """Returns the parts. None if a number is too great for them."""
        if self._greatest > MAX_PART_NUMBER:
            return None
        mask = self._mask
        if mask is not None and not (mask & (self._weights == 0)).any():
            mask = None
        steps = [
            record.quantiser.step
            for record in (self._entry.fingerprints, self._entry.importance)
            if record is not None and isinstance(record.quantiser, Uniform)
        ]
        vectors = [decoder.vectors[v.name] for v in self._entry.vector_list() if v.size]
        numbers = np.concatenate([np.array(steps, np.float32), *vectors])
        return Parts(self._structure, self._entry.shape, self._weights, mask, self._importance, numbers)


def _widened(patterns: Patterns, quantiser: Exact, entry: TensorEntry) -> Patterns:
    """Returns patterns of the coded dtype in the tensor's dtype."""
    values = patterns.view(quantiser.dtype.numpy).astype(entry.dtype.numpy)
    return float_patterns(values, entry.dtype)
