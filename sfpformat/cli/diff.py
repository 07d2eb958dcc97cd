"""``sfp diff``: compares two models tensor by tensor."""

from __future__ import annotations

import argparse
import math
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..dtypes import of_numpy
from ..errors import MOST_NAME, shortened
from .console import number, percent, printable, progress, show_json, show_table
from .delta_files import Result, is_delta, open_result
from .limit_option import add_limits, limits_of
from .model_files import Model, add_strict_index, open_model
from .parser import Parser, Subparsers, examples

_BLOCK = 1 << 20
# Maximum number of rows and names shown without --all; further ones are counted.
_MOST_ROWS = 200
_HEADER = ("tensor", "A", "B", "max error", "error dB", "zero in A", "zero in B", "zeros differ")

_DESCRIPTION = """Compares the tensors of two models. Each model is an .sfp or safetensors file, an index of
shards, or a folder. B can also be a delta of A; its result is then compared. Metadata are not compared.

For each tensor that differs, the table shows the greatest absolute error, the error in dB (10 log10 of the
mean squared error over the mean square of A), the share of zeros in A and in B, and the number of positions
that are zero in only one of them. The exit code is 0 if all tensors are identical bit for bit, else 1."""


def add_parser(subparsers: Subparsers[Parser]) -> Parser:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "diff",
        help="compare two files tensor by tensor",
        description=_DESCRIPTION,
        epilog=examples(
            ("sfp diff model.safetensors model.sfp", "show the changes by packing"),
            ("sfp diff step-17.safetensors step-18.sfp", "show what a delta changes"),
            ("sfp diff a.sfp b.sfp --all", "list identical tensors, too"),
            ("sfp diff a.sfp b.sfp --json", "print JSON"),
        ),
    )
    parser.add_argument("a", metavar="A", help="the original model")
    parser.add_argument("b", metavar="B", help="the changed model")
    parser.add_argument("--all", action="store_true", help="list identical tensors, too")
    parser.add_argument("--json", action="store_true", help="print JSON, with all tensors")
    add_strict_index(parser)
    add_limits(parser)
    return parser


@dataclass
class Difference:
    """The differences between a tensor of A and the same tensor of B.

    Attributes:
        name: the tensor's name.
        a, b: description of dtype and shape in A and in B.
        is_float: whether both are float; the figures over all tensors include only these.
        identical: whether dtype, shape and all bits are equal.
        max_error: greatest absolute difference, exact for integers; None if it is not finite, or if the
            shapes differ.
        error_sum, square_sum: sum of squared errors, and sum of the squares of A.
        zeros_a, zeros_b: share of positions that are zero.
        zeros_differ: number of positions that are zero in only one of them; None if the shapes differ.
    """

    name: str
    a: str
    b: str
    is_float: bool = False
    identical: bool = False
    max_error: float | None = None
    error_sum: float = math.nan
    square_sum: float = math.nan
    zeros_a: float | None = None
    zeros_b: float | None = None
    zeros_differ: int | None = None

    @property
    def error_db(self) -> float | None:
        """The error against A, in dB; None if it is zero or not finite."""
        return _db(self.error_sum, self.square_sum)

    def to_json(self) -> dict[str, object]:
        """Returns the figures as JSON values."""
        return {
            "name": self.name,
            "a": self.a,
            "b": self.b,
            "identical": self.identical,
            "max_error": self.max_error,
            "error_db": self.error_db,
            "zeros_a": self.zeros_a,
            "zeros_b": self.zeros_b,
            "zeros_differ": self.zeros_differ,
        }


def _db(error: float, square: float) -> float | None:
    if not (0 < error < math.inf and 0 < square < math.inf):
        return None
    return 10 * math.log10(error / square)


