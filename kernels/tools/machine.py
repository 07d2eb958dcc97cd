"""Compiles the kernels and reads their registers, spills and shared memory from the log. Needs no driver."""

from __future__ import annotations

import importlib
import io
import re
from dataclasses import dataclass
from typing import Any

from sfpformat.engines.cuda.driver import STANDARD
from sfpformat.engines.cuda.kernel_source import source


@dataclass(frozen=True)
class Usage:
    """Resource use of a kernel: registers per thread, spilled bytes, bytes of shared memory per block."""

    registers: int
    spilled: int
    shared: int


def compile_with_usage(arch: str) -> tuple[bytes, dict[str, Usage], str]:
    """Compiles the kernels for an architecture, such as ``"sm_90"``. Needs no driver.

    Returns:
        The machine code, the usage of each kernel by name, and the compiler's log.
    """
    core: Any = importlib.import_module("cuda.core")
    log = io.StringIO()
    options = core.ProgramOptions(arch=arch, std=STANDARD, ptxas_options=["-v"])
    code = core.Program(source(), "c++", options).compile("cubin", logs=log)
    return bytes(code.code), usage_of(log.getvalue()), log.getvalue()


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
