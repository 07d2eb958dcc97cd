"""`save_model` and `load_model`: write and load whole modules. Same interface as safetensors."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from itertools import chain

import torch
from torch.nn.parameter import is_lazy

from ..decode.opening import open_any
from ..encode.weights import warn_of_quantised
from ..encode.writer import Writer
from ..errors import MismatchError, OptionError, warn
from ..io.paths import AnyPath
from ..limits import DEFAULT_LIMITS, Limits
from ..names import MOST_LISTED, listed
from ..options import Options, options_by_name
from .compressed import Compressed
from .files import Device, TorchFile, require_device
from .layers import compressed_weights
from .loading import (
    AnyFile,
    Place,
    fill,
    groups_of,
    is_counter,
    is_shape_of,
    loses_values,
    match,
    non_persistent,
    places_of,
    require_fillable,
    require_same_names,
    warn_of_lost_values,
)
from .meta import require_none_left
from .packed import put_into
from .saving import ImportanceTensor, Numbers, add_tensor, outlines
from .tensors import is_wrapper, require_known_shapes, require_memory, require_module, tensor_of
from .ties import TiedNames


def save_model(
    model: torch.nn.Module,
    path: str | os.PathLike[str],
    metadata: dict[str, str] | None = None,
    force_contiguous: bool = True,
    *,
    options: Options | Mapping[str, Options] | None = None,
    masks: Mapping[str, Numbers] | None = None,
    importances: Mapping[str, ImportanceTensor] | None = None,
    limits: Limits = DEFAULT_LIMITS,
    threads: int | None = None,
    engine: str | None = None,
) -> None:
    """Writes a module's ``state_dict``. A tensor with several names is written once.

    The bytes of compressed layers are copied without encoding them again, under the names of the dense model.

    A tied tensor is written under its first name in alphabetical order, as in safetensors. The metadata map
    each other name to that name. Tensors that overlap only in part are each written in full.

    Example: ``save_model(model, "model.sfp")``.

    Args:
        model: any module; its tensors can be on any device except meta.
        path: path of the file, which is replaced only on success.
        metadata: str -> str; stored unchanged.
        force_contiguous: False refuses tensors that are not contiguous. True writes their elements in index
            order.
        options, masks, importances: as in `save_file`; any name of a tied tensor is valid.
        limits, threads, engine: as in `save_file`.

    Raises:
        OptionError: a value of the ``state_dict`` is not a tensor or has no memory; an option, mask or
            importance does not fit its tensor; a name in an argument is unknown or is that of a compressed
            weight; or an argument has different values for two names of one tensor.
        OSError: the file cannot be written.
    """
    require_module(model)
    require_known_shapes(model)
    compressed = compressed_weights(model)
    state: dict[str, torch.Tensor] = dict(model.state_dict())
    tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    others = [name for name in state if name not in tensors]
    if others:
        kind = type(state[others[0]]).__name__
        raise OptionError(
            f"{others[0]!r} of the state_dict is a {kind}, not a tensor; save_model cannot write it"
        )
    for name, tensor in tensors.items():
        require_memory(tensor, f"tensor {name!r}")
    strided = [name for name, tensor in tensors.items() if tensor.layout == torch.strided]
    scattered = [name for name in strided if not tensors[name].is_contiguous()]
    if scattered and not force_contiguous:
        raise OptionError(
            f"tensor {scattered[0]!r} is not contiguous; force_contiguous=True writes a contiguous copy"
        )
    ties = TiedNames(tensors)
    copied = {ties.kept(name) for name in compressed}
    chosen = options if not isinstance(options, Mapping) else ties.by_kept(options, "options")
    masks, importances = ties.by_kept(masks, "masks"), ties.by_kept(importances, "importances")
    for argument, given in (("options", chosen), ("masks", masks), ("importances", importances)):
        _require_not_compressed(argument, copied & set(given if isinstance(given, Mapping) else ()))
    with_aliases = dict(metadata or {})
    for name in list(tensors):
        kept = ties.kept(name)
        if name != kept:
            with_aliases.setdefault(name, kept)
            del tensors[name]
    options_of = options_by_name(chosen, tensors)
    encoded = {name: tensor for name, tensor in tensors.items() if name not in copied}
    warn_of_quantised(outlines(encoded), options)
    with Writer(path, metadata=with_aliases, limits=limits, engine=engine, threads=threads) as writer:
        for name, tensor in tensors.items():
            if name in copied:
                put_into(tensor, writer, name)
            else:
                mask, importance = masks.get(name), importances.get(name)
                add_tensor(writer, name, tensor, options_of[name], mask, importance)


def _require_not_compressed(argument: str, names: Collection[str]) -> None:
    """Refuses arguments for compressed weights, which are not encoded again.

    Raises:
        OptionError: ``names`` is not empty.
    """
    if names:
        raise OptionError(
            f"{argument}: {min(names)!r} is compressed already, so its bytes are copied unchanged; "
            "to encode it again, call decompress_model first"
        )


def load_model(
    model: torch.nn.Module,
    path: AnyPath,
    strict: bool = True,
    device: Device = "cpu",
    *,
    limits: Limits = DEFAULT_LIMITS,
    threads: int | None = None,
    engine: str | None = None,
) -> tuple[list[str], list[str]]:
    """Loads a file into a module. Decodes directly into the module's memory if possible.

    The peak memory is that of the module plus one chunk per thread. Tensors on another device than the CPU,
    and tensors whose dtype differs from the file's, need a temporary copy: 64 MiB or one tensor at a time, on
    the CPU, or on the CUDA device if it decodes them. The file's numbers are converted to the module's dtype.
    Parameters on the meta device are allocated. Non-persistent buffers are not in files and stay unchanged;
    `parameters_on_meta` creates a module that has them. If a module customises loading by hooks or methods,
    or is lazy, all tensors are passed to ``load_state_dict`` instead.

    As in torch, the counter of a batch norm may be missing, and a scalar accepts a vector of one element.

    Example: ``missing, unexpected = load_model(model, "model.sfp", strict=False)``.

    Args:
        model: the module.
        path: path or URL of the file, or of the ``.sfp.index.json`` of a sharded model.
        strict: whether missing names, unexpected names, and tensors that would stay on the meta device raise.
            Names of non-persistent buffers, which older files can have, never raise.
        device: the device for tensors that are on the meta device. Other tensors keep theirs.
        limits, threads, engine: as in `sfpformat.open`.

    Returns:
        The names of the module that are missing in the file, and the names in the file that were not used.
        One name of a tied tensor is enough; a second one in the file is unexpected.

    Warns:
        SfpWarning: tensors stay on the meta device (only if not strict); the file's numbers differ from those
            of a non-persistent buffer; or the module's dtype cannot represent the file's numbers.

    Raises:
        MismatchError: names (if strict) or shapes do not match. The module is unchanged, unless it customises
            loading.
        OptionError: the module has compressed layers, or tensors that cannot be filled, such as one with
            freed memory; or the device does not exist.
        InvalidFileError, UnsupportedError, LimitError: the file is damaged or refused. A note on the error
            says whether the module is unchanged.
        OSError: the file cannot be read.
    """
    require_module(model)
    if any(isinstance(module, Compressed) for module in model.modules()):
        raise OptionError(
            "the model has compressed layers: call compress_model with a dense model and the file"
        )
    where = require_device(device)
    with open_any(path, limits=limits, threads=threads, engine=engine) as file:
        places = places_of(model)
        if loads_its_own_way(model):
            return _by_state_dict(model, places, file, strict, where)
        found = match(model, places, file)
        if strict:
            found.require_all(model)
        require_none_left(model, found.filled, strict)
        fill(places, file, found.sources, where, engine, found.counters)
        warn_of_ignored(model, file, found.ignored)
        return found.missing, found.unexpected + found.ignored


def warn_of_ignored(model: torch.nn.Module, file: AnyFile, names: Sequence[str]) -> None:
    """Warns of non-persistent buffers whose values differ from the file's; the module keeps its values."""
    buffers = non_persistent(model)
    differ = [name for name in names if not _has_numbers_of(buffers[name], file, name)]
    if differ:
        warn(
            f"the file has other values for {listed(differ)} than the module, which computes these buffers "
            "itself (they are not persistent); the module's values are kept"
        )


