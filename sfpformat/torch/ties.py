"""Tied tensors: one tensor of a model with several names, any of which is valid in an argument."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import fields, is_dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import numpy as np
import torch

from ..errors import OptionError
from ..names import checked_by_name, require_known
from .loading import groups_of

T = TypeVar("T")


class TiedNames:
    """The names of a model's tensors, grouped by tensor: all names of a tied tensor are equivalent."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Groups the names by tensor.

        Args:
            tensors: name -> tensor; a tied tensor is present under each of its names.
        """
        self._groups = {name: group for group in groups_of(tensors) for name in group}

    def kept(self, name: str) -> str:
        """Returns the name under which `save_model` writes a tensor: the first in alphabetical order."""
        return min(self._groups[name])

    def names_of(self, name: str) -> list[str]:
        """Returns all names of a tensor."""
        return self._groups[name]

    def like(self, pattern: str) -> set[str]:
        """Returns all names of the tensors that have a name that matches a shell-style pattern."""
        return {
            name
            for name, group in self._groups.items()
            if any(fnmatchcase(other, pattern) for other in group)
        }

    def once(self, names: Iterable[str]) -> list[str]:
        """Returns the names without those whose tensor has an earlier name in the list.

        Raises:
            OptionError: a name is unknown.
        """
        names = list(names)
        require_known(names, self._groups)
        first: dict[str, str] = {}
        for name in names:
            first.setdefault(self.kept(name), name)
        return list(first.values())

    def one_each(self, given: Mapping[str, T] | None, argument: str) -> dict[str, T]:
        """Returns the given values, one for each tensor, under the first of its names in ``given``.

        Args:
            given: values by name; None is empty.
            argument: name of the caller's argument, for errors.

        Raises:
            OptionError: ``given`` is not a mapping, a name is unknown, or two names of one tensor have
                different values.
        """
        out: dict[str, T] = {}
        used: dict[str, str] = {}
        for name, value in checked_by_name(given, self._groups, argument).items():
            first = used.setdefault(self.kept(name), name)
            if first == name:
                out[name] = value
            elif not _same(out[first], value):
                raise OptionError(
                    f"{argument}: {first!r} and {name!r} are the same tensor, but "
                    "their values differ; give one"
                )
        return out

    def by_kept(self, given: Mapping[str, T] | None, argument: str) -> dict[str, T]:
        """Returns the same values as `one_each`, under the names that `save_model` writes."""
        return {self.kept(name): value for name, value in self.one_each(given, argument).items()}


def aliases_in(metadata: Mapping[str, str], names: Container[str]) -> dict[str, str]:
    """Returns the other names of tied tensors from the metadata of a file: other name -> kept name."""
    return {name: kept for name, kept in metadata.items() if kept in names and name not in names}


def _same(one: Any, other: Any) -> bool:
    """Returns whether two values are equal; tensors and arrays are compared by element."""
    if one is other:
        return True
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if is_dataclass(one) and type(one) is type(other):
        return all(_same(getattr(one, field.name), getattr(other, field.name)) for field in fields(one))
    if isinstance(one, (torch.Tensor, np.ndarray)) or isinstance(other, (torch.Tensor, np.ndarray)):
        return np.array_equal(_numbers(one), _numbers(other))
    return bool(one == other)


def _numbers(values: Any) -> Any:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        # float64 holds the numbers of all float dtypes, some of which numpy does not have.
        return (values.double() if values.is_floating_point() else values).numpy()
    return np.asarray(values)
