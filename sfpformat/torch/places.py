"""Where a module keeps its tensors, which of them are one and the same, and how they are filled from a file.

Rules: what does not fit is told before anything is changed. Tensors are decoded straight into the module's
memory where dtype, device and strides let them; a module on the meta device gets memory, and is given it when
all of it was decoded.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..errors import FileFault, MismatchError
from ..reader import SfpFile
from ..shards import ShardedFile
from .files import batches, is_decoded_on
from .tensors import format_dtype, memory_of, tensor_of, torch_dtype

AnyFile = SfpFile | ShardedFile
# Strided memory without a behaviour of its own: what other subclasses of Tensor do is up to them.
_PLAIN = (torch.Tensor, torch.nn.Parameter, getattr(torch.nn, "Buffer", torch.Tensor))


@dataclass(frozen=True)
class Place:
    """Where a module keeps a parameter or a persistent buffer."""

    module: torch.nn.Module
    attribute: str
    tensor: torch.Tensor


def places_of(model: torch.nn.Module) -> dict[str, Place]:
    """The places of a module's parameters and persistent buffers, by their names in its ``state_dict``."""
    found: dict[str, Place] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        tensors: dict[str, torch.Tensor | None] = {**module._parameters, **module._buffers}
        for attribute, tensor in tensors.items():
            if tensor is not None and attribute not in module._non_persistent_buffers_set:
                found[f"{path}.{attribute}" if path else attribute] = Place(module, attribute, tensor)
    return found


def identity(tensor: torch.Tensor) -> tuple[object, ...]:
    """Equal for tensors that are one and the same: the same elements of the same memory."""
    if tensor.is_meta or tensor.layout != torch.strided or not tensor.nbytes or not tensor.data_ptr():
        return (id(tensor),)
    view = tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg()
    return (tensor.device, *view)


