"""What an engine is: the functions that every one of them has, and what they are given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from numpy.typing import NDArray

from ..coding.bits import Bytes
from ..coding.codetable import CodeTable
from ..coding.planes import Counts, Levels, Planes, StreamSpan
from ..coding.quantiser import F32
from ..container.entry import TensorEntry


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


class Engine(Protocol):
    """What an engine does."""

    name: str

    def decode_levels(self, data: Bytes, span: StreamSpan, table: CodeTable) -> Levels:
        """As `coding.planes.decode_levels`."""

    def encode_levels(
        self, levels: Levels, counts: Counts, codes: Counts, trims: Counts, table: CodeTable
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
