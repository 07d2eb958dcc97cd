"""Builds the reader in C, and asks it about one file after another.

As a plugin of pytest, it also gives that reader every file that the tests expect to be accepted or refused::

    C_READER=PROGRAM python -m pytest -p tests.support.c_reader tests/format/test_mask.py
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sfpformat.errors import CODE_OF_CLAUSE, FileFault
from sfpformat.limits import DEFAULT_LIMITS, Limits

from . import forge
from .clauses import ROOT

SOURCE = ROOT / "conformance" / "examples" / "c"
LIMITS = ("directory_bytes", "depth", "name_bytes", "tensors", "rank", "tensor_bytes", "expansion")

Answer = dict[str, Any]


@dataclass
class Reader:
    """A process of the program that executes one command after another."""

    process: subprocess.Popen[str]
    folder: Path

    def ask(
        self, command: str, data: bytes, base: bytes | None = None, keys: list[str] | None = None
    ) -> Answer:
        """The program's answer to a command for a file with these bytes, with a base or hexadecimal keys."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        path = self.folder / "file.sfp"
        path.write_bytes(data)
        words = [command, str(path)]
        if base is not None:
            other = self.folder / "base.sfp"
            other.write_bytes(base)
            words.append(str(other))
        if keys is not None:
            listed = self.folder / "keys.txt"
            listed.write_text("".join(f"{key}\n" for key in keys), "ascii")
            words.append(str(listed))
        words += [] if command == "validate" else [str(self.folder)]
        self.process.stdin.write("\t".join(words) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"the program ended: {(self.folder / 'errors').read_text()}"
        answer: Answer = json.loads(line)
        return answer

    def written(self, name: str) -> bytes:
        """A file that the program wrote."""
        return (self.folder / name).read_bytes()


def built(target: str, folder: Path) -> Path:
    """Compiles the program. Returns its path."""
    for tool in ("make", "cc"):
        assert shutil.which(tool), f"{tool} is needed to build the reader in C: install a C compiler and make"
    done = subprocess.run(
        ["make", "-C", str(SOURCE), target, f"BUILD={folder}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr, f"the compiler warns: {done.stderr}"
    return next(folder.glob("sfp_driver*"))


@dataclass
class Readers:
    """Running programs, one for each set of limits."""

    program: Path
    folder: Path
    running: dict[Limits, Reader] = field(default_factory=dict)

    def reader(self, limits: Limits = DEFAULT_LIMITS) -> Reader:
        """Returns a running program with these limits."""
        if limits not in self.running:
            folder = self.folder / str(len(self.running))
            folder.mkdir()
            words = [str(self.program), *(f"{name}={getattr(limits, name)}" for name in LIMITS), "serve"]
            with (folder / "errors").open("w") as errors:
                process = subprocess.Popen(
                    words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
                )
            self.running[limits] = Reader(process, folder)
        return self.running[limits]

    def end(self) -> None:
        """Ends the programs. Asserts that they released all memory."""
        for one in self.running.values():
            one.process.communicate()
            assert one.process.returncode == 0, (one.folder / "errors").read_text()


# -------------------------------------------------------------------------------- the plugin: files of others


def pytest_configure(config: pytest.Config) -> None:
    """Makes `accepted` and `refused_bytes` also ask the reader in C, before the tests are imported."""
    readers = Readers(Path(os.environ["C_READER"]), Path(tempfile.mkdtemp()))
    config.add_cleanup(lambda: shutil.rmtree(readers.folder))
    config.add_cleanup(readers.end)

    def accepted(data: bytes, limits: Limits = DEFAULT_LIMITS) -> dict[str, np.ndarray]:
        answer = readers.reader(limits).ask("validate", data)
        assert answer["ok"], answer
        return forge.read_all(data, limits)

    def refused_bytes(
        data: bytes, clause: str, *, tensor: str | None = None, limits: Limits = DEFAULT_LIMITS
    ) -> FileFault:
        answer = readers.reader(limits).ask("validate", data)
        assert not answer["ok"]
        assert (answer["clause"], answer["error"]) == (clause, CODE_OF_CLAUSE[clause])
        assert answer["tensor"] == tensor
        assert 0 <= answer["offset"] <= len(data)
        return forge.fault_of(data, limits)

    forge.accepted, forge.refused_bytes = accepted, refused_bytes
