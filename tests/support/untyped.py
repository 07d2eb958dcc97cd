"""Calls that a type checker refuses: wrong arguments on purpose, or calls that a library's types lack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def untyped(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function or class itself, without the types of its arguments."""
    return function
