"""Check bits are spent where they save most, for every kind of budget."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from sfpformat import KeyedTable
from sfpformat.coding.codetable import CodeTable, PrefixCode
from sfpformat.coding.keyed.rows import RowCode
from sfpformat.keyed.design import Budget, check_sizes, class_probabilities
from sfpformat.options import Uniform

KEYS = [f"key {i}" for i in range(4000)]
WEIGHTS = np.random.default_rng(2).laplace(size=4000).astype(np.float32)
STRANGERS = [f"no {i}" for i in range(40000)]


def built(**budget: float) -> KeyedTable:
    return KeyedTable.build(KEYS, WEIGHTS, quantiser=Uniform(step=0.25), **budget)  # type: ignore[arg-type]  # one of several options


def error_of(table: KeyedTable) -> float:
    return float(np.abs(table.find(STRANGERS).weights).sum(axis=1).mean())


def test_greater_weights_have_longer_checks() -> None:
    checks = built(expected_error=0.01).map.code.checks
    used = [c for c in range(len(checks)) if checks[c] < 32]
    assert checks[max(used)] > checks[min(used)]
    assert len(set(checks)) > 3


def test_variable_checks_cause_less_error_than_fixed_checks_of_the_same_size() -> None:
    fixed = built(check_bits=5)
    variable = built(bits_per_key=fixed.bits_per_key)
    assert variable.bits_per_key <= fixed.bits_per_key * 1.03
    assert error_of(variable) < 0.8 * error_of(fixed)


def test_budgets_are_kept() -> None:
    assert built(bits_per_key=14).bits_per_key == pytest.approx(14, rel=0.15)
    assert error_of(built(expected_error=0.02)) == pytest.approx(0.02, rel=0.3)
    cheap, dear = built(false_positive_cost=1), built(false_positive_cost=1000)
    assert cheap.bits_per_key < dear.bits_per_key
    assert error_of(cheap) > error_of(dear)


def test_the_chosen_checks_are_the_best_of_all_of_the_same_cost() -> None:
    shares, harm = np.array([0.5, 0.25, 0.25]), np.array([0.1, 1.0, 4.0])
    keys = np.array([6, 3, 1])
    found = check_sizes(shares, harm, keys, 0, Budget(total_bits=25))

    def error(sizes: tuple[int, ...]) -> float:
        return float((shares * harm * 0.5 ** np.array(sizes)).sum())

    every = [s for s in itertools.product(range(9), repeat=3) if (np.array(s) * keys).sum() <= 25]
    assert (np.frombuffer(found, np.uint8) * keys).sum() <= 25
    assert error(tuple(found)) <= 1.1 * min(map(error, every))


def test_probabilities_of_classes_are_those_of_random_bits() -> None:
    levels = CodeTable(2, bytes(4), (PrefixCode(bytes([1, 2, 3, 3])),))
    gaps = CodeTable(0, bytes([0, 1, 0]), (PrefixCode(bytes([1, 2, 2])),))
    code = RowCode(3, gaps, levels, np.float32(1), np.zeros(0, np.float32), bytes(4))
    rng = np.random.default_rng(4)
    count = np.zeros(5)
    for _ in range(40000):
        o, greatest = 0, -1
        while o < 3:
            o += int(rng.choice([0, 1, 2, 3], p=[0.5, 0.125, 0.125, 0.25]))
            if o < 3:
                greatest = max(greatest, int(rng.choice(4, p=[0.5, 0.25, 0.125, 0.125])))
                o += 1
        count[greatest] += 1
    assert class_probabilities(code) == pytest.approx(count[:4] / count.sum(), abs=0.01)
    assert class_probabilities(code).sum() == pytest.approx(1 - count[4] / count.sum(), abs=0.01)
