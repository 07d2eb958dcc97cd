"""What became of the tensors that a pack quantises: bits and errors as met, beside what was asked for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..coding.quantisers import F32, Table, Uniform
from ..container.entry import TensorEntry
from ..decode.reader import SfpFile
from ..decode.tensor import scale_index
from ..dtypes import DTYPES
from ..encode.quantise import error_weights
from ..encode.zeros import with_positive_zeros
from ..names import listed, quoted
from ..options import Options
from .console import number
from .models import as_bits
from .packing import Job, is_quantised
from .report import TensorReport, report_tensor
from .rules import Pruning, Treatment
from .treat import Array, importance_of, treated

# By how much an error may miss the one asked for: steps are chosen to 0.05 dB, sums differ in their order.
TOLERANCE_DB = 0.1
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Outcome:
    """One tensor as asked for and as met.

    Attributes:
        report: its sizes.
        asked: what was to be done to it; empty where it was to stay as it is.
        is_quantised: whether its weights are numbers of a lossy quantiser.
        kept_lossless: whether it was to be quantised, and is not.
        error, power: sums of the squared errors and of the squares of what is left after pruning, weighed as
            the quantiser weighed them.
        faults: what is wrong with it, in words.
    """

    report: TensorReport
    asked: str
    is_quantised: bool
    kept_lossless: bool
    error: float = 0.0
    power: float = 0.0
    faults: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of the tensor."""
        return self.report.entry.name

    @property
    def survivors(self) -> int:
        """How many positions are left; all where there is no mask."""
        found = self.report.survivors
        return self.report.entry.positions if found is None else found

    @property
    def level_bits(self) -> int:
        """Bits of the levels of all survivors."""
        return self.report.bits["fingerprints"] + self.report.bits["raw"]


def outcome(job: Job, asked: Treatment, file: SfpFile, name: str, *, compare: bool) -> Outcome:
    """The outcome of one tensor.

    Args:
        job: which it is part of.
        asked: what was to be done to the tensor, before budgets were shared.
        file: that has the tensor, open.
        name: of the tensor.
        compare: whether to compare weight by weight. Without it, only the mean error of a quantised tensor is
            measured.
    """
    report = report_tensor(file, name)
    quantised = is_quantised(asked.options, report.entry)
    words = "" if asked.lossless else _words(asked)
    kept_lossless = not asked.options.lossless and not quantised
    if not quantised and not compare:
        return Outcome(report, words, False, kept_lossless)
    before = treated(name, job.model.read(name), job.treatments[name], job.shares.get(name))
    after = file.get_tensor(name)
    if not quantised:
        before = _as_written(before, asked.options)
        same = np.array_equal(as_bits(before), as_bits(after))
        faults = () if same else (f"tensor {quoted(name)} is not what it was",)
        return Outcome(report, words, False, kept_lossless, faults=faults)
    weights = None
    if asked.options.weighted is not None:
        importance = importance_of(name, job.importances)
        assert importance is not None
        weights = error_weights(importance.reshape(-1), asked.options.weighted)
    bound = _Bound.of(file, report.entry, weighted=weights is not None) if compare else None
    found = _compare(before.reshape(-1), after.reshape(-1), weights, bound)
    wrong = tuple(found.faults(name, asked.options))
    return Outcome(report, words, True, False, found.error, found.power, wrong)


def _as_written(array: Array, options: Options) -> Array:
    """A tensor as it must come back from lossless coding."""
    if options.zeros == "keep":
        return array
    return with_positive_zeros(array.reshape(-1)).reshape(array.shape)


@dataclass
class _Comparison:
    """Sums over the weights of a quantised tensor.

    Attributes:
        error, power: as of `Outcome`.
        not_finite: finite weights that are not finite any more.
        alive: pruned weights that are not 0.
        far: weights that moved further than `_Bound` allows.
    """

    error: float = 0.0
    power: float = 0.0
    not_finite: int = 0
    alive: int = 0
    far: int = 0

    def faults(self, name: str, options: Options) -> Iterator[str]:
        """What is wrong, in words."""
        tensor = f"tensor {quoted(name)}"
        if self.not_finite:
            yield f"{tensor}: {self.not_finite:,} finite weights are infinite or NaN"
        if self.alive:
            yield f"{tensor}: {self.alive:,} pruned weights are not 0"
        if self.far:
            yield f"{tensor}: {self.far:,} weights moved further than the quantiser may move them"
        error = decibels(self.error, self.power)
        if options.error_db is not None and error is not None and error > options.error_db + TOLERANCE_DB:
            yield f"{tensor}: the error is {error:.2f} dB, not {options.error_db:g} dB"


