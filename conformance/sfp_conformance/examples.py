"""Example files for a fuzzer, generated from choices: valid and damaged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .choices import Choices
from .damage import damaged
from .forge import Forge
from .generate import any_file


@dataclass(frozen=True)
class Example:
    """A generated file.

    Attributes:
        data: its bytes.
        twin: its bytes before the damage; equal to ``data`` for a valid file.
        words: the description of the damage; empty for a valid file.
    """

    data: bytes
    twin: bytes
    words: str


def example(choices: Choices, golden: Sequence[bytes] = (), *, valid: bool | None = None) -> Example:
    """Generates a file from choices.

    Args:
        golden: valid files, small ones first; half of the examples start from one of them.
        valid: whether the file is valid; None for either, one in sixteen valid.
    """
    file = Forge.of(choices.pick(golden)) if golden and choices.below(2) else any_file(choices)
    twin = file.build()
    if valid or (valid is None and choices.below(16) == 0):
        return Example(twin, twin, "")
    data, words = damaged(file, choices)
    return Example(data, twin, words)
