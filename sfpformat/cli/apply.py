"""``sfp apply``: makes a model from a base and deltas."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..deltas.result import DeltaFile
from ..encode.writer import Writer
from ..io.atomic import replacing
from ..io.safetensors import TensorSpec, in_aligned_order, write_tensors
from ..limits import Limits
from .console import Progress, bytes_words, progress, show_json
from .delta_files import add_deltas, chain_in_errors, open_result, result_specs
from .errors import checked_target, path_in_errors, require_suffix
from .limit_option import add_limits, limits_of
from .model_files import open_model, sub_byte_keys
from .parser import Parser, Subparsers, examples

_DESCRIPTION = """Makes the model that one or more deltas describe, from the base of the first one. All
checksums are compared: a wrong base, a delta that is missing in the chain, or one that was applied before, is
an error, and no file is written."""


def add_parser(subparsers: Subparsers[Parser]) -> Parser:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "apply",
        help="make a model from a base and deltas",
        description=_DESCRIPTION,
        epilog=examples(
            ("sfp apply step-17.safetensors step-18.sfp -o step-18.safetensors", "one delta"),
            ("sfp apply base.sfp d1.sfp d2.sfp d3.sfp -o new.sfp", "a chain; a lossless .sfp file"),
        ),
    )
    add_deltas(parser)
    parser.add_argument(
        "-o", "--output", metavar="NEW", required=True, help="the .safetensors or .sfp file to write"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    add_limits(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand. Returns the exit code."""
    start = time.monotonic()
    require_suffix(args.output, ".safetensors", ".sfp", what="'sfp apply'")
    limits = limits_of(args.limit)
    with (
        open_model(args.base, limits=limits) as base,
        open_result(base, args.deltas, limits) as result,
    ):
        target = checked_target(args.output, [*base.paths(), *map(Path, args.deltas)])
        specs = result_specs(base, result)
        size = sum(spec.nbytes for spec in specs)
        within = chain_in_errors(base, args.deltas)
        with progress(size, target.name) as shown, path_in_errors(target), within:
            if target.suffix == ".sfp":
                _write_sfp(result, specs, target, limits, shown)
            else:
                with replacing(target) as file:
                    ordered = in_aligned_order(specs)
                    write_tensors(file, ordered, result.metadata(), _arrays(result, ordered, shown))
                    result.check_base()
    if args.json:
        show_json({"tensors": len(specs), "bytes": target.stat().st_size, "decoded_bytes": size})
    else:
        print(f"{len(specs)} tensors, {bytes_words(size)} in {time.monotonic() - start:.1f} s")
    return 0


def _arrays(result: DeltaFile, specs: list[TensorSpec], shown: Progress) -> Iterator[NDArray[np.generic]]:
    for spec in specs:
        shown.at(spec.name)
        yield result.get_tensor(spec.name)
        shown.advance(spec.nbytes)


def _write_sfp(
    result: DeltaFile, specs: list[TensorSpec], target: Path, limits: Limits, shown: Progress
) -> None:
    with Writer(target, metadata=result.metadata(), limits=limits) as writer:
        for spec, array in zip(specs, _arrays(result, specs, shown), strict=True):
            writer.add(spec.name, array, other=sub_byte_keys(spec))
        result.check_base()