@dataclass(frozen=True)
class _Bound:
    """How far a lossy quantiser may move each weight.

    Of a step: less than one step, as the nearest multiple or the next below is taken; where errors are
    weighed, a weight may also become 0. Of a table: to the nearest centroid whose product is finite.

    Attributes:
        entry: of the tensor.
        quantiser: its quantiser.
        centroids: of a table, ascending, float64; else None.
        factors: of the scale, float64; None where there is none.
        weighted: whether errors were weighed by an importance.
    """

    entry: TensorEntry
    quantiser: Uniform | Table
    centroids: NDArray[np.float64] | None
    factors: NDArray[np.float64] | None
    weighted: bool

    @classmethod
    def of(cls, file: SfpFile, entry: TensorEntry, *, weighted: bool) -> _Bound:
        """The bound of a quantised tensor of a file."""
        assert entry.fingerprints is not None
        quantiser = entry.fingerprints.quantiser
        assert isinstance(quantiser, (Uniform, Table))
        vectors = file.decoder(entry).vectors
        centroids, factors = vectors.get("fingerprint centroids"), vectors.get("scale")
        return cls(entry, quantiser, _wide(centroids), _wide(factors), weighted)

    def errors(self, start: int, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """The greatest error of each weight; ``start``: the position of the first one."""
        magnitudes = np.abs(weights)
        scale = np.ones(len(weights))
        if self.factors is not None:
            scale = self.factors[scale_index(self.entry, np.arange(start, start + len(weights)))]
        if self.centroids is None:
            assert isinstance(self.quantiser, Uniform)
            moved = float(self.quantiser.step) * scale
            moved = np.maximum(moved, magnitudes) if self.weighted else moved
        else:
            moved = self._to_nearest(magnitudes, scale)
        # What the arithmetic of encoder and reader adds: some roundings to float32, one to the dtype.
        dtype, float32 = self.entry.dtype, DTYPES["F32"]
        mantissa_bits = dtype.bits - 1 - dtype.exponent_bits
        rounding = (magnitudes + moved) * (2.0 ** -(mantissa_bits + 1) + 2.0**-20)
        return np.asarray(moved + rounding + dtype.least + 2 * float32.least * (1 + scale), np.float64)

    def _to_nearest(self, magnitudes: NDArray[np.float64], scale: NDArray[np.float64]) -> NDArray[np.float64]:
        assert self.centroids is not None
        safe = np.where(scale > 0, scale, 1.0)
        # The greatest centroid of each weight whose product is finite; without one, the least.
        with np.errstate(over="ignore"):
            greatest, wanted = self.entry.dtype.greatest / safe, magnitudes / safe
        last = np.maximum(np.searchsorted(self.centroids, greatest, side="right") - 1, 0)
        above = np.minimum(np.searchsorted(self.centroids, wanted), last)
        below = np.maximum(above - 1, 0)
        errors = [np.abs(self.centroids[index] * scale - magnitudes) for index in (above, below)]
        return np.asarray(np.minimum(*errors), np.float64)


def _wide(vector: F32 | None) -> NDArray[np.float64] | None:
    return None if vector is None else vector.astype(np.float64)


def _compare(
    before: NDArray[np.generic],
    after: NDArray[np.generic],
    weights: NDArray[np.float32] | None,
    bound: _Bound | None,
) -> _Comparison:
    out = _Comparison()
    for start in range(0, before.size, _BLOCK):
        block = slice(start, start + _BLOCK)
        was, is_now = before[block].astype(np.float64), after[block].astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            moved = is_now - was
            errors, squares = np.square(moved), np.square(was)
            out.far += 0 if bound is None else int(np.count_nonzero(np.abs(moved) > bound.errors(start, was)))
        out.not_finite += int(np.count_nonzero(np.isfinite(was) & ~np.isfinite(is_now)))
        out.alive += int(np.count_nonzero((was == 0) & (is_now != 0)))
        if weights is not None:
            errors, squares = errors * weights[block], squares * weights[block]
        out.error += float(errors.sum())
        out.power += float(squares.sum())
    return out


def decibels(error: float, power: float) -> float | None:
    """10 log10 of an error over a power; None where one of them is 0 or not finite."""
    if not (0 < error < math.inf and 0 < power < math.inf):
        return None
    return 10 * math.log10(error / power)


def _words(treatment: Treatment) -> str:
    """What is asked for, in words: ``4 bits a survivor, 50 % pruned``."""
    options, pruning = treatment.options, treatment.pruning
    words = []
    if options.bits is not None:
        words.append(f"{options.bits:g} bits a survivor")
    if options.budget is not None:
        words.append(f"{options.budget:g} bits a position{' together' if treatment.shares_bits else ''}")
    if options.error_db is not None:
        words.append(f"{options.error_db:g} dB")
    if options.step is not None:
        words.append(f"step {options.step:g}")
    if options.centroids is not None:
        words.append(f"table of {options.centroids}")
    if pruning is not None:
        words.append(_pruned(pruning))
    if treatment.cast is not None:
        words.append(treatment.cast.name)
    return ", ".join(words)


def _pruned(pruning: Pruning) -> str:
    return f"{pruning.keep}:{pruning.of} pruned" if pruning.of else f"{100 * pruning.fraction:g} % pruned"


# ------------------------------------------------------------------------------------------ several tensors


@dataclass(frozen=True)
class Group:
    """Tensors that were quantised by the same words.

    Attributes:
        asked: the words.
        members: their outcomes, at least one.
    """

    asked: str
    members: list[Outcome]

    @property
    def bits_per_survivor(self) -> float | None:
        """Bits of the levels for each survivor; None where there is no survivor."""
        survivors = sum(member.survivors for member in self.members)
        return sum(member.level_bits for member in self.members) / survivors if survivors else None

    @property
    def bits_per_position(self) -> float | None:
        """Bits of all chunks, index included and importances not, for each position."""
        positions = sum(member.report.entry.positions for member in self.members)
        stored = 8 * sum(member.report.entry.stored_bytes for member in self.members)
        return (stored - self.importance_bits) / positions if positions else None

    @property
    def importance_bits(self) -> int:
        """Bits of the importances that come with the weights."""
        return sum(member.report.bits["importance"] for member in self.members)

    @property
    def error_db(self) -> float | None:
        """The error over all of them."""
        return decibels(sum(m.error for m in self.members), sum(m.power for m in self.members))

    def line(self) -> str:
        """In words."""
        tensors = f"{len(self.members):,} tensor{'s' if len(self.members) > 1 else ''}"
        importances = " without the importances" if self.importance_bits else ""
        return (
            f"{self.asked}: {tensors} with {number(self.bits_per_survivor, 3)} bits a survivor, "
            f"{number(self.bits_per_position, 3)} a position{importances}, "
            f"error {number(self.error_db, 2, ' dB')}"
        )

    def to_json(self) -> dict[str, object]:
        """For a machine."""
        return {
            "asked": self.asked,
            "tensors": [member.name for member in self.members],
            "bits_per_survivor": self.bits_per_survivor,
            "bits_per_position": self.bits_per_position,
            "importance_bits": self.importance_bits,
            "error_db": self.error_db,
        }


def groups(outcomes: Iterable[Outcome]) -> list[Group]:
    """The quantised tensors, by what was asked for."""
    found: dict[str, list[Outcome]] = {}
    for each in outcomes:
        if each.is_quantised:
            found.setdefault(each.asked, []).append(each)
    return [Group(asked, members) for asked, members in found.items()]


def lines(outcomes: list[Outcome]) -> Iterator[str]:
    """What was asked for and what was met, in words."""
    for group in groups(outcomes):
        yield group.line()
    kept = [each.name for each in outcomes if each.kept_lossless]
    if kept:
        why = "because that takes no more bits than asked for, or no step meets the error"
        yield f"{len(kept):,} kept lossless, {why}: {listed(kept, 3)}"
