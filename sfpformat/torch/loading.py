"""Finds a module's tensors and ties, matches them with a file's tensors, and fills them.

Rules: errors about names and shapes are raised before the module is changed. Tensors are decoded directly
into the module's memory if dtype, device and strides allow it. Tensors on the meta device are allocated, and
are put into the module only after all of them are decoded.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..decode.reader import SfpFile
from ..decode.shards import ShardedFile
from ..errors import FileFault, MismatchError, OptionError, warn
from ..names import MOST_LISTED, joined, listed
from .files import batches, is_decoded_on
from .name_hints import hint
from .tensors import (
    address_of,
    count_write,
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
    ". A U8 vector in place of a weight probably comes from the state_dict of a compressed model; write "
    "the model with save_model, which load_model and compress_model can read"
)
# Tensor classes with plain strided memory. Other subclasses of Tensor may behave differently.
_PLAIN = (torch.Tensor, torch.nn.Parameter, getattr(torch.nn, "Buffer", torch.Tensor))


@dataclass(frozen=True)
class Place:
    """The module and attribute of a parameter or persistent buffer."""

    module: torch.nn.Module
    attribute: str
    tensor: torch.Tensor


def places_of(model: torch.nn.Module) -> dict[str, Place]:
    """Returns the places of a module's parameters and persistent buffers, by ``state_dict`` name."""
    found: dict[str, Place] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        tensors: dict[str, torch.Tensor | None] = {**module._parameters, **module._buffers}
        for attribute, tensor in tensors.items():
            if tensor is not None and attribute not in module._non_persistent_buffers_set:
                found[f"{path}.{attribute}" if path else attribute] = Place(module, attribute, tensor)
    return found


def identity(tensor: torch.Tensor) -> tuple[object, ...]:
    """Returns a key that is equal for tensors that are the same elements of the same memory."""
    start = address_of(tensor) if tensor.layout == torch.strided else 0
    if not start or not tensor.nbytes:
        return (id(tensor),)
    view = start, tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg()
    return (tensor.device, *view)


