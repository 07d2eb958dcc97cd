"""What a weight costs each kernel, counted in its machine code, and what an H200 or an H100 could do then.

``python -m kernels.tools.budget`` compiles the kernels with NVRTC (no driver is needed), disassembles them
and counts the instructions of their main loops. No figure is measured on a device: they
say which pipe of a multiprocessor would be full first, and how much of the time that memory alone takes.

Counts are of lanes: what a warp does for the lane with the most to do counts for all. Needs `cuobjdump` and
`nvdisasm`, as `kernels.tools.machine` says.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from .machine import Instruction, always_executed, compile_with_usage, disassemble, inner_loops, loops_of

# For both devices: multiprocessors; clock rate in Hz; per multiprocessor and cycle, lanes that issue and
# lanes of the integer pipe; banks of shared memory.
MULTIPROCESSORS, CLOCK = 132, 1.98e9
ISSUE, INTEGER, BANKS = 128, 64, 32
# Bytes per second that a copy reads and writes in total. Measured on an H200: nine tenths of its nominal
# memory bandwidth. For an H100, nine tenths of the nominal 3.35e12.
COPY = {"h200": 4.3e12, "h100": 3.0e12}
# Cycles for one look-up of each of 32 lanes at independent random addresses in 32 banks (bank conflicts).
MEETING = 3.4
# Cycles for look-ups if every two lanes share a copy of the table; measured on an H200.
SHARING = 2.0
# Bits per weight of a prefix code for the exponents of BF16 weights (SPEC.md chapter 27).
CODE_BITS = 2.73
# Bits per position at 50 % pruned: 8 magnitudes in the presets `gpu` and `fused`, and lossless.
QUANTISED_BITS, PLAIN_BITS, EXACT_BITS = 2.95, 3.02, 1 + 0.5 * (CODE_BITS + 8)
DENSITY = 0.5
SEGMENT = 512  # positions, in both presets
# Octets per iteration of the compiled loop.
_OCTETS = 2
# Of `index_chunks`: segments per thread and round; iterations of the loops over quantities and over streams.
_SEGMENTS, _QUANTITIES, _STREAMS = 4, 13, 3
SIDE = 8192  # rows and columns of the matrix for predicted products

# Instructions that do not use the integer pipe: memory, control, multiplier, and other pipes.
_MEMORY = ("LD", "LDG", "LDS", "LDGSTS", "ST", "STG", "STS", "LDC", "LDL", "STL", "LDGDEPBAR", "DEPBAR")
_CONTROL = ("BRA", "BSSY", "BSYNC", "NOP", "EXIT", "WARPSYNC", "BAR", "BREAK", "CALL", "RET")
_MULTIPLIER = ("IMAD", "FMUL", "FADD", "FFMA", "DMUL", "HFMA2", "CS2R")
_APART = ("POPC", "FLO", "BREV", "HMMA", "SHFL", "MUFU", "F2I", "I2F", "F2FP", "S2R", "UMOV", "ULDC", "S2UR")


@dataclass(frozen=True)
class Piece:
    """Instructions, and the minimum and maximum number of executions per weight."""

    every: list[Instruction]
    least: float
    most: float

    @classmethod
    def loop(cls, every: list[Instruction], times: float) -> list[Piece]:
        """Returns the pieces of a loop. Instructions that a forward branch can skip have a minimum of 0."""
        always = always_executed(every)
        skipped = [i for i in every if i not in always]
        return [cls(always, times, times), cls(skipped, 0, times)]


@dataclass(frozen=True)
class Budget:
    """Lane slots per weight of each pipe. Computes the share of the memory-bound rate that each pipe allows.

    Attributes:
        kernel: the name of the kernel.
        bytes: bytes read and written per weight.
        issue, integer: minimum (optional code never executed) and maximum (always executed).
        memory: slots of the load-store units.
        copy: copy rate of the device in bytes per second.
    """

    kernel: str
    bytes: float
    issue: tuple[float, float]
    integer: tuple[float, float]
    memory: float
    copy: float

    @property
    def floor(self) -> float:
        """Weights per cycle and multiprocessor if memory bandwidth is the limit."""
        return self.copy / self.bytes / (MULTIPROCESSORS * CLOCK)

    def shares(self) -> dict[str, float]:
        """Returns pipe -> share of the memory-bound rate that it allows, at most 1, at the maximum counts."""
        slots = {
            "issue": ISSUE / self.floor / self.issue[1],
            "integer": INTEGER / self.floor / self.integer[1],
            "memory": BANKS / self.floor / self.memory,
        }
        return {pipe: min(share, 1.0) for pipe, share in slots.items()}

    def seconds(self, weights: int) -> float:
        """Returns the predicted seconds for ``weights`` weights, with the busiest pipe saturated."""
        return weights * self.bytes / self.copy / min(self.shares().values())


def budget_of_pieces(kernel: str, size: float, pieces: list[Piece], memory: float) -> Budget:
    """Returns the budget of pieces of code, on an H200."""
    others = (*_MEMORY, *_CONTROL, *_MULTIPLIER, *_APART)

    def both(wanted: Callable[[Instruction], bool]) -> tuple[float, float]:
        counts = [(sum(map(wanted, piece.every)), piece) for piece in pieces]
        return sum(n * piece.least for n, piece in counts), sum(n * piece.most for n, piece in counts)

    integer = both(lambda i: i.kind not in others)
    return Budget(kernel, size, both(lambda _: True), integer, memory, COPY["h200"])


# ------------------------------------------------------------------------------------------------- loops


def _count(loop: list[Instruction], name: str) -> int:
    return sum(i.name == name or i.kind == name for i in loop)


def _written(loop: list[Instruction]) -> int:
    return _count(loop, "ST") + _count(loop, "STG")


def writing_loop(code: list[Instruction], item: int) -> list[Piece]:
    """Returns the loop that writes tiles to memory, in words of weights of ``item`` bytes."""
    loops = [loop for loop in inner_loops(code) if _written(loop) >= 8 and not _count(loop, "STS")]
    loops = [loop for loop in loops if not any(".U8" in i.name for i in loop)]
    loop = max(loops, key=_written)
    return Piece.loop(loop, item / 4 / _written(loop))


def joining(code: list[Instruction]) -> list[Piece]:
    """Returns the branch-free code that joins slots with residuals and writes 64 weights per lane."""
    stores = [i.at for i in code if _written([i]) and (".64" in i.name or ".128" in i.name)]
    begin = max(i.at for i in code if i.kind in _CONTROL and i.at < stores[0])
    return [Piece([i for i in code if begin < i.at <= stores[-1]], 1 / 64, 1 / 64)]


def tile_memory(item: int, bits: float) -> float:
    """Returns the load-store slots per weight: reading and writing the tile, and loading the planes.

    Planes are loaded 16 bytes at a time, and each lane accesses its own cache line.
    """
    return 2 * item / 4 + BANKS * bits / 128


def dense(kernel: str, code: list[Instruction]) -> Budget:
    """Returns the budget of a kernel for dense exact tensors: at least four look-ups per iteration."""
    item = int(kernel[6])
    width = 8 * item - 8  # an approximation for kernels that support any width
    loops = [loop for loop in inner_loops(code) if _count(loop, "LDS.U16") >= 4 and _count(loop, "STS")]
    loop = max((loop for loop in loops if not _written(loop)), key=lambda loop: _count(loop, "LDS.U16"))
    written = writing_loop(code, item) if kernel.endswith("_0") else joining(code)
    pieces = Piece.loop(loop, 1 / _count(loop, "LDS.U16")) + written
    look_up = SHARING if "one" in kernel else MEETING
    memory = look_up + item / 4 + tile_memory(item, CODE_BITS + width)
    return budget_of_pieces(kernel, (CODE_BITS + width) / 8 + item, pieces, memory)


def slowest(positions: int, a_turn: int) -> float:
    """Returns the mean iterations of a warp's slowest lane, for ``positions`` positions per lane."""
    survivors = np.random.default_rng(0).binomial(positions, DENSITY, (4000, 32))
    return float(np.ceil(survivors / a_turn).max(1).mean())


