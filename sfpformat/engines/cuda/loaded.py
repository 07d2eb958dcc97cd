"""The recipes on a device. Each is copied once, many in one copy; a kernel fills their look-up tables."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import numpy as np

from . import layout
from .device import Device, Memory
from .recipe import Recipe


class Recipes:
    """The recipes on a queue's device. A recipe is removed when its host object is gone."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._there: weakref.WeakKeyDictionary[Recipe, tuple[Memory, int]] = weakref.WeakKeyDictionary()

    def load(self, recipes: Iterable[Recipe]) -> None:
        """Copies recipes that are not on the device yet, and fills their look-up tables."""
        new = [recipe for recipe in dict.fromkeys(recipes) if recipe not in self._there]
        if not new:
            return
        codes = np.zeros(sum(len(recipe.codes) for recipe in new), layout.CODE)
        size = sum(recipe.size for recipe in new)
        memory, staging = self._device.allocate(size + codes.nbytes), self._device.pin(size + codes.nbytes)
        at = done = 0
        for recipe in new:
            staging.bytes[at : at + len(recipe.data)] = recipe.data
            for stream, code in recipe.codes:
                codes[done] = (memory.address + at, stream, code)
                done += 1
            self._there[recipe] = memory, memory.address + at
            at += recipe.size
        staging.bytes[size : size + codes.nbytes] = codes.view(np.uint8)
        self._device.copy(memory.address, staging.address, size + codes.nbytes)
        if len(codes):
            self._device.launch("fill_tables", len(codes), [memory.address + size])
        self._device.mark().wait()  # the pinned memory is freed on return

    def address(self, recipe: Recipe) -> int:
        """Returns the device address of a loaded recipe."""
        return self._there[recipe][1]
