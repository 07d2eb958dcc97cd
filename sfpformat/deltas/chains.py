"""Chains of deltas: each one's base is the result of the one before."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import OptionError
from ..io.source import Readable
from ..limits import DEFAULT_LIMITS, Limits
from .result import DeltaFile
from .tensors import Source

# The most deltas of a chain: each holds a file open and needs memory for a few tensors.
MAX_CHAIN = 256


def open_chain(
    base: Source,
    deltas: Sequence[Readable],
    *,
    limits: Limits = DEFAULT_LIMITS,
    engine: str | None = None,
    threads: int | None = None,
) -> DeltaFile:
    """Opens the result of several deltas, each of which has the result of the one before as its base.

    Args:
        base: the base of the first delta, as for `write_delta`.
        deltas: one to 256 deltas, in order.
        limits, engine, threads: same as for `sfpformat.open`.

    Raises:
        BaseMismatchError: the deltas are out of order, or the first was made from another base.
        OptionError: there is no delta, or there are too many; use fewer, or squash them.
        InvalidFileError, UnsupportedError, LimitError, OSError: as in `sfpformat.open`.
    """
    if not 1 <= len(deltas) <= MAX_CHAIN:
        raise OptionError(f"a chain of {len(deltas)} deltas; give 1 to {MAX_CHAIN}, or squash them")
    found: DeltaFile | None = None
    try:
        for readable in deltas:
            under = found
            found = DeltaFile(
                readable, base if under is None else under, limits=limits, engine=engine, threads=threads
            )
            if under is not None:
                found.on_close(under.close)
    except BaseException:
        if found is not None:
            found.close()
        raise
    assert found is not None
    return found