def _has_numbers_of(buffer: torch.Tensor, file: AnyFile, name: str) -> bool:
    """Returns whether a buffer equals a tensor in a file; True if the buffer has no data to compare."""
    info = file.info(name)
    if buffer.is_meta or is_wrapper(buffer):
        return True
    if info.shape != tuple(buffer.shape):
        return False
    # Compared in the file's dtype, which may be less precise.
    stored = tensor_of(file.get_tensor(name))
    return torch.equal(buffer.detach().to("cpu", stored.dtype), stored)


# Modules of torch's default loading code. Batch norm only adds a counter that very old files lack.
_PLAIN_LOADING = ("torch.nn.modules.module", "torch.nn.modules.batchnorm")


def loads_its_own_way(model: torch.nn.Module) -> bool:
    """Returns whether a submodule customises loading, or is lazy: it has no shape before it is loaded."""
    return any(
        module._load_state_dict_pre_hooks
        or module._load_state_dict_post_hooks
        or type(module)._load_from_state_dict.__module__ not in _PLAIN_LOADING
        or type(module).set_extra_state is not torch.nn.Module.set_extra_state
        or type(module).load_state_dict is not torch.nn.Module.load_state_dict
        for module in model.modules()
    ) or any(map(is_lazy, chain(model.parameters(), model.buffers())))


