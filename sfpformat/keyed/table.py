"""Keyed tables in memory and in files: `KeyedTable`."""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from ..coding.bits import Bytes, as_bytes
from ..coding.keyed.hashing import Keys, positions_of
from ..coding.keyed.rows import FoundRows
from ..coding.quantisers import F32
from ..container.keyed_map import KeyedMap
from ..decode.reader import SfpFile
from ..encode.quantise import F64
from ..encode.sink import Target
from ..encode.writer import Writer
from ..engines import get_engine
from ..errors import MissingTensorError, OptionError
from ..io.remote.location import location_of
from ..io.source import Buffer, Readable, open_source
from ..limits import DEFAULT_LIMITS, Limits
from ..names import quoted
from ..options.quantisers import LossyQuantiser, Uniform
from .building import build, checked_choices
from .design import class_probabilities, expected_parts
from .keys import Key, ManyKeys, packed

_MANY = 64  # keys for which all chunks of a file are checked at once
_WEIGHTS = 16  # that are decoded in the time of looking a key up, in pure Python
_EACH = 1 << 14  # keys that are looked up at a time: their positions stay in a cache


class Found(NamedTuple):
    """What a look-up of several keys found.

    Attributes:
        weights: float32 [n, C]; zeros for unknown keys.
        known: bool [n].
        importance: float32 [n], 0 for unknown keys; None if the table stores no importance.
    """

    weights: F32
    known: NDArray[np.bool_]
    importance: F32 | None


