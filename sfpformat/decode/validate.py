"""Validates a file (SPEC.md chapters 20, 22): reports all faults, and whether the file is canonical."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import cast

import numpy as np
from numpy.typing import NDArray

from ..coding.classes import Histogram, add_histograms, histogram
from ..coding.codetable import EMPTY_TABLE, MAX_CODE_BITS, CodeTable, code_lengths
from ..coding.planes import greatest_trims, symbol_counts, symbols_of_classes
from ..coding.quantisers import Exact, Quantiser
from ..coding.windows import levels_outside
from ..container.chunk import excess_in_index
from ..container.delta_map import DeltaMap
from ..container.directory import entry_faults
from ..container.entry import TensorEntry
from ..container.preamble import SIZE, Preamble
from ..errors import FileFault, fault, placed
from ..io.paths import FilePath, file_size, is_index, is_path, model_path
from ..io.source import Readable, open_source
from ..limits import DEFAULT_LIMITS, Limits
from .delta_maps import require_one_kind
from .reader import SfpFile, require_within_limits
from .tensor import Chunk, TensorDecoder

Progress = Callable[[int, int], None]


@dataclass
class Report:
    """The result of `validate`.

    Attributes:
        faults: every fault, in file order.
        notes: reasons why a file without faults is not canonical; each begins with a clause in brackets.
        tensors: number of tensors that were checked.
        bytes: length of the file, in bytes.
        not_finite: tensor name -> number of weights that a lossy quantiser decodes to an infinity or a NaN.
            The format allows this, but the weights were finite before: the writer lost their values.
        keyed: number of keyed tables.
    """

    faults: list[FileFault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tensors: int = 0
    bytes: int = 0
    not_finite: dict[str, int] = field(default_factory=dict)
    keyed: int = 0

    @property
    def ok(self) -> bool:
        """Whether the file has no faults, so that a reader accepts it."""
        return not self.faults

    @property
    def canonical(self) -> bool:
        """Whether the file is canonical: the only encoding of its contents with its writer's choices."""
        return not self.faults and not self.notes


