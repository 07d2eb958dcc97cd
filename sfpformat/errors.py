"""The errors of this package (SPEC.md chapter 20).

Rules: `fault` creates all errors of files, from the clause that the file breaks. One table maps the clause to
the error code, and the code determines the class of the exception. The inner code of the codec knows neither
the tensor nor the file offset; its offsets are relative to the bytes that it gets. The caller adds the tensor
and the base offset with `placed`.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from types import TracebackType

_PACKAGE = __name__.partition(".")[0]


# The greatest lengths of details and of names in messages, in characters. A file can have names of megabytes.
MOST_DETAIL, MOST_NAME = 400, 120


def shortened(text: str, most: int) -> str:
    """Returns a text shortened to ``most`` characters: its beginning, an ellipsis and its end."""
    return text if len(text) <= most else f"{text[: most // 2]}…{text[len(text) - (most - most // 2 - 1) :]}"


class SfpError(Exception):
    """Base class of all errors that this package defines."""


class SfpWarning(UserWarning):
    """An operation succeeded, but its result differs from the request, or it was slower."""


def warn(message: str) -> None:
    """Issues an `SfpWarning` with the location of the first caller outside this package."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals["__name__"].partition(".")[0] == _PACKAGE:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, SfpWarning, stacklevel=level)


class FileFault(SfpError):
    """A file breaks a requirement of SPEC.md. Always one of the four subclasses.

    Attributes:
        code: one of the error codes of SPEC.md chapter 20, such as ``E_CRC``.
        clause: the broken requirement, such as ``R-LAY-004``.
        detail: description of the fault, of any length; ``str()`` of the error shortens it.
        tensor: name of the tensor, or None.
        offset: byte offset in the file, or None if the fault has no single position.
    """

    def __init__(
        self, clause: str, detail: str, *, tensor: str | None = None, offset: int | None = None
    ) -> None:
        self.clause = clause
        self.code = CODE_OF_CLAUSE[clause]
        self.detail = detail
        self.tensor = tensor
        self.offset = offset
        super().__init__(clause, detail)

    def place(self, tensor: str | None, base: int | None) -> None:
        """Sets the tensor's name, if it is not set, and adds a base offset.

        Args:
            tensor: name of the tensor, or None.
            base: the file offset to which the fault's offset is relative, in bytes. It becomes the offset if
                the fault has none. None changes nothing.
        """
        if tensor is not None and self.tensor is None:
            self.tensor = tensor
        if base is not None:
            self.offset = base + (self.offset or 0)

    def __str__(self) -> str:
        where = []
        if self.tensor is not None:
            where.append(f"tensor {shortened(self.tensor, MOST_NAME)!r}")
        if self.offset is not None:
            where.append(f"byte {self.offset}")
        place = f" ({', '.join(where)})" if where else ""
        return f"{self.code} [{self.clause}] {shortened(self.detail, MOST_DETAIL)}{place}"


class InvalidFileError(FileFault):
    """The file is damaged, or its writer did not follow SPEC.md."""


class UnsupportedError(FileFault):
    """The file needs a version or a feature that this reader does not support."""


class LimitError(FileFault):
    """The file exceeds a limit of the reader. If you trust the file, pass higher `Limits`."""


class BaseMismatchError(FileFault):
    """A delta is applied to a base from which it was not made."""


class OptionError(SfpError, ValueError):
    """An argument is invalid, or does not fit the tensor."""


class UnknownPresetError(OptionError, KeyError):
    """No preset has this name."""

    def __str__(self) -> str:
        return str(self.args[0])


class MissingTensorError(SfpError, KeyError):
    """No tensor in the file has this name."""

    def __str__(self) -> str:
        return str(self.args[0])


class MismatchError(SfpError, RuntimeError):
    """The contents of a file do not match their destination: a module, an array, or a pickled file.

    Attributes:
        missing: names of the module that the file does not have.
        unexpected: names of the file that the module does not have.
    """

    def __init__(self, detail: str, missing: Sequence[str] = (), unexpected: Sequence[str] = ()) -> None:
        self.missing = tuple(missing)
        self.unexpected = tuple(unexpected)
        super().__init__(detail)


class LossError(SfpError, ArithmeticError):
    """A loss or a statistic of calibration data is not finite, so that training cannot continue."""


class ProcessError(SfpError, RuntimeError):
    """Another process of the same run failed, ended, or did not answer within the time limit of the group."""


class PartlyChangedError(SfpError, RuntimeError):
    """A delta was applied in part, and some tensors could not be restored.

    Attributes:
        tensors: names of these tensors. All others have the elements of the base.
    """

    def __init__(self, detail: str, tensors: Sequence[str]) -> None:
        self.tensors = tuple(tensors)
        super().__init__(detail)


