"""Chapter 28: deltas, alone and with their base."""

from __future__ import annotations

from ..suite import Suite
from . import applied, maps, parts
from .building import base_of, delta, sample

__all__ = ["add", "base_of", "delta", "sample"]


def add(suite: Suite) -> None:
    """Adds the cases of this package to the suite."""
    maps.add(suite)
    applied.add(suite)
    parts.add(suite)
