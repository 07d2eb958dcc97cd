"""Chooses masks, sources and code tables for a tensor with coding fingerprint.

A plan contains no levels. It has a source that makes the levels of any block of positions: once for the
histograms of the tables, and once for the bytes. This bounds the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from ..coding.mask import Mask
from ..coding.planes import AnyLevels, Counts
from ..coding.quantisers import F32, Exact, float_patterns, narrowest_exact
from ..container.entry import TensorEntry
from ..container.stream_maps import FingerprintsEntry, ImportanceEntry, MaskEntry
from ..dtypes import DTYPES, Dtype
from ..engines import Engine
from ..errors import OptionError
from ..io.threads import Workers
from ..options import ImportanceOptions, Lossless, Options
from .blocks import Blocks, CodedBlocks
from .codes import INDEX_BITS, LevelBlocks
from .exact_tables import choose_exact, takes_more_bits
from .finite import require_finite
from .importances import (
    ImportanceSource,
    Multiplier,
    StoredFactors,
    checked_factor,
    checked_importance,
    importance_source,
    require_finite_products,
)
from .level_sources import KINDS, MAX_DISTINCT, ExactSource, LossyTensor, Source, Survives, value_source
from .mask_tables import choose_mask
from .number_tables import choose_numbers
from .quantise import error_weights
from .scales import scaling_of
from .segments import DENSE, default_chunk, default_segment
from .zeros import zeros_of

Importance = NDArray[np.floating] | tuple[NDArray[np.floating], NDArray[np.floating]]
_NO_FACTORS = np.zeros(0, np.float32)
# Above this density, a mask is not tried: it could save a few parts in a thousand, and decoding it takes
# longer than decoding the rest.
NEARLY_ALL = 0.995
# If more than 1/_MANY_ZEROS of the weights are -0, a mask of +0 saves little: coding without a mask is tried
# for sparser tensors too. It must save 1/_MASK_WORTH of the size, because readers use the mask.
_MANY_ZEROS, _MASK_WORTH = 16, 50


@dataclass(frozen=True)
class Plan:
    """The planned encoding of a tensor.

    Attributes:
        entry: the directory entry, without chunk records.
        flat: the array, one-dimensional, C order.
        blocks: its chunks.
        coded: masks and fingerprint levels of the chunks; None for coding raw.
        codes: stream -> the code of each segment.
        vectors: name -> vector of the vector chunk.
        importance: the source of importance levels, or None.
        bits: estimate of the bits of the tensor.
    """

    entry: TensorEntry
    flat: NDArray[np.generic]
    blocks: Blocks
    coded: CodedBlocks | None = None
    codes: dict[str, NDArray[np.uint8]] = field(default_factory=dict)
    vectors: dict[str, NDArray[np.generic]] = field(default_factory=dict)
    importance: ImportanceSource | None = None
    bits: int = 0


class Planner:
    """Plans a tensor with coding fingerprint."""

    def __init__(
        self, raw: Plan, options: Options, engine: Engine, mask: Mask | None, workers: Workers
    ) -> None:
        self.workers = workers
        self.raw, self.flat, self.options, self.engine, self.given_mask = raw, raw.flat, options, engine, mask
        self.entry = replace(raw.entry, coding="fingerprint")

    def allowance(self) -> int:
        """Returns the number of bits that the options allow for mask and levels; 0 if they set none."""
        asked = self.options.lossy
        if asked is None:
            return 0
        return KINDS[asked.NAME].allowed_bits(asked, self.flat, self.given_mask)

    def without_loss(self) -> Planner:
        """Returns a planner for the same tensor with lossless options."""
        options = self.options.without_loss()
        return Planner(self.raw, options, self.engine, self.given_mask, self.workers)

    def plan(self, importance: Importance | None, at_most: int | None = None) -> tuple[Plan, int] | None:
        """Plans the tensor. For lossless options, returns the smallest of several plans.

        Args:
            importance: as in `plan_tensor`.
            at_most: the greatest number of bits, or None.

        Returns:
            The plan, and an estimate of its bits. None if the bits are more than ``at_most``, or if no step
            meets the error or the bits in the options.

        Raises:
            OptionError: the options do not fit the tensor.
        """
        stored = self._stored_importance(importance)
        found = self._smallest(self._sources(importance, stored), at_most)
        if found is not None and stored is not None:
            options = self.options.importance or ImportanceOptions()
            plan, more = self.with_importance(found[0], stored, options)
            found = plan, found[1] + more
        return None if found is not None and at_most is not None and found[1] > at_most else found

    def _smallest(self, sources: list[Source], at_most: int | None) -> tuple[Plan, int] | None:
        """Returns the smallest plan of all sources. Of equal plans, prefers the first source, and a mask.

        Returns None if there is no source, or if each certainly takes more than ``at_most`` bits.

        Plans the last source first. This is usually a table of all values, and so small that a lower bound on
        the bits of the other source, bit patterns, excludes that source without a plan.
        """
        best: tuple[Plan, int] | None = None
        for source in reversed(sources):
            bound = at_most if best is None else best[1]
            if bound is not None and self._is_larger(source, bound):
                continue
            plans = list(self._with_and_without_mask(source))
            found = min(plans, key=lambda plan: plan[1])
            if best is None or found[1] <= best[1]:
                best = found
        return best

    def _is_larger(self, source: Source, bits: int) -> bool:
        """Returns whether every plan of a source certainly takes more than ``bits`` bits.

        Only bit patterns in the tensor's own dtype have such a bound; False for other sources.
        """
        if not isinstance(source, ExactSource) or source.coded != source.dtype:
            return False
        patterns = float_patterns(self.flat, source.dtype)
        if self.given_mask is not None:
            patterns = np.where(self.given_mask, patterns, patterns.dtype.type(0))
        return takes_more_bits(patterns, source.dtype, bits, self.options, self.engine)

    def _stored_importance(self, importance: Importance | None) -> ImportanceSource | StoredFactors | None:
        """Returns the importance as it will be stored; None if none is stored.

        Raises:
            OptionError: it has another shape or cannot be stored, or its product with a weight is not finite
                in the tensor's dtype.
        """
        entry, options = self.entry, self.options.importance
        if importance is None or options is None:
            return None
        stored: ImportanceSource | StoredFactors
        if isinstance(importance, tuple):
            given = self._factors(importance, DTYPES[options.dtype])
            dtype = DTYPES[options.dtype].numpy
            stored = StoredFactors(*(f.astype(dtype).astype(np.float32) for f in (given.rows, given.columns)))
            products = given.stored
        else:
            if importance.shape != entry.shape:
                raise OptionError(f"the importance has shape {importance.shape}, not {entry.shape}")
            exact_weights = (self.flat, entry.dtype) if self.options.lossless else None
            stored = importance_source(importance, options, exact_weights)
            flat = stored.flat

            def products(where: slice | NDArray[np.int64]) -> F32:
                return flat[where]

        if options.role == "multiplier":
            exact = self.options.lossless
            self._require_finite_products(products, exact=exact)
            if exact and isinstance(stored, StoredFactors):
                self._require_finite_products(stored.stored, exact=True)
        return stored

    def _factors(
        self, factors: tuple[NDArray[np.floating], NDArray[np.floating]], dtype: Dtype
    ) -> StoredFactors:
        entry = self.entry
        if not entry.positions:  # an empty tensor's factors have no elements (SPEC.md 15.3)
            return StoredFactors(_NO_FACTORS, _NO_FACTORS)
        sizes = {"importance rows": entry.rows, "importance columns": entry.columns}
        return StoredFactors(
            *(checked_factor(name, f, n, dtype) for (name, n), f in zip(sizes.items(), factors, strict=True))
        )

    def _require_finite_products(self, multiplier: Multiplier, *, exact: bool) -> None:
        require_finite_products(self.flat, self.entry.dtype, multiplier, self.given_mask, exact=exact)

    def _sources(
        self, importance: Importance | None, stored: ImportanceSource | StoredFactors | None
    ) -> list[Source]:
        """Returns the possible sources of the tensor's levels.

        Args:
            importance: as given; may weight the errors.
            stored: as it will be stored; may multiply the weights.

        Raises:
            OptionError: the options do not fit the tensor.
        """
        flat, dtype, options = self.flat, self.entry.dtype, self.options
        asked = options.lossy
        if asked is None:
            # A narrower dtype does not allow coarse classes, so that it needs longer codes.
            narrow = options.narrow and options.code_limit >= 8
            magnitudes = self.engine.few_magnitudes(float_patterns(flat, dtype), MAX_DISTINCT)
            # The dtype does not depend on signs, so that the magnitudes suffice if they are few.
            all_values = flat if magnitudes is None else magnitudes.view(dtype.numpy)
            coded = narrowest_exact(all_values, dtype) if narrow else dtype
            sources: list[Source] = [ExactSource(flat, dtype, coded, magnitudes, self.engine)]
            if isinstance(options.quantiser, Lossless):
                values = value_source(flat, dtype, magnitudes, self.engine)
                sources += [] if values is None else [values]
            return sources
        require_finite(flat)
        scaling = scaling_of(flat, self.entry, asked, self.given_mask)
        if scaling is not None:
            self.entry = scaling.entry
        weights = None
        if asked.weighted:
            if not isinstance(importance, np.ndarray) or importance.shape != self.entry.shape:
                raise OptionError("weighted needs an importance of the tensor's shape")
            weights = error_weights(checked_importance(importance), asked.weighted)
        multiplier = None
        if stored is not None and options.importance is not None and options.importance.role == "multiplier":
            multiplier = stored.stored
        tensor = LossyTensor(flat, dtype, self.given_mask, scaling, weights, multiplier, self.engine)
        source = KINDS[asked.NAME].source(tensor, asked, fixed_width=options.fixed_width)
        return [] if source is None else [source]

    def _with_and_without_mask(self, source: Source) -> Iterator[tuple[Plan, int]]:
        """Yields plans with the mask of the options, or with and without a mask if both are reasonable."""
        kind, given = self.options.mask, self.given_mask
        if kind == "none":
            if given is not None and not given.all():
                raise OptionError("a mask was given and mask is 'none'")
            yield self.plan_streams(source.with_zero(), None, 1.0)
            return
        survives = source.survives if given is None else _survivors_of(given)
        alive = source.count_survivors() if given is None else int(np.count_nonzero(given))
        density = alive / len(self.flat) if len(self.flat) else 1.0
        optional = given is None and kind == "auto" and source.may_omit_mask(alive)
        if optional and DENSE < density <= NEARLY_ALL:
            source = source.with_cached_levels(self.workers)
        masked: tuple[Plan, int] | None = None
        if not (density == 1.0 and kind == "auto") and not (optional and density > NEARLY_ALL):
            masked = self.plan_streams(source, survives, density)
            yield masked
        if (optional and density > DENSE) or (density == 1.0 and kind == "auto"):
            yield self.plan_streams(source, None, 1.0)
        elif masked is not None and optional and self._has_many_negative_zeros(source):
            plain = self.plan_streams(source, None, 1.0)
            if plain[1] * _MASK_WORTH < masked[1] * (_MASK_WORTH - 1):
                yield plain

    def _has_many_negative_zeros(self, source: Source) -> bool:
        """Returns whether many weights are -0. They survive, so that a mask of only the +0 saves little."""
        return source.IS_LOSSLESS and zeros_of(self.flat).negative * _MANY_ZEROS > len(self.flat)

    def plan_streams(
        self,
        source: Source,
        survives: Survives | None,
        density: float,
    ) -> tuple[Plan, int]:
        """Plans one source, with or without a mask.

        Args:
            source: the source of the fingerprint levels.
            survives: returns the mask of a block; None for no mask.
            density: survivors per position; 1 without a mask.

        Returns:
            The plan, and an estimate of its bits.
        """
        options = self.options
        source = source.of_survivors(survives, self.given_mask)
        exact = isinstance(source.quantiser, Exact)
        segment = options.segment or default_segment(self.entry.columns, density, exact, options)
        chunk = default_chunk(self.entry.columns, segment, options)
        entry = replace(self.entry, segment=segment, chunk=chunk)
        blocks = Blocks(len(self.flat), segment, chunk)
        coded = CodedBlocks(source, survives, self.engine)
        codes, bits = {}, 8 * sum(v.size * v.dtype.itemsize for v in entry.vector_list())
        if survives is not None:
            chosen = choose_mask(blocks, coded.mask_levels, density, options, self.engine, self.workers)
            entry = replace(entry, mask=MaskEntry(chosen.kind, chosen.polarity, chosen.choice.table))
            codes["mask"] = chosen.choice.codes
            bits += chosen.choice.bits + INDEX_BITS * entry.segments

        def levels(block: slice, positions: Counts) -> tuple[AnyLevels, Counts]:
            survivors = coded.survivors(block, positions)
            return survivors.levels, survivors.counts

        quantiser = source.quantiser
        stream = LevelBlocks(entry.segments, blocks, levels, isinstance(quantiser, Exact), self.workers)
        bound = source.bound(entry.dtype)
        if isinstance(quantiser, Exact):
            choice = choose_exact(stream, quantiser.dtype, bound, options, self.engine)
            quantiser = replace(quantiser, trim=choice.trim)
        else:
            choice = choose_numbers(
                stream, bound, options, self.engine, signed=True, zero_first=source.has_zero_first
            )
        bits += 32 * quantiser.centroids
        codes["fingerprints"] = choice.codes
        entry = replace(entry, fingerprints=FingerprintsEntry(quantiser, choice.table))
        plan = Plan(entry, self.flat, blocks, coded, codes, dict(source.vectors()))
        return plan, bits + choice.bits

    def with_importance(
        self, plan: Plan, source: ImportanceSource | StoredFactors, options: ImportanceOptions
    ) -> tuple[Plan, int]:
        """Returns the plan with the importance added, and an estimate of the importance's bits."""
        entry = plan.entry
        if isinstance(source, StoredFactors):
            dtype = DTYPES[options.dtype]
            entry = replace(entry, importance=ImportanceEntry("factors", options.role, dtype=dtype))
            factors = {"importance rows": source.rows, "importance columns": source.columns}
            bits = 8 * dtype.itemsize * (entry.rows + entry.columns)
            return replace(plan, entry=entry, vectors={**plan.vectors, **factors}), bits

        def levels(block: slice, positions: Counts) -> tuple[AnyLevels, Counts]:
            assert plan.coded is not None
            counts = plan.coded.survivors(block, positions).counts if source.over_survivors else positions
            return source.levels(block, plan.coded.mask(block)), counts

        is_exact = isinstance(source.quantiser, Exact)
        stream = LevelBlocks(entry.segments, plan.blocks, levels, is_exact, self.workers)
        bound = source.quantiser.importance_bound()
        if isinstance(source.quantiser, Exact):
            choice = choose_exact(
                stream, source.quantiser.dtype, bound, self.options.but(mantissa_bits=None), self.engine
            )
        else:
            coded = self.options.but(fixed_width=False)  # fused kernels do not read the importance
            choice = choose_numbers(stream, bound, coded, self.engine, signed=False)
        quantiser = source.quantiser
        if isinstance(quantiser, Exact):
            quantiser = replace(quantiser, trim=choice.trim)
        record = ImportanceEntry(options.over, options.role, quantiser, choice.table)
        codes = {**plan.codes, "importance": choice.codes}
        plan = replace(plan, entry=replace(entry, importance=record), codes=codes, importance=source)
        return plan, choice.bits


def _survivors_of(mask: Mask) -> Callable[[slice], Mask]:
    return lambda block: mask[block]
