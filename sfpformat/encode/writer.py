"""Writes `.sfp` files, tensor by tensor.

`Writer.add` writes one tensor. `Writer.add_later` starts a tensor and returns: threads work on several
tensors, and the calling thread writes the finished ones in order (`pipeline`). Needs memory for the largest
tensor and about 300 MB.

Rules: the writer writes to a temporary file, syncs it, and renames it to the target in one step (R-STR-005).
After an error before this step, the old file is unchanged and the temporary file is removed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..coding.bits import Bytes
from ..coding.mask import Mask
from ..container.delta_map import DeltaMap
from ..container.entry import TensorEntry
from ..container.keyed_map import KeyedMap
from ..dtypes import Dtype
from ..engines import Engine, get_engine
from ..errors import ClosedFileError, OptionError, SfpError
from ..io.threads import Workers, thread_count
from ..limits import DEFAULT_LIMITS, Limits
from ..names import quoted
from ..options import Options, require_options
from .arguments import Given, checked_keys, require_arrays, require_name
from .assembly import Assembly, Encoded
from .chunks import Chunk, chunk_jobs, encode_chunk, encode_vectors
from .number_sequences import plan_numbers
from .pipeline import Pipeline
from .plan import plan_tensor
from .planner import Importance, Plan
from .sink import Target

if TYPE_CHECKING:
    from ..decode.parts import Parts

# Larger tensors, in bytes, are encoded while they are written, so that their chunks do not wait in memory.
_ENCODED_WHOLE = 1 << 24
# Bytes per chunk of a bit array: a look-up of one key compares the checksums of at most eight chunks.
KEYED_SEGMENT = 1 << 14


class Writer:
    """Writes an `.sfp` file. A context manager: after an exception in its block, the target is unchanged.

    ``with Writer("model.sfp") as w: w.add("w", array)``
    """

    def __init__(
        self,
        target: Target,
        *,
        metadata: dict[str, str] | None = None,
        engine: str | None = None,
        threads: int | None = None,
        resume_key: str | None = None,
        limits: Limits = DEFAULT_LIMITS,
        weights: int = 0,
    ) -> None:
        """Starts a file.

        Args:
            target: a path; a seekable binary object, which is written from its start; or a sink.
            metadata: the caller's strings.
            engine: same as for `sfpformat.open`.
            threads: the greatest number of encoding threads; None uses the available cores. The bytes do not
                depend on it.
            resume_key: identifies the job. With a key, an interrupted writer keeps its partial file, and the
                next writer with the same key continues after the last complete tensor; see `done`.
            limits: limits of the readers. The writer refuses to write a file that exceeds them. Readers need
                the same limits if these are not the default.
            weights: about how many weights will be added, if known: ``"auto"`` then chooses the engine at
                once, not after some tensors. The bytes do not depend on it.

        Raises:
            OptionError: metadata are not strings, or the target cannot be written or resumed.
            EngineError: the engine is unknown or not available.
            LockedFileError: with ``resume_key``, another process is writing the target.
            OSError: the temporary file cannot be created.
        """
        self._limits = limits
        self._engine_name, self._engine = engine, get_engine(engine, weights)
        self._weights, self._chosen_for = 0, weights
        self._workers = Workers(thread_count(threads))
        self._pipeline = Pipeline(self._workers)
        self._file = Assembly(target, metadata, resume_key, limits)
        self._later: set[str] = set()  # names of the tensors that are added, but not written yet
        self._open = True

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:
            # An interrupted job can be resumed; a job that failed would fail again.
            self.abort(keep=isinstance(error, KeyboardInterrupt))

    @property
    def done(self) -> tuple[str, ...]:
        """The names of the tensors written so far, including those of an earlier, resumed writer.

        Without those of `add_later` that are not written yet.
        """
        return tuple(self._file.entries)

    def add(
        self,
        name: str,
        array: NDArray[np.generic],
        options: Options | None = None,
        *,
        mask: Mask | None = None,
        importance: Importance | None = None,
        other: Mapping[str, object] | None = None,
    ) -> TensorEntry:
        """Encodes and writes a tensor.

        Args:
            name: the tensor's name, which no other tensor of the file has.
            array: any shape, a dtype of SPEC.md 25.1. BF16 and FP8 are dtypes of `ml_dtypes`.
            options: how to encode the tensor; None is lossless.
            mask: bool, of the array's shape, True for survivors. None: all non-zero weights survive.
            importance: float, of the array's shape, finite and not negative; or two vectors, one number per
                row and one number per column.
            other: additional keys for the tensor's entry in the directory (R-DIR-005). Their names begin with
                ``x-``. Their values are maps, lists, strings, bytes and integers from 0 to 2^64 - 1. Readers
                return them in `TensorInfo.unknown`.

        Returns:
            The tensor's entry in the directory.

        Raises:
            OptionError: the options do not fit the tensor, the name is taken, or the tensor exceeds the
                limits. The writer can add other tensors, unless only encoding detected the error.
            OSError: the file cannot be written. The writer cannot complete it any more.
            ClosedFileError: the writer is closed.
            SfpError: an earlier tensor was only partly written.
        """
        self.flush()
        given = Given(np.asanyarray(array), mask, importance)
        options, keys = self._checked(name, given, options, other)
        engine = self._engine_for(given.array.size)
        return self._file.write(self._encoded(name, given, options, keys, engine, whole=False))

    def add_later(
        self,
        name: str,
        array: NDArray[np.generic],
        options: Options | None = None,
        *,
        mask: Mask | None = None,
        importance: Importance | None = None,
        other: Mapping[str, object] | None = None,
    ) -> None:
        """Starts to encode a tensor, and returns before it is written. Threads encode several tensors.

        The bytes are those of `add`. Waits while the tensors that are not written yet need too much memory.
        With one thread, writes the tensor before it returns.

        ``with Writer("m.sfp") as w: [w.add_later(name, array) for name, array in arrays.items()]``

        Args:
            name, options, other: same as for `add`.
            array, mask, importance: same as for `add`; do not change them before the next call of `add`,
                `add_encoded` or `close` has returned.

        Raises:
            OptionError: same as for `add`. A later call, or `close`, raises the error of a tensor that failed
                while it was encoded: the first error in the order of the tensors. The writer cannot complete
                the file then.
            OSError, ClosedFileError, SfpError: same as for `add`.
        """
        given = Given(np.asanyarray(array), mask, importance)
        try:
            options, keys = self._checked(name, given, options, other)
        except SfpError:
            self.flush()  # an earlier tensor's error comes first
            raise
        self._put(name, lambda: given, given.array.nbytes, given.array.size, options, keys)

    def add_read(
        self,
        name: str,
        read: Callable[[], Given],
        nbytes: int,
        weights: int,
        options: Options,
        *,
        other: Mapping[str, object] | None = None,
        done: Callable[[TensorEntry], None] | None = None,
    ) -> None:
        """Like `add_later`, but a thread reads the tensor, too, just before it is encoded.

        Args:
            name, options, other: same as for `add`.
            read: returns the arrays; called in any thread.
            nbytes, weights: approximate size of the tensor, in bytes and in elements.
            done: called with the tensor's entry after it is written, in the thread that calls the writer.

        Raises:
            OptionError, OSError, ClosedFileError, SfpError: same as for `add_later`.
            Exception: what ``read`` or ``done`` raised.
        """
        try:
            self._require_addable(name, 0, 0)
            keys = checked_keys(name, other, self._limits)
        except SfpError:
            self.flush()
            raise
        self._put(name, read, nbytes, weights, options, keys, done)

    def _put(
        self,
        name: str,
        read: Callable[[], Given],
        nbytes: int,
        weights: int,
        options: Options,
        keys: dict[str, object],
        done: Callable[[TensorEntry], None] | None = None,
    ) -> None:
        """Passes a checked tensor to the pipeline. See `add_read` for the arguments."""
        engine = self._engine_for(weights)

        def work() -> Encoded:
            given = read()
            self._file.require_size(name, given.array.ndim, given.array.nbytes)
            return self._encoded(name, given, options, keys, engine, whole=nbytes <= _ENCODED_WHOLE)

        def finish(encoded: Encoded) -> None:
            self._later.discard(name)
            entry = self._file.write(encoded)
            if done is not None:
                done(entry)

        self._later.add(name)
        self._run(partial(self._pipeline.put, work, nbytes, finish))

    def flush(self) -> None:
        """Writes all tensors of `add_later`.

        Raises:
            OptionError, OSError: the first error of one of them.
        """
        if len(self._pipeline):
            self._run(self._pipeline.drain)

    def _run(self, step: Callable[[], None]) -> None:
        """Runs a step of the pipeline. After an error, the writer cannot complete the file any more."""
        try:
            step()
        except BaseException:
            self._file.is_whole = False
            self._pipeline.drop()
            raise

    def add_numbers(
        self, name: str, numbers: NDArray[np.unsignedinteger], dtype: Dtype, shape: tuple[int, ...]
    ) -> TensorEntry:
        """Encodes and writes a tensor of numbers of a delta (SPEC.md 28.2).

        Args:
            name: the tensor's name, which no other tensor of the file has.
            numbers: the levels of its elements, [n].
            dtype: its dtype, a float type of more bits than the greatest number.
            shape: its shape, of n elements.

        Returns:
            The tensor's entry in the directory.

        Raises:
            OptionError, OSError, ClosedFileError, SfpError: as in `add`.
        """
        self.flush()
        self._require_addable(name, len(shape), len(numbers) * dtype.itemsize)
        engine = self._engine_for(len(numbers))
        plan = plan_numbers(name, numbers, dtype, shape, engine, self._workers)
        return self._file.write(self._encoded_plan(plan, {}, engine))

    def add_parts(self, name: str, parts: Parts, *, other: Mapping[str, object] | None = None) -> TensorEntry:
        """Encodes and writes a tensor whose mask, levels, importance and vectors are given.

        Args:
            name, other: same as for `add`.
            parts: the tensor. `Parts.require_valid` accepts it.

        Returns:
            The tensor's entry in the directory.

        Raises:
            OptionError, OSError, ClosedFileError, SfpError: as in `add`.
        """
        from .parts import plan_parts  # lazy: most writers have no parts

        self.flush()
        nbytes = parts.weights.size * parts.structure.dtype.itemsize
        self._require_addable(name, len(parts.shape), nbytes)
        keys = checked_keys(name, other, self._limits)
        engine = self._engine_for(parts.weights.size)
        plan = plan_parts(name, parts, engine, self._limits, self._workers)
        return self._file.write(self._encoded_plan(plan, keys, engine))

    def set_delta(self, delta: DeltaMap) -> None:
        """Makes the file a delta. The map must describe the tensors that the file has when it is closed."""
        self._file.delta = delta

    def add_keyed(self, keyed: KeyedMap, bits: Bytes) -> TensorEntry:
        """Writes the bit array of a keyed table (SPEC.md chapter 17).

        `sfpformat.KeyedTable.write` calls this function.

        Args:
            keyed: the table. No other table of the file has its name or the name of its bit array.
            bits: the bit array, of `KeyedMap.array_bytes`.

        Returns:
            The entry of the bit array in the directory.

        Raises:
            OptionError: a name is taken.
            OSError, ClosedFileError, SfpError: as in `add`.
        """
        if keyed.name in {table.name for table in self._file.keyed}:
            raise OptionError(f"the keyed table {quoted(keyed.name)} was already written")
        options = Options(coding="raw", segment=KEYED_SEGMENT, chunk=KEYED_SEGMENT)
        entry = self.add(keyed.bits, bits, options)
        self._file.keyed = (*self._file.keyed, keyed)
        return entry

    def add_encoded(self, entry: TensorEntry, vectors: Bytes | None, chunks: Iterable[Bytes]) -> TensorEntry:
        """Copies an encoded tensor from another file without encoding it again.

        Args:
            entry: the entry of the other file's directory, with the tensor's new name.
            vectors: the vector chunk, from `SfpFile.read_checked` with k = -1, or None if there is none.
            chunks: the chunks, from `SfpFile.read_checked` with k = 0, 1, ....

        Returns:
            The tensor's entry in this file's directory.

        Raises:
            OptionError: the name is taken, or the tensor exceeds the limits. The writer can add others.
            OSError: the file cannot be written. The writer cannot complete it any more.
            ClosedFileError: the writer is closed.
            SfpError: an earlier tensor was only partly written.
        """
        self.flush()
        self._require_addable(entry.name, len(entry.shape), entry.decoded_bytes)
        what = f"tensor {quoted(entry.name)}"
        self._limits.require_written_tensor(entry.decoded_bytes, entry.stored_bytes, what)
        self._file.require_depth(entry)
        copied = None if vectors is None else Chunk.of([vectors])
        return self._file.write(Encoded(entry, copied, (Chunk.of([chunk]) for chunk in chunks)))

    def _encoded(
        self,
        name: str,
        given: Given,
        options: Options,
        keys: dict[str, object],
        engine: Engine,
        *,
        whole: bool,
    ) -> Encoded:
        """Plans a tensor, and encodes it if ``whole`` is true; else threads encode a few chunks ahead."""
        plan = plan_tensor(
            name, given.array, options, engine, given.mask, given.importance, self._limits, self._workers
        )
        encoded = self._encoded_plan(plan, keys, engine)
        return encoded._replace(chunks=list(encoded.chunks)) if whole else encoded

    def _encoded_plan(self, plan: Plan, keys: dict[str, object], engine: Engine) -> Encoded:
        """Returns a planned tensor. Its chunks are encoded while they are iterated."""
        entry = replace(plan.entry, other=keys) if keys else plan.entry
        self._file.require_depth(entry)
        chunks = self._workers.map(partial(encode_chunk, plan, engine), chunk_jobs(plan))
        return Encoded(entry, encode_vectors(plan), chunks)

    def _checked(
        self, name: str, given: Given, options: Options | None, other: Mapping[str, object] | None
    ) -> tuple[Options, dict[str, object]]:
        """Checks the arguments of `add`, and returns the options and the additional keys of the entry."""
        self._require_addable(name, given.array.ndim, given.array.nbytes)
        options = require_options(options, f"the options of {name!r}")
        require_arrays(name, given.mask, given.importance)
        return options, checked_keys(name, other, self._limits)

    def _require_addable(self, name: str, rank: int, decoded: int) -> None:
        """Checks that a tensor can be added. Called before any of it is written.

        Raises:
            OptionError: the name is invalid or taken, or the tensor exceeds the limits.
            ClosedFileError: the writer is closed.
            SfpError: an earlier tensor was only partly written.
        """
        self._require_usable()
        require_name(name, self._limits)
        if name in self._file.entries or name in self._later:
            raise OptionError(f"tensor {quoted(name)} was already written")
        tensors = len(self._file.entries) + len(self._later) + 1
        self._limits.require_written("tensors", tensors, f"tensor {quoted(name)}")
        self._file.require_size(name, rank, decoded)

    def _engine_for(self, weights: int) -> Engine:
        """Returns the engine for a tensor. Chooses again if the number of weights has more than doubled."""
        self._weights += weights
        if self._weights > 2 * self._chosen_for:
            self._engine = get_engine(self._engine_name, self._weights)
            self._chosen_for = self._weights
        return self._engine

    def _require_usable(self) -> None:
        if not self._open:
            raise ClosedFileError("the writer is closed")
        if not self._file.is_whole:
            raise SfpError(
                "an earlier tensor was only partly written, so the file cannot be completed; write it again"
            )

    def close(self) -> None:
        """Writes the directory and completes the file. Does nothing if the writer is closed.

        Raises:
            OptionError: the directory exceeds the limits, or a tensor of `add_later` failed.
            OSError: the file cannot be written or renamed.
            SfpError: a tensor was only partly written.
        """
        if not self._open:
            return
        try:
            self.flush()
            self._require_usable()
            self._workers.stop()
            self._file.finish()
        except BaseException as error:
            self.abort(keep=isinstance(error, KeyboardInterrupt))
            raise
        self._open = False

    def abort(self, *, keep: bool = False) -> None:
        """Aborts. The target is unchanged. With ``keep``, a resumable writer keeps its partial file."""
        if self._open:
            self._open = False
            self._pipeline.drop()
            self._workers.stop()
            self._file.abort(keep)
