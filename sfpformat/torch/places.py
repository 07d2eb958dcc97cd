"""Where a module keeps its tensors, which of them are one and the same, and how they are filled from a file.

Rules: what does not fit is told before anything is changed. Tensors are decoded straight into the module's
memory where dtype, device and strides let them; a module on the meta device gets memory, and is given it when
all of it was decoded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..decode.reader import SfpFile
from ..decode.shards import ShardedFile
from ..errors import FileFault, MismatchError, OptionError, warn
from ..names import MOST_LISTED, listed
from .files import batches, is_decoded_on
from .hints import hint
from .tensors import (
    address_of,
    first_line,
    format_dtype,
    is_wrapper,
    memory_of,
    missing_memory,
    tensor_of,
    torch_dtype,
)

AnyFile = SfpFile | ShardedFile
Group = tuple[str, ...]  # the names of one tensor
_COUNTER = "num_batches_tracked"
_OF_COMPRESSED = (
    ". A vector of U8 for a weight is probably of the state_dict of a compressed model, which save_model "
    "writes so that load_model and compress_model take it"
)
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
    start = address_of(tensor) if tensor.layout == torch.strided else 0
    if not start or not tensor.nbytes:
        return (id(tensor),)
    view = start, tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg()
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
        ignored: names in the file that fill nothing because the module makes them itself: buffers that are
            not persistent.
        counters: groups that may be missing: what batch norm counts its batches with.
    """

    sources: dict[Group, str]
    missing: list[str]
    unexpected: list[str]
    ignored: list[str]
    counters: list[Group]

    def require_all(self, model: torch.nn.Module) -> None:
        """Refuses missing and unexpected names.

        Raises:
            MismatchError: there are some.
        """
        require_same_names(model, self.missing, self.unexpected)

    @property
    def filled(self) -> set[str]:
        """The names of the module that get numbers."""
        return {name for group in (*self.sources, *self.counters) for name in group}


def require_same_names(model: torch.nn.Module, missing: Sequence[str], unexpected: Sequence[str]) -> None:
    """Refuses names that a module or a file has alone.

    Raises:
        MismatchError: there are some; the message has the first ones and a reason, where that is known.
    """
    if missing or unexpected:
        said = [
            f"{word} in the file: {listed(names)}"
            for word, names in (("missing", missing), ("unexpected", unexpected))
            if names
        ]
        reason = hint(missing, unexpected)
        raise MismatchError(
            f"the file does not fit {type(model).__name__}: {'; '.join(said)}{reason and f'. {reason}'}",
            missing,
            unexpected,
        )


def match(model: torch.nn.Module, places: Mapping[str, Place], file: AnyFile) -> Match:
    """Finds for each tensor of a module the one in a file: by a name of its own, else by an alias.

    An alias is what `save_model` and safetensors write for names of one tensor: metadata name -> name kept.
    As in torch, the counter of batch norm may be missing, and a scalar may be a vector of one element.

    Args:
        model: the module.
        places: of the module; no tensor of a lazy module.
        file: open.

    Raises:
        MismatchError: a shape is another, or this version of torch has no such dtype.
        OptionError: a tensor of the module cannot be filled, such as one whose memory was freed.
    """
    aliases = file.metadata()
    sources: dict[Group, str] = {}
    missing: list[str] = []
    counters: list[Group] = []
    wrong: list[str] = []
    compressed = False  # whether the file seems to have bytes of compressed layers
    for group in groups_of({name: place.tensor for name, place in places.items()}):
        place = places[group[0]]
        shape = tuple(place.tensor.shape)
        own = next((name for name in group if name in file), None)
        also = (aliases[name] for name in group if name in aliases)
        source = own or next((name for name in also if name in file and file.info(name).shape == shape), None)
        if source is None:
            if is_counter(place):
                counters.append(tuple(group))
            else:
                missing += group
            continue
        info = file.info(source)
        torch_dtype(info.dtype)
        sources[tuple(group)] = source
        if not is_shape_of(info.shape, shape):
            compressed |= info.dtype == "U8" and len(info.shape) == 1 and place.tensor.is_floating_point()
            wrong.append(f"{source!r} is {list(info.shape)} in the file, {list(shape)} in the module")
        require_fillable(group[0], place.tensor)
    if wrong:
        more = f" and {len(wrong) - MOST_LISTED:,} more" if len(wrong) > MOST_LISTED else ""
        reason = _OF_COMPRESSED if compressed else ""
        raise MismatchError(f"shapes differ: {'; '.join(wrong[:MOST_LISTED])}{more}{reason}")
    used = set(sources.values())
    unused = [name for name in file if name not in used]
    own_buffers = non_persistent(model)
    return Match(
        sources,
        missing,
        [name for name in unused if name not in own_buffers],
        [name for name in unused if name in own_buffers],
        counters,
    )


def is_counter(place: Place) -> bool:
    """Whether a place is the counter of a batch norm, which files older than it do not have."""
    return place.attribute == _COUNTER and isinstance(place.module, torch.nn.modules.batchnorm._NormBase)


