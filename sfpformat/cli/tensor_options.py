"""The options of ``sfp pack`` that apply to tensors and can follow ``--like``, and their parsing."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from ..dtypes import FACTOR_DTYPES
from ..encode.weights import MIN_ELEMENTS
from ..options import PRESETS, WEIGHTED, ZEROS
from ..pruning.thresholds import Pattern
from .errors import CommandError
from .parser import Parser
from .rules import Layer, Pruning

_LONGEST_PATTERN = 1024  # positions; groups of this size are sorted in memory
_OPTIONS = "tensor_options"  # the namespace's name for the options of this module


class _StoreTensorOption(argparse.Action):
    """Stores the value in ``namespace.tensor_options``, apart from the other options of the command."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        found = self.const if self.nargs == 0 else values
        setattr(namespace, _OPTIONS, {**getattr(namespace, _OPTIONS, {}), self.dest: found})


def add_tensor_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that can also follow ``--like``.

    The namespace has a dict ``tensor_options`` of those that the user gives.
    """
    parser.set_defaults(**{_OPTIONS: {}})
    value = parser.add_argument_group(
        "options that change values",
        "Without --like, these options apply to float tensors of rank 2 or more with at least\n"
        f"{MIN_ELEMENTS:,} elements, except: scales, zero points and storage of weights that are already\n"
        "quantised (GPTQ, AWQ, bitsandbytes, FP8 with scales, ...), buffers such as masks, biases,\n"
        "gains of normalisation layers, and tensors with infinities or NaNs. The exceptions stay\n"
        "lossless, and the summary lists them with the reason. --like GLOB applies options to them,\n"
        "too. Tensors of other dtypes never change.",
    )
    how = value.add_mutually_exclusive_group()
    _add(how, "--bits", float, "B", "uniform quantiser: about B bits per remaining weight")
    _add(how, "--budget", float, "B", "uniform quantiser: about B bits per position, with the mask")
    _add(how, "--step", float, "S", "uniform quantiser: multiples of S")
    _add(how, "--error-db", float, "D", "uniform quantiser: an error of at most D dB, such as -30")
    _add(how, "--table", int, "N", "table quantiser: N centroids for the magnitudes")
    _add(
        value,
        "--budget-scope",
        str,
        "SCOPE",
        "share the --budget among all tensors (model, the default), or give it to each (tensor)",
        ("tensor", "model"),
    )
    _add(
        value,
        "--weighted",
        str,
        "HOW",
        "weight errors by the --importance (full), or by its square root (root)",
        WEIGHTED,
    )
    how.add_argument(
        "--lossless",
        action=_StoreTensorOption,
        nargs=0,
        const=True,
        default=argparse.SUPPRESS,
        help="keep every bit (the default); after --like, cancels earlier options that change values",
    )
    _add(
        value,
        "--prune",
        _pruning,
        "P",
        "prune the fraction P with the smallest magnitudes, such as 0.5, or keep n of every m, such as 2:4",
    )
    _add(
        value,
        "--pattern-dim",
        _dimension,
        "D",
        "dimension of an n:m pattern (default: the inputs, which are the last dimension of a matrix, "
        "dimension 1 of a kernel)",
    )
    _add(
        value,
        "--scope",
        str,
        "SCOPE",
        "prune the fraction of each tensor (tensor, the default), or of all tensors together (model)",
        ("tensor", "model"),
    )
    _add(value, "--scale", _scale, "PER", "scale factors: per tensor, row, column, or group of N positions")
    _add(
        value,
        "--scale-dtype",
        str,
        "DTYPE",
        "dtype of scale factors: F16 (the default), BF16 or F32",
        FACTOR_DTYPES,
    )
    _add(
        value,
        "--rate-weight",
        float,
        "W",
        "weight of bits against error in rounding (0.12); 0 rounds to nearest",
    )
    _add(value, "--dtype", str, "DTYPE", "cast to F32, F16 or BF16 before encoding", FACTOR_DTYPES)
    coding = parser.add_argument_group(
        "options of the coding",
        "These options apply to all tensors. They change no values (+0 equals -0).",
    )
    _add(coding, "--zeros", str, "HOW", "keep -0 (keep, the default), or write it as +0 (positive)", ZEROS)
    _add(
        coding,
        "--preset",
        str,
        "NAME",
        f"default values of the other options: {', '.join(PRESETS)}",
        tuple(PRESETS),
    )
    _add(
        coding,
        "--mask",
        str,
        "KIND",
        "kind of mask: auto, none, runs or octets",
        ("auto", "none", "runs", "octets"),
    )
    _add(coding, "--group", int, "G", "levels per symbol: 1 or 2", (1, 2))
    _add(coding, "--segment", int, "S", "positions per segment, a multiple of 32")
    _add(coding, "--chunk", int, "N", "positions per chunk (262,144)")
    _add(coding, "--codes", int, "N", "maximum number of codes per stream, at most 16")
    _add(coding, "--code-limit", int, "L", "maximum length of prefix codes in bits, at most 12")
    _add(
        coding,
        "--window",
        int,
        "W",
        "symbols of W bits (1 to 4) instead of prefix codes, where most levels fit: faster, larger",
    )
    _add(
        coding,
        "--mantissa-bits",
        int,
        "M",
        "number of mantissa bits in the class of weights that are stored as bit patterns",
    )
    _add(
        coding,
        "--importance-bits",
        int,
        "B",
        "bits per importance stored from --importance (6); 0 stores none",
    )


def _add(
    group: Any, name: str, kind: Any, metavar: str, words: str, choices: Sequence[object] | None = None
) -> None:
    group.add_argument(
        name,
        action=_StoreTensorOption,
        type=kind,
        metavar=metavar,
        help=words,
        choices=choices,
        default=argparse.SUPPRESS,
    )


def _pruning(text: str) -> Pruning:
    """Parses ``0.5`` or ``2:4``."""
    with suppress(ValueError):
        if ":" in text:
            pattern = Pattern.parse(text)
            if pattern.of <= _LONGEST_PATTERN:
                return Pruning(keep=pattern.keep, of=pattern.of)
        elif 0 <= float(text) <= 1:
            return Pruning(float(text))
    raise argparse.ArgumentTypeError(f"{text!r} is neither a fraction from 0 to 1 nor a pattern such as 2:4")


def _dimension(text: str) -> int:
    if text.isdecimal():
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a dimension, a whole number of 0 or more")


def _scale(text: str) -> str | int:
    """Parses ``tensor``, ``row``, ``column`` or a number of positions."""
    if text in ("tensor", "row", "column"):
        return text
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is neither tensor, row, column nor a number of positions")


def parse_like(words: list[str]) -> tuple[str, Layer]:
    """Parses the words after one ``--like``. Returns the pattern and the options.

    Raises:
        CommandError: the pattern or the options are missing or invalid.
    """
    if not words or words[0].startswith("--"):
        raise CommandError("--like needs a pattern of tensor names, such as '*embed*'")
    parser = Parser(prog="sfp pack", add_help=False)
    add_tensor_options(parser)
    args, rest = parser.parse_known_args(words[1:])
    if rest:
        raise CommandError(
            f"{rest[0]!r} after --like {words[0]!r} is not an option of tensors; put it before all --like"
        )
    layer: Layer = args.tensor_options
    if not layer:
        raise CommandError(
            f"--like {words[0]!r} needs options after it; to keep tensors lossless, use --keep"
        )
    return words[0], layer
