"""Plans the encoding of a tensor whose mask, levels, importance and vectors are given (SPEC.md 28.4)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from ..coding.mask import Mask
from ..coding.planes import AnyLevels
from ..coding.quantisers import Exact, Quantiser, levels_to_patterns, narrowest_exact
from ..container.delta_parts import Structure
from ..decode.parts import Parts
from ..engines import Engine
from ..io.threads import Workers
from ..limits import DEFAULT_LIMITS, Limits
from ..options import ImportanceOptions, Options
from .blocks import Blocks
from .importances import ImportanceSource, StoredFactors
from .level_sources import ExactSource, Source
from .plan import raw_entry, require_readable, within_expansion
from .planner import Plan, Planner


@dataclass(frozen=True)
class GivenSource(Source):
    """The given levels of a quantiser that has numbers.

    Attributes:
        parts: the tensor.
    """

    parts: Parts

    IS_LOSSLESS: ClassVar[bool] = False

    @property
    def positions(self) -> int:
        return len(self.parts.weights)

    @property
    def quantiser(self) -> Quantiser:
        assert self.parts.entry.fingerprints is not None
        return self.parts.entry.fingerprints.quantiser

    def survives(self, block: slice) -> Mask:
        return self.parts.survivors[block]

    def levels(self, block: slice, mask: Mask | None) -> AnyLevels:
        levels = self.parts.levels(block)  # the mask of a block is that of the parts
        return levels.astype(np.min_scalar_type(int(levels.max(initial=0))))


@dataclass(frozen=True)
class GivenImportance(ImportanceSource):
    """The given levels of an importance.

    Attributes:
        parts: the tensor.
    """

    parts: Parts | None = None

    def levels(self, block: slice, mask: Mask | None) -> AnyLevels:
        """Returns the levels of a block; for `exact`, bit patterns."""
        assert self.parts is not None
        levels = self.parts.importance_levels(block)
        assert levels is not None
        if isinstance(self.quantiser, Exact):
            return levels_to_patterns(levels, self.quantiser.dtype)
        return levels.astype(np.min_scalar_type(int(levels.max(initial=0))))


def plan_parts(
    name: str,
    parts: Parts,
    engine: Engine,
    limits: Limits = DEFAULT_LIMITS,
    workers: Workers | None = None,
) -> Plan:
    """Chooses how a tensor is encoded that is given in parts.

    Args:
        name: the tensor's name.
        parts: the tensor. `Parts.require_valid` accepts it.
        engine: the engine that counts.
        limits: the limits of readers.
        workers: threads that make and count levels; None uses the calling thread.

    Raises:
        OptionError: a reader would refuse the tensor.
    """
    structure, flat = parts.structure, parts.weights.view(parts.structure.weights.numpy)
    options = _options_of(structure)
    entry = replace(raw_entry(name, structure.dtype, parts.shape, options), scale=structure.scale)
    raw = Plan(entry, flat, Blocks(len(flat), entry.segment, entry.chunk))
    planner = Planner(raw, options, engine, None, workers or Workers())
    source: Source = GivenSource(parts)
    if structure.quantiser == Exact.NAME:
        coded = narrowest_exact(flat[parts.survivors], structure.dtype)
        source = ExactSource(flat, structure.dtype, coded, None, engine)

    def survives(block: slice) -> Mask:
        return parts.survivors[block]

    density = np.count_nonzero(parts.survivors) / max(len(flat), 1)
    plan, bits = planner.plan_streams(source, survives if structure.masked else None, density)
    if options.importance is not None:
        plan, more = planner.with_importance(plan, _importance_of(parts), options.importance)
        bits += more
    plan = replace(plan, vectors=dict(parts.named_vectors))
    require_readable(plan)
    return within_expansion(replace(plan, bits=bits), limits)


def _options_of(structure: Structure) -> Options:
    own = structure.importance
    if own is None:
        return Options(importance=None)
    over = "all" if own.over == "factors" else own.over  # not used for factors
    dtype = "F32" if own.dtype is None else own.dtype.name
    return Options(importance=ImportanceOptions(role=own.role, over=over, dtype=dtype))


def _importance_of(parts: Parts) -> ImportanceSource | StoredFactors:
    own = parts.structure.importance
    assert own is not None
    if own.quantiser is None:
        vectors = parts.named_vectors
        return StoredFactors(vectors["importance rows"], vectors["importance columns"])
    assert parts.entry.importance is not None
    quantiser = parts.entry.importance.quantiser
    assert quantiser is not None
    return GivenImportance(np.zeros(0, np.float32), quantiser, own.over == "survivors", parts=parts)
