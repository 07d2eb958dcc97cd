"""Prunes an `.sfp` file further. Needs only the file: no calibration data and no torch.

Rules: tensors whose importance has the role of metadata are pruned: the lowest importances first, among equal
ones the lowest magnitudes. Positions that are already zero, of either sign, are pruned before all others.
Survivors keep their values bit for bit. The writer chooses their coding again, and keeps their quantiser if
it gives the same values. All other tensors are copied chunk by chunk.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..coding.mask import Mask
from ..coding.quantisers import Exact, Uniform
from ..container.entry import TensorEntry
from ..decode.reader import SfpFile
from ..decode.shard_index import ShardIndex, index_name, shard_name
from ..decode.shards import ShardedFile
from ..encode.writer import Writer
from ..errors import OptionError, SfpWarning
from ..io.atomic import ReplacedTogether
from ..io.paths import SUFFIX
from ..names import listed, require_matches
from ..options import ImportanceOptions, Options
from ..options import Uniform as UniformOptions
from .masks import masks_of
from .thresholds import Allocation, Numbers, Pattern, Threshold, pattern_dim


@dataclass(frozen=True)
class Repruned:
    """The result of `reprune`.

    Attributes:
        pruned: the names of the tensors that were pruned.
        unfit: tensors that a pattern did not fit, which are unchanged: name -> reason.
        positions: the number of positions of the pruned tensors.
        before, after: the number of pruned positions in these tensors before and after. Stored zeros count as
            pruned, except those of a uniform quantiser.
        outputs: the files that were written, without the index of shards.
    """

    pruned: tuple[str, ...]
    positions: int
    before: int
    after: int
    outputs: tuple[Path, ...]
    unfit: dict[str, str] = field(default_factory=dict)


def reprune(
    file: SfpFile | ShardedFile,
    target: str | os.PathLike[str],
    threshold: Threshold | Pattern | Allocation | float,
    *,
    scope: str = "model",
    exempt: str | Sequence[str] = (),
    floor: float = 0.0,
    keep_importance: bool = True,
    single: bool = False,
) -> Repruned:
    """Writes a file with some of its tensors pruned further.

    Example::

        with sfpformat.open("model.sfp") as file:
            reprune(file, "smaller.sfp", 0.8)

    Args:
        file: an open file; the new file uses its limits. For a sharded model each shard is written again.
        target: path of the new file, which appears only on success. Must differ from that of ``file``. Shards
            get names derived from it and an index file; it must then end in ``.sfp``.
        threshold, scope, floor: as in `masks.masks_of`. A sparsity counts all positions, including those
            that are already pruned. A pattern runs along `thresholds.pattern_dim`.
        exempt: patterns of tensor names in the file that are not pruned.
        keep_importance: whether the file keeps the survivors' importances.
        single: whether a sharded model is written as one file.

    Memory: all tensors with an importance, plus 60 bytes for each of their positions.

    Warns: for the reasons of `masks.masks_of`, or tensors already keep less than the floor.

    Raises:
        OptionError: no tensor has an importance as metadata; all such tensors are exempt; the threshold is
            invalid; or the target is one of the files read, or cannot name shards.
        InvalidFileError, LimitError, OSError.
    """
    names = [name for name in file if _is_prunable(file.entry(name))]
    if not names:
        raise OptionError(
            "no tensor has an importance stored as metadata, by which to prune; write a file with importances"
        )
    patterns = (exempt,) if isinstance(exempt, str) else tuple(exempt)
    require_matches(patterns, file, "exempt")
    names = [name for name in names if not any(fnmatchcase(name, pattern) for pattern in patterns)]
    if not names:
        raise OptionError("all tensors with an importance are exempt: nothing would be pruned")
    tensors = {name: file.get_tensor(name) for name in names}
    importances = {name: _importance(file, name) for name in names}
    alive = {name: _alive(file, name, tensors[name]) for name in names}
    masks = masks_of(
        # Pruned positions get the importance −1, below all others, so that they stay pruned.
        {name: np.where(alive[name], importances[name], np.float32(-1)) for name in names},
        threshold,
        scope=scope,
        floor=floor,
        tiebreak={name: _numbers(array) for name, array in tensors.items()},
    )
    masks = {name: mask & alive[name] for name, mask in masks.items()}
    below = [name for name, mask in masks.items() if np.count_nonzero(alive[name]) < floor * mask.size]
    if below:
        warnings.warn(
            f"tensors that already keep less than the floor {floor} ({len(below):,}): {listed(below)}; "
            "their pruned positions stay pruned",
            SfpWarning,
            stacklevel=2,
        )

    def put(names: Iterable[str], writer: Writer) -> None:
        for name in names:
            entry = file.entry(name)
            if name not in masks:
                _copy(file, entry, writer)
                continue
            importance = importances[name] if keep_importance else None
            options = _options(entry, importance)
            array = np.where(masks[name], tensors[name], tensors[name].dtype.type(0))
            keys = {key: value for key, value in entry.other.items() if key.startswith("x-")}
            writer.add(name, array, options, mask=masks[name], importance=importance, other=keys)

    if isinstance(file, ShardedFile) and not single:
        outputs = _write_shards(file, Path(target), put)
    else:
        outputs = [Path(target)]
        with Writer(target, metadata=file.metadata(), limits=file.limits) as writer:
            put(file, writer)
    return Repruned(
        tuple(masks),
        sum(mask.size for mask in masks.values()),
        sum(int(np.count_nonzero(~alive[name])) for name in masks),
        sum(int(np.count_nonzero(~mask)) for mask in masks.values()),
        tuple(outputs),
        _unfit(file, [name for name in names if name not in masks], threshold),
    )


def _unfit(file: SfpFile | ShardedFile, names: list[str], threshold: object) -> dict[str, str]:
    """Returns the reason why a pattern does not fit, for each of these tensors."""
    if not isinstance(threshold, Pattern):
        return {}
    shapes = {name: file.entry(name).shape for name in names}
    return {name: threshold.why_not(shape, (pattern_dim(shape), 1)) for name, shape in shapes.items()}


def _write_shards(
    model: ShardedFile, target: Path, put: Callable[[Iterable[str], Writer], None]
) -> list[Path]:
    """Writes one shard for each shard of the model, and the index; all files are replaced together.

    Args:
        put: writes the tensors of the given names to a writer.

    Raises:
        OptionError: the target does not end in ``.sfp``.
    """
    if target.suffix != SUFFIX:
        raise OptionError(
            f"{target}: the name must end in {SUFFIX} to write shards; single=True writes one file"
        )
    stem, count = target.with_suffix(""), len(model.files)
    weight_map: dict[str, str] = {}
    outputs = []
    with ReplacedTogether(stem.with_name(index_name(stem.name))) as new:
        for number, shard in enumerate(model.files.values(), 1):
            output = stem.with_name(shard_name(stem.name, number, count))
            with Writer(new.add(output), metadata=shard.metadata(), limits=model.limits) as writer:
                put(shard, writer)
            weight_map |= dict.fromkeys(shard, output.name)
            outputs.append(output)
        size = sum(model.entry(name).decoded_bytes for name in model)
        new.index.write(ShardIndex(weight_map, {"total_size": size}).to_bytes())
    return outputs


def _is_prunable(entry: TensorEntry) -> bool:
    importance = entry.importance
    return importance is not None and importance.role == "metadata"


def _alive(file: SfpFile | ShardedFile, name: str, array: NDArray[np.generic]) -> Mask:
    """Returns the mask of the positions that are not pruned yet.

    Stored zeros, of either sign, count as pruned. The zeros of a uniform quantiser do not: they are rounded
    weights, ranked by their importance.
    """
    fingerprints = file.entry(name).fingerprints
    mask = file.get_mask(name)
    if fingerprints is not None and isinstance(fingerprints.quantiser, Uniform):
        return mask
    return np.asarray(mask & (array != 0))


def _importance(file: SfpFile | ShardedFile, name: str) -> NDArray[np.float32]:
    importance = file.get_importance(name)
    assert importance is not None
    return importance


def _numbers(array: NDArray[np.generic]) -> Numbers:
    """Returns the magnitudes as float32. Values beyond its range become its maximum, NaN becomes ∞."""
    with np.errstate(over="ignore", invalid="ignore"):
        magnitudes: NDArray[np.float32] = np.abs(array.astype(np.float32))
    most = np.finfo(np.float32).max
    return np.where(np.isnan(magnitudes), np.float32(np.inf), np.minimum(magnitudes, most))


def _options(entry: TensorEntry, importance: NDArray[np.float32] | None) -> Options:
    """Returns options that reproduce the survivors' values bit for bit, and importances approximately."""
    options = Options()
    quantiser = entry.fingerprints.quantiser if entry.fingerprints is not None else None
    if isinstance(quantiser, Uniform) and entry.scale is None:
        # The same step rounds every multiple of it back to itself.
        options = Options(UniformOptions(step=float(quantiser.step), rate_weight=0.0))
    if entry.importance is None or importance is None or entry.importance.over == "factors":
        return options
    stored = entry.importance.quantiser
    if isinstance(stored, Exact):
        kept = ImportanceOptions(over=entry.importance.over, quantiser="exact", dtype=stored.dtype.name)
    else:
        # The same number of levels gives the same step, because the greatest importance survives.
        step = float(stored.step) if isinstance(stored, Uniform) else 0.0
        levels = round(float(importance.max()) / step) if step and importance.size else 63
        kept = ImportanceOptions(over=entry.importance.over, bits=min(max(levels.bit_length(), 1), 24))
    return options.but(importance=kept)


def _copy(file: SfpFile | ShardedFile, entry: TensorEntry, writer: Writer) -> None:
    """Copies a tensor chunk by chunk without encoding it again."""
    vectors = None if entry.vectors is None else file.read_checked(entry, -1)
    chunks = (file.read_checked(entry, k) for k in range(len(entry.chunks)))
    writer.add_encoded(entry, vectors, chunks)
