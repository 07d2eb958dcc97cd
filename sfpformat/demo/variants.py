"""The demonstration's variants of packing, and their measurement."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..coding.mask import Mask
from ..decode.validate import validate
from ..numpy import load_file, save_file
from ..options import Options, Table, Uniform
from ..pruning.masks import masks_of
from ..pruning.thresholds import Pattern, Sparsity, Threshold
from .bundled import heldout_tokens, importances, linear_layers
from .model import Config, perplexity

Tensors = dict[str, NDArray[np.generic]]

# Number of held-out characters for perplexities, by kind of text; one more character is the first context.
EVALUATED_TOKENS = {"code": 1 << 13, "prose": 1 << 12}


# Criterion of pruning -> its name in a plot.
PRUNED_BY = {
    "magnitude": "magnitude, in each layer",
    "importance": "the bundled importance, over all layers",
}


@dataclass(frozen=True)
class Variant:
    """A way of packing the linear layers; all other tensors are lossless.

    Attributes:
        name: its name in the table.
        pruned: the threshold of pruning, or None without pruning.
        options: the options of the linear layers.
        by: the criterion, a key of `PRUNED_BY`.
    """

    name: str
    pruned: Sparsity | Pattern | None
    options: Options
    by: str = "magnitude"


def _uniform(bits: float) -> Options:
    return Options(Uniform(budget=bits))


def _error(decibels: float) -> Options:
    return Options(Uniform(error_db=decibels))


VARIANTS = (
    Variant("lossless", None, Options()),
    Variant("6 bits", None, _uniform(6)),
    Variant("4 bits", None, _uniform(4)),
    Variant("3 bits", None, _uniform(3)),
    Variant("table of 8", None, Options(Table(centroids=8))),
    Variant("50 % pruned, exact", Sparsity(0.5), Options()),
    Variant("2:4 pruned, exact", Pattern(2, 4), Options()),
    Variant("30 % pruned, -25 dB", Sparsity(0.3), _error(-25)),
    Variant("50 % pruned, -20 dB", Sparsity(0.5), _error(-20)),
    Variant("70 % pruned, -20 dB", Sparsity(0.7), _error(-20)),
    Variant("90 % pruned, -15 dB", Sparsity(0.9), _error(-15)),
    Variant("50 % by importance, -20 dB", Sparsity(0.5), _error(-20), "importance"),
    Variant("70 % by importance, -20 dB", Sparsity(0.7), _error(-20), "importance"),
    Variant("80 % by importance, -20 dB", Sparsity(0.8), _error(-20), "importance"),
    Variant("90 % by importance, -20 dB", Sparsity(0.9), _error(-20), "importance"),
)


def variants_of(shares: Sequence[float]) -> tuple[Variant, ...]:
    """Returns a variant by magnitude and one by importance for each share, quantised at -20 dB."""
    return tuple(
        Variant(f"{100 * share:.4g} % by {by}, -20 dB", Sparsity(share), _error(-20), by)
        for share in shares
        for by in PRUNED_BY
    )


@dataclass(frozen=True)
class Result:
    """The measurements of a variant.

    Attributes:
        name: name of the variant.
        sparsity: share of zeros in the loaded linear layers.
        file_bytes: size of the `.sfp` file.
        bits_per_weight: bits of the file divided by the number of all weights of the model.
        error_db: 10 log10 of the mean squared error over the mean square of the linear layers; None if the
            loaded weights equal the original ones bit for bit.
        code, prose: perplexities of the loaded model on the two held-out texts.
        verified: whether the file is valid and canonical.
    """

    name: str
    sparsity: float
    file_bytes: int
    bits_per_weight: float
    error_db: float | None
    code: float
    prose: float
    verified: bool

    def as_json(self) -> dict[str, object]:
        """Returns the fields."""
        return asdict(self)


@dataclass(frozen=True)
class Row:
    """A file pruned by a method.

    Attributes:
        method: name of the method.
        asked: the target sparsity.
        result: the measurements of the file.
    """

    method: str
    asked: float
    result: Result

    def as_json(self) -> dict[str, object]:
        """Returns the fields as a flat object."""
        return {"method": self.method, "asked": self.asked, **self.result.as_json()}


def rows_of(variants: Sequence[Variant], results: Sequence[Result]) -> list[Row]:
    """Returns rows for the variants that were pruned to a sparsity."""
    return [
        Row(variant.by, variant.pruned.share, result)
        for variant, result in zip(variants, results, strict=True)
        if isinstance(variant.pruned, Sparsity)
    ]


def run_all(
    tensors: Tensors, variants: Sequence[Variant], folder: Path, at: Callable[[str], None]
) -> Iterator[Result]:
    """Packs every variant into a file, verifies it, loads it back and evaluates the loaded model.

    Args:
        tensors: the model's weights.
        variants: the variants.
        folder: folder for the files.
        at: called with each variant's name before it is packed.
    """
    for variant in variants:
        at(variant.name)
        yield run(tensors, variant, folder / f"{_file_name(variant.name)}.sfp")


def run(tensors: Tensors, variant: Variant, path: Path) -> Result:
    """Packs one variant into a file, verifies it, loads it back and evaluates it."""
    masks: dict[str, Mask] = {}
    if variant.pruned is not None:
        masks = (magnitude_masks if variant.by == "magnitude" else importance_masks)(tensors, variant.pruned)
    kept = {name: np.where(mask, tensors[name], tensors[name].dtype.type(0)) for name, mask in masks.items()}
    options = dict.fromkeys(linear_layers(tensors), variant.options)
    return measure(tensors, kept, masks, variant.name, options, path)


def measure(
    tensors: Tensors,
    changed: Tensors,
    masks: dict[str, Mask],
    name: str,
    options: dict[str, Options],
    path: Path,
) -> Result:
    """Packs a model with some tensors replaced, verifies the file, loads it back and evaluates it.

    Args:
        tensors: the original model.
        changed: name -> replacement.
        masks: masks of the pruned tensors, by name.
        name: name of the result.
        options: options by name; other tensors are lossless.
        path: path of the file.
    """
    packed = {**tensors, **changed}
    save_file(packed, path, {"variant": name}, options=options, masks=masks)
    report = validate(path)
    loaded = load_file(path)
    size = path.stat().st_size
    layers = linear_layers(tensors)
    return Result(
        name,
        _sparsity(loaded, layers),
        size,
        8 * size / sum(array.size for array in tensors.values()),
        _error_db(tensors, loaded, layers),
        evaluate(loaded, "code"),
        evaluate(loaded, "prose"),
        report.canonical,
    )


def magnitude_masks(tensors: Tensors, threshold: Threshold | Pattern) -> dict[str, Mask]:
    """Returns the masks of a threshold on the magnitudes in each linear layer."""
    return masks_of(_magnitudes(tensors), threshold, scope="tensor")


def importance_masks(tensors: Tensors, threshold: Threshold | Pattern) -> dict[str, Mask]:
    """Returns the masks of a threshold on the package's importance, over all linear layers.

    Magnitudes order equal importances.
    """
    return masks_of(importances(), threshold, tiebreak=_magnitudes(tensors))


def _magnitudes(tensors: Tensors) -> dict[str, NDArray[np.float32]]:
    return {name: np.abs(tensors[name].astype(np.float32)) for name in linear_layers(tensors)}


def evaluate(tensors: Tensors, kind: str) -> float:
    """Returns the perplexity per character of a model on held-out text, ``code`` or ``prose``."""
    return perplexity(tensors, Config(), heldout_tokens(kind, EVALUATED_TOKENS[kind] + 1))


def _sparsity(tensors: Tensors, layers: list[str]) -> float:
    zeros = sum(int(np.count_nonzero(tensors[name] == 0)) for name in layers)
    return zeros / sum(tensors[name].size for name in layers)


def _error_db(tensors: Tensors, loaded: Tensors, layers: list[str]) -> float | None:
    if all(loaded[name].tobytes() == array.tobytes() for name, array in tensors.items()):
        return None
    error = power = 0.0
    for name in layers:
        before, after = tensors[name].astype(np.float64), loaded[name].astype(np.float64)
        error += float(((before - after) ** 2).sum())
        power += float((before**2).sum())
    return float(10 * np.log10(error / power))


def _file_name(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name).split())
