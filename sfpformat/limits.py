"""The limits of a reader (SPEC.md chapter 19)."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import OptionError, fault

MAX_DEPTH = 200  # the directory is read by recursion, which Python bounds
MAX_RANK = 64  # numpy's


@dataclass(frozen=True)
class Limits:
    """What a file may claim before it is refused with ``E_LIMIT`` (R-LIM-002).

    Attributes:
        directory_bytes: length of the directory, in bytes.
        depth: maps and arrays inside one another in the directory, the root being 1; 200 at most.
        name_bytes: length of a tensor's name in UTF-8, in bytes.
        tensors: number of tensors.
        rank: number of dimensions of a tensor; 64 at most.
        tensor_bytes: size of one decoded tensor, in bytes.
        expansion: decoded bytes of a tensor over its bytes in the file, for tensors above
            ``expansion_floor`` decoded bytes.
    """

    directory_bytes: int = 1 << 26
    depth: int = 16
    name_bytes: int = 1024
    tensors: int = 1 << 20
    rank: int = 32
    tensor_bytes: int = 1 << 37
    expansion: int = 1 << 16
    expansion_floor: int = 1 << 28

    def __post_init__(self) -> None:
        if self.depth > MAX_DEPTH or self.rank > MAX_RANK:
            raise OptionError(f"depth can be raised to {MAX_DEPTH} at most, rank to {MAX_RANK}")

    def require(self, limit: str, value: int, offset: int | None = None) -> None:
        """Raises `LimitError` when ``value`` is above the limit of that name."""
        allowed: int = getattr(self, limit)
        if value > allowed:
            raise fault(
                "R-LIM-002",
                f"{limit} is {value:,}, above the limit of {allowed:,}; "
                f"pass limits=Limits({limit}=...) if you trust this file",
                offset=offset,
            )

    def require_tensor(self, decoded: int, stored: int, offset: int) -> None:
        """Checks a tensor's decoded and stored sizes, in bytes, before memory is given to it.

        Args:
            offset: of the directory, which claims them.
        """
        self.require("tensor_bytes", decoded, offset)
        if decoded > self.expansion_floor:
            self.require("expansion", -(-decoded // max(stored, 1)), offset)


DEFAULT_LIMITS = Limits()
