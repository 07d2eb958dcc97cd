"""Checks of the values of options."""

from __future__ import annotations

from dataclasses import fields
from numbers import Real
from typing import TYPE_CHECKING, Any

from ..errors import OptionError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raises `OptionError` if a value is not one of the allowed ones."""
    if value not in allowed:
        raise OptionError(f"{name} is {value!r}, must be one of {', '.join(map(str, allowed))}")


def is_number(value: object) -> bool:
    """Returns whether a value is a real number; bool does not count."""
    return isinstance(value, Real) and not isinstance(value, bool)


def in_range(name: str, value: object, low: float, high: float) -> None:
    """Raises `OptionError` if a value is not a number from ``low`` to ``high``."""
    if not (isinstance(value, Real) and is_number(value)) or not low <= float(value) <= high:
        raise OptionError(f"{name} is {value!r}, must be from {low} to {high}")


def whole(name: str, value: Any, low: int, high: int) -> None:
    """Raises `OptionError` if a value is not a whole number from ``low`` to ``high``."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or not low <= value <= high:
        raise OptionError(f"{name} is {value!r}, must be a whole number from {low} to {high}")


def use_plain_numbers(options: DataclassInstance) -> None:
    """Converts numpy numbers in the fields to Python numbers, which the directory can store."""
    for field in fields(options):
        value = getattr(options, field.name)
        if isinstance(value, Real) and hasattr(value, "item"):
            object.__setattr__(options, field.name, value.item())
