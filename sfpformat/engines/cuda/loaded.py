"""Recipes on the device: copied once a tensor, many at a time; a kernel fills their look-up tables."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import numpy as np

from . import layout
from .device import Device, Memory
from .recipe import Recipe


class Recipes:
    """The recipes that a queue's device has; those whose tensors are gone are let go of."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._there: weakref.WeakKeyDictionary[Recipe, tuple[Memory, int]] = weakref.WeakKeyDictionary()

    def load(self, recipes: Iterable[Recipe]) -> None:
        """Sees to it that the device has them when the queue gets to what follows."""
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
        self._device.mark().wait()  # the pinned memory goes now

    def address(self, recipe: Recipe) -> int:
        """Where a recipe that was loaded lies on the device."""
        return self._there[recipe][1]
