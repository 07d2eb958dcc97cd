"""Tests that need a program other than Python."""

from __future__ import annotations

import os
import shutil

import pytest


def needs(*programs: str) -> pytest.MarkDecorator:
    """Skips a test if a program is missing, and names the program. In CI the test runs and fails."""
    missing = [program for program in programs if shutil.which(program) is None]
    is_optional = os.environ.get("CI") != "true"
    return pytest.mark.skipif(bool(missing) and is_optional, reason=f"needs {', '.join(missing)}")
