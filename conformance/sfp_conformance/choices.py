"""Choices that drive the generation of files: a sequence of numbers, each below a bound.

Rules: choice 0 always means the simplest alternative, and generators use no other randomness. The same code
therefore works with two sources: a seeded random generator, which is fast, and Hypothesis, which minimises a
find by making its choices fewer and smaller (`strategies`).
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


class Choices(ABC):
    """A source of numbers."""

    def below(self, bound: int) -> int:
        """Returns a number from 0 to ``bound`` - 1. Bound 1 consumes no choice."""
        return 0 if bound == 1 else self._number(bound)

    @abstractmethod
    def _number(self, bound: int) -> int:
        """Returns a number below a bound of 2 or more."""

    def pick(self, options: Sequence[T]) -> T:
        """Returns one of the options. The first must be the simplest."""
        return options[self.below(len(options))]

    def seldom(self, one_in: int) -> bool:
        """Returns true once in ``one_in`` times, for alternatives that are not simple."""
        return self.below(one_in) == one_in - 1

    def together(self, make: Callable[[Choices], T]) -> T:
        """Returns ``make(self)``. A source may group its choices, so that it can drop them together."""
        return make(self)

    def noise(self) -> Noise:
        """Returns a generator of many numbers that costs one choice. The simplest returns only zeros."""
        return Noise(self.below(1 << 16))


class Thrown(Choices):
    """Numbers from a seeded random generator.

    Attributes:
        made: the numbers returned so far, in order.
    """

    def __init__(self, seed: int | str) -> None:
        self.made: list[int] = []
        self._random = random.Random(seed)

    def _number(self, bound: int) -> int:
        self.made.append(self._random.randrange(bound))
        return self.made[-1]


class Noise:
    """Pseudorandom numbers from a seed: thousands of numbers for a single choice. Seed 0 gives only zeros."""

    def __init__(self, seed: int) -> None:
        self._state = seed * 0x9E3779B97F4A7C15 % 2**64

    def below(self, bound: int) -> int:
        """Returns a number from 0 to ``bound`` - 1, for bounds up to 2^64."""
        state = self._state
        if state == 0:
            return 0
        # Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (2014).
        self._state = state = (state + 0x9E3779B97F4A7C15) % 2**64 or 1
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
        return (state ^ state >> 31) % bound
