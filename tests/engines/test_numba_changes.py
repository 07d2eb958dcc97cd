"""The kernels for deltas of the numba engine against the reference: the same changes and checksums."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sfpformat.coding.changes import NOTHING, Extent, Patterns, kind_of, open_buckets
from sfpformat.deltas.writing import code_block
from sfpformat.dtypes import DTYPES
from sfpformat.engines import numba as fast
from sfpformat.engines import reference
from sfpformat.io.checksum import crc32, crc32_with

Pair = tuple[Patterns, Patterns]
NAMES = ("BF16", "F32", "F64", "F8_E5M2", "I16", "BOOL")
SHARES = (0.0, 0.001, 0.02, 0.4, 1.0)


def pair(rng: np.random.Generator, name: str, size: int, share: float) -> Pair:
    """Patterns of weights and of the weights after a change. ``share`` bounds the share of those that change.

    Only elements of small magnitude change, as after a small step of an optimiser, so that some groups of 64
    elements have a few elements with the keys of changes, and others none or many.
    """
    dtype = DTYPES[name]
    if dtype.is_float:
        base = (rng.normal(size=size) * 2.0 ** rng.integers(-9, 1, size)).astype(dtype.numpy)
        base[rng.random(size) < 0.02] = 0
        may = np.abs(base.astype(np.float64)) < rng.choice([0.003, 0.1, 10.0])
    else:
        base = rng.integers(0, 2 if name == "BOOL" else 99, size).astype(dtype.numpy)
        may = np.ones(size, np.bool_)
    old: NDArray[Any] = base.view(kind_of(dtype).pattern)
    changed = may & (rng.random(size) < share)
    return old, np.where(changed, old ^ old.dtype.type(1), old)


def parts_of(rng: np.random.Generator, name: str, share: float) -> list[Pair]:
    return [pair(rng, name, int(size), share) for size in rng.choice([0, 1, 63, 64, 65, 700, 3000], 3)]


def extent_of(parts: list[Pair], name: str) -> Extent:
    """The extent of the changes of a block, and the checksums of both engines, which must be equal."""
    extent = NOTHING
    for old, new in parts:
        known = crc32(old.data)
        found = fast.compare(old, new, kind_of(DTYPES[name]), known)
        assert found == reference.compare(old, new, kind_of(DTYPES[name]), known)
        assert found[0] == crc32(new.data)
        extent = extent.joined(found[1])
    return extent


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(NAMES), st.sampled_from(SHARES), st.integers(0, 2**32 - 1))
def test_engines_find_and_place_the_same_changes_and_checksums(name: str, share: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    kind, parts = kind_of(DTYPES[name]), parts_of(rng, name, share)
    extent = extent_of(parts, name)
    found, expected = (e.find_changes(parts, kind, extent) for e in (fast, reference))
    assert found is not None
    assert expected is not None
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert np.array_equal(one, other)
    coded = code_block(parts, extent, DTYPES[name], fast)
    counts = coded.counts.astype(np.int64)
    ours, theirs = (open_buckets(counts, coded.gaps, 0, 0) for _ in range(2))
    for old, new in parts:
        placed = []
        for engine, buckets in ((fast, ours), (reference, theirs)):
            positions, values = np.empty(len(old), np.uint32), np.empty(len(old), kind.pattern)
            count = engine.place_changes(old, kind, buckets, coded.gaps, coded.levels, positions, values)
            placed.append((positions[:count], values[:count]))
        assert all(np.array_equal(*both) for both in zip(*placed, strict=True))
        for engine in (fast, reference):
            result = old.copy()
            engine.write_changes(result, *placed[0])
            assert np.array_equal(result, new)
        known = crc32(old.data)
        assert fast.crc32_with(old, *placed[0], known) == crc32_with(old, *placed[0], known)
        assert crc32_with(old, *placed[0], known) == crc32(new.data)
    for buckets in (ours, theirs):
        assert np.array_equal(buckets.level, buckets.last)


@pytest.mark.parametrize("engine", [fast, reference])
def test_more_changes_than_were_announced_are_refused(engine: Any) -> None:
    old, new = pair(np.random.default_rng(0), "BF16", 1000, 1.0)
    extent = reference.compare(old, new, kind_of(DTYPES["BF16"]), 0)[1]
    assert engine.find_changes([(old, new)], kind_of(DTYPES["BF16"]), extent) is not None
    fewer = extent._replace(most=extent.most - 1)
    assert engine.find_changes([(old, new)], kind_of(DTYPES["BF16"]), fewer) is None


@pytest.mark.parametrize("engine", [fast, reference])
def test_a_dense_bucket_with_too_few_levels_is_refused(engine: Any) -> None:
    kind = kind_of(DTYPES["BF16"])
    base = np.full(200, 0x3F80, np.uint16)
    counts = np.zeros(kind.keys, np.int64)
    counts[126] = 2 * 150 + 1
    levels, gaps = np.ones(150, np.uint16), np.zeros(0, np.uint32)
    room = np.empty(150, np.uint32), np.empty(150, np.uint16)
    assert engine.place_changes(base, kind, open_buckets(counts, gaps, 0, 0), gaps, levels, *room) == -1
