"""Hypothesis strategies of `.sfp` files, and the hunt for a file of a certain kind, which it makes small.

Needs Hypothesis, which nothing else of the package does: ``pip install hypothesis``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from random import Random

from hypothesis import Verbosity, find, settings
from hypothesis import strategies as st
from hypothesis.database import ExampleDatabase, InMemoryExampleDatabase, choices_to_bytes
from hypothesis.errors import Flaky, NoSuchExample

from .choices import Choices, T
from .examples import Example, example

Look = Callable[[Example], bool]
_KEY = b"a find"


class _Drawn(Choices):
    """Numbers drawn by Hypothesis."""

    def __init__(self, draw: st.DrawFn) -> None:
        self._draw = draw

    def _number(self, bound: int) -> int:
        return self._draw(_below(bound))

    def together(self, make: Callable[[Choices], T]) -> T:
        """Drawn as one, so that Hypothesis tries to do without all of it."""
        return self._draw(_made(make))


@st.composite
def _made(draw: st.DrawFn, make: Callable[[Choices], T]) -> T:
    return make(_Drawn(draw))


@cache
def _below(bound: int) -> st.SearchStrategy[int]:
    return st.integers(0, bound - 1)


def examples(golden: Sequence[bytes] = (), *, valid: bool | None = None) -> st.SearchStrategy[Example]:
    """Files as `example` makes them."""

    return _made(lambda choices: example(choices, golden, valid=valid))


def valid_files() -> st.SearchStrategy[bytes]:
    """Valid files of every kind."""
    return examples(valid=True).map(lambda made: made.data)


def damaged_files() -> st.SearchStrategy[bytes]:
    """Files after a change or a few, most of which a reader must refuse."""
    return examples(valid=False).map(lambda made: made.data)


def hunt(golden: Sequence[bytes], look: Look, *, most: int, seed: str) -> Example | None:
    """The smallest example that Hypothesis finds of what is looked for, or None.

    Args:
        look: whether an example is one; asked of each that is made, and of many more once one was.
        most: examples that are made before the first is found.
        seed: the same seed makes the same.
    """
    return _smallest(golden, look, most, random=Random(seed))


def made_small(golden: Sequence[bytes], look: Look, made: Iterable[int]) -> Example | None:
    """The smallest example that Hypothesis makes of one that was found otherwise, or None.

    Args:
        look: whether an example is one.
        made: the choices that gave the one that was found.
    """
    # As if Hypothesis had met it in a run before and had not made it small yet.
    kept = InMemoryExampleDatabase()
    kept.save(_KEY + b".secondary", choices_to_bytes(made))
    return _smallest(golden, look, 1, database=kept)


def _smallest(
    golden: Sequence[bytes],
    look: Look,
    most: int,
    *,
    random: Random | None = None,
    database: ExampleDatabase | None = None,
) -> Example | None:
    quietly = settings(database=database, deadline=None, max_examples=most, verbosity=Verbosity.quiet)
    try:
        return find(examples(golden), look, settings=quietly, random=random, database_key=_KEY)
    except (NoSuchExample, Flaky):  # of a program that does not always do the same nothing can be said
        return None
