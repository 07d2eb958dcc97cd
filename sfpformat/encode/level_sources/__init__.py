"""Sources of fingerprint levels, one module for each quantiser kind.

A new lossy kind needs a module here with a subclass of `NumberSource`, and an entry in `KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...coding.mask import Mask
from ...coding.quantisers import Table, Uniform
from . import table, uniform
from .base import Flat, Source, Survives
from .exact import ExactSource
from .lossy import LossyTensor, NumberSource, sampled_survivors
from .value_table import MAX_DISTINCT, ValueSource, may_be_values, value_source

__all__ = [
    "KINDS",
    "MAX_DISTINCT",
    "ExactSource",
    "Flat",
    "Kind",
    "LossyTensor",
    "NumberSource",
    "Source",
    "Survives",
    "ValueSource",
    "may_be_values",
    "sampled_survivors",
    "value_source",
]


def _no_bits(asked: Any, flat: Flat, mask: Mask | None) -> int:
    return 0


def _not_reached(asked: Any) -> str:
    return "the quantiser does not reach its target; use lossless"


@dataclass(frozen=True)
class Kind:
    """What the encoder needs of a lossy quantiser kind.

    Attributes:
        source: returns the `NumberSource` of a `LossyTensor` and the caller's quantiser. None if the target
            of the quantiser cannot be reached.
        greatest_errors: returns the greatest error of each weight; the arguments are those of
            `uniform.greatest_errors`.
        allowed_bits: returns how many bits the caller allows for mask and levels of a tensor, given the
            caller's quantiser, the flat tensor and its mask; 0 if the quantiser sets no number of bits.
        why_none: returns the message for a tensor of which `source` returned None.
    """

    source: Callable[..., NumberSource | None]
    greatest_errors: Callable[..., NDArray[np.float64]]
    allowed_bits: Callable[..., int] = _no_bits
    why_none: Callable[..., str] = _not_reached


# Name of the kind (R-QNT-001) -> kind.
KINDS: dict[str, Kind] = {
    Uniform.NAME: Kind(uniform.source, uniform.greatest_errors, uniform.allowed_bits, uniform.why_none),
    Table.NAME: Kind(table.source, table.greatest_errors),
}
