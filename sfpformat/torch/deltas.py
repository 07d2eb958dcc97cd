"""Deltas between models of torch: `write_delta` and `apply_delta`."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from functools import partial
from itertools import chain
from typing import Any

import torch

from ..container.delta_map import DeltaMap
from ..deltas import applying, comparing
from ..deltas.applying import uninterrupted
from ..deltas.reading import Delta
from ..deltas.writing import BLOCK
from ..encode.sink import Target
from ..io.source import Readable
from ..limits import DEFAULT_LIMITS, Limits
from .delta_models import Source, arrays_of, copy_back, elements_of, named_tensors, state_of_target
from .device_deltas import apply_on_device, device_for
from .groups import is_distributed
from .overlaps import is_written, require_separate
from .sharded_deltas import write_sharded_delta
from .sliced_deltas import SliceIndex, apply_slices
from .tensors import Array, count_write, tensor_of


def write_delta(
    path: Target,
    base: Source,
    new: Source,
    *,
    base_name: str | None = None,
    metadata: dict[str, str] | None = None,
    parts: bool = False,
    block: int = BLOCK,
    group: Any = None,
    engine: str | None = None,
    threads: int | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> DeltaMap:
    """Writes how the tensors of a model differ from those of a base. Replaces an old file only at the end.

    ``write_delta("step-18.sfp", "step-17.safetensors", model)``

    If ``new`` has DTensors, as a model after ``fully_shard``, all processes of ``group`` call this function.
    It gathers one tensor at a time, never the whole model. The first process writes the file; or, if ``path``
    is that of an index, ``step-18.sfp.index.json``, each process writes a file, with a part of the tensors.
    All files appear, or none.

    Args:
        path: the file to write, or the index of the files of all processes.
        base, new: the base and the result: a module, a state dict, an open file, or the path of an `.sfp` or
            safetensors file or of an index. Of tied tensors of a module, only the first name in alphabetical
            order counts, as for `save_model`. DTensors of ``base``, such as copies of those of ``new`` before
            a step, are gathered, too.
        parts: same as for `sfpformat.write_delta`, but false by default: `apply_delta` takes only elements.
        group: the processes of ``torch.distributed`` that hold DTensors. None stands for all.
        base_name, metadata, block, engine, threads, limits: same as for `sfpformat.write_delta`.

    Returns:
        What the file says about the tensors; of several files, what all of them say.

    Raises:
        OptionError: an argument is invalid, a tensor has no memory of its own, or the format lacks its dtype;
            or the processes have different tensors.
        ProcessError: another process failed. No process wrote anything.
        InvalidFileError, UnsupportedError, LimitError, SafetensorsError: ``base`` or ``new`` is damaged.
        OSError: a file cannot be read or written.
    """
    named = named_tensors(new)
    if isinstance(named, Mapping) and any(map(is_distributed, named.values())):
        return write_sharded_delta(
            path,
            named_tensors(base),
            named,
            group,
            base_name=base_name,
            metadata=metadata,
            block=block,
            engine=engine,
            threads=threads,
            limits=limits,
        )
    return comparing.write_delta(
        path,
        arrays_of(base),
        arrays_of(named),
        base_name=base_name,
        metadata=metadata,
        parts=parts,
        block=block,
        engine=engine,
        threads=threads,
        limits=limits,
    )


def apply_delta(
    target: torch.nn.Module | MutableMapping[str, torch.Tensor],
    delta: Readable | Delta,
    *,
    slices: Mapping[str, SliceIndex] | None = None,
    group: Any = None,
    engine: str | None = None,
    threads: int | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> DeltaMap:
    """Changes a model from the base of a delta to its result, in place. Changes all tensors or none.

    ``apply_delta(model, "step-18.sfp")``

    Makes all checks before the first change. Tensors that are contiguous in CPU memory are changed there.

    If one CUDA device has all tensors that the delta changes or replaces, it changes them where they are,
    with at most 64 MB of its memory (for elements of up to 16 bits and blocks of the default size). It copies
    those that are not contiguous. All other tensors are copied to CPU memory and back: if several devices
    have them; without cuda-core; with ``engine="numba"`` or ``"python"``; if they overlap in part; and if the
    delta lists more than 65,536 tensors. The result is the same.

    If the target has DTensors, or with ``slices``, each process changes the part of each tensor that it
    holds. All processes of ``group`` then call this function, and together hold each element; several may
    hold the same part. They exchange how many elements of each exponent their parts have, not the elements,
    and change all parts or none.

    Args:
        target: a module, or a state dict. It must have exactly the tensors of the base; a tied tensor of a
            module needs only one of its names. A module keeps its structure and dtypes: for a delta that
            changes them, pass a state dict.
        delta: the delta, as for `sfpformat.open`, or an open `sfpformat.Delta`.
        slices: name -> the slice of the whole tensor that the target has, such as ``np.s_[:, 64:128]``.
            Tensors without one are whole, or DTensors with the placements Shard and Replicate.
        group: the processes of ``torch.distributed`` that hold parts. None stands for all.
        engine, threads, limits: same as for `sfpformat.open`. For an open `Delta`, its engine counts.

    Returns:
        What the delta says about the tensors.

    Raises:
        BaseMismatchError: the target is not the base of the delta. Nothing was changed.
        OptionError: the file is not a delta, or stores masks, levels or importances (written without
            ``parts=False``); a tensor has no memory of its own, or the structure of a module
            would change; the parts of processes overlap or leave elements out. Nothing was changed.
        ProcessError: another process failed. No process changed anything.
        InvalidFileError, UnsupportedError, LimitError: the delta is damaged. Nothing was changed.
        OSError: the delta cannot be read, or a temporary file cannot be written. Nothing was changed.
        PartlyChangedError: the delta could not be read to its end, and tensors could not be restored.
        EngineError: a CUDA device failed. Nothing was changed, or its memory is lost.
    """
    if slices is not None or _has_dtensors(target):
        options = {"engine": engine, "threads": threads, "limits": limits}
        return apply_slices(target, delta, slices or {}, group, options)
    if not isinstance(delta, Delta):
        with Delta(delta, limits=limits, engine=engine, threads=threads) as opened:
            return apply_delta(target, opened, threads=threads)
    delta.require_elements()
    state = state_of_target(target, delta.map)
    require_separate(state, delta.map)
    written = [state[tensor.name] for tensor in delta.map.tensors if is_written(tensor, state)]
    device = device_for(state, delta)
    if device is not None:
        apply_on_device(state, delta, device, partial(_restructure, target))
    else:
        _apply_on_cpu(target, state, delta, threads)
    for tensor in written:
        count_write(tensor)
    return delta.map


def _apply_on_cpu(
    target: torch.nn.Module | MutableMapping[str, torch.Tensor],
    state: Mapping[str, torch.Tensor],
    delta: Delta,
    threads: int | None,
) -> None:
    """Changes tensors in CPU memory, and copies of all others."""
    copied: dict[str, tuple[Array, torch.Tensor]] = {}
    arrays = {name: elements_of(name, tensor, copied) for name, tensor in state.items()}
    before = dict(arrays)
    applying.apply_delta(arrays, delta, threads=threads)

    def finish() -> None:
        copy_back({name: pair for name, pair in copied.items() if arrays.get(name) is pair[0]}, delta.map)
        new = {name: tensor_of(array) for name, array in arrays.items() if array is not before.get(name)}
        _restructure(target, new, [name for name in before if name not in arrays])

    uninterrupted(finish)


def _restructure(
    target: torch.nn.Module | MutableMapping[str, torch.Tensor], new: dict[str, torch.Tensor], gone: list[str]
) -> None:
    """Adds tensors to a state dict, and removes others. A module keeps its structure."""
    if isinstance(target, torch.nn.Module):
        return
    target.update(new)
    for name in gone:
        del target[name]


def _has_dtensors(target: object) -> bool:
    if isinstance(target, torch.nn.Module):
        return any(map(is_distributed, chain(target.parameters(), target.buffers())))
    return isinstance(target, Mapping) and any(map(is_distributed, target.values()))