def sparse(kernel: str, code: list[Instruction]) -> Budget:
    """Returns the budget of a kernel for quantised 2-byte weights: loops over words and their survivors."""
    found = [(own, turn) for own, inner in loops_of(code) for turn in inner if _count(turn, "STS.U16")]
    word, turn = min(found, key=lambda pair: len(pair[0]) + len(pair[1]))
    slots = _count(turn, "STS.U16")
    turns = slowest(32, slots) / 32
    pieces = Piece.loop(turn, turns) + Piece.loop(word, 1 / 32) + writing_loop(code, 2)
    memory = MEETING * (2 * turns * slots + 4 / 32) + 2 / 4 + tile_memory(2, QUANTISED_BITS)
    return budget_of_pieces(kernel, QUANTISED_BITS / 8 + 2, pieces, memory)


def survivors(kernel: str, code: list[Instruction]) -> Budget:
    """Returns the budget of a lossless kernel with an octet mask: loops over octets, survivors, tiles."""
    item = int(kernel[-1])
    found = []
    for own, inner in loops_of(code):
        turns = [loop for loop in inner if _count(loop, "FLO") and _count(loop, "STS")]
        if turns:
            found.append((own, inner, turns[0]))
    tile, inner, turn = min(found, key=lambda each: sum(map(len, each[1])))
    octets = max((loop for loop in inner if not _count(loop, "STS") and not _written(loop)), key=len)
    positions = 64 if item <= 2 else 32
    slots = slowest(positions, 1) / positions
    pieces = Piece.loop(turn, slots) + Piece.loop(octets, 1 / 8 / _OCTETS)
    pieces += Piece.loop(tile, 1 / positions) + writing_loop(code, item)
    bits = EXACT_BITS + (item - 2) * 8 * DENSITY
    # With tables in shared memory: two look-ups per survivor, a code and a pattern. Else one look-up of a
    # code, and each lane accesses its own cache line.
    look_ups = MEETING * (2 * slots + 1 / 8) if kernel.startswith("short") else BANKS * (slots + 1 / 8)
    memory = look_ups + item / 4 + tile_memory(item, bits)
    return budget_of_pieces(kernel, bits / 8 + item, pieces, memory)


