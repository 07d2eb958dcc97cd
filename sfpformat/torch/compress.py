"""`compress_model` keeps the weights of a model compressed in memory; `decompress_model` reverses it.

Rules: errors are raised before the model is changed. Layers keep their object identity, so that hooks, ties
and other references to them stay valid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..decode.opening import open_any
from ..errors import OptionError, warn
from ..io.source import Readable
from ..limits import DEFAULT_LIMITS, Limits
from ..options import Options, require_options
from . import packed
from .compressed import Compressed
from .decoded import holders_of
from .files import Device, require_device
from .layers import compressed_class, compressed_weights, make_compressed, make_dense
from .libraries import in_adapters, restore_save, save_dense
from .loading import AnyFile, Group, Place, fill, groups_of, identity, match, places_of
from .meta import require_none_left
from .models import loads_its_own_way, warn_of_ignored
from .tensors import require_known_shapes, require_module
from .ties import TiedNames
from .training import unwatch, watch
from .weight_cache import KeptWeights

Choose = Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class CompressionReport:
    """The result of `compress_model`. Memory that several names share counts once.

    Attributes:
        layers: names of the compressed layers, as ``named_modules`` gives them.
        weight_bytes_before: bytes of their dense weights.
        weight_bytes_after: bytes of their compressed weights.
        model_bytes_before: bytes of all parameters and buffers of the model before compression.
        model_bytes_after: bytes of all parameters and buffers of the model after compression.
        largest_weight_bytes: bytes of the largest decoded weight. A call needs this much memory temporarily,
            in addition to the kept weights.
        kept_bytes: the maximum number of bytes of decoded weights that are kept.
    """

    layers: tuple[str, ...]
    weight_bytes_before: int
    weight_bytes_after: int
    model_bytes_before: int
    model_bytes_after: int
    largest_weight_bytes: int
    kept_bytes: int

    def __str__(self) -> str:
        share = self.model_bytes_after / max(self.model_bytes_before, 1)
        return (
            f"{len(self.layers)} layers compressed: the model had {self.model_bytes_before / 1e6:,.1f} MB "
            f"and has {self.model_bytes_after / 1e6:,.1f} MB ({share:.1%}); a call needs up to "
            f"{self.largest_weight_bytes / 1e6:,.1f} MB more, the cache of weights up to "
            f"{self.kept_bytes / 1e6:,.1f} MB"
        )


def compress_model(
    model: nn.Module,
    source: Readable | Options | Mapping[str, Options] | None = None,
    *,
    keep: int = 0,
    choose: Choose | None = None,
    strict: bool = True,
    device: Device = "cpu",
    limits: Limits = DEFAULT_LIMITS,
    threads: int | None = None,
    engine: str | None = None,
) -> CompressionReport:
    """Compresses the weights of linear layers and embeddings in memory. Changes the model in place.

    Every `torch.nn.Linear` becomes an `SfpLinear` and every `torch.nn.Embedding` an `SfpEmbedding`. Some
    weights stay dense: weights that would not become smaller, weights that a layer of another kind shares,
    weights of subclasses, which may compute differently, and the adapters of peft, which train. Compressed
    weights are frozen: they are not parameters and have no gradient. Reading ``module.weight`` decodes the
    weight; writing to it encodes the new values, losslessly. ``state_dict`` has the compressed bytes under
    the names of the dense model; a dense model refuses them because of their shape. ``save_pretrained``, if
    the model has it, writes dense weights.

    Training does not change compressed weights. ``model.requires_grad_(True)`` warns of that. So does the
    first step of an optimizer that holds the replaced dense weights, or all parameters of a model in which
    nothing else is frozen.

    A CUDA device decodes its own layers if the engine ``cuda`` is available. Otherwise the CPU decodes.

    Example: ``print(compress_model(model, "model.sfp", keep=1 << 30))``.

    Args:
        model: any module. If `source` is a file, this function also loads the other tensors, like
            `load_model`; the dense weights of a model on the meta device are then never allocated.
        source: a file, as in `safe_open`; its chunks are copied without encoding them again. Or options, with
            which the model's own weights are encoded: one for all weights, or by name in the ``state_dict``;
            any name of a tied weight is valid. None encodes losslessly. All weights are encoded before the
            first dense one is released.
        keep: the maximum number of bytes of decoded weights to keep for later calls; the least recently used
            weights are released first. 0 keeps none.
        choose: (name of a layer, the layer) -> whether to compress it, even if that takes more memory. It is
            called only for layers that can be compressed.
        strict: with a file: whether missing names, unexpected names, and tensors that would stay on the meta
            device raise, as in `load_model`.
        device: with a file: the device for tensors that are on the meta device. Other tensors keep theirs.
        limits, threads, engine: with a file: as in `sfpformat.open`.

    Warns:
        SfpWarning: no layer can be compressed; ``choose`` or an option has no effect; or for the reasons of
            `load_model`.

    Raises:
        OptionError: an option does not fit a weight; a name in ``source`` is not the name of a weight that
            this call compresses; a tensor has no memory or belongs to a lazy module; the device does not
            exist; or a file is given for a model that is already compressed or customises loading. If it
            customises loading, call `load_model` first, then this function without a file.
        MismatchError: names (if strict) or shapes do not match.
        InvalidFileError, UnsupportedError, LimitError: the file is damaged or refused.
        OSError: the file cannot be read.

        After an error the model is unchanged, with one exception: if a tensor that is not compressed is
        damaged, a note on the error says whether the model was changed.
    """
    require_module(model)
    where = require_device(device)
    places = places_of(model)
    require_known_shapes(model)
    dense_bytes = _bytes_of(model)
    if source is None or isinstance(source, (Options, Mapping)):
        found = _from_memory(model, places, source, choose)
    else:
        if loads_its_own_way(model):
            raise OptionError(
                "the model is compressed already, or customises loading; in the second case, call "
                "load_model, then compress_model without a file"
            )
        with open_any(source, limits=limits, threads=threads, engine=engine) as file, file.prefetch():
            found = _from_file(model, places, file, choose, strict, where)
    weights = [places[group[0]].tensor.nbytes for group in found]
    layers = {id(places[name].module) for group in found for name in group}
    replaced = {name.rpartition(".")[0]: places[name].tensor for group in found for name in group}
    _exchange(places, found, KeptWeights(keep), where)
    save_dense(model)
    watch(model, replaced)
    return CompressionReport(
        tuple(name for name, module in model.named_modules() if id(module) in layers),
        sum(weights),
        sum(data.nbytes for data in found.values()),
        dense_bytes,
        _bytes_of(model),
        max(weights, default=0),
        keep,
    )


def decompress_model(model: nn.Module) -> None:
    """Makes the compressed layers of a model dense again, with their decoded weights.

    All weights are decoded before the first layer is changed. Losslessly compressed weights have their
    original values. Ties are kept, and a weight that required a gradient before compression requires one
    again. If `model` is part of a larger model, layers outside `model` that share a weight with one of its
    layers become dense too.

    Example: ``decompress_model(model)``, then train with a new optimizer.

    Raises:
        InvalidFileError, UnsupportedError, LimitError: the bytes of a layer are damaged; nothing was changed.
    """
    made: dict[tuple[object, ...], nn.Parameter] = {}
    chosen: dict[Compressed, nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, Compressed):
            same = *identity(module.weight_sfp), module.weight_dtype
            if same not in made:
                made[same] = nn.Parameter(module.decoded_weight(), module.weight_trains)
            chosen[module] = made[same]
            for other in holders_of(module.weight_sfp):
                if isinstance(other, Compressed):
                    chosen.setdefault(other, made[same])
    for module, weight in chosen.items():
        make_dense(module, weight)
    restore_save(model)
    unwatch(model)


def _candidates(model: nn.Module, places: Mapping[str, Place], choose: Choose | None) -> list[Group]:
    """Returns the names of each weight that can be compressed in all layers that share it."""
    paths = {id(module): path for path, module in model.named_modules()}
    adapters = in_adapters(model)

    def is_wanted(place: Place) -> bool:
        if place.attribute != "weight" or compressed_class(place.module) is None or place.module in adapters:
            return False
        return choose is None or bool(choose(paths[id(place.module)], place.module))

    found = []
    for group in groups_of({name: place.tensor for name, place in places.items()}):
        wanted = [name for name in group if is_wanted(places[name])]
        if len(wanted) == len(group):
            found.append(tuple(group))
        elif wanted and choose is not None:
            other = min(set(group) - set(wanted))
            warn(
                f"{wanted[0]!r} stays dense: it is the same tensor as {other!r}, which choose does not "
                "select or which cannot be compressed"
            )
    if choose is not None and not found:
        warn("choose selects no layer whose weight can be compressed, so no layer is compressed")
    if choose is None and not found and not compressed_weights(model):
        warn("the model has no linear layer or embedding that can be compressed, so no layer is compressed")
    return found


def _from_memory(
    model: nn.Module,
    places: Mapping[str, Place],
    options: Options | Mapping[str, Options] | None,
    choose: Choose | None,
) -> dict[Group, torch.Tensor]:
    """Encodes the model's own weights and returns their bytes."""
    candidates = _candidates(model, places, choose)
    chosen = _chosen_options(model, places, options, candidates)
    found = {}
    for group in candidates:
        weight = places[group[0]].tensor
        try:
            data = packed.pack(weight, chosen.get(group))
        except OptionError as error:
            raise OptionError(f"weight {group[0]!r} cannot be compressed: {error}") from error
        if choose is not None or data.nbytes < weight.nbytes:
            found[group] = data
        elif isinstance(options, Mapping) and group in chosen:
            warn(
                f"the options of {group[0]!r} have no effect: the compressed weight would be larger "
                "than the dense one"
            )
    return found


