"""Files for a fuzzer, from choices: valid ones, and those with damage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .choices import Choices
from .damage import damaged
from .forge import Forge
from .generate import any_file


@dataclass(frozen=True)
class Example:
    """A file that was made.

    Attributes:
        data: its bytes.
        twin: those before it was damaged; the same for a valid file.
        words: what was done to it; empty for a valid file.
    """

    data: bytes
    twin: bytes
    words: str


def example(choices: Choices, golden: Sequence[bytes] = (), *, valid: bool | None = None) -> Example:
    """A file from choices.

    Args:
        golden: valid files that may be taken as well as new ones, small ones first.
        valid: whether it is; None for either, one in sixteen valid.
    """
    file = Forge.of(choices.pick(golden)) if golden and choices.below(2) else any_file(choices)
    twin = file.build()
    if valid or (valid is None and choices.below(16) == 0):
        return Example(twin, twin, "")
    data, words = damaged(file, choices)
    return Example(data, twin, words)