def groups_of(tensors: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """The names, those of one and the same tensor together."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(identity(tensor), []).append(name)
    return list(groups.values())


@dataclass(frozen=True)
class Match:
    """Which tensor of a file goes where.

    Attributes:
        sources: the names of a group of `groups_of` -> the name in the file.
        missing: names of the module that nothing in the file fills.
        unexpected: names in the file that fill nothing.
    """

    sources: dict[tuple[str, ...], str]
    missing: list[str]
    unexpected: list[str]

    def require_all(self, model: torch.nn.Module) -> None:
        """Refuses missing and unexpected names.

        Raises:
            MismatchError: there are some.
        """
        if self.missing or self.unexpected:
            said = [
                f"{word} in the file: {', '.join(map(repr, names))}"
                for word, names in (("missing", self.missing), ("unexpected", self.unexpected))
                if names
            ]
            raise MismatchError(
                f"the file does not fit {type(model).__name__}: {'; '.join(said)}",
                self.missing,
                self.unexpected,
            )


def match(places: Mapping[str, Place], file: AnyFile, taken: Collection[str] = ()) -> Match:
    """Finds for each tensor of a module the one in a file: by a name of its own, else by an alias.

    An alias is what `save_model` and safetensors write for names of one tensor: metadata name -> name kept.

    Args:
        places: of the module.
        file: open.
        taken: names in the file that are used elsewhere.

    Raises:
        MismatchError: a shape is another, or this version of torch has no such dtype.
    """
    aliases = file.metadata()
    sources: dict[tuple[str, ...], str] = {}
    missing: list[str] = []
    wrong: list[str] = []
    for group in groups_of({name: place.tensor for name, place in places.items()}):
        shape = tuple(places[group[0]].tensor.shape)
        own = next((name for name in group if name in file), None)
        also = (aliases[name] for name in group if name in aliases)
        source = own or next((name for name in also if name in file and file.info(name).shape == shape), None)
        if source is None:
            missing += group
            continue
        info = file.info(source)
        torch_dtype(info.dtype)
        sources[tuple(group)] = source
        if info.shape != shape:
            wrong.append(f"{source!r} is {list(info.shape)} in the file, {list(shape)} in the module")
    if wrong:
        raise MismatchError(f"shapes differ: {'; '.join(wrong)}")
    used = {*sources.values(), *taken}
    return Match(sources, missing, [name for name in file if name not in used])


def fill(
    places: Mapping[str, Place],
    file: AnyFile,
    sources: Mapping[tuple[str, ...], str],
    device: torch.device,
    engine: str | None = None,
) -> None:
    """Decodes tensors of a file into a module.

    Args:
        places: of the module.
        file: open.
        sources: as in `Match`.
        device: where what is on the meta device goes.
        engine: that the file was opened with.

    Raises:
        InvalidFileError, LimitError: with a note that says what became of the module.
    """
    made: dict[tuple[str, ...], torch.Tensor] = {}
    direct: dict[str, torch.Tensor] = {}  # name in the file -> what it is decoded into
    rest: dict[str, list[torch.Tensor]] = {}  # name in the file -> what it is copied to
    for group, source in sources.items():
        tensor = places[group[0]].tensor
        if tensor.is_meta:
            made[group] = _memory_like(tensor, device)
        target = made.get(group, tensor.detach())
        if source not in direct and _fits(target, tensor, file.info(source).dtype):
            direct[source] = target
        else:
            rest.setdefault(source, []).append(target)
    with _noted(len(made) == len(sources)), torch.no_grad():
        file.read_into({name: memory_of(tensor) for name, tensor in direct.items()})
        for name, tensor in direct.items():
            _count_change(tensor)
            for other in rest.pop(name, []):
                other.copy_(tensor)
        for batch in batches({name: file.info(name).decoded_bytes for name in rest}):
            for name, tensor in _read(file, batch, rest, engine):
                for other in rest[name]:
                    other.copy_(tensor)
    for group, tensor in made.items():
        _put(places, group, tensor)


def _read(
    file: AnyFile, names: list[str], targets: Mapping[str, list[torch.Tensor]], engine: str | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Some tensors by name: decoded on the CUDA device of what they are for where that can be, else here."""
    by_device: dict[torch.device | None, list[str]] = {}
    for name in names:
        where = targets[name][0].device
        by_device.setdefault(where if is_decoded_on(where, engine) else None, []).append(name)
    for device, some in by_device.items():
        if device is None:
            for name, array in file.get_tensors(some).items():
                yield name, tensor_of(array)
        else:
            from .device import read_tensors  # not before it is needed: it makes ready what kernels take

            yield from read_tensors(file, some, device).items()


def _memory_like(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Memory for a tensor on the meta device."""
    # Not `empty_like`, which for the meta device imports a great part of torch.
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


def _fits(target: torch.Tensor, tensor: torch.Tensor, dtype: str) -> bool:
    """Whether a tensor of a file can be decoded into the memory of ``target``, which is for ``tensor``."""
    known = format_dtype(target.dtype)
    return (
        known is not None
        and known.name == dtype
        and type(tensor) in _PLAIN
        and target.device.type == "cpu"
        and target.layout == torch.strided
        and target.is_contiguous()
        and not (target.is_conj() or target.is_neg())
    )


def _put(places: Mapping[str, Place], group: tuple[str, ...], tensor: torch.Tensor) -> None:
    """Gives memory that was made to all places of a group; a parameter stays one parameter."""
    old = places[group[0]].tensor
    parameter = torch.nn.Parameter(tensor, old.requires_grad) if isinstance(old, torch.nn.Parameter) else None
    (tensor if parameter is None else parameter).__dict__.update(old.__dict__)
    for name in group:
        module, attribute = places[name].module, places[name].attribute
        if attribute in module._parameters:
            module._parameters[attribute] = parameter
        else:
            module._buffers[attribute] = tensor if parameter is None else parameter


def _count_change(tensor: torch.Tensor) -> None:
    """Tells autograd that memory was written, as an operation of torch's own would."""
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


@contextmanager
def _noted(untouched: bool) -> Iterator[None]:
    """Adds to a fault what became of the module."""
    try:
        yield
    except FileFault as error:
        error.add_note(
            "The module is as it was."
            if untouched
            else "Some of the module's weights were overwritten before this: load it again before it is used."
        )
        raise
