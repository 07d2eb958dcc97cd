"""For every check of the reference reader, a golden file fails if the check is removed."""

from __future__ import annotations

import numpy as np

from ..support.mutants import (
    REPEATED,
    Mutant,
    cases_by_clause,
    disabled,
    is_repeated,
    killer,
    mutants,
    survivors,
)


def test_every_mutant_is_killed_by_a_case_that_cites_its_clause() -> None:
    every = mutants()
    assert len(every) >= 100
    with np.errstate(all="ignore"):
        left = survivors(every)
    assert [mutant.place for mutant in left if not is_repeated(mutant)] == []
    used = {(mutant.function, clause) for mutant in left for clause in mutant.clauses}
    assert set(REPEATED) == used


def test_a_mutant_without_a_case_survives_and_the_reader_is_itself_again() -> None:
    magic = next(mutant for mutant in mutants() if mutant.clauses == ("R-PRE-001",))
    by_clause = cases_by_clause()
    assert killer(magic, {}) is None
    assert killer(magic, by_clause) is not None
    nothing = Mutant(magic.module, magic.function, -1, magic.clauses)
    with disabled(nothing):
        pass
    assert killer(nothing, by_clause) is None
