"""Alternatives to the bit array of keyed tables, on a million keys (SPEC.md chapter 27, "One bit array").

``python -m tests.figures.keyed_functions [KEYS]`` prints, for each structure, the bits per key beyond those
of the rows, the time to build it, and look-ups a second on one thread. Rows have 12 bits on average, 4 to 20.

* Perfect hash: PTHash (Pibiri and Trani 2021) with uniform buckets, its pilots in Rice codes; BBHash
  (Limasset et al. 2017). Rows of several lengths are found by the offset of each 64th row and a scan, or in
  constant time by the positions of all rows in an Elias-Fano code, of 2 + log2(mean length) bits.
* Static functions: the equations of `coding.keyed.equations` with three and four positions; standard ribbon
  (Dillinger and Walzer 2021) with rows of 64 coefficients, for one bit per key and for the bits of rows.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from sfpformat import KeyedTable, Uniform
from sfpformat.coding.keyed.equations import random_bytes
from sfpformat.coding.keyed.hashing import positions_of
from sfpformat.engines.numba.keyed import hash_keys, solve_rows
from sfpformat.keyed.keys import packed

Words = NDArray[np.uint64]
_BUCKET = 5  # keys
_LOAD = 0.98  # share of the slots of PTHash that have keys


@njit(cache=True)
def _mixed(x: Any) -> Any:
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return x ^ (x >> np.uint64(33))


@njit(cache=True)
def _slot(key: Any, pilot: Any, slots: Any) -> Any:
    return np.int64(_mixed(key ^ _mixed(np.uint64(pilot))) % np.uint64(slots))


@njit(cache=True)
def _pilots(keys: Any, starts: Any, order: Any, slots: Any, taken: Any, out: Any) -> None:
    """Finds the pilot of each bucket, the largest buckets first."""
    for b in order:
        own = keys[starts[b] : starts[b + 1]]
        pilot = 0
        while True:
            done = 0
            for i in range(len(own)):
                s = _slot(own[i], pilot, slots)
                if taken[s]:
                    break
                taken[s] = True
                done += 1
            if done == len(own):
                break
            for i in range(done):
                taken[_slot(own[i], pilot, slots)] = False
            pilot += 1
        out[b] = pilot


@njit(cache=True)
def _find_slots(a: Any, b: Any, buckets: Any, pilots: Any, slots: Any, out: Any) -> None:
    for i in range(len(a)):
        out[i] = _slot(b[i], pilots[np.int64(a[i] % np.uint64(buckets))], slots)


def pthash(a: Words, b: Words) -> tuple[float, float, float]:
    """Returns bits per key, seconds, and look-ups a second of a perfect hash with pilots."""
    start = time.perf_counter()
    buckets, slots = len(a) // _BUCKET, int(len(a) / _LOAD)
    owner = (a % np.uint64(buckets)).astype(np.int64)
    order = np.argsort(owner, kind="stable")
    sizes = np.bincount(owner, minlength=buckets)
    starts = np.concatenate(([0], np.cumsum(sizes)))
    pilots = np.zeros(buckets, np.int64)
    _pilots(b[order], starts, np.argsort(-sizes, kind="stable"), slots, np.zeros(slots, np.bool_), pilots)
    seconds = time.perf_counter() - start
    rice = min(int((k + 1) * buckets + (pilots >> k).sum()) for k in range(20))
    offsets = 32 * buckets / 64  # the place of each 64th pilot
    out = np.zeros(len(a), np.int64)
    _find_slots(a, b, buckets, pilots, slots, out)
    start = time.perf_counter()
    _find_slots(a, b, buckets, pilots, slots, out)
    speed = len(a) / (time.perf_counter() - start)
    assert len(np.unique(out)) == len(a)
    return (rice + offsets) / len(a), seconds, speed


def bbhash(a: Words, gamma: float) -> tuple[float, float]:
    """Returns bits per key and seconds of a perfect hash of bit arrays in levels."""
    start, bits, left, count = time.perf_counter(), 0, a, len(a)
    with np.errstate(over="ignore"):
        while len(left):
            size = max(int(gamma * len(left)), 64)
            left = _numpy_mixed(left + np.uint64(0x9E3779B97F4A7C15))
            slots = (left % np.uint64(size)).astype(np.int64)
            left = left[np.bincount(slots, minlength=size)[slots] > 1]
            bits += size
    return bits * (1 + 32 / 512) / count, time.perf_counter() - start


def _numpy_mixed(x: Words) -> Words:
    half = np.uint64(33)
    x = (x ^ (x >> half)) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ (x >> half)) * np.uint64(0xC4CEB9FE1A85EC53)
    return np.asarray(x ^ (x >> half))


@njit(cache=True)
def _band(starts: Any, coefficients: Any, sizes: Any, rows: Any) -> bool:
    """Eliminates the equations of a ribbon, each with its coefficients from ``starts`` on."""
    for i in range(len(starts)):
        for t in range(sizes[i]):
            at, c = starts[i] + t, coefficients[i]
            while True:
                if rows[at] == 0:
                    rows[at] = c
                    break
                c ^= rows[at]
                if c == 0:
                    return False
                while c & np.uint64(1) == 0:
                    c >>= np.uint64(1)
                    at += 1
    return True


def ribbon(a: Words, b: Words, sizes: NDArray[np.int64]) -> float | None:
    """Returns the least size of a ribbon, in bits per equation, that five attempts for each size find."""
    total = int(sizes.sum())
    for factor in (1.05, 1.08, 1.11, 1.14, 1.17, 1.2, 1.25, 1.3, 1.4, 1.6, 2.0):
        for attempt in range(5):
            size = int(total * factor)
            key = _numpy_mixed(a + np.uint64(attempt + 1))
            starts = ((key >> np.uint64(32)) * np.uint64(size) >> np.uint64(32)).astype(np.int64)
            order = np.argsort(starts, kind="stable")
            rows = np.zeros(size + 128 + int(sizes.max()), np.uint64)
            if _band(starts[order], (b | np.uint64(1))[order], sizes[order], rows):
                return factor
    return None


def fuse(words: NDArray[np.uint32], sizes: NDArray[np.int64], places: int) -> tuple[float, float]:
    """Returns the least size of equations with some positions, in bits for each, and the time to solve."""
    total = int(sizes.sum())
    rows = random_bytes(8 * (total // 64 + 1), 1)
    for factor in (1.04, 1.05, 1.06, 1.07, 1.08, 1.1, 1.12, 1.14, 1.16):
        for exponent in (14, 15, 16):
            segment = 1 << exponent
            starts = max(round(total * factor / segment) - places + 1, 1) * segment
            positions = positions_of(words, starts, segment)
            if places == 3:  # a fourth position that no equation shares
                end = starts + 2 * segment + 64
                positions[:, 3] = end + np.cumsum(sizes) - sizes
                positions = np.ascontiguousarray(positions)
            size = int(positions.max()) + 128
            start = time.perf_counter()
            if places == 3:
                if _peels(positions[:, :3].copy(), sizes, size):
                    return (starts + 2 * segment) / total, time.perf_counter() - start
            elif solve_rows(positions, sizes, rows, random_bytes(8 * (size // 64 + 1), 2)) is not None:
                return (starts + 3 * segment) / total, time.perf_counter() - start
    return float("nan"), float("nan")


@njit(cache=True)
def _peels(positions: Any, sizes: Any, size: Any) -> bool:
    """Returns whether equations with three positions each can be solved by peeling."""
    counts, joined = np.zeros(size, np.int64), np.zeros(size, np.int64)
    total = 0
    for i in range(len(sizes)):
        for t in range(sizes[i]):
            total += 1
            for k in range(3):
                counts[positions[i, k] + t] += 1
                joined[positions[i, k] + t] ^= (i << 8) | t
    stack = np.flatnonzero(counts == 1)
    room = np.empty(size, np.int64)
    room[: len(stack)] = stack
    top, removed = len(stack), 0
    while top:
        top -= 1
        place = room[top]
        if counts[place] != 1:
            continue
        equation = joined[place]
        removed += 1
        for k in range(3):
            other = positions[equation >> 8, k] + (equation & 255)
            counts[other] -= 1
            joined[other] ^= equation
            if counts[other] == 1:
                room[top] = other
                top += 1
    return removed == total


def main(keys: int) -> None:
    """Prints the figures."""
    given = packed([f"key number {i}" for i in range(keys)])
    words = hash_keys(given, 0)
    both = np.ascontiguousarray(words).view(np.uint64)
    a, b = both[:, 0].copy(), both[:, 1].copy()
    sizes = np.random.default_rng(1).integers(4, 21, keys)
    mean = float(sizes.mean())
    pthash(a[:1000], b[:1000])
    bits, seconds, speed = pthash(a, b)
    waste = (1 / _LOAD - 1) * mean  # bits of slots without keys
    scanned, constant = 32 / 64, 2 + float(np.log2(mean))
    print(f"PTHash: {bits:.2f} bits per key, {seconds:.1f} s, {speed / 1e6:.1f} M slots a second")
    print(f"  with rows, of which up to 63 are scanned: {bits + waste + scanned:.2f} bits beyond the rows")
    print(f"  with rows in constant time (Elias-Fano): {bits + waste + constant:.2f} bits beyond the rows")
    for gamma in (1.0, 2.0):
        bits, seconds = bbhash(a, gamma)
        print(f"BBHash, gamma {gamma:g}: {bits:.2f} bits per key, {seconds:.1f} s")
    for places in (3, 4):
        fuse(words[:1000], sizes[:1000], places)
        factor, seconds = fuse(words, sizes, places)
        extra = (factor - 1) * mean
        print(
            f"static function, {places} positions: {factor:.3f} of the bits, {extra:.2f} bits per key, "
            f"{seconds:.1f} s"
        )
    ones = np.ones(keys, np.int64)
    for what, own in (("one bit per key", ones), ("rows", sizes[: keys // 4])):
        found = ribbon(a[: len(own)], b[: len(own)], own)
        print(f"standard ribbon, 64 coefficients, {what}: {found} of the bits")
    whole_tables(keys)


def whole_tables(keys: int) -> None:
    """Prints the time to build a keyed table with one output, and its look-ups a second."""
    names = [f"key number {i}" for i in range(keys)]
    weights = np.random.default_rng(0).laplace(size=keys).astype(np.float32)
    KeyedTable.build(names[:1000], weights[:1000]).find(names[:1000])
    start = time.perf_counter()
    table = KeyedTable.build(names, weights, quantiser=Uniform(step=0.25), check_bits=6)
    seconds, given = time.perf_counter() - start, packed(names)
    print(f"keyed table of one output: {table.bits_per_key:.2f} bits per key, built in {seconds:.1f} s")
    for what, asked in (("packed keys", given), ("a list of strings", names)):
        least = float("inf")
        for _ in range(5):
            start = time.perf_counter()
            table.find(asked)
            least = min(least, time.perf_counter() - start)
        print(f"  {keys / least / 1e6:.1f} M look-ups a second of {what}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
