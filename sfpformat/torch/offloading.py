"""`dispatch_model`: models for accelerate, of which parts stay in the file until they are needed."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..decode.opening import open_any
from ..decode.reader import SfpFile
from ..decode.shards import ShardedFile
from ..errors import OptionError
from ..limits import DEFAULT_LIMITS, Limits
from ..names import quoted
from .files import Device, require_device
from .loading import Group, Place, fill, match, places_of
from .meta import require_none_left
from .tensors import require_module, tensor_of

DISK = "disk"


def dispatch_model(
    model: torch.nn.Module,
    path: str | os.PathLike[str],
    device_map: Mapping[str, Device],
    main_device: Device | None = None,
    *,
    limits: Limits = DEFAULT_LIMITS,
    threads: int | None = None,
    engine: str | None = None,
    **arguments: Any,
) -> torch.nn.Module:
    """Loads a file into a module by ``accelerate.dispatch_model``. Parts on ``"disk"`` stay in the file.

    ``dispatch_model(model, "model.sfp", {"model.embed_tokens": "cpu", "": "disk"})``

    The weights of these parts are on the meta device. Each forward pass of a layer decodes its weights from
    the file, and releases them. So no folder with a copy of the weights is needed, as accelerate does by
    default. Other parts are loaded as by `load_model`. The file stays open as long as the module exists.

    Args:
        model: the module, such as one that `parameters_on_meta` creates.
        path: same as for `load_model`.
        device_map: name of a submodule or tensor, or "" for all others -> its device, or ``"disk"``.
        main_device: same as for accelerate: where the parts on ``"disk"`` and ``"cpu"`` run.
        limits, threads, engine: same as for `load_model`.
        arguments: the other arguments of ``accelerate.dispatch_model``, such as ``offload_buffers``.

    Returns:
        The module.

    Raises:
        OptionError: a tensor has no device in ``device_map``, or a device does not exist.
        MismatchError, InvalidFileError, UnsupportedError, LimitError, OSError: as in `load_model`. Later, a
            damaged file raises these errors in the forward pass.
        ModuleNotFoundError: accelerate is not installed.
    """
    import accelerate  # lazy: optional

    require_module(model)
    file = open_any(path, limits=limits, threads=threads, engine=engine)
    try:
        places = places_of(model)
        devices = {name: _device_of(name, device_map) for name in places}
        found = match(model, places, file)
        found.require_all(model)
        require_none_left(model, found.filled, True)
        blocks = _blocks(model, devices)
        stays = {name for name, device in devices.items() if device == DISK and name not in blocks}
        if not arguments.get("offload_buffers", False):  # accelerate moves them to the main device at once
            stays -= {name for name, _ in model.named_buffers(remove_duplicate=False)}
        by_device: dict[torch.device, dict[Group, str]] = {}
        lazy: dict[str, str] = {}
        for group, source in found.sources.items():
            if stays.issuperset(group):
                lazy |= dict.fromkeys(group, source)
                continue
            named = next((devices[name] for name in group if devices[name] != DISK), "cpu")
            by_device.setdefault(require_device(named), {})[group] = source
        for device, sources in by_device.items():
            fill(places, file, sources, device, engine)
        fill(places, file, {}, torch.device("cpu"), engine, found.counters)
        weights = _Weights(file, lazy, places_of(model), devices)
        dispatched: torch.nn.Module = accelerate.dispatch_model(
            model,
            device_map=blocks,
            main_device=main_device,
            state_dict=weights,
            offload_index={},
            **arguments,
        )
    except BaseException:
        file.close()
        raise
    weakref.finalize(model, file.close)
    return dispatched


def _device_of(name: str, device_map: Mapping[str, Device]) -> Device:
    """Returns the device of a tensor: that of the nearest name in the map.

    Raises:
        OptionError: there is none.
    """
    prefix = name
    while prefix:
        if prefix in device_map:
            return device_map[prefix]
        prefix = prefix.rpartition(".")[0]
    if "" not in device_map:
        raise OptionError(f'device_map has no device for {quoted(name)}; add its module, or ""')
    return device_map[""]


def _blocks(model: torch.nn.Module, devices: Mapping[str, Device]) -> dict[str, Device]:
    """Returns the largest modules whose tensors have one device, with this device.

    accelerate applies each entry of its map to a whole module, also where another entry names a part of it.
    The own tensors of a module with several devices are listed by name; those are not offloaded.
    """
    below: dict[str, dict[str, Device]] = {}
    for name, device in devices.items():
        path = name
        while path:
            path = path.rpartition(".")[0]
            below.setdefault(path, {})[str(device)] = device
    out: dict[str, Device] = {}

    def visit(path: str, module: torch.nn.Module) -> None:
        found = list(below.get(path, {}).values())
        if len(found) == 1:
            out[path] = found[0]
        if len(found) <= 1:
            return
        start = f"{path}." if path else ""
        for name, child in module._modules.items():
            if child is not None:
                visit(start + name, child)
        for name in (*module._parameters, *module._buffers):
            if start + name in devices:
                device = devices[start + name]
                out[start + name] = "cpu" if device == DISK else device

    visit("", model)
    return out


class _Weights(Mapping[str, torch.Tensor]):
    """The weights for accelerate. Those on ``"disk"`` are decoded at each access; others are in memory."""

    def __init__(
        self,
        file: SfpFile | ShardedFile,
        lazy: Mapping[str, str],
        places: Mapping[str, Place],
        devices: Mapping[str, Device],
    ) -> None:
        self._file, self._lazy = file, lazy
        self._shapes = {name: tuple(places[name].tensor.shape) for name in lazy}
        self._tensors = {
            name: place.tensor.detach()
            for name, place in places.items()
            if name not in lazy and str(devices[name]) in ("cpu", DISK)
        }

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._tensors:
            return self._tensors[name]
        return tensor_of(self._file.get_tensor(self._lazy[name])).reshape(self._shapes[name])

    def __contains__(self, name: object) -> bool:  # that of `Mapping` would decode
        return name in self._lazy or name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter([*self._lazy, *self._tensors])

    def __len__(self) -> int:
        return len(self._lazy) + len(self._tensors)
