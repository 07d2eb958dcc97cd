"""Whole modules to files and back, tied tensors included: `save_model` and `load_model` of safetensors."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from ..codec.options import Options
from ..errors import MismatchError, OptionError
from ..limits import DEFAULT_LIMITS, Limits
from ..writer import Writer
from .files import Device, ImportanceTensor, Numbers, TorchFile, add_all, open_any
from .layers import Compressed, dense_names
from .packed import put_into
from .places import AnyFile, Match, Place, fill, groups_of, match, places_of


def save_model(
    model: torch.nn.Module,
    path: str | os.PathLike[str],
    metadata: dict[str, str] | None = None,
    force_contiguous: bool = True,
    *,
    options: Options | Mapping[str, Options] | None = None,
    masks: Mapping[str, Numbers] | None = None,
    importances: Mapping[str, ImportanceTensor] | None = None,
    threads: int | None = None,
    engine: str | None = None,
) -> None:
    """Writes a module's ``state_dict``; a tensor that has several names is written once.

    The weights of compressed layers are written under the names that they have in the dense model, as they
    are, nothing is encoded again.

    Of the names of one tensor, the first in alphabetical order is kept, as safetensors does; metadata say for
    each other name which one was kept. Tensors that only overlap are written each in full.

    Args:
        model: any module; its tensors can be on any device but meta.
        path: of the file, which is replaced only when all went well.
        metadata: strings of the caller's own.
        force_contiguous: False refuses tensors that are not contiguous; else their elements are written in
            the order of their indices.
        options, masks, importances: by the names kept; as in `save_file`.
        threads, engine: as in `save_file`.

    Raises:
        OptionError: a value of the ``state_dict`` is no tensor, or what is asked does not fit one.
        OSError: the file cannot be written.
    """
    compressed = dense_names(model)
    state: dict[str, torch.Tensor] = {
        compressed.get(name, name): tensor for name, tensor in model.state_dict().items()
    }
    tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    others = [name for name in state if name not in tensors]
    if others:
        raise OptionError(
            f"{others[0]!r} of the state_dict is a {type(state[others[0]]).__name__}, no tensor"
        )
    loose = [name for name, tensor in tensors.items() if tensor.layout == torch.strided]
    loose = [name for name in loose if not tensors[name].is_contiguous()]
    if loose and not force_contiguous:
        raise OptionError(f"tensor {loose[0]!r} is not contiguous; force_contiguous=True writes it as if")
    said = dict(metadata or {})
    for group in groups_of(tensors):
        kept = min(group)
        for name in group:
            if name != kept:
                said.setdefault(name, kept)
                del tensors[name]
    as_they_are = set(compressed.values())
    with Writer(path, metadata=said, engine=engine, threads=threads) as writer:
        for name, tensor in tensors.items():
            if name in as_they_are:
                put_into(tensor, writer, name)
            else:
                add_all(writer, {name: tensor}, options, masks or {}, importances or {})


def load_model(
    model: torch.nn.Module,
    path: str | os.PathLike[str],
    strict: bool = True,
    device: Device = "cpu",
    *,
    limits: Limits = DEFAULT_LIMITS,
    threads: int | None = None,
    engine: str | None = None,
) -> tuple[list[str], list[str]]:
    """Fills a module from a file, straight into its memory: at the peak the module and a chunk a thread.

    What is on another device than the processor, or has another dtype than in the file (numbers are
    converted to the module's), waits first, 64 MiB or one tensor at a time: on the processor, or on the
    CUDA device, where that decodes it. What is on the meta device gets memory. Buffers that are not
    persistent are in no file and stay as they are. A module that takes part in loading by hooks or by
    methods of its own is given all tensors by ``load_state_dict`` instead.

    Args:
        model: the module.
        path: of the file, or of the ``.sfp.index.json`` of a model in shards.
        strict: whether missing and unexpected names are refused.
        device: where what is on the meta device goes; the rest stays where it is.
        limits, threads, engine: as in `sfpformat.open`.

    Returns:
        The names of the module that the file did not fill, and the names in the file that filled nothing. Of
        the names of one tensor, one is enough; a second in the file is unexpected.

    Raises:
        MismatchError: names (where strict) or shapes do not fit; the module is as it was, unless it loads
            by methods of its own.
        OptionError: the module has compressed layers.
        InvalidFileError, UnsupportedError, LimitError: the file is damaged or refused; a note of the error
            says whether the module is as it was.
        OSError: the file cannot be read.
    """
    if any(isinstance(module, Compressed) for module in model.modules()):
        raise OptionError("the model has compressed layers: give compress_model a dense one, and the file")
    with open_any(path, limits=limits, threads=threads, engine=engine) as file:
        places = places_of(model)
        if loads_its_own_way(model):
            return _by_state_dict(model, places, file, strict, torch.device(device))
        found = match(places, file)
        if strict:
            found.require_all(model)
        fill(places, file, found.sources, torch.device(device), engine)
        return found.missing, found.unexpected


# Where modules load as `torch.nn.Module` does; batch norm only adds a counter that very old files lack.
_PLAIN_LOADING = ("torch.nn.modules.module", "torch.nn.modules.batchnorm")


def loads_its_own_way(model: torch.nn.Module) -> bool:
    """Whether some part of a module takes part in loading."""
    return any(
        module._load_state_dict_pre_hooks
        or module._load_state_dict_post_hooks
        or type(module)._load_from_state_dict.__module__ not in _PLAIN_LOADING
        or type(module).set_extra_state is not torch.nn.Module.set_extra_state
        or type(module).load_state_dict is not torch.nn.Module.load_state_dict
        for module in model.modules()
    )


def _by_state_dict(
    model: torch.nn.Module, places: Mapping[str, Place], file: AnyFile, strict: bool, device: torch.device
) -> tuple[list[str], list[str]]:
    """Loads through ``load_state_dict``: names are known to fit only when it is done."""
    groups = groups_of({name: place.tensor for name, place in places.items()})
    aliases = file.metadata()
    tensors = TorchFile(file, torch.device("cpu")).get_tensors()
    on_meta = any(place.tensor.is_meta for place in places.values())
    used: set[str] = set()  # names that the module need not take for itself
    for group in groups:
        old = places[group[0]].tensor
        names = [*group, *(aliases[name] for name in group if name in aliases)]
        source = next((name for name in names if name in tensors), None)
        if source is None or tensors[source].shape != old.shape:
            continue
        tensor = tensors[source]
        if on_meta:  # tensors are taken as they are, so they must be what the module wants
            tensor = tensor.to(device if old.is_meta else old.device, old.dtype)
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
        raise MismatchError(f"{error}\nSome of the module's weights may be overwritten.") from error
    found = Match({}, list(missing), [name for name in unexpected if name not in used])
    if strict:
        found.require_all(model)
    return found.missing, found.unexpected