def general(kernel: str, code: list[Instruction]) -> Budget:
    """Returns the budget of a kernel that loops over positions; the maximum includes all features."""
    item = int(kernel[-1])
    found = [(own, inner) for own, inner in loops_of(code) if _count(own, "STS") and not _written(own)]
    turn, inner = max((pair for pair in found if _count(pair[0], "LD") > 16), key=lambda pair: len(pair[0]))
    pieces = Piece.loop(turn, 1) + [Piece(loop, 0, 1) for loop in inner] + writing_loop(code, item)
    look_ups = BANKS * (2 + 1 / 8)  # a code and a number per position
    memory = look_ups + item / 4 + tile_memory(item, QUANTISED_BITS)
    return budget_of_pieces(kernel, QUANTISED_BITS / 8 + item, pieces, memory)


def index_slots(code: list[Instruction]) -> float:
    """Returns the maximum issue slots per weight of `index_chunks`, for chunks of one full round."""
    end = max(i.at for i in code if i.kind == "EXIT")  # later code is only for diverged warps
    slots = sum(i.at <= end for i in code)
    for loop in inner_loops(code):
        if loop[-1].at < end:
            # Only the loop over quantities loads from the chunk (the fields).
            slots += (_QUANTITIES if _count(loop, "LD") else _STREAMS) * len(loop) - len(loop)
    return slots / _SEGMENTS / SEGMENT