class KeyedTable:
    """A map from keys to weights that stores no keys (SPEC.md chapter 17).

    A key that the table does not have is taken for a known one with a small probability; see `false_matches`.
    Thread-safe.

    ``table = KeyedTable.build(["good", "bad"], [1.5, -2.0])``, then ``table["good"]``.
    """

    def __init__(
        self,
        keyed: KeyedMap,
        bits: Bytes,
        *,
        engine: str | None = None,
        file: SfpFile | None = None,
        parts: Mapping[str, int] | None = None,
    ) -> None:
        """Opens a table whose bit array is in memory. `build` and `open` call this function.

        Args:
            keyed: its map in the directory.
            bits: its bit array.
            engine: same as for `sfpformat.open`.
            file: the file from which the bit array is mapped; its checksums are compared before bytes are
                used. None: the bit array is correct.
            parts: the bits of all rows, by part; None if they are not known.
        """
        self.map = keyed
        self._bits, self._engine, self._file = bits, engine, file
        self._parts = None if parts is None else dict(parts)
        chunks = 0 if file is None else len(file.entry(keyed.bits).chunks)
        self._checked = np.zeros(chunks, np.bool_)
        self._all_checked = file is None
        self._asked = 0  # keys; approximate if threads look keys up at the same time

    # ------------------------------------------------------------------------------- make and store

    @classmethod
    def build(
        cls,
        keys: ManyKeys,
        weights: NDArray[np.floating],
        *,
        quantiser: LossyQuantiser = Uniform(error_db=-20),  # noqa: B008 - frozen
        false_positive_cost: float | None = None,
        bits_per_key: float | None = None,
        expected_error: float | None = None,
        check_bits: int | None = None,
        importance: F64 | None = None,
        keep: int | float | None = None,
        importance_bits: int = 0,
        name: str = "weights",
        engine: str | None = None,
    ) -> KeyedTable:
        """Builds a table. The bytes do not depend on the engine.

        Keys whose weights are all zero, or become zero by quantisation, are left out: a look-up returns zeros
        for them, too. Checks are longer for greater weights, so that the budget buys the least expected
        error: the probability that an unknown key matches, times the sum of the magnitudes that it then gets.

        Args:
            keys: distinct strings or bytes, n of them.
            weights: finite, shape [n] or [n, C].
            quantiser: `Uniform` or `Table`, without a scale.
            false_positive_cost: how many bits per key a unit of expected error is worth.
            bits_per_key: the size of the bit array, in bits per key, approximately.
            expected_error: the greatest expected error of an unknown key, as a sum of magnitudes.
            check_bits: the same number of check bits, 0 to 32, for all keys. At most one of these four is
                given; without any, `expected_error` is 1 % of the mean sum of magnitudes of a key.
            importance: how much each key matters, not negative, shape [n]; ``keep`` uses it.
            keep: the number of keys to keep, or their share as a float of at most 1: those of the greatest
                importance or, without it, of the greatest magnitude. None keeps all.
            importance_bits: bits with which the importance is stored; 0 does not store it.
            name: the table's name in a file.
            engine: same as for `sfpformat.open`.

        Raises:
            OptionError: an argument is not allowed, or a key occurs twice.
            EngineError: the engine is unknown or not available.
        """
        choices = checked_choices(
            quantiser,
            false_positive_cost,
            bits_per_key,
            expected_error,
            check_bits,
            keep,
            importance_bits,
            name,
        )
        found = build(keys, weights, importance, choices, get_engine(engine, np.size(weights) * 8))
        return cls(found.map, found.bits, engine=engine, parts=found.parts)

    def write(self, target: Target, *, metadata: dict[str, str] | None = None) -> None:
        """Writes a file with this table alone. `add_to` adds the table to a file with other contents.

        Raises:
            OptionError, OSError: as in `Writer`.
        """
        with Writer(target, metadata=metadata) as writer:
            self.add_to(writer)

    def add_to(self, writer: Writer) -> None:
        """Adds the table to a file that is being written.

        Raises:
            OptionError: the file has a table or a tensor of the same name.
            OSError, ClosedFileError, SfpError: as in `Writer.add`.
        """
        self._check_all()
        writer.add_keyed(self.map, self._bits)

    @classmethod
    def open(
        cls,
        readable: Readable,
        name: str | None = None,
        *,
        limits: Limits = DEFAULT_LIMITS,
        engine: str | None = None,
    ) -> KeyedTable:
        """Opens a table of a file. Maps the file into memory, and reads only its preamble and directory.

        A look-up compares the checksums of the chunks that it reads, once for each chunk.

        Args:
            readable: a path, bytes or an mmap; or a URL or a seekable binary object, which are read whole.
            name: the table's name; None if the file has only one.
            limits: same as for `sfpformat.open`.
            engine: same as for `sfpformat.open`.

        Raises:
            InvalidFileError, UnsupportedError, LimitError: the file is damaged or refused.
            MissingTensorError: the file has no table of this name.
            OptionError: the file has no table, or several and no name is given.
            OSError: the file cannot be read.
        """
        data = _mapped(readable)
        file = SfpFile(data, limits=limits, engine=engine, threads=1)
        keyed = _chosen(file.directory.keyed, name)
        start = file.chunk_offset(file.entry(keyed.bits), 0)
        view = as_bytes(cast(bytes, data))
        # A damaged file can have chunks that are shorter than their bytes; the checks of chunks find that.
        bits = view[start : start + keyed.array_bytes]
        if len(bits) < keyed.array_bytes:
            file.get_tensor(keyed.bits)
        return cls(keyed, bits, engine=engine, file=file)

    # --------------------------------------------------------------------------------------- look up

    def find(self, keys: ManyKeys | Key) -> Found:
        """Looks keys up.

        Args:
            keys: strings (looked up by their UTF-8) or bytes: a list, a numpy array, or packed `Keys`.

        Raises:
            InvalidFileError: the file is damaged.
            OptionError: a key is neither a string nor bytes.
        """
        own = packed(keys)
        self._asked += len(own)
        # All look-ups so far: a program that asks again and again is worth the import of Numba.
        engine = get_engine(self._engine, self._asked * _WEIGHTS)
        parts = []
        for first in range(0, max(len(own), 1), _EACH):
            offsets = own.offsets[first : first + _EACH + 1]
            part = Keys(own.data[offsets[0] : offsets[-1]], offsets - offsets[0])
            words = engine.hash_keys(part, self.map.seed)
            positions = positions_of(words, self.map.starts, self.map.segment)
            self._check(positions)
            parts.append(engine.decode_rows(self.map.code, self._bits, positions))
        found = FoundRows(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
        stored = self.map.code.importance is not None
        return Found(found.weights, found.known, found.importance if stored else None)

    def __getitem__(self, keys: ManyKeys | Key) -> F32:
        """Returns the weights of one key, float32 [C], or of n keys, [n, C]; zeros for unknown keys."""
        weights = self.find(keys).weights
        return weights[0] if isinstance(keys, (str, bytes)) else weights

    def __contains__(self, key: object) -> bool:
        return isinstance(key, (str, bytes)) and bool(self.find(key).known[0])

    def __len__(self) -> int:
        return self.map.keys

    def _check(self, positions: NDArray[np.int64]) -> None:
        """Compares the checksums of the chunks that rows at some positions need."""
        if self._all_checked or not len(positions):
            return
        if len(positions) >= _MANY:
            self._check_all()
            return
        assert self._file is not None
        entry = self._file.entry(self.map.bits)
        size = 8 * entry.segment * entry.chunk
        last = (positions + self.map.code.most_bits + 63) // size
        for k in np.unique(np.concatenate((positions // size, last))).tolist():
            if k < len(self._checked) and not self._checked[k]:
                self._check_chunk(k, size // 8)

    def _check_all(self) -> None:
        if self._file is not None and not self._all_checked:
            self._file.get_tensor(self.map.bits)
            self._all_checked = True

    def _check_chunk(self, k: int, size: int) -> None:
        assert self._file is not None
        self._file.get_slice(self.map.bits)[k * size : (k + 1) * size]
        self._checked[k] = True

    # -------------------------------------------------------------------------------------- describe

    @property
    def name(self) -> str:
        """The table's name."""
        return self.map.name

    @property
    def outputs(self) -> int:
        """C, the number of weights of a key."""
        return self.map.code.outputs

    @property
    def nbytes(self) -> int:
        """The size of the bit array, in bytes."""
        return self.map.array_bytes

    @property
    def bits_per_key(self) -> float:
        """The size of the bit array, in bits per key."""
        return 8 * self.nbytes / max(len(self), 1)

    @property
    def parts(self) -> dict[str, float]:
        """Bits per key of weights, gaps, checks, importance, and what the equations need beyond them.

        For a table from a file, these are the expected bits by its code tables.
        """
        if self._parts is not None:
            return {part: bits / max(len(self), 1) for part, bits in self._parts.items()}
        parts = expected_parts(self.map.code)
        return {**parts, "equations": self.bits_per_key - sum(parts.values())}

    def false_matches(self) -> F64:
        """Returns the probability that an unknown key matches a row of each class: float64 [K].

        The classes are those of the code table ``map.code.levels``, in the order of magnitudes. Their sum is
        the probability that an unknown key is taken for a known one.
        """
        checks = np.frombuffer(self.map.code.checks, np.uint8).astype(np.float64)
        return np.asarray(class_probabilities(self.map.code) * 0.5**checks)


def _mapped(readable: Readable) -> Buffer:
    """Returns the bytes of a file, mapped into memory if it is a local file."""
    if isinstance(readable, (str, os.PathLike)) and location_of(readable) is None:
        with open(readable, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                return b""  # an empty file cannot be mapped
            return cast(bytes, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    source = open_source(readable)
    try:
        return source.read(0, source.length)
    finally:
        source.close()


def _chosen(tables: tuple[KeyedMap, ...], name: str | None) -> KeyedMap:
    if not tables:
        raise OptionError("the file has no keyed table")
    names = ", ".join(quoted(table.name) for table in tables)
    if name is None:
        if len(tables) > 1:
            raise OptionError(f"the file has several keyed tables: {names}; name one")
        return tables[0]
    for table in tables:
        if table.name == name:
            return table
    raise MissingTensorError(f"no keyed table {quoted(name)} in the file; it has {names}")
