"""The interface of engines for arrays in CPU memory: their functions, and the types of the arguments.

`device_interface` has that of engines for the memory of a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..coding.bits import Bytes
from ..coding.changes import Bucket, Changes, ElementKind, Extent
from ..coding.classes import Histogram, Layout
from ..coding.codetable import CodeTable
from ..coding.counts import Costs, Rows
from ..coding.exact_encoding import Patterns
from ..coding.keyed.hashing import Keys
from ..coding.keyed.rows import FoundRows, RowCode
from ..coding.mask import Mask
from ..coding.planes import AnyLevels, Counts, Levels, Planes, StreamSpan
from ..coding.quantisers import F32
from ..container.entry import TensorEntry
from ..container.plain_entries import PlainTensors

# Where weights are written: an array, or an address in the memory of a device.
Out = TypeVar("Out", NDArray[Any], int)


class Run(NamedTuple, Generic[Out]):
    """A run of neighbouring segments of a chunk.

    Attributes:
        recipe: the tensor's recipe, from `make_recipe` of the engine.
        data: all bytes of the chunk, at least 64; its checksum has been verified.
        total: number of positions of the chunk.
        start: position in the tensor of the chunk's first position.
        first, stop: the first segment and one past the last, numbered within the chunk.
        out: array for the run's weights, contiguous, in the tensor's dtype; for a `DeviceQueue` the address
            of their memory on the device, a multiple of 4.
    """

    recipe: Any
    data: Bytes
    total: int
    start: int
    first: int
    stop: int
    out: Out


class DenseSurvey(NamedTuple):
    """Statistics of the levels of an exact stream, for choosing its classes and codes.

    Attributes:
        rows: how often each class from 0 occurs in each segment, int32 [segments, classes].
        totals: their sums over all segments, int64 [classes].
        zeros: see `coding.planes.shared_zeros`, int64 [segments].
        sampled: number of levels of the sample.
        widths: for each candidate width, finest first, of the sample's classes of that width: their entropy
            (see `coding.classes.entropies`), the number of used classes, and the first and last used class.
    """

    rows: Rows
    totals: Histogram
    zeros: Counts
    sampled: int
    widths: Sequence[Sequence[int]]


class PlainRuns(NamedTuple):
    """Whole chunks of plain tensors, as columns of int64 [m].

    Attributes:
        tensor: the index of each chunk's tensor.
        total: number of positions of the chunk.
        start: position in the tensor of the chunk's first position.
        length: size of the chunk in bytes.
        out, out_size: address and size in bytes of the array for its weights.
    """

    tensor: NDArray[np.int64]
    total: NDArray[np.int64]
    start: NDArray[np.int64]
    length: NDArray[np.int64]
    out: NDArray[np.int64]
    out_size: NDArray[np.int64]


class PlainPlan(Protocol):
    """An engine's plan for decoding the plain tensors of a file.

    Attributes:
        known: bool [n], whether the plan can decode each tensor.
    """

    known: NDArray[np.bool_]

    def prepare(self, runs: PlainRuns) -> Any:
        """Prepares chunks for `decode`; all must be of tensors that are `known`."""

    def decode(self, prepared: Any, regions: Sequence[tuple[int, int, Bytes]]) -> bool:
        """Decodes the weights of prepared chunks. Thread-safe.

        Args:
            prepared: the result of `prepare`.
            regions: regions of neighbouring chunks: index of the first, one past the last, and their bytes,
                concatenated. The checksums have been verified.

        Returns:
            False on any problem. The output is then undefined, and the caller falls back to
            `Engine.decode_runs`.
        """


class Engine(Protocol):
    """The functions of an engine."""

    name: str

    def decode_levels(self, data: Bytes, span: StreamSpan, table: CodeTable) -> Levels:
        """Implements `coding.planes.decode_levels`."""

    def few_magnitudes(self, patterns: Patterns, most: int) -> Patterns | None:
        """Implements `coding.magnitudes.few_magnitudes`."""

    def translate(
        self, patterns: Patterns, magnitudes: Patterns, meanings: NDArray[np.unsignedinteger]
    ) -> NDArray[np.unsignedinteger]:
        """Implements `coding.magnitudes.translate`."""

    def count_exact(self, patterns: Patterns, counts: Counts, width: int, first: int, classes: int) -> Rows:
        """Implements `coding.exact_encoding.count_exact`."""

    def exact_zeros(self, patterns: Patterns, counts: Counts) -> Counts:
        """Implements `coding.exact_encoding.exact_zeros`."""

    def survey_dense(
        self, patterns: Patterns, counts: Counts, chunk: int, width: int, fine: int, part: int, least: int
    ) -> DenseSurvey | None:
        """Counts the classes of an exact stream in one call; None if the engine has no such call.

        Args:
            patterns: bit patterns of 2 or 4 bytes, of all segments, at least one.
            counts: number of patterns of each segment.
            chunk: number of patterns of each chunk.
            width: residual bits of the counted classes, of which there are at most 2^10.
            fine: the least candidate width; there are no statistics of widths if it is ``width``.
            part, least: the sample has 1/part of each chunk, its first levels, but at least ``least``.
        """

    def encode_exact(
        self, patterns: Patterns, counts: Counts, codes: Counts, trims: Counts, table: CodeTable
    ) -> Planes:
        """Implements `coding.exact_encoding.encode_exact`."""

    def count_classes(self, levels: AnyLevels, counts: Counts, width: int, first: int, classes: int) -> Rows:
        """Implements `coding.counts.count_classes`."""

    def count_symbols(self, levels: AnyLevels, counts: Counts, layout: Layout, group: int) -> Rows:
        """Implements `coding.counts.count_symbols`."""

    def best_layout(self, counts: Histogram, signed: bool, bound: int, class_cost: int) -> Layout:
        """Implements `coding.classes.best_layout`."""

    def cluster(self, sample: Rows, order: NDArray[np.int64], most: int, segments: int) -> Costs:
        """Implements `coding.counts.cluster`."""

    def assign(self, rows: Rows, costs: Costs) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Implements `coding.counts.assign`."""

    def lengths_of_codes(self, totals: NDArray[np.int64], limit: int) -> NDArray[np.uint8]:
        """Implements `coding.counts.lengths_of_codes`."""

    def uniform_levels(
        self, weights: F32, factors: F32 | None, step: np.float32, thresholds: F32
    ) -> AnyLevels:
        """Implements `coding.quantisers.uniform_levels`."""

    def survivors(self, mask: Mask, positions: Counts) -> Counts:
        """Implements `coding.mask.survivors`."""

    def chosen(self, values: NDArray[Any], mask: Mask) -> NDArray[Any]:
        """Implements `coding.mask.chosen`."""

    def encode_mask(
        self, kind: str, polarity: int, mask: Mask, positions: Counts
    ) -> tuple[AnyLevels, Counts]:
        """Implements `coding.mask.encode_mask`."""

    def encode_levels(
        self, levels: AnyLevels, counts: Counts, codes: Counts, trims: Counts, table: CodeTable
    ) -> Planes:
        """Implements `coding.planes.encode_levels`."""

    def compare(self, base: Patterns, new: Patterns, kind: ElementKind, known: int) -> tuple[int, Extent]:
        """Returns the CRC-32 of ``new``, and the extent of the changes.

        Args:
            base, new: the elements of a tensor in the base and in the result, [n].
            kind: their kind.
            known: the CRC-32 of ``base``.
        """

    def find_changes(
        self, parts: Sequence[tuple[Patterns, Patterns]], kind: ElementKind, extent: Extent
    ) -> Changes | None:
        """Implements `coding.changes.find_changes`."""

    def crc32_with(self, base: Patterns, positions: NDArray[np.uint32], values: Patterns, known: int) -> int:
        """Implements `io.checksum.crc32_with`."""

    def place_changes(
        self,
        base: Patterns,
        kind: ElementKind,
        buckets: Bucket,
        gaps: NDArray[np.uint32],
        levels: Patterns,
        positions: NDArray[np.uint32],
        values: Patterns,
    ) -> int:
        """Implements `coding.changes.place_changes`."""

    def write_changes(self, elements: Patterns, positions: NDArray[np.uint32], values: Patterns) -> None:
        """Implements `coding.changes.write_changes`."""

    def hash_keys(self, keys: Keys, seed: int) -> NDArray[np.uint32]:
        """Implements `coding.keyed.hashing.hash_keys`."""

    def decode_rows(self, code: RowCode, bits: Bytes, positions: NDArray[np.int64]) -> FoundRows:
        """Implements `coding.keyed.rows.decode_rows`."""

    def solve_rows(
        self, positions: NDArray[np.int64], sizes: NDArray[np.int64], rows: Bytes, free: Bytes
    ) -> Bytes | None:
        """Implements `coding.keyed.equations.solve_rows`."""

    def make_recipe(self, entry: TensorEntry, vectors: dict[str, F32], weights: int) -> Any:
        """Returns the data that `decode_runs` needs for a tensor; None if the engine has no fast path for it.

        Args:
            weights: the approximate number of weights that will be decoded.
        """

    def decode_runs(self, runs: Sequence[Run[NDArray[Any]]]) -> list[bool]:
        """Fast path: decodes the weights of runs of segments in one call. No run's recipe may be None.

        Returns:
            For each run, whether its ``out`` holds the weights. False on any problem: ``out`` is then
            undefined, and the caller decodes the levels of that run, which raises the fault.
        """

    def plan_plain(self, tensors: PlainTensors) -> PlainPlan | None:
        """Returns a plan that decodes many plain tensors at once; None if the engine has none."""
