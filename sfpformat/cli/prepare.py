"""Prepares the tensors of a model for encoding: prunes and casts them, and distributes shared budgets.

Only one tensor is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
from numpy.typing import NDArray

from ..dtypes import Dtype
from ..encode.budget import Candidate, candidate, share_bits
from ..encode.weights import Kind, Reason, has_values_beyond
from ..errors import OptionError
from ..names import quoted
from ..options import Options, Uniform
from ..pruning.by_magnitude import (
    Cutoff,
    Patterns,
    count_equal,
    find_cutoff,
    key_bits,
    patterns,
    prune_below,
    prune_fraction,
    prune_pattern,
)
from ..pruning.thresholds import count_of_share
from .model_files import Model
from .rules import Pruning, TensorConfig

Array = NDArray[np.generic]
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Share:
    """A tensor's part in pruning by one cutoff over the model.

    Attributes:
        cutoff: the cutoff of all tensors.
        ties: number of magnitudes equal to the cutoff that are pruned in this tensor, the first ones.
        bits: bits of the patterns, 32 or 64.
    """

    cutoff: Cutoff
    ties: int
    bits: int


def find_not_finite(model: Model, configs: dict[str, TensorConfig], advance: Advance) -> dict[str, Reason]:
    """Finds tensors that must stay lossless because of their values. Returns tensor name -> reason.

    These are tensors with infinities or NaNs, or with values beyond float32 if they are to be quantised,
    unless a ``--like`` rule changes them. Reads all tensors that are not lossless.

    Args:
        advance: called with the bytes of each tensor read.

    Raises:
        OptionError: a ``--like`` rule quantises such a tensor; the message names it.
    """
    found: dict[str, Reason] = {}
    for name, config in configs.items():
        if config.lossless:
            continue
        quantised = not config.options.lossless
        if has_values_beyond(model.read(name), float32=quantised):
            if config.named and quantised:
                raise OptionError(
                    f"tensor {quoted(name)} has infinities, NaNs or values beyond float32, which cannot be "
                    f"quantised; keep it lossless with --keep {name!r}"
                )
            if not config.named:
                found[name] = Reason(Kind.NOT_FINITE, model.specs[name].words)
        advance(model.specs[name].nbytes)
    return found


def shares_of_model(model: Model, configs: dict[str, TensorConfig], advance: Advance) -> dict[str, Share]:
    """Returns tensor name -> share, for all tensors that are pruned by a cutoff over the model.

    Tensors with the same fraction have one cutoff. Reads these tensors twice (four times if one is F64),
    and once more if only some of the magnitudes equal to the cutoff are pruned.

    Args:
        advance: called with the bytes of each tensor read.
    """
    groups: dict[Pruning, list[str]] = {}
    for name, config in configs.items():
        if config.pruning is not None and config.pruning.scope == "model":
            groups.setdefault(config.pruning, []).append(name)
    shares: dict[str, Share] = {}
    for pruning, names in groups.items():
        shares |= _shares_of_group(model, names, pruning.fraction, advance)
    return shares


def bytes_of_passes(model: Model, configs: dict[str, TensorConfig]) -> int:
    """Returns the approximate number of bytes that `shares_of_model` will read."""
    pruned = [
        model.specs[name]
        for name, config in configs.items()
        if config.pruning is not None and config.pruning.scope == "model"
    ]
    passes = key_bits(spec.dtype for spec in pruned) // 16
    return passes * sum(spec.nbytes for spec in pruned)


def _shares_of_group(model: Model, names: list[str], fraction: float, advance: Advance) -> dict[str, Share]:
    bits = key_bits(model.specs[name].dtype for name in names)

    def read() -> Iterator[tuple[str, Array]]:
        for name in names:
            yield name, model.read(name)
            advance(model.specs[name].nbytes)

    def blocks() -> Iterator[Patterns]:
        for _, array in read():
            yield from patterns(array, bits)

    positions = sum(model.specs[name].nbytes // model.specs[name].dtype.itemsize for name in names)
    cutoff = find_cutoff(blocks, count_of_share(fraction, positions), bits)
    if cutoff.ties == cutoff.equal:
        return {name: Share(cutoff, cutoff.ties, bits) for name in names}
    shares, left = {}, cutoff.ties
    for name, array in read():
        ties = min(count_equal(array, cutoff, bits), left)
        shares[name] = Share(cutoff, ties, bits)
        left -= ties
    return shares


def with_shared_bits(
    model: Model,
    configs: dict[str, TensorConfig],
    shares: dict[str, Share],
    importances: Model | None,
    advance: Advance,
) -> dict[str, TensorConfig]:
    """Returns the configurations, with a step for each tensor that shares a budget. Reads these tensors once.

    A tensor becomes lossless if lossless coding takes no more bits.

    Args:
        shares: the result of `shares_of_model`.
        advance: called with the bytes of each tensor read.

    Raises:
        OptionError: a tensor is not finite, or lacks an importance that it needs.
    """
    groups: dict[float, dict[str, Candidate]] = {}
    sharing = {name: t for name, t in configs.items() if t.shares_bits}
    for name, config in sharing.items():
        options, asked = config.options, config.options.quantiser
        assert isinstance(asked, Uniform)
        assert asked.budget is not None
        array = prune_and_cast(name, model.read(name), config, shares.get(name))
        importance = importance_of(name, importances)
        try:
            found = candidate(array, None, importance, asked, len(sharing), fixed_width=options.fixed_width)
        except OptionError as error:
            raise OptionError(f"tensor {name!r}: {error}") from None
        groups.setdefault(asked.budget, {})[name] = found
        advance(model.specs[name].nbytes)
    out = dict(configs)
    for budget, members in groups.items():
        for name, step in zip(members, share_bits(members.values(), budget), strict=True):
            out[name] = replace(out[name], options=_with_step(out[name].options, step))
    return out


def _with_step(options: Options, step: float | None) -> Options:
    """Returns the options with a step in place of the budget. Lossless if the step is None."""
    if step is None:
        return options.without_loss()
    assert isinstance(options.quantiser, Uniform)
    return options.but(quantiser=replace(options.quantiser, budget=None, step=step))


def importance_of(name: str, importances: Model | None) -> NDArray[np.floating] | None:
    """Reads a tensor's importance; None if there is none."""
    if importances is None or name not in importances.specs:
        return None
    return cast("NDArray[np.floating]", importances.read(name))


def prune_and_cast(name: str, array: Array, config: TensorConfig, share: Share | None) -> Array:
    """Prunes a tensor in place, and returns it in the dtype of its configuration.

    Raises:
        OptionError: a weight exceeds the range of the new dtype.
    """
    pruning = config.pruning
    if share is not None:
        prune_below(array, share.cutoff, share.ties, share.bits)
    elif pruning is not None and pruning.of:
        prune_pattern(array, pruning.keep, pruning.of, pruning.dim)
    elif pruning is not None:
        prune_fraction(array, pruning.fraction)
    return array if config.cast is None else _cast(name, array, config.cast)


def _cast(name: str, array: Array, dtype: Dtype) -> Array:
    out = np.empty(array.shape, dtype.numpy)
    source, target = array.reshape(-1), out.reshape(-1)
    for start in range(0, source.size, 1 << 20):
        block = source[start : start + (1 << 20)]
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            cast = block.astype(dtype.numpy)
        if (np.isfinite(block) & ~np.isfinite(cast)).any():
            raise OptionError(f"tensor {name!r} has weights that exceed the range of {dtype.name}")
        target[start : start + (1 << 20)] = cast
    return out
