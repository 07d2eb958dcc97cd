"""What a weight costs each kernel, counted in its machine code, and what an H200 could do at that cost.

``python -m kernels.budget`` compiles the kernels with NVRTC (no driver is needed), disassembles them and
counts the instructions of the two loops in which a dense kernel spends its time: the one that decodes weights
into a tile, and the one that writes tiles out. No figure is measured on a device: they say which pipe of a
multiprocessor would be full first, and how much of the time that memory alone takes.

Needs `cuobjdump` and `nvdisasm`: ``pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm``, or a CUDA
toolkit.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfpformat.engines.cuda.source import source

# An H200: multiprocessors; gigahertz; bytes a second that a copy reads and writes together; lanes a
# multiprocessor that issue, that do integer work, and banks of its shared memory.
MULTIPROCESSORS, CLOCK, COPY = 132, 1.98e9, 4.3e12
ISSUE, INTEGER, BANKS = 128, 64, 32
# Bits of a prefix code for the exponents of BF16 weights, as SPEC.md chapter 27 has them coded.
CODE_BITS = 2.73

# Kernels whose loops are counted: bytes a weight, residual bits.
DENSE = {
    "dense_2_8_one_short": (2, 8),
    "dense_2_8_one_long": (2, 8),
    "dense_2_8_many_short": (2, 8),
    "dense_2_8_many_long": (2, 8),
    "dense_4_24_one_short": (4, 24),
    "dense_4_24_one_long": (4, 24),
    "dense_4_24_many_short": (4, 24),
    "dense_4_24_many_long": (4, 24),
}
SHORT = ("short_1", "short_2", "short_4")  # kernels whose loop over survivors is counted
# Not of the integer pipe: memory, control, and what the multiplier does.
_MEMORY = ("LD", "LDG", "LDS", "ST", "STG", "STS", "LDC", "LDL", "STL")
_CONTROL = ("BRA", "BSSY", "BSYNC", "NOP", "EXIT", "WARPSYNC", "BAR", "BREAK", "CALL", "RET")
_MULTIPLIER = ("IMAD", "FMUL", "FADD", "FFMA", "DMUL")
_LINE = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_.]+)([^;]*);")


@dataclass(frozen=True)
class Instruction:
    """An instruction: its address, its name with what is appended, where it branches to."""

    at: int
    name: str
    target: int | None

    @property
    def kind(self) -> str:
        """The name alone."""
        return self.name.split(".")[0]


@dataclass(frozen=True)
class Loop:
    """A loop without loops in it: its instructions, those of every turn, and weights a lane a turn."""

    every: list[Instruction]
    always: list[Instruction]
    weights: float

    def a_weight(self, instructions: list[Instruction], kinds: tuple[str, ...] | None = None) -> float:
        """How many of some kinds (all, where nothing is said) a weight takes."""
        return sum(kinds is None or i.kind in kinds for i in instructions) / self.weights


def instructions_of(text: str) -> list[Instruction]:
    """The instructions of a function, from what cuobjdump prints."""
    found = []
    for address, name, rest in _LINE.findall(text):
        target = re.search(r"0x([0-9a-f]+)\s*$", rest) if name.startswith("BRA") else None
        found.append(Instruction(int(address, 16), name, int(target[1], 16) if target else None))
    return found


def inner_loops(code: list[Instruction]) -> Iterator[list[Instruction]]:
    """The loops that have no loop in them."""
    spans = [(i.target, i.at) for i in code if i.target is not None and i.target < i.at]
    for start, stop in spans:
        if not any((start, stop) != other and start <= other[0] and other[1] <= stop for other in spans):
            yield [i for i in code if start <= i.at <= stop]


def always_executed(loop: list[Instruction]) -> list[Instruction]:
    """Those of a loop that no forward branch in it jumps over."""
    jumps = [(i.at, i.target) for i in loop if i.target is not None and i.target > i.at]
    return [i for i in loop if not any(start < i.at < stop for start, stop in jumps)]


def dense_loops(code: list[Instruction], item: int) -> tuple[Loop, Loop]:
    """The loop of a dense kernel that decodes, and the one that writes out."""
    decoding: list[Loop] = []
    writing: list[Loop] = []
    for loop in inner_loops(code):
        names = [i.name for i in loop]
        looked_up, stored = names.count("LDS.U16"), sum(i.kind == "STS" for i in loop)
        out = sum(i.kind in ("ST", "STG") for i in loop)
        if looked_up >= 4 and stored and not out:
            decoding.append(Loop(loop, always_executed(loop), looked_up))
        elif out >= 8 and not stored and not any(".U8" in name for name in names):
            writing.append(Loop(loop, always_executed(loop), out * 4 / item))
    return max(decoding, key=lambda loop: loop.weights), max(writing, key=lambda loop: loop.weights)


def survivor_loop(code: list[Instruction]) -> Loop:
    """The loop of a kernel for short levels in which each turn puts a survivor into the tile."""
    found = []
    for loop in inner_loops(code):
        kinds = [i.kind for i in loop]
        if kinds.count("STS") == 1 and kinds.count("LDS") >= 2 and "FLO" in kinds:
            found.append(Loop(loop, always_executed(loop), 1))
    return max(found, key=lambda loop: len(loop.every))


@dataclass(frozen=True)
class Budget:
    """Lane slots a weight, at least and at most, and the share of the floor that each pipe allows.

    Attributes:
        bytes: read and written, a weight.
        issue, integer: at least (branches not taken), at most (all taken).
        memory: of load-store units, bank conflicts of the look-ups left out.
    """

    kernel: str
    bytes: float
    issue: tuple[float, float]
    integer: tuple[float, float]
    memory: float

    def shares(self) -> dict[str, float]:
        """Pipe -> the share of the memory floor that it allows, at most 1, at the greater count."""
        weights = COPY / self.bytes / (MULTIPROCESSORS * CLOCK)  # a clock a multiprocessor at the floor
        slots = {
            "issue": ISSUE / weights / self.issue[1],
            "integer": INTEGER / weights / self.integer[1],
            "memory": BANKS / weights / self.memory,
        }
        return {pipe: min(share, 1.0) for pipe, share in slots.items()}


def budget_of(kernel: str, code: list[Instruction]) -> Budget:
    """The budget of a dense kernel."""
    item, width = DENSE[kernel]
    decode, write = dense_loops(code, item)

    def both(kinds: tuple[str, ...] | None = None) -> tuple[float, float]:
        least = decode.a_weight(decode.always, kinds) + write.a_weight(write.always, kinds)
        return least, decode.a_weight(decode.every, kinds) + write.a_weight(write.every, kinds)

    issue, others = both(), both((*_MEMORY, *_CONTROL, *_MULTIPLIER))
    # A look-up, a store into the tile, a load from it, a store of four bytes; and for each plane loads of 16
    # bytes, for which every lane goes to a line of its own.
    memory = 1 + 3 * item / 4 + BANKS * (CODE_BITS + width) / 128
    integer = issue[0] - others[0], issue[1] - others[1]
    return Budget(kernel, (CODE_BITS + width) / 8 + item, issue, integer, memory)


# ----------------------------------------------------------------------------------------------- machine code


@dataclass(frozen=True)
class Usage:
    """What ptxas says of a kernel: registers a thread, bytes spilled, bytes of shared memory a block."""

    registers: int
    spilled: int
    shared: int


def compile_with_usage(arch: str) -> tuple[bytes, dict[str, Usage], str]:
    """The machine code, the usage of each kernel, and all that the compilers said. Needs no driver."""
    core: Any = importlib.import_module("cuda.core")
    said = io.StringIO()
    options = core.ProgramOptions(arch=arch, std="c++17", ptxas_options=["-v"])
    code = core.Program(source(), "c++", options).compile("cubin", logs=said)
    return bytes(code.code), usage_of(said.getvalue()), said.getvalue()


def usage_of(text: str) -> dict[str, Usage]:
    """The usage of each kernel, from what ptxas says."""
    found = {}
    for part in text.split("Compiling entry function ")[1:]:
        registers = re.search(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        assert registers is not None
        spilled = sum(map(int, re.findall(r"(\d+) bytes spill", part)))
        found[part.split("'")[1]] = Usage(int(registers[1]), spilled, int(shared[1]) if shared else 0)
    return found


def disassemble(code: bytes) -> dict[str, list[Instruction]]:
    """Kernel -> its instructions.

    Raises:
        FileNotFoundError: cuobjdump is not there.
    """
    here = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin"
    path = os.pathsep.join([str(here), os.environ.get("PATH", "")])
    program = shutil.which("cuobjdump", path=path)
    if program is None:
        raise FileNotFoundError("cuobjdump is needed: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernels.cubin"
        file.write_bytes(code)
        command = [program, "--dump-sass", str(file)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, env={**os.environ, "PATH": path}
        )
    parts = done.stdout.split("Function : ")[1:]
    return {part.split("\n", 1)[0].strip(): instructions_of(part) for part in parts}


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m kernels.budget", description=__doc__)
    parser.add_argument("--arch", default="sm_90", help="architecture (sm_90)")
    args = parser.parse_args()
    code, usage, _ = compile_with_usage(args.arch)
    functions = disassemble(code)
    print(f"{args.arch}: registers a thread, shared memory a block, instructions")
    for kernel, used in sorted(usage.items()):
        spilled = f", {used.spilled} spilled" if used.spilled else ""
        print(f"  {kernel:22} {used.registers:4} {used.shared:7,} {len(functions[kernel]):6}{spilled}")
    print(
        "\nlane slots a weight, at least and at most, and the share of the memory floor that each pipe allows"
    )
    print(f"  {'kernel':22} {'bytes':>6} {'issue':>11} {'integer':>11} {'memory':>7}   shares")
    for kernel in DENSE:
        own = budget_of(kernel, functions[kernel])
        shares = ", ".join(f"{pipe} {share:.0%}" for pipe, share in own.shares().items())
        print(
            f"  {kernel:22} {own.bytes:6.2f} {own.issue[0]:5.1f}-{own.issue[1]:5.1f} "
            f"{own.integer[0]:5.1f}-{own.integer[1]:5.1f} {own.memory:7.1f}   {shares}"
        )
    print("\ninstructions a survivor, at least and at most, the mask's own and the tile's not counted")
    for kernel in SHORT:
        loop = survivor_loop(functions[kernel])
        print(f"  {kernel:22} {len(loop.always)}-{len(loop.every)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
