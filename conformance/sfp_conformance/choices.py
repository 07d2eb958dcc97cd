"""Where generated files come from: a sequence of choices, each a number below some bound.

Rules: whoever makes something of choices takes 0 as the simplest and asks for nothing else, so that the same
code serves two sources: numbers thrown by a seed, which is fast, and numbers drawn by Hypothesis, which can
make what was found small by making its choices fewer and smaller (`strategies`).
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
        """A number from 0 to ``bound`` - 1; what leaves no choice is none."""
        return 0 if bound == 1 else self._number(bound)

    @abstractmethod
    def _number(self, bound: int) -> int:
        """A number below a bound of 2 or more."""

    def pick(self, options: Sequence[T]) -> T:
        """One of some, the simplest of which stands first."""
        return options[self.below(len(options))]

    def seldom(self, one_in: int) -> bool:
        """Whether what is not simple is to be done: once in so many times."""
        return self.below(one_in) == one_in - 1

    def together(self, make: Callable[[Choices], T]) -> T:
        """What is made of choices that a source may leave out together, such as one thing of several."""
        return make(self)

    def noise(self) -> Noise:
        """Many numbers for one choice; the simplest noise is silence."""
        return Noise(self.below(1 << 16))


class Thrown(Choices):
    """Numbers thrown from a seed.

    Attributes:
        made: those that were asked for, in order.
    """

    def __init__(self, seed: int | str) -> None:
        self.made: list[int] = []
        self._random = random.Random(seed)

    def _number(self, bound: int) -> int:
        self.made.append(self._random.randrange(bound))
        return self.made[-1]


class Noise:
    """Numbers that follow from a seed, so that thousands of them are a single choice; of seed 0 all are 0."""

    def __init__(self, seed: int) -> None:
        self._state = seed * 0x9E3779B97F4A7C15 % 2**64

    def below(self, bound: int) -> int:
        """A number from 0 to ``bound`` - 1, for bounds to 2^64."""
        state = self._state
        if state == 0:
            return 0
        # Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (2014).
        self._state = state = (state + 0x9E3779B97F4A7C15) % 2**64 or 1
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
        return (state ^ state >> 31) % bound
