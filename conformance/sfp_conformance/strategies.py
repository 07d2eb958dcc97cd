"""Hypothesis strategies for `.sfp` files, and searches for a minimal file that satisfies a predicate.

The only module of the package that needs Hypothesis: ``pip install hypothesis``.
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
        """Draws the choices as one group, so that Hypothesis tries to remove the whole group."""
        return self._draw(choosing(make))


@st.composite
def choosing(draw: st.DrawFn, make: Callable[[Choices], T]) -> T:
    """Strategy for what a function of choices returns."""
    return make(_Drawn(draw))


@cache
def _below(bound: int) -> st.SearchStrategy[int]:
    return st.integers(0, bound - 1)


def examples(golden: Sequence[bytes] = (), *, valid: bool | None = None) -> st.SearchStrategy[Example]:
    """Strategy for the files of `example`."""

    return choosing(lambda choices: example(choices, golden, valid=valid))


def valid_files() -> st.SearchStrategy[bytes]:
    """Strategy for valid files of every kind."""
    return examples(valid=True).map(lambda made: made.data)


def damaged_files() -> st.SearchStrategy[bytes]:
    """Strategy for files after one or more changes. A reader must refuse most of them."""
    return examples(valid=False).map(lambda made: made.data)


def hunt(golden: Sequence[bytes], look: Look, *, most: int, seed: str) -> Example | None:
    """Returns the smallest example that Hypothesis finds for a predicate, or None.

    Args:
        golden: valid files that examples may start from.
        look: the predicate; called for each example, and for many more while a find is minimised.
        most: maximum number of examples before the first find.
        seed: the same seed gives the same examples.
    """
    return _smallest(golden, look, most, random=Random(seed))


def made_small(golden: Sequence[bytes], look: Look, made: Iterable[int]) -> Example | None:
    """Minimises with Hypothesis a find that another source made. None if the find does not reproduce.

    Args:
        golden: the valid files that the find was generated with.
        look: the predicate.
        made: the choices that generated the find.
    """
    # A "secondary" database entry: Hypothesis replays the find and minimises it, as after an interrupted run.
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
    except (NoSuchExample, Flaky):  # Flaky: the program is not deterministic
        return None
