"""Machine code of the kernels: compiles with NVRTC, disassembles, and finds loops. Needs no driver.

Needs `cuobjdump` and `nvdisasm`: ``pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm``, or a CUDA
toolkit.
"""

from __future__ import annotations

import importlib
import io
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfpformat.engines.cuda.driver import STANDARD
from sfpformat.engines.cuda.source import source

_LINE = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_.]+)([^;]*);")


@dataclass(frozen=True)
class Instruction:
    """An instruction: its address, its name with suffixes, and its branch target, if it is a branch."""

    at: int
    name: str
    target: int | None

    @property
    def kind(self) -> str:
        """The name without suffixes."""
        return self.name.split(".")[0]


def instructions_of(text: str) -> list[Instruction]:
    """Parses the instructions of a function from the output of cuobjdump."""
    found = []
    for address, name, rest in _LINE.findall(text):
        target = re.search(r"0x([0-9a-f]+)\s*$", rest) if name.startswith("BRA") else None
        found.append(Instruction(int(address, 16), name, int(target[1], 16) if target else None))
    return found


def inner_loops(code: list[Instruction]) -> Iterator[list[Instruction]]:
    """Yields the innermost loops."""
    spans = [(i.target, i.at) for i in code if i.target is not None and i.target < i.at]
    for start, stop in spans:
        if not any((start, stop) != other and start <= other[0] and other[1] <= stop for other in spans):
            yield [i for i in code if start <= i.at <= stop]


def always_executed(loop: list[Instruction]) -> list[Instruction]:
    """Returns the instructions of a loop that no forward branch in it skips."""
    jumps = [(i.at, i.target) for i in loop if i.target is not None and i.target > i.at]
    return [i for i in loop if not any(start < i.at < stop for start, stop in jumps)]


def loops_of(code: list[Instruction]) -> Iterator[tuple[list[Instruction], list[list[Instruction]]]]:
    """Yields for every loop its instructions outside of nested loops, and its outermost nested loops."""
    spans = sorted({(i.target, i.at) for i in code if i.target is not None and i.target < i.at})
    for start, stop in spans:
        within = [
            other for other in spans if other != (start, stop) and start <= other[0] and other[1] <= stop
        ]
        outermost = [o for o in within if not any(p != o and p[0] <= o[0] and o[1] <= p[1] for p in within)]
        body = [i for i in code if start <= i.at <= stop]
        own = [i for i in body if not any(low <= i.at <= high for low, high in outermost)]
        yield own, [[i for i in body if low <= i.at <= high] for low, high in outermost]


@dataclass(frozen=True)
class Usage:
    """Resource use of a kernel: registers per thread, spilled bytes, bytes of shared memory per block."""

    registers: int
    spilled: int
    shared: int


def compile_with_usage(arch: str) -> tuple[bytes, dict[str, Usage], str]:
    """Compiles the kernels.

    Returns machine code, usage of each kernel, and the compiler log. Needs no driver.
    """
    core: Any = importlib.import_module("cuda.core")
    said = io.StringIO()
    options = core.ProgramOptions(arch=arch, std=STANDARD, ptxas_options=["-v"])
    code = core.Program(source(), "c++", options).compile("cubin", logs=said)
    return bytes(code.code), usage_of(said.getvalue()), said.getvalue()


def usage_of(text: str) -> dict[str, Usage]:
    """Parses the usage of each kernel from the output of ptxas."""
    found = {}
    for part in text.split("Compiling entry function ")[1:]:
        registers = re.search(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        assert registers is not None
        spilled = sum(map(int, re.findall(r"(\d+) bytes spill", part)))
        found[part.split("'")[1]] = Usage(int(registers[1]), spilled, int(shared[1]) if shared else 0)
    return found


def disassemble(code: bytes) -> dict[str, list[Instruction]]:
    """Returns kernel -> instructions.

    Raises:
        FileNotFoundError: cuobjdump is not installed.
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
