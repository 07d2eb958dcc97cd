"""``sfp apply``: makes a model from a base and deltas."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ..encode.writer import Writer
from ..io.atomic import replacing
from ..io.safetensors import TensorSpec, in_aligned_order, write_tensors
from .console import bytes_words, show_json
from .delta_files import Chain, add_deltas, add_output, opened_chain
from .errors import require_suffix
from .model_files import sub_byte_keys
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
    add_output(parser, "NEW", "the .safetensors or .sfp file to write")
    return parser


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand. Returns the exit code."""
    start = time.monotonic()
    require_suffix(args.output, ".safetensors", ".sfp", what="'sfp apply'")
    with opened_chain(args) as chain:
        if chain.target.suffix == ".sfp":
            _write_sfp(chain)
        else:
            _write_safetensors(chain)
    tensors, size = len(chain.specs), chain.nbytes
    if args.json:
        show_json({"tensors": tensors, "bytes": chain.target.stat().st_size, "decoded_bytes": size})
    else:
        print(f"{tensors} tensors, {bytes_words(size)} in {time.monotonic() - start:.1f} s")
    return 0


def _write_safetensors(chain: Chain) -> None:
    with replacing(chain.target) as file:
        ordered = in_aligned_order(chain.specs)
        write_tensors(file, ordered, chain.result.metadata(), _arrays(chain, ordered))
        chain.result.check_base()


def _write_sfp(chain: Chain) -> None:
    with Writer(chain.target, metadata=chain.result.metadata(), limits=chain.limits) as writer:
        for spec, array in zip(chain.specs, _arrays(chain, chain.specs), strict=True):
            writer.add(spec.name, array, other=sub_byte_keys(spec))
        chain.result.check_base()


def _arrays(chain: Chain, specs: list[TensorSpec]) -> Iterator[NDArray[np.generic]]:
    for spec in specs:
        chain.shown.at(spec.name)
        yield chain.result.get_tensor(spec.name)
        chain.shown.advance(spec.nbytes)
