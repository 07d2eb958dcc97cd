"""Random blocks of deltas on a device, compared with the reference: for tests and fuzzing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sfpformat.coding.changes import ElementKind, Patterns, keys_of, open_buckets, place_changes
from sfpformat.coding.changes import to_levels as levels_between
from sfpformat.engines import CheckedBlock, DeviceBlock, DevicePart, Misfit, PlacedChanges
from sfpformat.engines.cuda.changes import Changes
from sfpformat.engines.cuda.device import Device, Memory
from sfpformat.io.checksum import crc32

from .ondevice import fetch, put

# F64, F32, F16, BF16, both formats of F8, and integers of each width.
KINDS = tuple(ElementKind(*pair) for pair in ((64, 11), (32, 8), (16, 5), (16, 8), (8, 4), (8, 5)))
KINDS += tuple(ElementKind(bits, 0) for bits in (8, 16, 32, 64))
_MOST = 9000  # elements of a part: up to three tiles


@dataclass(frozen=True)
class Block:
    """A block of a delta: its elements in the base, part by part, and its changes."""

    parts: list[Patterns]
    counts: NDArray[np.int64]
    gaps: NDArray[np.uint32]
    levels: Patterns


def random_patterns(size: int, kind: ElementKind, rng: np.random.Generator) -> Patterns:
    """Returns elements with few or many keys, and some of the greatest and the least."""
    bits = np.frombuffer(rng.bytes(size * kind.bits // 8), kind.pattern).copy()
    full, top = (1 << kind.bits) - 1, 1 << (kind.bits - 1)
    if kind.exponent_bits and rng.random() < 0.7:  # few exponents
        kept = top | ((1 << kind.shift) * int(rng.choice([1, 2, 8])) - 1) & full
        bits &= kind.pattern.type(kept)
        bits |= kind.pattern.type(int.from_bytes(rng.bytes(8), "little") & full & ~kept)
    bits[rng.random(size) < 0.05] = 0
    bits[rng.random(size) < 0.02] = full
    return bits


def random_block(kind: ElementKind, rng: np.random.Generator, damaged: bool) -> Block:
    """Returns a block in which few, many, all or no elements change.

    Args:
        kind: the kind of the elements.
        rng: the source of random numbers.
        damaged: whether counts, gaps and levels may not fit the elements.
    """
    sizes = [int(rng.integers(1, _MOST if rng.random() < 0.3 else 70)) for _ in range(rng.integers(1, 5))]
    parts = [random_patterns(size, kind, rng) for size in sizes]
    base = np.concatenate(parts)
    share = float(rng.choice([0.0, 0.01, 0.3, 1.0]))
    changed = rng.random(len(base)) < share
    new = np.where(changed, base + rng.integers(1, 5, len(base)).astype(kind.pattern), base)
    new[changed & (rng.random(len(base)) < 0.1)] = 0
    keys = keys_of(base, kind)
    counts = np.zeros(kind.keys, np.int64)
    gaps: list[int] = []
    levels: list[Patterns] = []
    for key in np.unique(keys).tolist():
        at = np.flatnonzero(keys == key)
        own = levels_between(base[at], new[at], kind)
        ranks = np.flatnonzero(changed[at])
        dense = len(ranks) > len(at) // 3 or rng.random() < 0.1
        if dense:
            ranks = np.arange(len(at))
        else:
            gaps += (np.diff(ranks, prepend=-1) - 1).tolist()
        counts[key] = 2 * len(ranks) + dense
        levels.append(own[ranks])
    found = np.concatenate([np.zeros(0, kind.pattern), *levels])
    block = Block(parts, counts, np.array(gaps, np.uint32), found)
    return _damaged(block, kind, rng) if damaged else block


def _damaged(block: Block, kind: ElementKind, rng: np.random.Generator) -> Block:
    """Changes counts, gaps and levels at random; there are as many gaps and levels as the counts say."""
    counts, gaps = block.counts.copy(), block.gaps.copy()
    way = int(rng.integers(4))
    if way == 0 and len(gaps):
        gaps[rng.integers(len(gaps))] = rng.choice([1, 5000, (1 << 32) - 1])
    elif way == 1:
        counts[rng.integers(len(counts))] ^= 1
    elif way == 2:
        counts[rng.integers(len(counts))] += 2 * int(rng.integers(1, 40))
    else:
        used = np.flatnonzero(counts > 1)
        if len(used):
            counts[rng.choice(used)] -= 2
    coded = counts >> 1
    needed = int(coded[counts & 1 == 0].sum())
    gaps = np.concatenate([gaps, rng.integers(0, 9, needed, np.uint32)])[:needed].astype(np.uint32)
    total = int(coded.sum())
    levels = np.concatenate([block.levels, random_patterns(total, kind, rng)])[:total]
    return Block(block.parts, counts, gaps, levels)


def expected(block: Block, kind: ElementKind) -> list[Patterns] | Misfit:
    """Returns the parts of the result, or why the changes do not fit; by the reference."""
    buckets = open_buckets(block.counts, block.gaps, 0, 0)
    out = []
    for part in block.parts:
        positions, values = np.empty(len(part), np.uint32), np.empty(len(part), kind.pattern)
        found = place_changes(part, kind, buckets, block.gaps, block.levels, positions, values)
        if found < 0:
            return Misfit.FEWER
        new = part.copy()
        new[positions[:found]] = values[:found]
        out.append(new)
    return out if np.array_equal(buckets.level, buckets.last) else Misfit.LEFT


class Comparison:
    """Compares the changes of a device with the reference. Each part has its own memory."""

    def __init__(self, device: Device) -> None:
        self._device, self._changes = device, Changes(device)

    def compare(self, blocks: list[Block], kind: ElementKind) -> int:
        """Checks blocks of one pool, changes them if all fit, and restores them.

        Returns:
            How many fit.

        Raises:
            AssertionError: device and reference disagree.
        """
        memory = [[put(self._device, part.tobytes()) for part in block.parts] for block in blocks]
        on_device = [
            DeviceBlock(
                [DevicePart(at.address, len(part)) for at, part in zip(places, block.parts, strict=True)],
                block.counts if block.counts.any() else None,
                block.gaps,
                block.levels,
            )
            for block, places in zip(blocks, memory, strict=True)
        ]
        room = sum(self._changes.bytes_of(block, kind) for block in on_device)
        pending = self._changes.start(on_device, kind)
        assert pending.nbytes <= room + (1 << 14), "more memory than announced"
        checked, placed = pending.wait()
        self._require(blocks, memory, None, "the check changed the elements")
        results = [expected(block, kind) for block in blocks]
        for one, block, result in zip(checked, blocks, results, strict=True):
            self._compare_block(one, block, result)
        if placed is not None and not any(isinstance(result, Misfit) for result in results):
            self._make(placed, blocks, memory, results)
        return sum(not isinstance(result, Misfit) for result in results)

    def _compare_block(self, found: CheckedBlock, block: Block, result: list[Patterns] | Misfit) -> None:
        assert found.bases == [crc32(part.tobytes()) for part in block.parts], "other checksums of the base"
        if isinstance(result, Misfit):
            assert found.misfit is result, f"{found.misfit}, by the reference {result}"
            return
        assert found.misfit is None, f"{found.misfit}, but the changes fit"
        assert found.results == [crc32(part.tobytes()) for part in result], "other checksums of the result"

    def _make(
        self,
        placed: PlacedChanges,
        blocks: list[Block],
        memory: list[list[Memory]],
        results: list[list[Patterns] | Misfit],
    ) -> None:
        self._changes.flip(placed)
        self._require(blocks, memory, results, "other elements")
        self._changes.flip(self._changes.put(self._changes.fetch(placed)))
        self._require(blocks, memory, None, "the elements were not restored")

    def _require(
        self,
        blocks: list[Block],
        memory: list[list[Memory]],
        results: list[list[Patterns] | Misfit] | None,
        words: str,
    ) -> None:
        """Requires the elements of the results, or of the base."""
        for number, (block, places) in enumerate(zip(blocks, memory, strict=True)):
            parts = block.parts if results is None else results[number]
            assert not isinstance(parts, Misfit)
            for at, part in zip(places, parts, strict=True):
                assert fetch(self._device, at, part.nbytes) == part.tobytes(), words


def random_comparison(comparison: Comparison, rng: np.random.Generator, damaged: bool) -> bool:
    """Compares a few random blocks of one kind. Returns whether all fit.

    Raises:
        AssertionError: device and reference disagree, or undamaged blocks do not fit.
    """
    kind = KINDS[rng.integers(len(KINDS))]
    blocks = [random_block(kind, rng, damaged) for _ in range(rng.integers(1, 4))]
    fit = comparison.compare(blocks, kind) == len(blocks)
    assert fit or damaged, f"undamaged changes are refused: {kind}"
    return fit