def groups_of(tensors: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """Groups names by tensor: the names of one tied tensor form one group."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(identity(tensor), []).append(name)
    return list(groups.values())


@dataclass(frozen=True)
class Match:
    """The mapping from a module's tensors to those of a file.

    Attributes:
        sources: the names of a group of `groups_of` -> the name in the file.
        missing: names of the module that are not in the file.
        unexpected: names in the file that are not used.
        ignored: names in the file that are not used because they are non-persistent buffers, which the module
            computes itself.
        counters: groups that may be missing: the batch counters of batch norms.
    """

    sources: dict[Group, str]
    missing: list[str]
    unexpected: list[str]
    ignored: list[str]
    counters: list[Group]

    def require_all(self, model: torch.nn.Module) -> None:
        """Refuses missing and unexpected names.

        Raises:
            MismatchError: a name is missing or unexpected.
        """
        require_same_names(model, self.missing, self.unexpected)

    @property
    def filled(self) -> set[str]:
        """The names of the module that are filled."""
        return {name for group in (*self.sources, *self.counters) for name in group}


def require_same_names(model: torch.nn.Module, missing: Sequence[str], unexpected: Sequence[str]) -> None:
    """Refuses names that only the module or only the file has.

    Raises:
        MismatchError: there is such a name. The message lists the first names and the reason, if known.
    """
    if missing or unexpected:
        parts = [
            f"{word} in the file: {listed(names)}"
            for word, names in (("missing", missing), ("unexpected", unexpected))
            if names
        ]
        reason = hint(missing, unexpected)
        raise MismatchError(
            f"the file does not fit {type(model).__name__}: {'; '.join(parts)}{reason and f'. {reason}'}",
            missing,
            unexpected,
        )


def match(model: torch.nn.Module, places: Mapping[str, Place], file: AnyFile) -> Match:
    """Finds the tensor in a file for each tensor of a module: by one of its names, or by an alias.

    Aliases are the metadata that `save_model` and safetensors write for tied tensors: other name -> kept
    name. As in torch, the counter of batch norm may be missing, and a scalar may be a vector of one element.

    Args:
        model: the module.
        places: the places of the module, without tensors of lazy modules.
        file: an open file.

    Raises:
        MismatchError: a shape differs, or this version of torch has no such dtype.
        OptionError: a tensor of the module cannot be filled, such as one with freed memory.
    """
    aliases = file.metadata()
    sources: dict[Group, str] = {}
    missing: list[str] = []
    counters: list[Group] = []
    wrong: list[str] = []
    compressed = False  # whether the file probably has bytes of compressed layers
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
        reason = _OF_COMPRESSED if compressed else ""
        some = joined(wrong[:MOST_LISTED], len(wrong) - MOST_LISTED)
        raise MismatchError(f"shapes differ: {some}{reason}")
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
    """Returns whether a place is the batch counter of a batch norm, which very old files lack."""
    return place.attribute == _COUNTER and isinstance(place.module, torch.nn.modules.batchnorm._NormBase)


def is_shape_of(stored: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Returns whether a stored shape fits a tensor's; as in torch, a vector of one element fits a scalar."""
    return stored == shape or (stored == (1,) and shape == ())


def require_fillable(name: str, tensor: torch.Tensor) -> None:
    """Refuses a tensor of a module that cannot be filled from a file.

    Raises:
        OptionError: the tensor's memory was freed or resized; it is a DTensor, quantised or nested; or it is
            a wrapper on the meta device.
    """
    reason = missing_memory(tensor)
    if hasattr(tensor, "full_tensor"):
        reason = "is a distributed DTensor; load the model before you distribute it"
    elif tensor.is_quantized or tensor.is_nested:
        reason = f"is a {'quantised' if tensor.is_quantized else 'nested'} tensor of torch"
    elif tensor.is_meta and is_wrapper(tensor):
        reason = f"is a {type(tensor).__name__} on the meta device"
    if reason is not None:
        raise OptionError(f"{name!r} of the module {reason}")


def non_persistent(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Returns the buffers of a module that are not in its ``state_dict``, by name."""
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
        places: the places of the module.
        file: an open file.
        sources: as in `Match`.
        device: the device for tensors that are on the meta device.
        engine: the engine that the file was opened with.
        counters: as in `Match`; those on the meta device are set to 0.

    Warns:
        SfpWarning: the module's dtype cannot represent the file's numbers.

    Raises:
        InvalidFileError, LimitError: the file is damaged or refused; a note says whether the module changed.
        MismatchError: a tensor's class does not accept the numbers; with the same note.
    """
    made: dict[Group, torch.Tensor] = {}
    lost: list[str] = []
    direct: dict[str, torch.Tensor] = {}  # name in the file -> the tensor into which it is decoded
    rest: dict[str, list[torch.Tensor]] = {}  # name in the file -> the tensors to which it is copied
    for group, source in sources.items():
        tensor = places[group[0]].tensor
        if tensor.is_meta:
            made[group] = _memory_like(tensor, device)
        target = made.get(group, tensor.detach())
        if source not in direct and fits(target, tensor, file.info(source).dtype):
            direct[source] = target
        else:
            rest.setdefault(source, []).append(target)
    for group in counters:
        tensor = places[group[0]].tensor
        if tensor.is_meta:
            made[group] = torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
    with (
        file.prefetch(_in_file_order(file, direct, rest)),
        _note_on_error(all(group in made for group in sources)),
        torch.no_grad(),
    ):
        file.read_into(
            {name: memory_of(tensor).reshape(file.info(name).shape) for name, tensor in direct.items()}
        )
        for name, tensor in direct.items():
            count_write(tensor)
            for other in rest.pop(name, []):
                _copy(name, tensor, other, lost)
        for batch in batches({name: file.info(name).decoded_bytes for name in rest}):
            for name, tensor in _read(file, batch, rest, engine):
                for other in rest[name]:
                    _copy(name, tensor, other, lost)
    for group, tensor in made.items():
        _put(places, group, tensor)
    warn_of_lost_values(lost)


def _in_file_order(file: AnyFile, *names: Collection[str]) -> list[str]:
    """Returns several sets of names one after another, each in the order in which a remote file is read."""
    order = file.keys() if file.is_remote else []
    return [name for some in names for name in order if name in some]


def _read(
    file: AnyFile, names: list[str], targets: Mapping[str, list[torch.Tensor]], engine: str | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields tensors with their names: decoded on their target's CUDA device if possible, else on the CPU."""
    by_device: dict[torch.device | None, list[str]] = {}
    for name in names:
        where = targets[name][0].device
        by_device.setdefault(where if is_decoded_on(where, engine) else None, []).append(name)
    for device, some in by_device.items():
        if device is None:
            for name, array in file.get_tensors(some).items():
                yield name, tensor_of(array)
        else:
            from .device_memory import read_tensors  # lazy: the import prepares the kernels' tables

            yield from read_tensors(file, some, device).items()


def _memory_like(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Allocates memory for a tensor that is on the meta device."""
    # Not `empty_like`, which imports a large part of torch for the meta device.
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


def fits(target: torch.Tensor, tensor: torch.Tensor, dtype: str) -> bool:
    """Returns whether a file's tensor can be decoded directly into ``target``, the memory of ``tensor``."""
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
    """Copies a file's numbers to a tensor of a module, which can be a subclass of Tensor.

    Args:
        lost: the name is appended if the module's dtype cannot represent the numbers.

    Raises:
        MismatchError: the tensor does not accept the numbers.
    """
    given = tensor
    if tensor.is_complex() and not (target.is_complex() or is_wrapper(target)):
        given = tensor.real  # torch drops the imaginary part too, with a warning only in the first call
    try:
        target.copy_(given.reshape(target.shape))
    except torch.cuda.OutOfMemoryError:  # a RuntimeError that is not about the tensor's class
        raise
    except (RuntimeError, TypeError) as error:  # a class raises either of them if it has no such operation
        raise MismatchError(
            f"the file's values cannot be written to {name!r} of the module, a {type(target).__name__}: "
            f"{first_line(error)}"
        ) from error
    if loses_values(tensor, target):
        lost.append(name)


def loses_values(tensor: torch.Tensor, target: torch.Tensor) -> bool:
    """Returns whether a module's dtype cannot represent a file's numbers: out of range, or not integers or
    real numbers.

    Args:
        tensor: the file's tensor.
        target: the module's tensor, on any device. If its dtype is an integer type, it must already hold the
            converted numbers.
    """
    if is_wrapper(target) or tensor.dtype == target.dtype or target.is_complex():
        return False
    if tensor.is_complex():
        return bool(tensor.imag.count_nonzero()) or loses_values(tensor.real, target)
    if tensor.is_floating_point() and tensor.itemsize < 2:
        tensor = tensor.float()  # torch has few operators for FP8
    if target.is_floating_point():
        held = torch.finfo(target.dtype)
        if tensor.is_floating_point() and held.max >= torch.finfo(tensor.dtype).max:
            return False
        # Out of range numbers become infinite, NaN, or in some dtypes the greatest number.
        return _largest_magnitude(tensor) > held.max * (1 + held.eps / 4)
    return not torch.equal(target.to(tensor.device, tensor.dtype).reshape(tensor.shape), tensor)


def _largest_magnitude(tensor: torch.Tensor) -> float:
    """Returns the greatest finite magnitude; 0 if there is none."""
    if not tensor.is_floating_point():
        tensor = tensor.double()
    if not tensor.numel():
        return 0.0
    ends = torch.stack(torch.aminmax(tensor)).abs()
    if not torch.isfinite(ends).all():
        ends = tensor[torch.isfinite(tensor)].abs()
    return float(ends.max()) if ends.numel() else 0.0


def warn_of_lost_values(names: Sequence[str]) -> None:
    """Warns of the tensors for which `loses_values` is true."""
    if names:
        warn(f"the module's dtype cannot represent all values of {listed(names)} in the file")


def _put(places: Mapping[str, Place], group: Group, tensor: torch.Tensor) -> None:
    """Puts an allocated tensor into all places of a group; a tied parameter stays one parameter."""
    old = places[group[0]].tensor
    parameter = torch.nn.Parameter(tensor, old.requires_grad) if isinstance(old, torch.nn.Parameter) else None
    (tensor if parameter is None else parameter).__dict__.update(old.__dict__)
    for name in group:
        module, attribute = places[name].module, places[name].attribute
        # `setattr`, as in torch's own loading: an LSTM, for example, also keeps its weights in a list.
        setattr(module, attribute, tensor if parameter is None else parameter)


@contextmanager
def _note_on_error(untouched: bool) -> Iterator[None]:
    """Adds a note to an error that says whether the module was changed."""
    try:
        yield
    except (FileFault, MismatchError) as error:
        error.add_note(
            "The module is unchanged."
            if untouched
            else "Some of the module's weights were overwritten: load it again before you use it."
        )
        raise