def _by_state_dict(
    model: torch.nn.Module, places: Mapping[str, Place], file: AnyFile, strict: bool, device: torch.device
) -> tuple[list[str], list[str]]:
    """Loads through ``load_state_dict``, which checks names and shapes only after it changed the module."""
    for name, place in places.items():
        if not is_lazy(place.tensor):
            require_fillable(name, place.tensor)
    own_buffers = non_persistent(model)
    if strict:
        require_none_left(model, places.keys(), strict)
    groups = groups_of({name: place.tensor for name, place in places.items()})
    aliases = file.metadata()
    tensors = TorchFile(file, torch.device("cpu")).get_tensors()
    on_meta = any(place.tensor.is_meta for place in places.values())
    lost: list[str] = []
    used: set[str] = set()  # names that must not be reported as unexpected
    for group in groups:
        old = places[group[0]].tensor
        names = [*group, *(aliases[name] for name in group if name in aliases)]
        source = next((name for name in names if name in tensors), None)
        if source is None:
            if on_meta and is_counter(places[group[0]]):
                tensors |= {name: torch.zeros((), dtype=old.dtype, device=device) for name in group}
            continue
        if not is_lazy(old) and not is_shape_of(tuple(tensors[source].shape), tuple(old.shape)):
            continue
        tensor = tensors[source]
        if loses_values(tensor, tensor.to(old.dtype)):
            lost.append(source)
        if on_meta:  # `assign` takes tensors as they are, so device and dtype must match the module's
            tensor = tensor.to(device if old.is_meta else old.device, old.dtype)
            tensor = tensor if is_lazy(old) else tensor.reshape(old.shape)
            if isinstance(old, torch.nn.Parameter):
                tensor = torch.nn.Parameter(tensor, requires_grad=old.requires_grad)
            tensors[source] = tensor
        for name in group:
            if name not in tensors:
                tensors[name] = tensor
                used |= {name, source}
    try:
        missing, unexpected = model.load_state_dict(tensors, strict=False, assign=on_meta)
    except RuntimeError as error:
        lines = str(error).splitlines()
        first = "\n".join(line[:300] for line in lines[: MOST_LISTED + 1])
        more = f"\n\tand {len(lines) - MOST_LISTED - 1:,} more" if len(lines) > MOST_LISTED + 1 else ""
        raise MismatchError(
            f"{first}{more}\nSome of the module's weights may have been overwritten: load it again before "
            "you use it."
        ) from error
    unexpected = [name for name in unexpected if name not in used]
    ignored = [name for name in unexpected if name in own_buffers]
    refused = [name for name in unexpected if name not in own_buffers]
    if strict:
        require_same_names(model, missing, refused)
    require_none_left(model, (), strict)
    warn_of_lost_values(lost)
    warn_of_ignored(model, file, ignored)
    return list(missing), refused + ignored
