"""The golden files reach every branch of the pure-Python reader, except those with a stated reason."""

from __future__ import annotations

import subprocess
import sys

from ..support.clauses import ROOT


def test_every_branch_of_the_reader_is_taken_by_golden_files_or_excused() -> None:
    words = [sys.executable, "-m", "tests.support.reader_coverage"]  # alone: nothing may be imported before
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
