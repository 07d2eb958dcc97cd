"""Searches for the step from which an excess is gone, with few trials."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ..coding.classes import FRACTION

_OCTAVE = 1 << 23  # units in the last place of float32
_NEAR = 8  # units in the last place that the result of a search may be away


class Guess(NamedTuple):
    """Where a search starts.

    Attributes:
        step: a step near the turning point.
        fall: about how much the excess falls with an octave of the step, above 0.
    """

    step: float
    fall: float

    @classmethod
    def of(cls, mean: float, bits: float, survivors: float) -> Guess:
        """Returns the guess for a number of bits.

        Args:
            mean: the mean magnitude.
            bits: bits per survivor's level.
            survivors: the number of survivors whose bits (times 2^16) are searched.
        """
        # A Laplace distribution with a step of s has an entropy of log2(2 e mean / s) bits. Its inverse needs
        # no more than a line in each octave, and no power, whose last bits differ between platforms.
        whole = math.floor(min(bits, 32.0))
        power = math.ldexp(1 + min(bits, 32.0) - whole, whole)
        return cls(2 * math.e * mean / power, max(survivors, 1) * (1 << FRACTION))


def turning_point(
    excess: Callable[[float], float], greatest: float, close: float, guess: Guess
) -> tuple[float, float]:
    """Searches for the step from which an excess is gone. Returns a step below it and a step above it.

    The steps are equal if an excess is close, or if there is none at the least step or one at the greatest.

    The search encloses the turning point by moves from a guess. It then interpolates between the ends of the
    interval, by the variant of regula falsi of Anderson and Björck (1973, doi:10.1007/BF01951936). It uses
    the bit patterns of float32, which grow about as the logarithm.

    Args:
        excess: positive for small steps, at most 0 for great ones.
        greatest: the greatest magnitude.
        close: an excess from 0 to this one ends the search, unless this is 0: one of at most 0 if this is
            negative, else a positive one. Otherwise it ends when the steps differ by at most 1 part in 10^6.
        guess: where the search starts. It changes the number of trials, but hardly the result.
    """
    if greatest == 0.0:
        return 1.0, 1.0
    least = max(_pattern(greatest / (1 << 20)), 1)
    most = _pattern(greatest * 4)
    aim = close / 2  # the middle of what is close

    def over(at: int) -> float:
        """Returns the excess over the aim, which has the sign of the excess unless that is close."""
        return excess(_number(at)) - aim

    (low, above), (high, below) = _enclosed(over, least, most, abs(aim), guess)
    side, widths = 0, [math.inf] * 3  # before the last three rounds
    while (width := high - low) > _NEAR:
        middle, slope = (low + high) // 2, above - below
        halved, widths = 2 * width <= widths[0], [*widths[1:], width]
        if halved and 0 < slope < math.inf:  # else bisects, so that the rounds have a bound
            estimate = low + int(width * (above / slope))
            middle = min(max(estimate, low + _NEAR), high - _NEAR)
        value = over(middle)
        if _is_close(value, abs(aim)):
            return _number(middle), _number(middle)
        # An end that stays twice counts less, so that the next estimate is beyond the turning point.
        if value > 0:
            below *= _kept(value, above) if side > 0 else 1.0
            low, above, side = middle, value, 1
        else:
            above *= _kept(value, below) if side < 0 else 1.0
            high, below, side = middle, value, -1
    return _number(low), _number(high)


def _enclosed(
    over: Callable[[int], float], least: int, most: int, close: float, guess: Guess
) -> tuple[tuple[int, float], tuple[int, float]]:
    """Returns a step below the turning point and one above it, as bit patterns, with the value of each.

    Equal ones if a step is close, or if the turning point is not between ``least`` and ``most``.
    """
    at = min(max(_pattern(guess.step), least), most)
    low: tuple[int, float] | None = None
    high: tuple[int, float] | None = None
    move = 0
    while low is None or high is None:
        here = at, over(at)
        if _is_close(here[1], close) or at == (most if here[1] > 0 else least):
            return here, here
        octaves = min(1.25 * abs(here[1]) / guess.fall, 128.0)  # a quarter more than expected
        # At least twice the last move, so that the trials have a bound.
        move = max(2 * move, int(octaves * _OCTAVE), _NEAR)
        if here[1] > 0:
            low, at = here, min(at + move, most)
        else:
            high, at = here, max(at - move, least)
    return low, high


def _kept(value: float, before: float) -> float:
    """Returns the factor on the value of an end that stays, given the other end's value, and that before."""
    return 1 - value / before if abs(value) < abs(before) else 0.5


def _is_close(value: float, close: float) -> bool:
    return close > 0 and abs(value) <= close


def _pattern(number: float) -> int:
    """Returns the bit pattern of a number, at least 0, as float32; of a greater one, that of the greatest."""
    return int(np.float32(min(number, float(np.finfo(np.float32).max))).view(np.uint32))


def _number(pattern: int) -> float:
    return float(np.uint32(pattern).view(np.float32))
