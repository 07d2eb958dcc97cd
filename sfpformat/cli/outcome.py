"""Measures the bits and errors of changed tensors after a pack, beside the requested ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..coding.quantisers import F32, NumberQuantiser
from ..container.entry import TensorEntry
from ..decode.reader import SfpFile
from ..decode.tensor import scale_index
from ..dtypes import DTYPES
from ..encode.level_sources import KINDS
from ..encode.quantise import error_weights
from ..encode.zeros import with_positive_zeros
from ..names import listed, quoted
from ..options import LossyQuantiser, Options, Uniform
from .console import number
from .model_files import as_bits
from .pack_files import Job, is_quantised
from .prepare import Array, importance_of, prune_and_cast
from .report import TensorReport, report_tensor
from .rules import Pruning, TensorConfig

# Tolerance of the requested error: the encoder finds steps to 0.05 dB, and adds errors in another order.
_TOLERANCE_DB = 0.1
_BLOCK = 1 << 16  # weights per comparison; more do not fit in the cache as float64


class Errors(NamedTuple):
    """Sums of the squared errors of some weights, and of their squares before the changes."""

    error: float = 0.0
    power: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """The requested configuration of a tensor, and the result of encoding.

    Attributes:
        report: its sizes.
        asked: description of the requested configuration; empty for lossless.
        changes: description of the requested pruning and cast; empty without them.
        is_quantised: whether its weights are coded by a lossy quantiser.
        kept_lossless: whether quantisation was requested, but is not applied.
        is_weighted: whether the quantiser weights errors by an importance.
        coding: errors of quantising, against the weights after pruning and cast. Each term is multiplied by
            the weight of its error, if the quantiser has one.
        total: errors of all changes, against the input, over all positions.
        faults: descriptions of its faults; empty if its weights were not checked.
    """

    report: TensorReport
    asked: str
    is_quantised: bool
    kept_lossless: bool
    changes: str = ""
    is_weighted: bool = False
    coding: Errors | None = None
    total: Errors | None = None
    faults: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The tensor's name."""
        return self.report.entry.name

    @property
    def survivors(self) -> int:
        """The number of survivors; all positions if there is no mask."""
        found = self.report.survivors
        return self.report.entry.positions if found is None else found

    @property
    def level_bits(self) -> int:
        """The number of bits of the levels of all survivors."""
        return self.report.bits["fingerprints"] + self.report.bits["raw"]


def outcome(job: Job, asked: TensorConfig, file: SfpFile, name: str, *, compare: bool) -> Outcome:
    """Measures the outcome of one tensor.

    Args:
        job: the job that packed the tensor.
        asked: the requested configuration, before budgets were shared.
        file: the open file that holds the tensor.
        name: the tensor's name.
        compare: whether to check every weight. If false, only the mean error of a quantised tensor is
            measured.
    """
    quantised = is_quantised(asked.options, file.entry(name))
    words, changes = "" if asked.lossless else _words(asked), _words_of_changes(asked)
    kept_lossless = not asked.options.lossless and not quantised
    if not (quantised or changes or compare):
        return Outcome(report_tensor(file, name), words, False, kept_lossless)
    after = file.get_tensor(name)
    report = report_tensor(file, name, after)
    given = job.model.read(name)
    total = _errors(given, after) if changes else None
    before = prune_and_cast(name, given, job.configs[name], job.shares.get(name))  # prunes in place
    if not quantised:
        faults: tuple[str, ...] = ()
        if compare and not np.array_equal(as_bits(_as_written(before, asked.options)), as_bits(after)):
            faults = (f"tensor {quoted(name)} differs from the input",)
        return Outcome(report, words, False, kept_lossless, changes, total=total, faults=faults)
    weights = None
    quantiser = asked.options.lossy
    if quantiser is not None and quantiser.weighted is not None:
        importance = importance_of(name, job.importances)
        assert importance is not None
        weights = error_weights(importance.reshape(-1), quantiser.weighted)
    bound = _Bound.of(file, report.entry, weighted=weights is not None) if compare else None
    found = _compare(before.reshape(-1), after.reshape(-1), weights, bound)
    wrong = tuple(found.faults(name, quantiser)) if compare else ()
    coding = Errors(found.error, found.power)
    if total is None:
        total = coding if weights is None else _errors(before, after)
    return Outcome(report, words, True, False, changes, weights is not None, coding, total, wrong)


def _errors(before: Array, after: Array) -> Errors:
    """Returns the errors of all weights of a tensor."""
    found = _compare(before.reshape(-1), after.reshape(-1), None, None)
    return Errors(found.error, found.power)


def _as_written(array: Array, options: Options) -> Array:
    """Returns the expected result of lossless coding: unless ``zeros`` is ``keep``, -0 becomes +0."""
    if options.zeros == "keep":
        return array
    return with_positive_zeros(array.reshape(-1)).reshape(array.shape)


