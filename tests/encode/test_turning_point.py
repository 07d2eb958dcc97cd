"""The search for the step of a uniform quantiser."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfpformat.encode.step_search import CLOSE
from sfpformat.encode.turning_point import Guess, turning_point

# Excesses that end at a step, as functions of the step over it.
SHAPES: dict[str, Callable[[float], float]] = {
    "logarithm": lambda ratio: -math.log2(ratio),
    "jump": lambda ratio: 1.0 if ratio < 1 else -1.0,
    "stairs": lambda ratio: -math.floor(4 * math.log2(ratio)) - 0.5,
    "high on one side": lambda ratio: 1e30 if ratio < 1 else -1e-30 * ratio,
    "infinite": lambda ratio: math.inf if ratio < 1 else 1 - 2 * ratio,
}


def search(
    excess: Callable[[float], float], greatest: float, close: float, guess: Guess
) -> tuple[float, float, int]:
    """Returns both steps, and the number of trials."""
    trials: list[float] = []

    def tried(step: float) -> float:
        trials.append(step)
        return excess(step)

    return *turning_point(tried, greatest, close, guess), len(trials)


@given(
    st.sampled_from(sorted(SHAPES)),
    st.floats(-18, 1.9),
    st.floats(1e-30, 1e30),
    st.one_of(st.floats(0, math.inf), st.floats(0.25, 4)),
    st.one_of(st.floats(5e-324, 1e300), st.floats(0.25, 4)),
)
def test_the_steps_enclose_the_turning_point_to_one_part_in_a_million(
    shape: str, octaves: float, greatest: float, guess: float, fall: float
) -> None:
    place = greatest * 2.0**octaves
    guessed = Guess(guess * place, fall)
    low, high, trials = search(lambda step: SHAPES[shape](step / place), greatest, 0.0, guessed)
    turning = next(r for r in (1.0, 2.0**0.25) if SHAPES[shape](r * (1 + 1e-9)) <= 0) * place
    assert low < turning * (1 + 1e-6)
    assert high > turning * (1 - 1e-6)
    assert 0 < high - low < 1.1e-6 * low
    assert trials < 120  # 26 by bisection alone; the worst shape makes two of three rounds useless


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_close_excess_of_the_wanted_sign_ends_the_search(sign: int) -> None:
    bits = 4.0
    for octaves in (0.01, 0.3, 5):
        guess = Guess(2.0 ** (octaves - bits), 1.2)
        ends = search(lambda step: -math.log2(step) - bits, 1.0, sign * CLOSE * bits, guess)
        found = -math.log2(ends[1 if sign < 0 else 0]) - bits
        assert 0 <= sign * found <= CLOSE * bits
        assert ends[2] < 8 + octaves


def test_a_turning_point_outside_the_range_gives_an_end_of_it() -> None:
    for guess in (Guess(0.0, 1.0), Guess(1.0, 1e-300), Guess(math.inf, 1e300)):
        assert search(lambda step: 1.0, 3.0, 0.0, guess)[:2] == (12.0, 12.0)
        assert search(lambda step: -1.0, 3.0, 0.0, guess)[:2] == (3.0 / (1 << 20), 3.0 / (1 << 20))
        assert search(lambda step: 1.0, 0.0, 0.0, guess) == (1.0, 1.0, 0)
