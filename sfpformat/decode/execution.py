"""Executes decoding jobs: reads chunks and decodes them into arrays, in parallel if that is faster."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

from numpy.typing import NDArray

from ..coding.bits import Bytes
from ..container.directory import Directory
from ..container.entry import TensorEntry
from ..engines import Engine, Run, get_engine
from ..errors import FileFault
from ..io.threads import for_each
from .fast_path import Bulk, SmallRaw
from .jobs import Job, batches
from .stored_chunks import StoredChunks
from .tensor import TensorDecoder

# Decodes a run of segments into an array: an `..._into` method of `TensorDecoder`.
Into = Callable[[TensorDecoder, Bytes, int, int, int, NDArray[Any]], None]

# Size of the decoder cache. A decoder with its tables of levels takes up to half a megabyte.
_DECODERS_KEPT = 32
# Decoding fewer positions than this takes less time than starting a thread.
_WORTH_THREADS = 1 << 18


class Decoding:
    """Decodes chunks of a file. Thread-safe."""

    def __init__(self, stored: StoredChunks, directory: Directory, engine: str | None, threads: int) -> None:
        """Loads no engine yet; this happens at first use.

        Args:
            stored: the chunks of the file.
            directory: the directory of the file.
            engine: name of the engine, as in `engines.get_engine`.
            threads: the greatest number of threads.
        """
        self._stored = stored
        self._directory = directory
        self._engine_name = engine
        self._threads = threads
        self._decoders: OrderedDict[str, TensorDecoder] = OrderedDict()
        self._lock = threading.Lock()

    def threads_for(self, positions: int) -> int:
        """Returns how many threads to use for a number of positions."""
        return self._threads if positions >= _WORTH_THREADS else 1

    def decoder(self, entry: TensorEntry, weights: int = 0) -> TensorDecoder:
        """Returns the decoder of a tensor, from a cache or new. A new one reads and checks its vectors.

        Args:
            entry: the tensor's entry.
            weights: the approximate number of weights that will be decoded.

        Raises:
            InvalidFileError: the vector chunk is damaged.
        """
        with self._lock:
            decoder = self._decoders.get(entry.name)
            if decoder is None:
                decoder = self._new_decoder(entry)
                self._decoders[entry.name] = decoder
                if len(self._decoders) > _DECODERS_KEPT:
                    self._decoders.popitem(last=False)
        decoder.expect(weights)
        return decoder

    def _new_decoder(self, entry: TensorEntry) -> TensorDecoder:
        if entry.vectors is None:
            return TensorDecoder(entry, None, self._engine)
        data = self._stored.read(entry, -1)
        with self._stored.placed(entry, -1):
            return TensorDecoder(entry, data, self._engine)

    @cached_property
    def _engine(self) -> Engine:
        plain = self._directory.plain
        if plain is not None and len(plain.names) == len(self._directory.tensors):
            weights = int(plain.positions.sum())
        else:
            weights = sum([entry.positions for entry in self._directory.tensors.values()])
        return get_engine(self._engine_name, weights)

    @cached_property
    def bulk(self) -> Bulk | None:
        """Decodes whole plain tensors together. None if the file or the engine does not support this."""
        plain = self._directory.plain
        plan = None if plain is None else self._engine.plan_plain(plain)
        return None if plain is None or plan is None else Bulk(plain, plan, self._stored)

    @cached_property
    def small_raw(self) -> SmallRaw | None:
        """Reads small raw tensors. None if the directory has no `PlainTensors`."""
        plain = self._directory.plain
        return None if plain is None else SmallRaw(plain, self._stored)

    def do(self, jobs: list[Job], into: Into) -> None:
        """Executes the jobs in batches. Uses threads if there are enough positions.

        Args:
            jobs: the chunks, their runs of segments, and the arrays to write.
            into: decodes a run into an array.

        Raises:
            InvalidFileError: the first error in the order of the jobs.
        """
        wanted: dict[str, int] = {}
        for entry, _, runs in jobs:
            wanted[entry.name] = wanted.get(entry.name, 0) + sum([out.size for _, _, out in runs])
        threads = self.threads_for(sum(wanted.values()))
        together = list(batches(jobs, threads))
        with self._stored.ahead(self._chunks(jobs)):
            for_each(lambda batch: self._do_batch(batch, wanted, into), together, min(threads, len(together)))

    def _chunks(self, jobs: list[Job]) -> Iterator[tuple[TensorEntry, int]]:
        """Yields the chunks that jobs read: their own, and those of vectors that are not decoded yet."""
        for name, entry in {entry.name: entry for entry, _, _ in jobs}.items():
            if entry.vectors is not None and name not in self._decoders:
                yield entry, -1
        yield from ((entry, k) for entry, k, _ in jobs)

    def _do_batch(self, jobs: list[Job], wanted: dict[str, int], into: Into) -> None:
        """Reads and decodes the chunks of a batch. One call of the engine decodes all runs that it supports.

        ``into`` decodes the other runs, and those for which the engine reports a problem, one by one; it
        raises the error.
        """
        pieces: list[tuple[TensorDecoder, Bytes, int, int, int, NDArray[Any]]] = []
        at_once: list[Run[NDArray[Any]]] = []
        numbers: list[int] = []  # indices of the pieces in `at_once`
        whole = into is TensorDecoder.weights_into
        unread: FileFault | None = None
        try:
            for decoder, data, k, runs in self._fetched(jobs, wanted):
                for first, stop, out in runs:
                    run = decoder.run(data, k, first, stop, out) if whole else None
                    if run is not None:
                        numbers.append(len(pieces))
                        at_once.append(run)
                    pieces.append((decoder, data, k, first, stop, out))
        except FileFault as error:
            unread = error  # raised at the end, so that errors of earlier chunks are raised first
        done: set[int] = set()
        if at_once:
            good = pieces[numbers[0]][0].engine.decode_runs(at_once)
            done = {number for number, is_good in zip(numbers, good, strict=True) if is_good}
        for number, (decoder, data, k, first, stop, out) in enumerate(pieces):
            if number not in done:
                with self._stored.placed(decoder.entry, k):
                    into(decoder, data, k, first, stop, out)
        if unread is not None:
            raise unread

    def _fetched(
        self, jobs: list[Job], wanted: dict[str, int]
    ) -> Iterator[tuple[TensorDecoder, Bytes, int, list[tuple[int, int, NDArray[Any]]]]]:
        """Yields for each job the decoder, the chunk's bytes, its number and its runs.

        Consecutive chunks of a tensor are read with one call.
        """
        begin = 0
        while begin < len(jobs):
            entry, k, _ = jobs[begin]
            end = begin + 1
            while end < len(jobs) and jobs[end][0] is entry and jobs[end][1] == k + end - begin:
                end += 1
            decoder = self.decoder(entry, wanted[entry.name])
            for data in self._stored.read_in_turn(entry, k, end - begin):
                yield decoder, data, jobs[begin][1], jobs[begin][2]
                begin += 1
