"""The limits of a reader (SPEC.md chapter 19)."""

from __future__ import annotations

from dataclasses import dataclass, fields

from .errors import OptionError, fault

MAX_DEPTH = 200  # the parser of the directory is recursive, and Python limits recursion
MAX_RANK = 64  # numpy's


@dataclass(frozen=True)
class Limits:
    """The limits of a reader, which refuses files that exceed one with ``E_LIMIT`` (R-LIM-002).

    ``sfpformat.open("model.sfp", limits=Limits(tensor_bytes=1 << 40))``

    Attributes:
        directory_bytes: length of the directory, in bytes.
        depth: nesting depth of maps and arrays in the directory, with 1 for the root; at most 200.
        name_bytes: length of a tensor's name in UTF-8, in bytes.
        tensors: number of tensors.
        rank: number of dimensions of a tensor; at most 64.
        tensor_bytes: size of one decoded tensor, in bytes.
        expansion: ratio of a tensor's decoded bytes to its bytes in the file. Applies to tensors of more than
            ``expansion_floor`` decoded bytes.
        expansion_floor: size up to which ``expansion`` does not apply, in decoded bytes.

    Raises:
        OptionError: a limit is not a whole number of at least 0, or ``depth`` or ``rank`` is too large.
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
        for field in fields(self):
            value = getattr(self, field.name)
            if not hasattr(value, "__index__") or isinstance(value, bool) or value < 0:
                raise OptionError(
                    f"the limit {field.name} is {value!r}, must be a whole number of at least 0"
                )
        if self.depth > MAX_DEPTH or self.rank > MAX_RANK:
            raise OptionError(
                f"depth is {self.depth} and rank {self.rank}, must be at most {MAX_DEPTH} and {MAX_RANK}"
            )

    def require(self, limit: str, value: int, offset: int | None = None) -> None:
        """Checks a value of a file.

        Args:
            limit: the name of a limit.
            value: the value in the file.
            offset: the byte offset of the value, or None.

        Raises:
            LimitError: the value is above the limit.
        """
        allowed: int = getattr(self, limit)
        if value > allowed:
            raise fault(
                "R-LIM-002",
                f"{limit} is {value:,}, above the limit of {allowed:,}; "
                f"pass limits=Limits({limit}=...), or --limit {limit}=... to sfp, if you trust this file",
                offset=offset,
            )

    def require_tensor(self, decoded: int, stored: int, offset: int) -> None:
        """Checks the sizes of a tensor, before memory is allocated for it.

        Args:
            decoded: size of the decoded tensor, in bytes.
            stored: size of its chunks, in bytes.
            offset: byte offset of the directory, which contains the sizes.

        Raises:
            LimitError: a size is above a limit.
        """
        self.require("tensor_bytes", decoded, offset)
        if decoded > self.expansion_floor:
            self.require("expansion", -(-decoded // max(stored, 1)), offset)

    def require_written(self, limit: str, value: int, what: str) -> None:
        """Checks that readers with these limits will accept a file to be written (R-LIM-001).

        Args:
            limit: the name of a limit.
            value: the value in the file.
            what: the object that has the value, for the message.

        Raises:
            OptionError: the value is above the limit.
        """
        allowed: int = getattr(self, limit)
        if value > allowed:
            raise OptionError(
                f"{what}: {limit} would be {value:,}, but readers accept at most {allowed:,}; "
                f"{_INSTEAD[limit]}, or pass limits=Limits({limit}={value}) to the writer and to readers "
                f"(--limit {limit}={value} to sfp)"
            )

    def require_written_tensor(self, decoded: int, stored: int, what: str) -> None:
        """Calls `require_written` for the decoded and the stored size of a tensor, in bytes.

        Raises:
            OptionError: a size is above a limit.
        """
        self.require_written("tensor_bytes", decoded, what)
        if decoded > self.expansion_floor:
            self.require_written("expansion", -(-decoded // max(stored, 1)), what)


# Limit -> how to stay within it.
_INSTEAD = {
    "directory_bytes": "write several files, or larger chunks",
    "depth": "remove nested keys from the entry",
    "name_bytes": "shorten the name",
    "tensors": "write several files",
    "rank": "reshape it",
    "tensor_bytes": "write it in parts",
    "expansion": "use smaller chunks or segments",
}

DEFAULT_LIMITS = Limits()
