"""The interface of an engine: its functions, and the types of their arguments."""

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
        recipe: the tensor's recipe, from `Engine.make_recipe`.
        data: all bytes of the chunk, at least 64; its checksum has been verified.
        total: number of positions of the chunk.
        start: position in the tensor of the chunk's first position.
        first, stop: the first segment and one past the last, numbered within the chunk.
        out: array for the run's weights, contiguous, in the tensor's dtype.
    """

    recipe: Any
    data: Bytes
    total: int
    start: int
    first: int
    stop: int
    out: NDArray[Any]


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
        """Implements `coding.exact.count_exact`."""

    def exact_zeros(self, patterns: Patterns, counts: Counts) -> Counts:
        """Implements `coding.exact.exact_zeros`."""

    def encode_exact(
        self, patterns: Patterns, counts: Counts, codes: Counts, trims: Counts, table: CodeTable
    ) -> Planes:
        """Implements `coding.exact.encode_exact`."""

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

    def make_recipe(self, entry: TensorEntry, vectors: dict[str, F32], weights: int) -> Any:
        """Returns the data that `decode_runs` needs for a tensor; None if the engine has no fast path for it.

        Args:
            weights: the approximate number of weights that will be decoded.
        """

    def decode_runs(self, runs: Sequence[Run]) -> list[bool]:
        """Fast path: decodes the weights of runs of segments in one call. No run's recipe may be None.

        Returns:
            For each run, whether its ``out`` holds the weights. False on any problem: ``out`` is then
            undefined, and the caller decodes the levels of that run, which raises the fault.
        """

    def plan_plain(self, tensors: PlainTensors) -> PlainPlan | None:
        """Returns a plan that decodes many plain tensors at once; None if the engine has none."""
