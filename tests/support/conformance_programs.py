"""Programs under test for the runner: arbitrary drivers, and drivers with one wrong behaviour."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

from .clauses import ROOT

OWN = [sys.executable, "-m", "sfpformat.cli", "conformance", "driver", "--engine", "python", "--"]
_SERVED = """
for line in sys.stdin:
    print(json.dumps(answer(line.rstrip('\\n').split('\\t'))), flush=True)
"""


def program(folder: Path, body: str) -> list[str]:
    """A driver that serves: ``body`` defines a function ``answer(words)`` that returns a dictionary."""
    path = folder / "driver.py"
    head = f"import json, os, sys, time\nsys.path.insert(0, {str(ROOT)!r})\n"
    path.write_text(head + textwrap.dedent(body) + _SERVED)
    return [sys.executable, str(path)]


def lying_program(folder: Path, lie: str) -> list[str]:
    """A driver with the answers of the reference, except for one wrong behaviour.

    Args:
        lie: statements that may change ``got``, the right answer to ``words``, or the written files.
    """
    body = """
from sfp_conformance.own import OwnDriver, limits_of
from sfpformat.limits import DEFAULT_LIMITS
def answer(words):
    limits, words = limits_of(words, DEFAULT_LIMITS)
    got = OwnDriver("python", limits).answer(words)
LIE
    return got
"""
    return program(folder, body.replace("LIE", textwrap.indent(textwrap.dedent(lie).strip("\n"), "    ")))