def product(kernel: str, code: list[Instruction]) -> Budget:
    """Returns the budget of a product kernel: loops over tiles and words of the mask.

    A word covers 32 columns of two rows.
    """
    found = [(own, inner) for own, inner in loops_of(code) if any(_count(loop, "HMMA") for loop in inner)]
    tile, inner = min(found, key=lambda pair: sum(map(len, pair[1])))
    whole = next(loop for loop in inner if _count(loop, "HMMA"))
    word = next(own for own, _ in loops_of(whole) if _count(own, "HMMA"))
    copies = [loop for loop in inner_loops(whole) if _count(loop, "LDGSTS")]
    always = always_executed(word)
    once = [i for i in word if i not in always]  # executed only for the last of the four words of a tile
    pieces = [Piece(always, 1 / 64, 1 / 64), Piece(once, 1 / 256, 1 / 256), *Piece.loop(tile, 1 / 256)]
    blocks = 512 * PLAIN_BITS / 128 / 4 + 1  # copies per lane and row
    pieces += [Piece(loop, blocks / 256, blocks / 256) for loop in copies]
    loads = sum(i.kind == "LDS" and ".128" not in i.name for i in always)
    memory = (MEETING * loads + 4 * _count(always, "LDS.128")) / 64 + BANKS * PLAIN_BITS / 8 / 128
    return budget_of_pieces(kernel, PLAIN_BITS / 8, pieces, memory)


FAMILIES = {"dense": dense, "sparse": sparse, "short": survivors, "plain": survivors, "any": general}
FAMILIES |= {"multiply": product}


def budget_of(kernel: str, code: list[Instruction]) -> Budget | None:
    """Returns the budget of a kernel; None for kernels that do not loop over weights."""
    family = FAMILIES.get(kernel.split("_")[0])
    return None if family is None else family(kernel, code)


def main() -> int:
    """Runs the command. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m kernels.tools.budget", description=__doc__)
    parser.add_argument("--arch", default="sm_90", help="architecture (sm_90)")
    parser.add_argument("--card", choices=list(COPY), default="h200", help="whose memory (h200)")
    args = parser.parse_args()
    copy = COPY[args.card]
    code, usage, _ = compile_with_usage(args.arch)
    functions = disassemble(code)
    print(f"{args.arch}: registers a thread, shared memory a block, instructions")
    for kernel, used in sorted(usage.items()):
        spilled = f", {used.spilled} spilled" if used.spilled else ""
        print(f"  {kernel:22} {used.registers:4} {used.shared:7,} {len(functions[kernel]):6}{spilled}")
    print(f"\nlane slots a weight, at least and at most; shares of an {args.card.upper()}'s floor")
    print(f"  {'kernel':22} {'bytes':>6} {'issue':>12} {'integer':>12} {'memory':>7}   shares")
    for kernel in sorted(functions):
        counted = budget_of(kernel, functions[kernel])
        if counted is None:
            continue
        own = replace(counted, copy=copy)
        shares = ", ".join(f"{pipe} {share:.0%}" for pipe, share in own.shares().items())
        print(
            f"  {kernel:22} {own.bytes:6.2f} {own.issue[0]:5.1f}-{own.issue[1]:6.1f} "
            f"{own.integer[0]:5.1f}-{own.integer[1]:6.1f} {own.memory:7.1f}   {shares}"
        )
    slots = index_slots(functions["index_chunks"])
    print(f"  index_chunks beside: at most {slots:.1f} issue slots, in segments of {SEGMENT}")
    print(f"\nproducts with {SIDE} × {SIDE} weights, microseconds; dense: at the rate of copying")
    for kernel, item in (("multiply_bf16", 2), ("multiply_f16", 2), ("multiply_f32", 4)):
        counted = budget_of(kernel, functions[kernel])
        assert counted is not None
        own = replace(counted, copy=copy)
        taken, beside = own.seconds(SIDE * SIDE) * 1e6, SIDE * SIDE * item / copy * 1e6
        print(f"  {kernel:22} {taken:6.1f}, dense {beside:6.1f}: {beside / taken:.2f} times as fast")
    return 0


if __name__ == "__main__":
    sys.exit(main())
