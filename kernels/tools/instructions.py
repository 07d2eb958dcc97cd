"""Counts the instructions of the kernels' loops in the machine code. Needs no driver and no device.

``python -m kernels.tools.instructions KERNEL …`` compiles the kernels, disassembles them by nvdisasm (package
``nvidia-cuda-nvdisasm``), and prints the instructions of each loop outside its inner loops, by the unit that
executes them. Instructions that a branch skips count, too. For kernels whose levels per pass are known, it
also prints the instructions per weight of the main loop, and the rate in TB/s of weights at which an H200
could issue them: 132 multiprocessors, four instructions of 32 lanes per cycle, 1.755 GHz.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from .machine import compile_with_usage

LANES_A_SECOND = 132 * 4 * 32 * 1.755e9  # instructions of one lane that an H200 issues
# Kernel -> levels per lane of a pass of its main loop; bytes per weight. The main loop is the shortest of
# those with most accesses to shared memory.
WEIGHTS = {"windows_2_8": (32, 2), "windows_4_24": (32, 4)}
UNITS = {
    "global": ("LDG", "STG", "ATOMG", "RED", "LDGSTS"),
    "shared": ("LDS", "STS", "ATOMS", "LDSM"),
    "shuffle": ("SHFL", "VOTE", "MATCH"),
    "popc": ("POPC", "FLO", "BREV", "MUFU"),
    "tensor": ("HMMA", "IMMA"),
    "branch": ("BRA", "BSSY", "BSYNC", "WARPSYNC", "BAR", "EXIT", "CALL", "RET", "BREAK", "YIELD"),
}
_LINE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+ )?(\w+)(.*?);")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")


@dataclass(frozen=True)
class Loop:
    """A loop.

    Attributes:
        depth: 1, or for a loop within others one more than theirs.
        units: its instructions outside inner loops, by unit; all others count as ``arithmetic``.
    """

    depth: int
    units: Counter[str]

    @property
    def total(self) -> int:
        """The number of instructions."""
        return self.units.total()


def unit_of(name: str) -> str:
    """Returns the unit that executes an instruction."""
    return next((unit for unit, names in UNITS.items() if name in names), "arithmetic")


def loops_of(text: str) -> dict[str, list[Loop]]:
    """Returns the loops of each kernel from the output of nvdisasm, in the order of their code."""
    found = {}
    for section in text.split("//--------------------- .text.")[1:]:
        name, body = section.split(None, 1)
        found[name] = _loops(body.split("//---------------------")[0].splitlines())
    return found


def _loops(lines: list[str]) -> list[Loop]:
    places: dict[str, int] = {}
    names: list[str] = []
    ends: list[int] = []
    spans: list[tuple[int, int]] = []
    for line in lines:
        label, instruction = _LABEL.match(line), _LINE.match(line)
        if label:
            places[label[1]] = len(names)
        elif instruction:
            names.append(instruction[2])
            if instruction[2] == "EXIT" and not instruction[1]:
                ends.append(len(names))
            target = _TARGET.search(instruction[3])
            # The last instruction of a kernel is a branch to itself. Rare code after the end returns by
            # branches backwards, too.
            start = places.get(target[1], len(names)) if target else len(names)
            if instruction[2] == "BRA" and start < len(names) - 1 and not any(start < end for end in ends):
                spans.append((start, len(names)))
    found = []
    for start, stop in sorted(set(spans)):
        inner = {
            place
            for other in spans
            if other != (start, stop) and start <= other[0] and other[1] <= stop
            for place in range(*other)
        }
        own = [unit_of(names[place]) for place in range(start, stop) if place not in inner]
        depth = sum(other[0] <= start and stop <= other[1] for other in set(spans))
        found.append(Loop(depth, Counter(own)))
    return found


def disassembled(code: bytes) -> str:
    """Returns the output of nvdisasm for machine code.

    Raises:
        RuntimeError: nvdisasm is not installed.
    """
    program = shutil.which("nvdisasm", path=os.pathsep.join([*_folders(), os.environ.get("PATH", "")]))
    if program is None:
        raise RuntimeError("nvdisasm is not installed: pip install nvidia-cuda-nvdisasm")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.cubin"
        path.write_bytes(code)
        return subprocess.run([program, "-c", path], capture_output=True, text=True, check=True).stdout


def _folders() -> list[str]:
    """Returns the folders of programs in NVIDIA's packages."""
    spec = find_spec("nvidia")
    places = spec.submodule_search_locations if spec else None
    return [str(path) for place in places or [] for path in Path(place).glob("*/bin")]


def main() -> int:
    """Runs the command. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m kernels.tools.instructions", description=__doc__)
    parser.add_argument("kernels", nargs="+", metavar="KERNEL")
    parser.add_argument("--arch", default="sm_90", help="sm_80, sm_90 (default) or sm_100")
    args = parser.parse_args()
    code, usage, _ = compile_with_usage(args.arch)
    unknown = sorted(set(args.kernels) - set(usage))
    if unknown:
        parser.error(f"no such kernel: {', '.join(unknown)}; there are {', '.join(usage)}")
    loops = loops_of(disassembled(code))
    units = ["arithmetic", *UNITS]
    print(f"| kernel, loop | depth | all | {' | '.join(units)} |\n|---|{'---|' * (len(units) + 2)}")
    for kernel in args.kernels:
        for number, loop in enumerate(loops[kernel]):
            cells = " | ".join(str(loop.units[unit]) for unit in units)
            print(f"| {kernel}, {number} | {loop.depth} | {loop.total} | {cells} |")
    for kernel in args.kernels:
        if kernel in WEIGHTS and loops[kernel]:
            levels, item = WEIGHTS[kernel]
            main_loop = max(loops[kernel], key=lambda loop: (loop.units["shared"], -loop.total))
            a_weight = main_loop.total / levels
            rate = LANES_A_SECOND / a_weight * item / 1e12
            print(f"\n{kernel}: {a_weight:.1f} instructions per weight; an H200 could issue {rate:.1f} TB/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