def compare(name: str, a: NDArray[np.generic], b: NDArray[np.generic]) -> Difference:
    """Compares two contiguous arrays of any dtype of the format, block by block.

    Integers are compared exactly. Two NaNs have no difference, but ``identical`` compares their bits.
    """
    out = Difference(name, _dtype_and_shape(a), _dtype_and_shape(b), _is_float(a) and _is_float(b))
    if a.shape != b.shape:
        return out
    flat_a, flat_b = a.reshape(-1), b.reshape(-1)
    out.identical = a.dtype == b.dtype
    errors_of = _integer_errors if _is_integer(a) and _is_integer(b) else _errors
    out.error_sum = out.square_sum = 0.0
    greatest: float = 0
    zeros_a, zeros_b, zeros_differ = 0, 0, 0
    for start in range(0, flat_a.size, _BLOCK):
        block_a, block_b = flat_a[start : start + _BLOCK], flat_b[start : start + _BLOCK]
        if out.identical:
            out.identical = np.array_equal(block_a.view(np.uint8), block_b.view(np.uint8))
        errors, most = errors_of(block_a, block_b)
        greatest = max(greatest, most)
        with np.errstate(all="ignore"):
            out.square_sum += float(np.square(np.abs(_wide(block_a))).sum())
            out.error_sum += float(np.square(errors).sum())
        zero_a, zero_b = _is_zero(block_a), _is_zero(block_b)
        zeros_a += int(np.count_nonzero(zero_a))
        zeros_b += int(np.count_nonzero(zero_b))
        zeros_differ += int(np.count_nonzero(zero_a != zero_b))
    out.max_error = greatest if greatest < math.inf else None
    if flat_a.size:
        out.zeros_a, out.zeros_b = zeros_a / flat_a.size, zeros_b / flat_a.size
    out.zeros_differ = zeros_differ
    return out


def _errors(a: NDArray[np.generic], b: NDArray[np.generic]) -> tuple[NDArray[np.floating], float]:
    """Returns the absolute differences (infinity if only one is a NaN), and the greatest of them.

    Computes in the widest float of the machine if one array has 64-bit integers, and else in float64.
    """
    long = any(_is_integer(array) and array.dtype.itemsize == 8 for array in (a, b))
    wide_a, wide_b = (_wide(array, np.longdouble if long else np.float64) for array in (a, b))
    with np.errstate(all="ignore"):
        errors = np.abs(wide_a - wide_b)
        errors[(wide_a == wide_b) | (np.isnan(wide_a) & np.isnan(wide_b))] = 0
        errors[np.isnan(errors)] = np.inf
    return errors, float(errors.max(initial=0))


def _integer_errors(a: NDArray[np.generic], b: NDArray[np.generic]) -> tuple[NDArray[np.floating], int]:
    """Returns the absolute differences of integers, float64, and the exact greatest difference."""
    if np.uint64 not in (a.dtype, b.dtype):
        whole_a, whole_b = a.astype(np.int64), b.astype(np.int64)
    elif all(array.dtype.kind != "i" for array in (a, b)):
        whole_a, whole_b = a.astype(np.uint64), b.astype(np.uint64)
    else:  # no dtype holds all values of both
        exact = np.abs(a.astype(object) - b.astype(object))
        return exact.astype(np.float64), int(exact.max(initial=0))
    # The difference of two 64-bit integers fits in an unsigned 64-bit integer, computed modulo 2^64.
    exact = np.maximum(whole_a, whole_b).view(np.uint64) - np.minimum(whole_a, whole_b).view(np.uint64)
    return exact.astype(np.float64), int(exact.max(initial=0))


def _wide(block: NDArray[np.generic], real: type[np.floating] = np.float64) -> NDArray[np.inexact]:
    return block.astype(np.result_type(real, np.complex128) if block.dtype.kind == "c" else real)


def _is_zero(block: NDArray[np.generic]) -> NDArray[np.bool_]:
    return np.asarray((block if _is_integer(block) else _wide(block)) == 0, np.bool_)


def _is_integer(array: NDArray[np.generic]) -> bool:
    return array.dtype.kind in "biu"


def _is_float(array: NDArray[np.generic]) -> bool:
    dtype = of_numpy(array.dtype)
    return dtype is not None and dtype.is_float


