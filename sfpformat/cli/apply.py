"""``sfp apply``: makes a model from a base and deltas."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..decode.shard_index import ShardIndex, index_name, shard_name
from ..encode.writer import Writer
from ..io.atomic import ReplacedTogether, replacing
from ..io.safetensors import TensorSpec, in_aligned_order, write_tensors
from .console import bytes_words, counted, seconds_words, show_json
from .delta_files import Chain, add_deltas, add_output, opened_chain, paths_of
from .errors import checked_target, require_suffix
from .model_files import sub_byte_keys
from .parser import Parser, Subparsers, examples

_DESCRIPTION = """Makes the model that one or more deltas describe, from the base of the first one. A new .sfp
file has the masks, levels, quantisers and importances that the deltas describe. All checksums are compared: a
wrong base, a delta that is missing in the chain, or one that was applied before, is an error, and no file is
written."""


def add_parser(subparsers: Subparsers[Parser]) -> Parser:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "apply",
        help="make a model from a base and deltas",
        description=_DESCRIPTION,
        epilog=examples(
            ("sfp apply step-17.safetensors step-18.sfp -o step-18.safetensors", "one delta"),
            ("sfp apply base.sfp d1.sfp d2.sfp d3.sfp -o new.sfp", "a chain; a lossless .sfp file"),
            ("sfp apply base/ d.sfp -o new/model.safetensors --sharded", "one file per shard of the base"),
        ),
    )
    add_deltas(parser)
    add_output(parser, "NEW", "the .safetensors or .sfp file to write")
    parser.add_argument(
        "--sharded",
        action="store_true",
        help="write one file per shard of BASE, and an index; NEW without its suffix begins their names",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand. Returns the exit code."""
    start = time.monotonic()
    require_suffix(args.output, ".safetensors", ".sfp", what="'sfp apply'")
    with opened_chain(args) as chain:
        write = _write_sfp if chain.target.suffix == ".sfp" else _write_safetensors
        if args.sharded:
            written = _write_shards(chain, write, paths_of(args.deltas))
        else:
            with replacing(chain.target) as file:
                write(chain, file, chain.specs)
                chain.result.check_base()
            written = [chain.target]
    tensors, size = len(chain.specs), chain.nbytes
    if args.json:
        stored = sum(path.stat().st_size for path in written)
        show_json({"tensors": tensors, "files": len(written), "bytes": stored, "decoded_bytes": size})
    else:
        print(
            f"{counted(tensors, 'tensor')}, {bytes_words(size)} in {seconds_words(time.monotonic() - start)}"
        )
    return 0


_Write = Callable[[Chain, BinaryIO, list[TensorSpec]], None]


def _write_safetensors(chain: Chain, file: BinaryIO, specs: list[TensorSpec]) -> None:
    ordered = in_aligned_order(specs)
    write_tensors(file, ordered, chain.result.metadata(), _arrays(chain, ordered))


def _write_sfp(chain: Chain, file: BinaryIO, specs: list[TensorSpec]) -> None:
    with Writer(file, metadata=chain.result.metadata(), limits=chain.limits) as writer:
        for spec in specs:
            chain.shown.at(spec.name)
            parts, keys = chain.result.parts(spec.name), sub_byte_keys(spec)
            if parts is None:
                writer.add(spec.name, chain.result.get_tensor(spec.name), other=keys)
            else:
                writer.add_parts(spec.name, parts, other=keys)
            chain.shown.advance(spec.nbytes)


def _write_shards(chain: Chain, write: _Write, deltas: list[Path]) -> list[Path]:
    """Writes a file for each shard of the base that the result has tensors of, and the index.

    Renames all files to their final names at the end, the index last (R-SHD-003).

    Returns:
        The paths of the files, without that of the index.

    Raises:
        CommandError: a file to write is one of those to read.
    """
    stem, suffix = chain.target.with_suffix(""), chain.target.suffix
    groups = _by_shard(chain)
    for number in range(1, len(groups) + 1):
        output = stem.with_name(shard_name(stem.name, number, len(groups), suffix))
        checked_target(output, [*chain.base.paths(), *deltas])
    weight_map: dict[str, str] = {}
    outputs = []
    with ReplacedTogether(stem.with_name(index_name(stem.name, suffix))) as new:
        for number, specs in enumerate(groups, 1):
            output = stem.with_name(shard_name(stem.name, number, len(groups), suffix))
            write(chain, new.add(output), specs)
            weight_map |= dict.fromkeys((spec.name for spec in specs), output.name)
            outputs.append(output)
        chain.result.check_base()
        new.index.write(ShardIndex(weight_map, {"total_size": chain.nbytes}).to_bytes())
    return outputs


def _by_shard(chain: Chain) -> list[list[TensorSpec]]:
    """Returns the tensors of the result by the shard of the base; new ones are in the last shard."""
    places = {name: file for file in chain.base.files for name in chain.base.names_in(file)}
    groups: dict[str, list[TensorSpec]] = {file: [] for file in chain.base.files}
    last = list(groups)[-1]
    for spec in chain.specs:
        groups[places.get(spec.name, last)].append(spec)
    return [specs for specs in groups.values() if specs] or [[]]


def _arrays(chain: Chain, specs: list[TensorSpec]) -> Iterator[NDArray[np.generic]]:
    for spec in specs:
        chain.shown.at(spec.name)
        yield chain.result.get_tensor(spec.name)
        chain.shown.advance(spec.nbytes)
