"""Implements `device_interface.DeviceEngine`."""

from __future__ import annotations

from collections.abc import Sequence

from ...coding.quantisers import F32
from ...container.entry import TensorEntry
from . import pinned_loading, product
from .changes import Changes
from .product import Product, has_kernels
from .recipe import Recipe, make_recipe
from .resident import Resident

__all__ = ["hold", "make_product", "make_recipe", "open_changes", "open_queue"]


def open_queue(number: int, stream: int) -> pinned_loading.Queue:
    """Implements `device_interface.DeviceEngine`."""
    open_device = pinned_loading.open_device
    return pinned_loading.Queue(open_device(number, stream), lambda: open_device(number, None))


def open_changes(number: int, stream: int) -> Changes:
    """Implements `device_interface.DeviceEngine`."""
    return Changes(pinned_loading.open_device(number, stream))


def hold(queue: pinned_loading.Queue, recipe: Recipe, entry: TensorEntry, at: int) -> Resident:
    """Implements `device_interface.DeviceEngine`."""
    queue.prepare([recipe])
    return Resident(queue, recipe, entry, at)


def make_product(
    entry: TensorEntry, vectors: dict[str, F32], dtype: str, compute: str, capability: Sequence[int]
) -> Product | None:
    """Implements `device_interface.DeviceEngine`."""
    return product.make_product(entry, vectors, dtype, compute) if has_kernels(capability) else None