def is_shape_of(stored: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether a stored shape fills a tensor's: as in torch, one element fills a scalar."""
    return stored == shape or (stored == (1,) and shape == ())


def require_fillable(name: str, tensor: torch.Tensor) -> None:
    """Refuses a tensor of a module that numbers of a file cannot be written to.

    Raises:
        OptionError: its memory was freed or cut, it is spread over processes, or has a dtype of torch alone.
    """
    reason = missing_memory(tensor)
    if hasattr(tensor, "full_tensor"):
        reason = "is a DTensor, spread over processes; load the model before it is distributed"
    elif tensor.is_quantized or tensor.is_nested:
        reason = f"is a {'quantised' if tensor.is_quantized else 'nested'} tensor of torch"
    elif tensor.is_meta and is_wrapper(tensor):
        reason = f"is a {type(tensor).__name__} on the meta device"
    if reason is not None:
        raise OptionError(f"{name!r} of the module {reason}")


def non_persistent(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The buffers of a module that are not in its ``state_dict``, by name."""
    return {
        f"{path}.{name}" if path else name: buffer
        for path, module in model.named_modules(remove_duplicate=False)
        for name, buffer in module._buffers.items()
        if buffer is not None and name in module._non_persistent_buffers_set
    }


def fill(
    places: Mapping[str, Place],
    file: AnyFile,
    sources: Mapping[Group, str],
    device: torch.device,
    engine: str | None = None,
    counters: Sequence[Group] = (),
) -> None:
    """Decodes tensors of a file into a module.

    Args:
        places: of the module.
        file: open.
        sources: as in `Match`.
        device: where what is on the meta device goes.
        engine: that the file was opened with.
        counters: as in `Match`; those on the meta device begin at 0.

    Warns:
        SfpWarning: numbers do not fit into the module's dtype.

    Raises:
        InvalidFileError, LimitError: with a note that says what became of the module.
        MismatchError: a tensor's class does not take the numbers; with the same note.
    """
    made: dict[Group, torch.Tensor] = {}
    lost: list[str] = []
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
    for group in counters:
        tensor = places[group[0]].tensor
        if tensor.is_meta:
            made[group] = torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
    with _noted(all(group in made for group in sources)), torch.no_grad():
        file.read_into(
            {name: memory_of(tensor).reshape(file.info(name).shape) for name, tensor in direct.items()}
        )
        for name, tensor in direct.items():
            _count_change(tensor)
            for other in rest.pop(name, []):
                _copy(name, tensor, other, lost)
        for batch in batches({name: file.info(name).decoded_bytes for name in rest}):
            for name, tensor in _read(file, batch, rest, engine):
                for other in rest[name]:
                    _copy(name, tensor, other, lost)
    for group, tensor in made.items():
        _put(places, group, tensor)
    warn_of_lost(lost)


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


def _copy(name: str, tensor: torch.Tensor, target: torch.Tensor, lost: list[str]) -> None:
    """Writes numbers of a file to a tensor of a module, which may be of a class of its own.

    Args:
        lost: gets the name where the module's dtype does not hold the numbers.

    Raises:
        MismatchError: it does not take them.
    """
    try:
        target.copy_(tensor.reshape(target.shape))
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise MismatchError(
            f"{name!r} of the module is a {type(target).__name__} that does not take the file's numbers: "
            f"{first_line(error)}"
        ) from error
    if loses_numbers(tensor, target):
        lost.append(name)


def loses_numbers(tensor: torch.Tensor, target: torch.Tensor) -> bool:
    """Whether numbers of a file do not fit into a module's dtype: they are beyond it, or no whole numbers.

    Args:
        tensor: of the file.
        target: of the module, on any device; if its dtype is of whole numbers, with what ``tensor`` became.
    """
    if is_wrapper(target) or tensor.dtype == target.dtype or tensor.is_complex() or target.is_complex():
        return False
    if tensor.is_floating_point() and tensor.itemsize < 2:
        tensor = tensor.float()  # torch has few operators for FP8
    if target.is_floating_point():
        held = torch.finfo(target.dtype)
        if tensor.is_floating_point() and held.max >= torch.finfo(tensor.dtype).max:
            return False
        # What is beyond becomes infinite, a NaN, or in some dtypes the greatest number.
        return _greatest(tensor) > held.max * (1 + held.eps / 4)
    return not torch.equal(target.to(tensor.device, tensor.dtype).reshape(tensor.shape), tensor)


def _greatest(tensor: torch.Tensor) -> float:
    """The greatest finite magnitude; 0 where there is none."""
    if not tensor.is_floating_point():
        tensor = tensor.double()
    if not tensor.numel():
        return 0.0
    ends = torch.stack(torch.aminmax(tensor)).abs()
    if not torch.isfinite(ends).all():
        ends = tensor[torch.isfinite(tensor)].abs()
    return float(ends.max()) if ends.numel() else 0.0


def warn_of_lost(names: Sequence[str]) -> None:
    """Warns of tensors with numbers that `loses_numbers`."""
    if names:
        warn(f"the module's dtype does not hold all numbers that the file has for {listed(names)}")


def _put(places: Mapping[str, Place], group: Group, tensor: torch.Tensor) -> None:
    """Gives memory that was made to all places of a group; a parameter stays one parameter."""
    old = places[group[0]].tensor
    parameter = torch.nn.Parameter(tensor, old.requires_grad) if isinstance(old, torch.nn.Parameter) else None
    (tensor if parameter is None else parameter).__dict__.update(old.__dict__)
    for name in group:
        module, attribute = places[name].module, places[name].attribute
        # By `setattr`, as torch's own loading: an LSTM, for one, keeps its weights in a list, too.
        setattr(module, attribute, tensor if parameter is None else parameter)


def _count_change(tensor: torch.Tensor) -> None:
    """Tells autograd that memory was written, as an operation of torch's own would."""
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


@contextmanager
def _noted(untouched: bool) -> Iterator[None]:
    """Adds to a fault what became of the module."""
    try:
        yield
    except (FileFault, MismatchError) as error:
        error.add_note(
            "The module is as it was."
            if untouched
            else "Some of the module's weights were overwritten before this: load it again before it is used."
        )
        raise