class RemoteError(SfpError, OSError):
    """A server does not give the bytes of a file: it fails, ignores ranges, or the file has changed."""


class EngineError(SfpError, RuntimeError):
    """The requested engine is not available on this machine, or its device failed. The message says why."""


class ClosedFileError(SfpError, ValueError):
    """The file or writer is closed."""


# Clause -> error code, for every clause of SPEC.md that a reader enforces. The test
# `tests/format/test_spec.py` compares this table with SPEC.md.
CODE_OF_CLAUSE: dict[str, str] = {
    clause: code
    for code, clauses in {
        "E_MAGIC": "R-PRE-001",
        "E_VERSION": "R-PRE-004",
        "E_TRUNCATED": "R-PRE-002 R-PRE-007 R-MSG-007",
        "E_TRAILING": "R-PRE-008 R-MSG-006",
        "E_CRC": "R-PRE-003 R-PRE-010 R-LAY-004 R-DLT-012",
        "E_RESERVED": (
            "R-CNV-005 R-PRE-006 R-PLN-002 R-PLN-004 R-MSK-006 R-CHK-002 R-CHK-003 R-IDX-004 "
            "R-VEC-002 R-RAW-003 R-TAB-010"
        ),
        "E_ENCODING": (
            "R-MSG-001 R-MSG-002 R-MSG-003 R-MSG-004 R-MSG-005 R-DIR-001 R-DIR-002 R-DIR-003 "
            "R-DIR-004 R-DIR-007 R-TEN-001 R-FEA-002 R-DLT-002 R-KEY-003"
        ),
        "E_RANGE": (
            "R-TEN-002 R-TEN-005 R-TEN-006 R-TEN-007 R-TEN-010 R-TAB-001 R-TAB-002 R-TAB-003 "
            "R-TAB-004 R-TAB-005 R-TAB-006 R-TAB-007 R-TAB-008 R-TAB-009 R-TAB-011 R-TAB-012 "
            "R-PLN-005 R-MSK-002 R-MSK-004 R-QNT-002 R-QNT-003 R-QNT-004 R-QNT-005 R-QNT-006 "
            "R-QNT-007 R-QNT-008 R-SCL-002 R-SCL-003 R-SCL-004 R-SCL-006 R-IMP-003 R-IMP-004 "
            "R-IMP-005 R-IMP-006 R-IDX-001 R-IDX-002 R-IDX-005 R-IDX-006 R-RAW-004 R-SHD-002 "
            "R-DLT-003 R-DLT-004 R-DLT-005 R-DLT-011 R-DLT-016 R-DLT-019 "
            "R-DLT-020 R-KEY-002 R-KEY-004 R-KEY-005 R-KEY-006 R-KEY-007 R-KEY-009 R-KEY-010"
        ),
        "E_LAYOUT": (
            "R-PRE-009 R-PRE-011 R-LAY-002 R-LAY-003 R-TEN-008 R-TEN-012 R-PLN-003 "
            "R-MSK-005 R-CHK-001 R-IDX-003 R-VEC-001 R-RAW-002 R-SHD-001 "
            "R-DLT-001 R-DLT-006 R-DLT-007 R-DLT-008 R-DLT-010 R-DLT-017 R-DLT-018 "
            "R-KEY-011 R-KEY-012"
        ),
        "E_FEATURE": (
            "R-TEN-003 R-TEN-004 R-MSK-001 R-QNT-001 R-SCL-001 R-IMP-001 R-IMP-002 R-KEY-008 "
            "R-KEY-013 R-FEA-001 R-PRO-001"
        ),
        "E_LIMIT": "R-LIM-002",
        "E_BASE": "R-DLT-009",
    }.items()
    for clause in clauses.split()
}

_CLASS_OF_CODE: dict[str, type[FileFault]] = {
    "E_VERSION": UnsupportedError,
    "E_FEATURE": UnsupportedError,
    "E_LIMIT": LimitError,
    "E_BASE": BaseMismatchError,
}


def fault(clause: str, detail: str, *, tensor: str | None = None, offset: int | None = None) -> FileFault:
    """Returns the exception for a file that breaks a clause. The caller raises it.

    Args:
        clause: a key of `CODE_OF_CLAUSE`.
        detail: description of the fault.
        tensor: name of the tensor, or None.
        offset: byte offset; absolute, or relative if a caller adds the base with `placed`.
    """
    error_class = _CLASS_OF_CODE.get(CODE_OF_CLAUSE[clause], InvalidFileError)
    return error_class(clause, detail, tensor=tensor, offset=offset)


class placed:
    """Context manager that calls `FileFault.place` for a fault raised in its block."""

    __slots__ = ("_base", "_tensor")

    def __init__(self, *, tensor: str | None = None, base: int | None = None) -> None:
        self._tensor, self._base = tensor, base

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, FileFault):
            error.place(self._tensor, self._base)