@dataclass
class _Comparison:
    """Sums over the weights of a quantised tensor.

    Attributes:
        error, power: same as for `Errors`; each term multiplied by the weight of its error.
        not_finite: number of finite weights that became infinite or NaN.
        alive: number of pruned weights that are not 0.
        far: number of weights whose error exceeds the bound.
    """

    error: float = 0.0
    power: float = 0.0
    not_finite: int = 0
    alive: int = 0
    far: int = 0

    def faults(self, name: str, asked: LossyQuantiser | None) -> Iterator[str]:
        """Yields descriptions of the faults. ``asked`` is the requested quantiser."""
        tensor = f"tensor {quoted(name)}"
        if self.not_finite:
            yield f"{tensor}: {self.not_finite:,} finite weights are infinite or NaN"
        if self.alive:
            yield f"{tensor}: {self.alive:,} pruned weights are not 0"
        if self.far:
            yield f"{tensor}: {self.far:,} weights have errors above the bound of the quantiser"
        error = decibels(self.error, self.power)
        most = asked.error_db if isinstance(asked, Uniform) else None
        if most is not None and error is not None and error > most + _TOLERANCE_DB:
            yield f"{tensor}: the error is {error:.2f} dB, above the requested {most:g} dB"


@dataclass(frozen=True)
class _Bound:
    """A bound on the error of each weight of a lossy quantiser.

    Attributes:
        entry: the tensor's entry.
        quantiser: its quantiser.
        centroids: its centroids, ascending, float64; None for a quantiser without centroids.
        factors: the scale factors, float64; None without a scale.
        weighted: whether errors were weighted by an importance.
    """

    entry: TensorEntry
    quantiser: NumberQuantiser
    centroids: NDArray[np.float64] | None
    factors: NDArray[np.float64] | None
    weighted: bool

    @classmethod
    def of(cls, file: SfpFile, entry: TensorEntry, *, weighted: bool) -> _Bound:
        """Reads the bound of a quantised tensor from its file."""
        assert entry.fingerprints is not None
        quantiser = entry.fingerprints.quantiser
        assert isinstance(quantiser, NumberQuantiser)
        vectors = file.decoder(entry).vectors
        centroids, factors = vectors.get("fingerprint centroids"), vectors.get("scale")
        return cls(entry, quantiser, _wide(centroids), _wide(factors), weighted)

    def errors(self, start: int, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Returns the greatest allowed error of each weight, float64. ``start`` is the first position."""
        magnitudes = np.abs(weights)
        scale = np.ones(len(weights))
        if self.factors is not None:
            scale = self.factors[scale_index(self.entry, np.arange(start, start + len(weights)))]
        moved = KINDS[self.quantiser.NAME].greatest_errors(
            self.quantiser,
            magnitudes,
            scale,
            self.centroids,
            self.entry.dtype.greatest,
            weighted=self.weighted,
        )
        # The encoder and the reader round a few times to float32, and once to the dtype.
        dtype, float32 = self.entry.dtype, DTYPES["F32"]
        mantissa_bits = dtype.bits - 1 - dtype.exponent_bits
        rounding = (magnitudes + moved) * (2.0 ** -(mantissa_bits + 1) + 2.0**-20)
        return np.asarray(moved + rounding + dtype.least + 2 * float32.least * (1 + scale), np.float64)


def _wide(vector: F32 | None) -> NDArray[np.float64] | None:
    return None if vector is None else vector.astype(np.float64)


def _compare(
    before: NDArray[np.generic],
    after: NDArray[np.generic],
    weights: NDArray[np.float32] | None,
    bound: _Bound | None,
) -> _Comparison:
    """Compares the weights of a quantised tensor. Without a bound, only sums the errors."""
    out = _Comparison()
    for start in range(0, before.size, _BLOCK):
        block = slice(start, start + _BLOCK)
        was, is_now = before[block].astype(np.float64), after[block].astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            moved = is_now - was
            errors, squares = np.square(moved), np.square(was)
            if bound is not None:
                out.far += int(np.count_nonzero(np.abs(moved) > bound.errors(start, was)))
                out.not_finite += int(np.count_nonzero(np.isfinite(was) & ~np.isfinite(is_now)))
                out.alive += int(np.count_nonzero((was == 0) & (is_now != 0)))
        if weights is not None:
            errors, squares = errors * weights[block], squares * weights[block]
        out.error += float(errors.sum())
        out.power += float(squares.sum())
    return out


def decibels(error: float, power: float) -> float | None:
    """Returns 10 log10 of an error over a power; None if one of them is 0 or not finite."""
    if not (0 < error < math.inf and 0 < power < math.inf):
        return None
    return 10 * math.log10(error / power)


def _words(config: TensorConfig) -> str:
    """Describes a configuration: ``4 bits per survivor, 50 % pruned``."""
    asked, changes = config.options.lossy, _words_of_changes(config)
    if asked is None:
        return changes
    words = f"{asked.describe()}{' over all' if config.shares_bits else ''}"
    return f"{words}, {changes}" if changes else words


def _words_of_changes(config: TensorConfig) -> str:
    """Describes pruning and cast: ``50 % pruned, cast to F16``. Empty without them."""
    pruned = [] if config.pruning is None else [_pruned(config.pruning)]
    return ", ".join(pruned + ([] if config.cast is None else [f"cast to {config.cast.name}"]))


def _pruned(pruning: Pruning) -> str:
    return f"{pruning.keep}:{pruning.of} pruned" if pruning.of else f"{100 * pruning.fraction:g} % pruned"


# ------------------------------------------------------------------------------------------ several tensors


@dataclass(frozen=True)
class Group:
    """Tensors that were changed in the same way.

    Attributes:
        asked: description of the requested configuration that was applied, not empty.
        members: their outcomes, at least one.
    """

    asked: str
    members: list[Outcome]

    @property
    def bits_per_survivor(self) -> float | None:
        """Bits of the levels per survivor; None if there are no survivors."""
        survivors = sum(member.survivors for member in self.members)
        return sum(member.level_bits for member in self.members) / survivors if survivors else None

    @property
    def bits_per_position(self) -> float | None:
        """Bits of all chunks per position, with the index and without importances; None without positions."""
        positions = sum(member.report.entry.positions for member in self.members)
        stored = 8 * sum(member.report.entry.stored_bytes for member in self.members)
        return (stored - self.importance_bits) / positions if positions else None

    @property
    def importance_bits(self) -> int:
        """Bits of the importances stored with the weights."""
        return sum(member.report.bits["importance"] for member in self.members)

    @property
    def error_db(self) -> float | None:
        """The error of quantising the survivors, in dB, weighted if the quantiser weights errors.

        None if nothing is quantised, or if the error is 0 or not finite.
        """
        return _decibels(member.coding for member in self.members)

    @property
    def total_error_db(self) -> float | None:
        """The error of all changes over all positions, in dB; None if it is 0 or not finite."""
        return _decibels(member.total for member in self.members)

    def line(self) -> str:
        """Returns the summary line."""
        tensors = f"{len(self.members):,} tensor{'s' if len(self.members) > 1 else ''}"
        importances = " without the importances" if self.importance_bits else ""
        return (
            f"{self.asked}: {tensors} with {number(self.bits_per_survivor, 3)} bits per survivor, "
            f"{number(self.bits_per_position, 3)} per position{importances}, {self._errors()}"
        )

    def _errors(self) -> str:
        """Describes the error of all changes and, if it differs, the error of quantising."""
        over_all = f"error {number(self.total_error_db, 2, ' dB')}"
        first = self.members[0]
        kinds = ["weighted"] * first.is_weighted + ["of the survivors"] * bool(first.changes)
        if not first.is_quantised or not kinds:
            return over_all
        return f"{over_all} ({', '.join(kinds)} {number(self.error_db, 2, ' dB')})"

    def to_json(self) -> dict[str, object]:
        """Returns the figures as JSON values."""
        return {
            "asked": self.asked,
            "tensors": [member.name for member in self.members],
            "bits_per_survivor": self.bits_per_survivor,
            "bits_per_position": self.bits_per_position,
            "importance_bits": self.importance_bits,
            "error_db": self.error_db,
            "total_error_db": self.total_error_db,
        }


def _decibels(parts: Iterable[Errors | None]) -> float | None:
    """Returns `decibels` of the sums; None if there are none."""
    found = [part for part in parts if part is not None]
    return decibels(sum(part.error for part in found), sum(part.power for part in found))


def groups(outcomes: Iterable[Outcome], *, quantised: bool) -> list[Group]:
    """Groups changed tensors by the configuration that was applied.

    Args:
        outcomes: the outcomes of all tensors.
        quantised: whether to return the quantised tensors, or those that were only pruned or cast.
    """
    found: dict[str, list[Outcome]] = {}
    for each in outcomes:
        applied = each.asked if quantised else each.changes
        if each.is_quantised == quantised and applied:
            found.setdefault(applied, []).append(each)
    return [Group(applied, members) for applied, members in found.items()]


def lines(outcomes: list[Outcome]) -> Iterator[str]:
    """Yields the summary lines: requested configurations and results."""
    for quantised in (True, False):
        for group in groups(outcomes, quantised=quantised):
            yield group.line()
    kept = [each.name for each in outcomes if each.kept_lossless]
    if kept:
        why = "because lossless coding takes no more bits, or because no step meets the error"
        yield f"{len(kept):,} not quantised, {why}: {listed(kept, 3)}"
