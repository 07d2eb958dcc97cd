"""Options of ``sfp pack`` about tensors, which can also follow ``--like``, and their parsing."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

from ..dtypes import FACTOR_DTYPES
from ..encode.weights import MIN_ELEMENTS
from ..options import PRESETS, WEIGHTED, ZEROS
from .errors import CommandError
from .parser import Parser
from .rules import Layer, Pruning

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

    The namespace gets them in ``tensor_options``, a dict without the options that are not given.
    """
    parser.set_defaults(**{_OPTIONS: {}})
    value = parser.add_argument_group(
        "options that change values",
        f"Without --like they reach float tensors of rank 2 or more with at least {MIN_ELEMENTS:,}\n"
        "elements, but not: scales, zero points and storage of weights that are quantised already\n"
        "(GPTQ, AWQ, bitsandbytes, FP8 with scales, ...), buffers such as masks, biases, gains of\n"
        "normalisations, and tensors with infinities or NaNs. These stay lossless and are listed with\n"
        "the reason; --like GLOB reaches them. Tensors that are not float are never changed.",
    )
    how = value.add_mutually_exclusive_group()
    _add(how, "--bits", float, "B", "uniform quantiser: about B bits for the level of each weight left")
    _add(how, "--budget", float, "B", "uniform quantiser: about B bits a position, mask and levels together")
    _add(how, "--step", float, "S", "uniform quantiser: multiples of S")
    _add(how, "--error-db", float, "D", "uniform quantiser: error D dB against the weights, such as -30")
    _add(how, "--table", int, "N", "table quantiser: N centroids for the magnitudes")
    _add(
        value,
        "--budget-scope",
        str,
        "WHERE",
        "a --budget of all its tensors together (model, the default), or of each",
        ("tensor", "model"),
    )
    _add(value, "--weighted", str, "HOW", "errors count by the --importance (full) or its root", WEIGHTED)
    how.add_argument(
        "--lossless",
        action=_StoreTensorOption,
        nargs=0,
        const=True,
        default=argparse.SUPPRESS,
        help="every bit as it is (the default); undoes what was said before",
    )
    _add(value, "--prune", _pruning, "P", "prune the fraction P, such as 0.5, or keep n of m, such as 2:4")
    _add(
        value,
        "--pattern-dim",
        _dimension,
        "D",
        "n of m along dimension D (the inputs: the last of a matrix, 1 of a kernel)",
    )
    _add(value, "--by", str, "HOW", "what decides: magnitude (the default, and all there is)", ("magnitude",))
    _add(value, "--scope", str, "WHERE", "prune so in each tensor, or over the model", ("tensor", "model"))
    _add(value, "--scale", _scale, "PER", "scale factors per tensor, row, column, or of so many positions")
    _add(value, "--scale-dtype", str, "DTYPE", "of the factors: F16 (the default), BF16, F32", FACTOR_DTYPES)
    _add(value, "--rate-weight", float, "W", "how much bits weigh against error, 0 for nearest (0.12)")
    _add(value, "--dtype", str, "DTYPE", "cast to F32, F16 or BF16 first", FACTOR_DTYPES)
    coding = parser.add_argument_group(
        "options of the coding", "They change no values (+0 equals -0) and reach all tensors."
    )
    _add(coding, "--zeros", str, "HOW", "keep -0 (the default), or write +0 for it: positive", ZEROS)
    _add(coding, "--preset", str, "NAME", f"what the others start from: {', '.join(PRESETS)}", tuple(PRESETS))
    _add(coding, "--mask", str, "KIND", "auto, none, runs or octets", ("auto", "none", "runs", "octets"))
    _add(coding, "--group", int, "G", "levels a symbol", (1, 2))
    _add(coding, "--segment", int, "S", "positions a segment, a multiple of 32")
    _add(coding, "--chunk", int, "N", "positions a chunk (262,144)")
    _add(coding, "--codes", int, "N", "at most N codes a stream, up to 16")
    _add(coding, "--code-limit", int, "L", "prefix codes of at most L bits, up to 12")
    _add(coding, "--mantissa-bits", int, "M", "of exact: M mantissa bits join the class")
    _add(coding, "--importance-bits", int, "B", "bits of an importance (6; 0: not kept), with --importance")


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
    if ":" in text:
        keep, _, of = text.partition(":")
        if keep.isdecimal() and of.isdecimal() and 0 < int(keep) < int(of) <= 1024:
            return Pruning(keep=int(keep), of=int(of))
    else:
        try:
            fraction = float(text)
        except ValueError:
            fraction = math.nan
        if 0 <= fraction <= 1:
            return Pruning(fraction)
    raise argparse.ArgumentTypeError(f"{text!r} is neither a fraction from 0 to 1 nor a pattern such as 2:4")


def _dimension(text: str) -> int:
    if text.isdecimal():
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no dimension: 0, 1, …")


def _scale(text: str) -> str | int:
    """Parses ``tensor``, ``row``, ``column`` or a number of positions."""
    if text in ("tensor", "row", "column"):
        return text
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is neither tensor, row, column nor a number of positions")


def parse_like(words: list[str]) -> tuple[str, Layer]:
    """Parses the pattern and the options of one rule."""
    if not words or words[0].startswith("--"):
        raise CommandError("--like needs a pattern of tensor names, such as '*embed*'")
    parser = Parser(prog="sfp pack", add_help=False)
    add_tensor_options(parser)
    args, rest = parser.parse_known_args(words[1:])
    if rest:
        raise CommandError(
            f"{rest[0]!r} after --like {words[0]!r} is no option of tensors; put it before all --like"
        )
    layer: Layer = args.tensor_options
    if not layer:
        raise CommandError(f"--like {words[0]!r} is followed by no option; --keep leaves tensors as they are")
    return words[0], layer
