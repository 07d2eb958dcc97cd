"""Converts keys to bytes (SPEC.md R-KEY-014)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from ..coding.keyed.hashing import Keys
from ..engines import Engine
from ..errors import OptionError
from ..names import quoted

Key = str | bytes
# Several keys: strings or bytes in any iterable, or an array of dtype S, U, T or object; or packed keys.
ManyKeys = Keys | Iterable[Key] | NDArray[Any]


def is_one(keys: object) -> TypeGuard[Key]:
    """Returns whether the argument is one key, not several."""
    return isinstance(keys, (str, bytes))


def packed(keys: ManyKeys | Key) -> Keys:
    """Returns keys as bytes, one after another. Strings become UTF-8, without normalisation.

    Args:
        keys: one key or several. A numpy array of fixed-size strings gives them as numpy does: without zeros
            at their ends.

    Raises:
        OptionError: a key is neither a string nor bytes, or a string has a lone surrogate; packed keys have
            offsets that do not ascend or do not fit their bytes.
    """
    if isinstance(keys, Keys):
        return _checked(keys)
    if is_one(keys):
        keys = [keys]
    given = keys.reshape(-1).tolist() if isinstance(keys, np.ndarray) else list(keys)
    try:
        if all(map(str.__instancecheck__, given)):
            joined = "".join(given)
            if joined.isascii():
                return Keys(_bytes_of(joined.encode()), _offsets(map(len, given), len(given)))
        encoded = [key.encode() if isinstance(key, str) else bytes(memoryview(key)) for key in given]
    except (TypeError, UnicodeEncodeError) as error:
        raise OptionError(f"a key is not a string or bytes: {error}") from None
    return Keys(_bytes_of(b"".join(encoded)), _offsets(map(len, encoded), len(encoded)))


def _bytes_of(data: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8)


def _offsets(sizes: Iterable[int], count: int) -> NDArray[np.int64]:
    out = np.zeros(count + 1, np.int64)
    np.cumsum(np.fromiter(sizes, np.int64, count), out=out[1:])
    return out


def _checked(keys: Keys) -> Keys:
    data, offsets = np.ascontiguousarray(keys.data, np.uint8), np.ascontiguousarray(keys.offsets, np.int64)
    whole = len(offsets) and offsets[0] == 0 and offsets[-1] == len(data) and (np.diff(offsets) >= 0).all()
    if not whole:
        raise OptionError("the offsets of packed keys must ascend from 0 to the number of bytes")
    return Keys(data, offsets)


def selected(keys: Keys, chosen: NDArray[np.int64]) -> Keys:
    """Returns some of the keys, given by their numbers."""
    starts, sizes = keys.offsets[:-1][chosen], np.diff(keys.offsets)[chosen]
    ends = np.concatenate((np.zeros(1, np.int64), np.cumsum(sizes)))
    places = np.arange(ends[-1]) + np.repeat(starts - ends[:-1], sizes)
    return Keys(keys.data[places], ends)


def require_distinct(keys: Keys, engine: Engine) -> None:
    """Compares the hashes of all keys.

    Raises:
        OptionError: two keys are equal.
    """
    both = np.ascontiguousarray(engine.hash_keys(keys, 0)).view(np.uint64)
    order = np.lexsort((both[:, 1], both[:, 0]))
    same = (both[order][1:] == both[order][:-1]).all(axis=1)
    if same.any():
        at = int(np.flatnonzero(same)[0])
        first, second = sorted((int(order[at]), int(order[at + 1])))
        key = keys.data[keys.offsets[first] : keys.offsets[first + 1]].tobytes()
        raise OptionError(
            f"the key {quoted(key.decode(errors='replace'))} occurs twice, as number {first} and {second}"
        )