def _chosen_options(
    model: nn.Module,
    places: Mapping[str, Place],
    options: Options | Mapping[str, Options] | None,
    candidates: list[Group],
) -> dict[Group, Options]:
    """Returns the options of each weight to compress. Any name of a tied weight is valid.

    Raises:
        OptionError: a name is unknown, or its tensor is not compressed; two names of one tensor have
            different options; or a value is not Options.
    """
    if not isinstance(options, Mapping):
        return dict.fromkeys(candidates, require_options(options, "options"))
    done = compressed_weights(model) & set(options)
    if done:
        raise OptionError(f"options: {min(done)!r} is compressed already; call decompress_model first")
    by_name = {name: group for group in candidates for name in group}
    ties = TiedNames({name: place.tensor for name, place in places.items()})
    out = {}
    for name, given in ties.one_each(options, "options").items():
        checked = require_options(given, f"the options of {name!r}")
        if name not in by_name:
            raise OptionError(
                f"options: {name!r} is not compressed; only the weight of a Linear or Embedding can be, and "
                "only if choose selects every layer that has it"
            )
        out[by_name[name]] = checked
    return out


def _from_file(
    model: nn.Module,
    places: Mapping[str, Place],
    file: AnyFile,
    choose: Choose | None,
    strict: bool,
    device: torch.device,
) -> dict[Group, torch.Tensor]:
    """Returns the compressed bytes of weights in a file, and decodes all its other tensors into the model."""
    matched = match(model, places, file)
    if strict:
        matched.require_all(model)
    require_none_left(model, matched.filled, strict)
    found = {}
    for group in _candidates(model, places, choose):
        if group in matched.sources:
            data = packed.cut_out(file, matched.sources[group])
            if choose is not None or data.nbytes < places[group[0]].tensor.nbytes:
                found[group] = data
    rest = {group: name for group, name in matched.sources.items() if group not in found}
    fill(places, file, rest, device, counters=matched.counters)
    warn_of_ignored(model, file, matched.ignored)
    return found


def _exchange(
    places: Mapping[str, Place],
    found: Mapping[Group, torch.Tensor],
    kept: KeptWeights,
    device: torch.device,
) -> None:
    """Replaces dense weights by bytes, on the weight's device; ``device`` is for weights on meta."""
    for group, data in found.items():
        weight = places[group[0]].tensor
        there = data.to(device if weight.is_meta else weight.device)
        for name in group:
            module = places[name].module
            if not isinstance(module, Compressed):  # a module with two names is converted once
                make_compressed(module, there, kept, name.rpartition(".")[0])


def _bytes_of(model: nn.Module) -> int:
    """Returns the bytes of all parameters and buffers; those on the meta device count as if allocated."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({identity(tensor): tensor.nbytes for tensor in tensors}.values())