def validate(
    readable: Readable,
    *,
    limits: Limits = DEFAULT_LIMITS,
    engine: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Checks structure and checksums, decodes all tensors, and checks whether the file is canonical.

    For a model in shards, checks the index and all shards; faults and notes then name the shard.

    Example: ``report = sfpformat.validate("model.sfp")``, then ``print(report.ok, *report.faults)``.

    Args:
        readable: as in `sfpformat.open`.
        limits: the limits of the reader.
        engine: as in `sfpformat.open`.
        progress: (bytes done, total bytes); called after each tensor and at the end.

    Returns:
        The report. It contains the faults of the file; they are not raised.

    Raises:
        OSError: the file cannot be read. That a shard cannot be read is a fault.
        OptionError: as in `sfpformat.open`.
        SafetensorsError: an index is not valid JSON of the expected form.
    """
    if is_path(readable):
        readable = model_path(cast(str, readable))
        if is_index(readable):
            return _validate_model(readable, limits, engine, progress)
    report = Report()
    try:
        file = SfpFile(readable, limits=limits, engine=engine, threads=1)
    except FileFault as error:
        report.faults = _directory_faults(readable, limits, error)
        return report
    with file, file.prefetch():
        report.bytes = file.preamble.file_length
        report.keyed = len(file.directory.keyed)
        done = SIZE
        for name in file:
            entry = file.entry(name)
            _validate_tensor(file, entry, report)
            report.tensors += 1
            done += entry.stored_bytes
            if progress is not None:
                progress(done, report.bytes)
    if progress is not None:
        progress(report.bytes, report.bytes)
    return report


def validate_index(path: FilePath, limits: Limits = DEFAULT_LIMITS) -> tuple[Report, list[str]]:
    """Checks that the shards have the tensors that an index lists (SPEC.md chapter 18).

    Does not check the contents of the shards, as `validate` does. Skips shards whose directory has a fault,
    and those that cannot be read.

    Args:
        path: path or location of the index.
        limits: the limits of the reader.

    Returns:
        The report, and the names of the shards.

    Raises:
        SafetensorsError: the index is not valid JSON of the expected form.
        OSError: the index cannot be read.
    """
    from .shard_index import ShardIndex  # lazy: most models have one file

    report = Report(bytes=file_size(path))
    try:
        index = ShardIndex.read(path)
    except FileFault as error:
        report.faults.append(error)
        return report, []
    found: dict[str, list[str]] = {}
    maps: list[DeltaMap | None] = []
    for name in index.files():
        with (
            contextlib.suppress(FileFault, OSError),
            SfpFile(path.with_name(name), limits=limits, threads=1) as shard,
        ):
            found[name] = shard.keys()
            maps.append(shard.directory.delta)
    report.tensors = len(index.weight_map)
    report.faults += [fault("R-SHD-001", words, tensor=name) for name, words in index.all_misplaced(found)]
    try:
        require_one_kind(list(found), maps)
    except FileFault as error:
        report.faults.append(error)
    return report, index.files()


def _validate_model(path: FilePath, limits: Limits, engine: str | None, progress: Progress | None) -> Report:
    """Validates an index and its shards."""
    whole, names = validate_index(path, limits)
    shards = [path.with_name(name) for name in names]
    sizes = []
    for shard in list(shards):
        try:
            sizes.append(file_size(shard))
        except OSError as unread:
            shards.remove(shard)
            words = f"{shard.name!r} cannot be read: {unread.strerror or unread}"
            whole.faults.append(fault("R-SHD-001", words))
    whole.tensors, whole.bytes = 0, whole.bytes + sum(sizes)
    before = 0
    for shard, size in zip(shards, sizes, strict=True):

        def advance(done: int, _: int, before: int = before) -> None:
            if progress is not None:
                progress(before + done, whole.bytes)

        report = validate(shard, limits=limits, engine=engine, progress=advance)
        for error in report.faults:
            error.detail = f"in {shard.name!r}: {error.detail}"
        whole.faults += report.faults
        whole.notes += [note.replace("] ", f"] in {shard.name!r}: ", 1) for note in report.notes]
        whole.not_finite |= report.not_finite
        whole.tensors += report.tensors
        whole.keyed += report.keyed
        before += size
    if progress is not None:
        progress(whole.bytes, whole.bytes)
    return whole


def _directory_faults(readable: Readable, limits: Limits, first: FileFault) -> list[FileFault]:
    """Returns the first fault, and the faults of all tensor entries if the directory can be parsed."""
    source = open_source(readable)
    try:
        preamble = Preamble.from_bytes(bytes(source.read(0, min(SIZE, source.length))), source.length)
        limits.require("directory_bytes", preamble.directory_length)
        data = bytes(source.read(preamble.directory_offset, preamble.directory_length))
        preamble.require_directory(data)
    except FileFault:
        return [first]
    finally:
        source.close()
    others = entry_faults(data, limits)
    for other in others:
        other.offset = preamble.directory_offset + (other.offset or 0)
    met = {(fault.clause, fault.tensor) for fault in others}
    return others if (first.clause, first.tensor) in met else [first, *others]


def _validate_tensor(file: SfpFile, entry: TensorEntry, report: Report) -> None:
    """Decodes a tensor chunk by chunk, and adds its faults and notes to the report.

    Continues after a fault in a chunk, to report faults in later chunks too.
    """
    try:
        require_within_limits(file, entry)
        decoder = file.decoder(entry)
    except FileFault as error:
        report.faults.append(error)
        return
    before = len(report.faults)
    usage = {stream: _StreamUsage(table) for stream, table in entry.streams().items()}
    excess: list[tuple[str, str]] = []
    for k in range(len(entry.chunks)):
        try:
            data = file.read_checked(entry, k)
            with placed(tensor=entry.name, base=file.chunk_offset(entry, k)):
                chunk = decoder.open_chunk(data, k)
                lost = _decode_everything(decoder, chunk, usage)
                if lost:
                    report.not_finite[entry.name] = report.not_finite.get(entry.name, 0) + lost
                if chunk.index is not None and not excess:
                    excess = list(excess_in_index(chunk.data, entry, chunk.index))
        except FileFault as error:
            report.faults.append(error)
    if len(report.faults) == before:
        notes = [*excess, *_canonical_notes(entry, usage)]
        report.notes += [f"[{clause}] tensor {entry.name!r}: {words}" for clause, words in notes]


def _decode_everything(decoder: TensorDecoder, chunk: Chunk, usage: dict[str, _StreamUsage]) -> int:
    """Decodes all streams of a chunk and counts their symbols.

    Returns:
        The number of weights that are not finite; 0 if the quantiser is lossless.
    """
    segments = np.diff(decoder.entry.segments_of_chunk(chunk.k))[0]
    values = decoder.values(chunk, 0, int(segments))
    if chunk.index is None:
        return 0
    if decoder.entry.importance is not None:
        decoder.importance(chunk, 0, int(segments))
    trimmed = decoder.entry.trimmed_streams()
    for stream, counted in usage.items():
        levels = decoder.levels(chunk, stream, 0, int(segments))
        counts = chunk.index.counts[stream]
        counted.add(levels, counts, chunk.index.codes[stream], chunk.index.bits[stream, "prefix"])
        if stream in trimmed:
            counted.add_trims(levels, counts, chunk.index.trims[stream])
    fingerprints = decoder.entry.fingerprints
    if fingerprints is None or isinstance(fingerprints.quantiser, Exact):
        return 0
    return int(np.count_nonzero(~np.isfinite(values)))


class _StreamUsage:
    """Statistics of a stream: symbols of each code, levels, trims, and the order in which codes occur."""

    def __init__(self, table: CodeTable) -> None:
        self.table = table
        symbols = table.classes**table.group
        self.symbols = np.zeros((max(len(table.codes), 1), symbols), np.int64)
        self.is_best_window, self.escaped_inside = True, False
        self.first_use: list[int] = []
        self.numbers: Histogram = np.zeros(0, np.int64)
        self.levels = 0
        self.trims: tuple[int, int] | None = None  # sums of the written trims and of the greatest possible

    def add(
        self,
        levels: NDArray[np.uint64],
        counts: NDArray[np.int64],
        codes: NDArray[np.int64],
        prefix_bits: NDArray[np.int64],
    ) -> None:
        """Counts the levels of a chunk."""
        table = self.table
        self.levels += len(levels)
        if table.top <= 1 << 18:
            self.numbers = add_histograms(self.numbers, histogram(levels))
        for code in dict.fromkeys(codes.tolist()):
            if code not in self.first_use:
                self.first_use.append(code)
        symbols = symbols_of_classes(table.class_of(levels), counts, table.classes, table.group)
        if table.window is not None:
            self._compare_windows(symbols, counts, codes, prefix_bits, table.window)
            codes = np.zeros_like(codes)  # all symbols are counted in one row
        row = np.repeat(codes, symbol_counts(counts, table.group)) * self.symbols.shape[1]
        flat = np.bincount(row + symbols, minlength=self.symbols.size)
        self.symbols += flat.reshape(self.symbols.shape)

    def _compare_windows(
        self,
        classes: NDArray[np.integer],
        counts: NDArray[np.int64],
        windows: NDArray[np.int64],
        prefix_bits: NDArray[np.int64],
        width: int,
    ) -> None:
        """Compares the windows of a chunk's segments with the best ones, and their bits with the fewest."""
        segments = np.arange(len(counts))
        rows = np.zeros((len(counts), self.table.classes), np.int64)
        np.add.at(rows, (np.repeat(segments, counts), classes), 1)
        outside = levels_outside(rows, width)
        needed = counts * width + outside[segments, windows] * self.table.escape_bits
        self.is_best_window &= np.array_equal(outside.argmin(axis=1), windows)
        self.escaped_inside |= bool((prefix_bits > needed).any())

    def add_trims(
        self, levels: NDArray[np.uint64], counts: NDArray[np.int64], trims: NDArray[np.int64]
    ) -> None:
        """Adds the written trims of a chunk, and the greatest possible ones."""
        residuals = levels - self.table.first[self.table.class_of(levels)]
        possible = greatest_trims(residuals, counts, self.table.least_extra)
        before = self.trims or (0, 0)
        self.trims = before[0] + int(trims.sum()), before[1] + int(possible.sum())

    def notes(self) -> Iterator[tuple[str, str]]:
        """Yields each clause that the stream's table breaks, with the reason."""
        table = self.table
        if self.trims is not None and (self.trims[0] != self.trims[1] or not self.trims[0]):
            yield "R-CAN-009", f"segments trim {self.trims[0]} bits, but could trim {self.trims[1]}"
        if not self.levels:
            if table != EMPTY_TABLE:
                yield "R-CAN-006", "a stream without levels has a table"
            return
        numbers = np.flatnonzero(self.symbols.sum(0))
        used = np.concatenate([numbers // table.classes**j % table.classes for j in range(table.group)])
        if used.min() != 0 or used.max() != table.classes - 1:
            yield "R-CAN-006", "the first or the last class is not used"
        if not self.is_best_window:
            yield "R-CAN-010", "a segment has a window that does not contain most of its levels"
        elif self.escaped_inside:
            yield "R-CAN-011", "a level inside the window of its segment is escaped"
        if not table.codes:
            return
        for number, (code, counts) in enumerate(zip(table.codes, self.symbols, strict=True)):
            if not np.array_equal(np.frombuffer(code.length, np.uint8) > 0, counts > 0):
                yield "R-CAN-004", f"code {number} has codewords for symbols that do not occur"
            elif code.length not in (
                code_lengths(counts, MAX_CODE_BITS),
                code_lengths(counts, max(code.length)),
            ):
                yield "R-CAN-005", f"code {number} does not have the code lengths of the canonical algorithm"
        if self.first_use != sorted(self.first_use):
            yield "R-CAN-008", "the codes are not in the order of their first use"


def _canonical_notes(entry: TensorEntry, usage: dict[str, _StreamUsage]) -> Iterator[tuple[str, str]]:
    for stream, counted in usage.items():
        for clause, words in counted.notes():
            yield clause, f"{stream}: {words}"
    quantisers = {
        "fingerprints": (entry.fingerprints and entry.fingerprints.quantiser, 1),
        "importance": (entry.importance and entry.importance.quantiser, 0),
    }
    for stream, (quantiser, sign) in quantisers.items():
        if isinstance(quantiser, Quantiser) and quantiser.centroids:
            levels = usage[stream].numbers
            found = len(np.unique(np.flatnonzero(levels) >> sign))
            if max(found, 1) != quantiser.centroids:
                yield "R-CAN-007", f"{stream}: {found} of {quantiser.centroids} centroids are used"
