"""The demonstration's ways of packing, and what each of them costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..codec.options import Options
from ..codec.plan import Importance
from ..coding.mask import Mask
from ..numpy import load_file, save_file
from ..pruning.thresholds import Sparsity, Threshold, masks_of
from ..validate import validate
from .carried import heldout_tokens, importances, linear_layers
from .model import Config, perplexity

Tensors = dict[str, NDArray[np.generic]]

# Held-out characters that perplexities are taken over, by kind of text; one more is read, as first context.
EVALUATED_TOKENS = {"code": 1 << 13, "prose": 1 << 12}


@dataclass(frozen=True)
class Variant:
    """A way of packing the linear layers; all other tensors are kept bit for bit.

    Attributes:
        name: what it is called in the table.
        pruned: share of the weights that are pruned, or the words ``2:4``.
        options: how the survivors are coded.
        by: ``magnitude``, in each layer, or ``importance``, the one that the file carries, over all layers.
    """

    name: str
    pruned: float | str
    options: Options
    by: str = "magnitude"


def _uniform(bits: float) -> Options:
    return Options(quantiser="uniform", bits=bits)


def _error(decibels: float) -> Options:
    return Options(quantiser="uniform", error_db=decibels)


VARIANTS = (
    Variant("lossless", 0.0, Options()),
    Variant("6 bits", 0.0, _uniform(6)),
    Variant("4 bits", 0.0, _uniform(4)),
    Variant("3 bits", 0.0, _uniform(3)),
    Variant("table of 8", 0.0, Options(quantiser="table", centroids=8)),
    Variant("50 % pruned, exact", 0.5, Options()),
    Variant("2:4 pruned, exact", "2:4", Options()),
    Variant("30 % pruned, -25 dB", 0.3, _error(-25)),
    Variant("50 % pruned, -20 dB", 0.5, _error(-20)),
    Variant("70 % pruned, -20 dB", 0.7, _error(-20)),
    Variant("90 % pruned, -15 dB", 0.9, _error(-15)),
    Variant("50 % by importance, -20 dB", 0.5, _error(-20), "importance"),
    Variant("70 % by importance, -20 dB", 0.7, _error(-20), "importance"),
    Variant("80 % by importance, -20 dB", 0.8, _error(-20), "importance"),
    Variant("90 % by importance, -20 dB", 0.9, _error(-20), "importance"),
)


def variants_of(shares: Sequence[float]) -> tuple[Variant, ...]:
    """Magnitude and importance side by side, at each of some shares pruned; survivors quantised at -20 dB."""
    return tuple(
        Variant(f"{100 * share:.4g} % by {by}, -20 dB", share, _error(-20), by)
        for share in shares
        for by in ("magnitude", "importance")
    )


@dataclass(frozen=True)
class Result:
    """What a variant cost.

    Attributes:
        name: of the variant.
        sparsity: share of zeros in the linear layers as loaded back.
        file_bytes: size of the `.sfp` file.
        bits_per_weight: of the file, over all weights of the model.
        error_db: 10 log10 of the mean squared error over the mean square of the linear layers; None where the
            loaded weights are those that were carried, bit for bit.
        code, prose: perplexities of the loaded model on the two held-out texts.
        verified: whether the file has no faults and is canonical.
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
        """The fields."""
        return asdict(self)


def run_all(
    tensors: Tensors, variants: Sequence[Variant], folder: Path, at: Callable[[str], None]
) -> Iterator[Result]:
    """Packs every variant into a file, verifies it, loads it back and evaluates what was loaded.

    Args:
        tensors: the model's weights.
        variants: ways of packing.
        folder: where the files go.
        at: called with each variant's name before it is packed.
    """
    for variant in variants:
        at(variant.name)
        yield run(tensors, variant, folder / f"{_file_name(variant.name)}.sfp")


def run(tensors: Tensors, variant: Variant, path: Path) -> Result:
    """Packs one variant into a file, verifies it, loads it back and evaluates it."""
    layers = linear_layers(tensors)
    if variant.by == "importance":
        masks = importance_masks(tensors, Sparsity(float(variant.pruned)))
    else:
        masks = {name: magnitude_mask(tensors[name], variant.pruned) for name in layers}
    kept = {name: np.where(mask, tensors[name], tensors[name].dtype.type(0)) for name, mask in masks.items()}
    shown = masks if variant.pruned else None
    return measure(tensors, kept, shown, variant.name, dict.fromkeys(layers, variant.options), path)


def measure(
    tensors: Tensors,
    changed: Tensors,
    masks: dict[str, Mask] | None,
    name: str,
    options: dict[str, Options],
    path: Path,
    kept_importances: dict[str, Importance] | None = None,
) -> Result:
    """Packs a model of which some tensors changed, verifies the file, loads it back and evaluates it.

    Args:
        tensors: the model as it was.
        changed: by name, those that are packed instead.
        masks: by name, or None.
        name: of the result.
        options: by name; lossless where nothing is said.
        path: of the file.
        kept_importances: by name, to be kept in the file.
    """
    packed = {**tensors, **changed}
    save_file(packed, path, {"variant": name}, options=options, masks=masks, importances=kept_importances)
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


def importance_masks(tensors: Tensors, threshold: Threshold) -> dict[str, Mask]:
    """The masks of a threshold on the carried importance, over all linear layers; magnitudes settle ties."""
    magnitudes = {name: tensors[name].astype(np.float32) for name in linear_layers(tensors)}
    return masks_of(importances(), threshold, tiebreak=magnitudes)


def evaluate(tensors: Tensors, kind: str) -> float:
    """The perplexity a character of a model on held-out text, ``code`` or ``prose``."""
    return perplexity(tensors, Config(), heldout_tokens(kind, EVALUATED_TOKENS[kind] + 1))


def magnitude_mask(array: NDArray[np.generic], pruned: float | str) -> Mask:
    """True for the weights that magnitude keeps: of the whole tensor, or two of every four neighbours."""
    magnitudes = np.abs(array.astype(np.float32))
    if pruned == "2:4":
        groups = magnitudes.reshape(-1, 4)
        mask = np.zeros(groups.shape, np.bool_)
        np.put_along_axis(mask, np.argsort(groups, axis=1, kind="stable")[:, 2:], True, axis=1)
        return mask.reshape(array.shape)
    flat = np.ones(array.size, np.bool_)
    order = np.argsort(magnitudes.reshape(-1), kind="stable")
    flat[order[: round(array.size * float(pruned))]] = False
    return flat.reshape(array.shape)


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
