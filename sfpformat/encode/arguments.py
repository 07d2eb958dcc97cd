"""Checks the arguments of a writer before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..coding.mask import Mask
from ..container import messagepack
from ..errors import FileFault, OptionError
from ..limits import DEFAULT_LIMITS, Limits
from ..names import quoted, require_mapping
from .planner import Importance


class Given(NamedTuple):
    """The arrays of a tensor to write; the attributes are the arguments of `Writer.add`."""

    array: NDArray[np.generic]
    mask: Mask | None = None
    importance: Importance | None = None


def require_name(name: str, limits: Limits = DEFAULT_LIMITS) -> None:
    """Checks that a value is a valid tensor name (R-TEN-002, R-MSG-003, R-LIM-001).

    Raises:
        OptionError: the name is not a string, is empty, contains U+0000 or lone surrogates, or is too long.
    """
    if not isinstance(name, str):
        raise OptionError(f"{name!r} cannot be a tensor's name: it is a {type(name).__name__}, not a string")
    if not name:
        raise OptionError("a tensor has an empty name, which .sfp does not allow; rename it")
    if not is_text(name):
        raise OptionError(
            f"{quoted(name)} cannot be a tensor's name: names are UTF-8 without U+0000; rename it"
        )
    limits.require_written("name_bytes", len(name.encode()), f"tensor {quoted(name)}")


def checked_keys(name: str, other: Mapping[str, object] | None, limits: Limits) -> dict[str, object]:
    """Checks the additional keys of an entry, and returns a copy. None: there are none.

    Raises:
        OptionError: a name does not begin with ``x-``, or a value has a type that the directory does not
            support or is nested too deep.
    """
    if other is None:
        return {}
    require_mapping(other, f"extra keys of {quoted(name)}")
    keys = dict(other)
    if not keys:
        return keys
    for key in keys:
        if not isinstance(key, str) or not key.startswith("x-"):
            raise OptionError(f"tensor {quoted(name)}: the key {quoted(key)} does not begin with 'x-'")
    try:
        as_deep_as_an_entry: dict[str, object] = {"": {"": keys}}
        messagepack.decode(messagepack.encode(as_deep_as_an_entry), limits)
    except (FileFault, TypeError, ValueError, OverflowError) as error:
        detail = error.detail if isinstance(error, FileFault) else error
        raise OptionError(f"tensor {quoted(name)}: extra keys cannot be written: {detail}") from None
    return keys


def require_arrays(name: str, mask: object, importance: object) -> None:
    """Checks the types of a mask and an importance.

    Raises:
        OptionError: one is not an array, or an importance is a tuple that does not have two vectors.
    """
    if not (mask is None or isinstance(mask, np.ndarray)):
        raise OptionError(f"the mask of {name!r} is a {type(mask).__name__}, not an array")
    if isinstance(importance, tuple) and len(importance) != 2:
        raise OptionError(
            f"the importance of {name!r} is a tuple of {len(importance)}, not of rows and columns"
        )
    for vector in importance if isinstance(importance, tuple) else (importance,):
        if not (importance is None or isinstance(vector, np.ndarray)):
            raise OptionError(f"the importance of {name!r} is a {type(vector).__name__}, not an array")


def checked_metadata(metadata: dict[str, str]) -> dict[str, str]:
    """Returns a copy of the metadata of a file.

    Raises:
        OptionError: it is no mapping, or has keys or values that are not strings of the directory.
    """
    require_mapping(metadata, "metadata")
    for key, value in metadata.items():
        if not (isinstance(key, str) and isinstance(value, str) and is_text(key + value)):
            raise OptionError(
                f"metadata {key!r}: {value!r}: keys and values must be strings of UTF-8 without U+0000"
            )
    return dict(metadata)


def is_text(text: str) -> bool:
    """Returns whether the directory can store a string: valid UTF-8 without U+0000 (R-MSG-003)."""
    try:
        return "\0" not in text and bool(text.encode() or True)
    except UnicodeEncodeError:
        return False