def _dtype_and_shape(array: NDArray[np.generic]) -> str:
    dtype = of_numpy(array.dtype)
    return f"{dtype.name if dtype else array.dtype} {'×'.join(map(str, array.shape))}".strip()


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand. Returns the exit code."""
    strict, limits = args.strict_index, limits_of(args.limit)
    with ExitStack() as stack:
        a = stack.enter_context(open_model(args.a, strict_index=strict, limits=limits))
        given = stack.enter_context(open_model(args.b, strict_index=strict, deltas=True, limits=limits))
        b: Model | Result = given
        if is_delta(given):
            path = str(given.path)
            b = Result(a, stack.enter_context(open_result(a, [path], limits)), path, limits)
        common = [name for name in a.specs if name in b.specs]
        only_a = [name for name in a.specs if name not in b.specs]
        only_b = [name for name in b.specs if name not in a.specs]
        differences = []
        size = sum(a.specs[name].nbytes for name in common)
        with a.ahead(common), given.ahead(common if b is given else ()), progress(size, "compare") as shown:
            for name in common:
                shown.at(name)
                differences.append(_compare_tensor(name, a, b))
                shown.advance(a.specs[name].nbytes)
    same = not only_a and not only_b and all(d.identical for d in differences)
    if args.json:
        show_json(_as_json(differences, only_a, only_b, same))
    else:
        _show(differences, only_a, only_b, args.all)
    return 0 if same else 1


def _compare_tensor(name: str, a: Model, b: Model | Result) -> Difference:
    found = compare(name, a.read(name), b.read(name))
    if a.specs[name].sub_byte != b.specs[name].sub_byte:  # equal bytes of different dtypes
        found.a, found.b, found.identical = a.specs[name].words, b.specs[name].words, False
    return found


def _overall(differences: list[Difference]) -> dict[str, float | None]:
    alike = [d for d in differences if d.zeros_differ is not None and d.is_float]
    errors = [d.max_error for d in alike]
    greatest = None if None in errors else max((e for e in errors if e is not None), default=None)
    return {
        "max_error": greatest,
        "error_db": _db(sum(d.error_sum for d in alike), sum(d.square_sum for d in alike)),
    }


def _as_json(
    differences: list[Difference], only_a: list[str], only_b: list[str], same: bool
) -> dict[str, object]:
    return {
        "identical": same,
        "tensors": [d.to_json() for d in differences],
        "only_a": only_a,
        "only_b": only_b,
        **_overall(differences),
    }


def _show(differences: list[Difference], only_a: list[str], only_b: list[str], everything: bool) -> None:
    listed = [d for d in differences if everything or not d.identical]
    shown = listed if everything else listed[:_MOST_ROWS]
    if shown:
        show_table(_HEADER, [_row(d) for d in shown], 3)
    if len(listed) > len(shown):
        print(f"{len(listed) - len(shown):,} more tensors differ; --all lists them")
    for word, names in (("A", only_a), ("B", only_b)):
        for name in names if everything else names[:_MOST_ROWS]:
            print(f"only in {word}: {printable(shortened(name, MOST_NAME))}")
        if len(names) > _MOST_ROWS and not everything:
            print(f"only in {word}: {len(names) - _MOST_ROWS:,} more; --all lists them")
    equal = sum(d.identical for d in differences)
    print(f"{equal} of {len(differences)} tensors identical", end="")
    print(f", {len(only_a)} only in A, {len(only_b)} only in B" if only_a or only_b else "", end="")
    if equal < len(differences):
        overall = _overall(differences)
        greatest = "–" if overall["max_error"] is None else f"{overall['max_error']:.3g}"
        print(f"; greatest error {greatest}, {number(overall['error_db'], 2, ' dB')} over all", end="")
    print()


def _row(d: Difference) -> list[str]:
    if d.identical:
        error, db = "identical", ""
    elif d.zeros_differ is None:
        error, db = "shapes differ", ""
    else:
        error = _error_text(d)
        db = number(d.error_db)
    differ = "–" if d.zeros_differ is None else f"{d.zeros_differ:,}"
    return [shortened(d.name, MOST_NAME), d.a, d.b, error, db, percent(d.zeros_a), percent(d.zeros_b), differ]


def _error_text(d: Difference) -> str:
    if d.max_error is None:
        return "not finite"
    if not d.max_error:  # other dtypes, signs of zeros, or payloads of NaNs
        return "0, bits differ"
    return f"{d.max_error:,}" if isinstance(d.max_error, int) else f"{d.max_error:.3g}"
