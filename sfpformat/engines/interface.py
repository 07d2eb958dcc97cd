"""What an engine is: the functions that every one of them has, and what they are given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ..coding.bits import Bytes
from ..coding.classes import Histogram, Layout
from ..coding.codetable import CodeTable
from ..coding.counts import Costs, Rows
from ..coding.exact import Patterns
from ..coding.mask import Mask
from ..coding.planes import AnyLevels, Counts, Levels, Planes, StreamSpan
from ..coding.quantisers import F32
from ..container.entry import TensorEntry
from ..container.plain import PlainTensors


class Run(NamedTuple):
    """A run of neighbouring segments of a chunk.

    Attributes:
        recipe: the tensor's, of `Engine.make_recipe`.
        data: all bytes of the chunk, its checksum compared; at least 64.
        total: positions of the chunk.
        start: position in the tensor of the chunk's first.
        first, stop: the run, numbered within the chunk.
        out: the run's positions, contiguous, in the tensor's dtype.
    """

    recipe: Any
    data: Bytes
    total: int
    start: int
    first: int
    stop: int
    out: NDArray[Any]


class PlainRuns(NamedTuple):
    """Whole chunks of plain tensors, in columns, int64 [m].

    Attributes:
        tensor: the number of each one's tensor.
        total: its positions.
        start: position in the tensor of its first.
        length: its bytes.
        out, out_size: address and bytes of where its weights go.
    """

    tensor: NDArray[np.int64]
    total: NDArray[np.int64]
    start: NDArray[np.int64]
    length: NDArray[np.int64]
    out: NDArray[np.int64]
    out_size: NDArray[np.int64]


class PlainPlan(Protocol):
    """How an engine decodes the plain tensors of a file.

    Attributes:
        known: bool [n], which of them.
    """

    known: NDArray[np.bool_]

    def prepare(self, runs: PlainRuns) -> Any:
        """What `decode` needs of some chunks of tensors that it knows."""

    def decode(self, prepared: Any, regions: Sequence[tuple[int, int, Bytes]]) -> bool:
        """The weights of some of the chunks that were prepared; used by any number of threads.

        Args:
            prepared: of `prepare`.
            regions: the number of the first of neighbouring chunks, that behind the last, and the bytes of
                all of them one after another; their checksums were compared.

        Returns:
            Whether all is well. If not, what was written means nothing, and the caller goes the way of
            `Engine.decode_runs`, which gives the weights or the fault.
        """


class Engine(Protocol):
    """What an engine does."""

    name: str

    def decode_levels(self, data: Bytes, span: StreamSpan, table: CodeTable) -> Levels:
        """As `coding.planes.decode_levels`."""

    def few_magnitudes(self, patterns: Patterns, most: int) -> Patterns | None:
        """As `coding.magnitudes.few_magnitudes`."""

    def translate(
        self, patterns: Patterns, magnitudes: Patterns, meanings: NDArray[np.unsignedinteger]
    ) -> NDArray[np.unsignedinteger]:
        """As `coding.magnitudes.translate`."""

    def count_exact(self, patterns: Patterns, counts: Counts, width: int, first: int, classes: int) -> Rows:
        """As `coding.exact.count_exact`."""

    def exact_zeros(self, patterns: Patterns, counts: Counts) -> Counts:
        """As `coding.exact.exact_zeros`."""

    def encode_exact(
        self, patterns: Patterns, counts: Counts, codes: Counts, trims: Counts, table: CodeTable
    ) -> Planes:
        """As `coding.exact.encode_exact`."""

    def count_classes(self, levels: AnyLevels, counts: Counts, width: int, first: int, classes: int) -> Rows:
        """As `coding.counts.count_classes`."""

    def count_symbols(self, levels: AnyLevels, counts: Counts, layout: Layout, group: int) -> Rows:
        """As `coding.counts.count_symbols`."""

    def best_layout(self, counts: Histogram, signed: bool, bound: int, class_cost: int) -> Layout:
        """As `coding.classes.best_layout`."""

    def cluster(self, sample: Rows, order: NDArray[np.int64], most: int, segments: int) -> Costs:
        """As `coding.counts.cluster`."""

    def assign(self, rows: Rows, costs: Costs) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """As `coding.counts.assign`."""

    def lengths_of_codes(self, totals: NDArray[np.int64], limit: int) -> NDArray[np.uint8]:
        """As `coding.counts.lengths_of_codes`."""

    def uniform_levels(
        self, weights: F32, factors: F32 | None, step: np.float32, thresholds: F32
    ) -> AnyLevels:
        """As `coding.quantiser.uniform_levels`."""

    def survivors(self, mask: Mask, positions: Counts) -> Counts:
        """As `coding.mask.survivors`."""

    def chosen(self, values: NDArray[Any], mask: Mask) -> NDArray[Any]:
        """As `coding.mask.chosen`."""

    def encode_mask(
        self, kind: str, polarity: int, mask: Mask, positions: Counts
    ) -> tuple[AnyLevels, Counts]:
        """As `coding.mask.encode_mask`."""

    def encode_levels(
        self, levels: AnyLevels, counts: Counts, codes: Counts, trims: Counts, table: CodeTable
    ) -> Planes:
        """As `coding.planes.encode_levels`."""

    def make_recipe(self, entry: TensorEntry, vectors: dict[str, F32], weights: int) -> Any:
        """What `decode_runs` needs of a tensor; None where this engine leaves its weights to the levels.

        Args:
            weights: about how many will be decoded.
        """

    def decode_runs(self, runs: Sequence[Run]) -> list[bool]:
        """The weights of some runs of segments, in one go; each has a recipe that is not None.

        Returns:
            For each run whether its ``out`` now has the weights. If not, ``out`` means nothing, and the
            caller goes the way of levels, which gives the weights or the fault.
        """

    def plan_plain(self, tensors: PlainTensors) -> PlainPlan | None:
        """How it decodes plain tensors many at once; None where it does not."""
