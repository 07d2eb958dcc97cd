"""``sfp unpack``: converts an `.sfp` file to safetensors."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..decode.shard_index import ShardIndex, index_name, shard_name
from ..io.atomic import ReplacedTogether, replacing
from ..io.safetensors import TensorSpec, in_aligned_order, write_tensors
from ..names import unmatched
from .console import Progress, bytes_words, counted, progress, seconds_words
from .errors import CommandError, checked_target, path_in_errors, require_suffix
from .limit_option import add_limits, limits_of
from .model_files import Model, open_model
from .parser import Parser, Subparsers, examples

_SUFFIX = ".safetensors"


def add_parser(subparsers: Subparsers[Parser]) -> Parser:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "unpack",
        help="convert an .sfp file to safetensors",
        description="Converts an .sfp file, or all shards of an index, to a safetensors file. Decodes one "
        "tensor at a time. Does not write the importances stored beside the weights.",
        epilog=examples(
            ("sfp unpack model.sfp -o model.safetensors", "all tensors"),
            ("sfp unpack model.sfp -o embed.safetensors --tensor '*embed*'", "tensors with matching names"),
            ("sfp unpack model.sfp.index.json -o model.safetensors --sharded", "one file per shard"),
        ),
    )
    parser.add_argument("source", metavar="FILE", help="an .sfp file, an .sfp.index.json, or a folder")
    parser.add_argument("-o", "--output", metavar="OUT.safetensors", required=True, help="the file to write")
    parser.add_argument("--sharded", action="store_true", help="write one file per shard, and an index")
    parser.add_argument(
        "--tensor", metavar="GLOB", action="append", help="write only tensors with matching names"
    )
    add_limits(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand. Returns the exit code."""
    start = time.monotonic()
    require_suffix(args.output, _SUFFIX, what="'sfp unpack'")
    with open_model(args.source, kind="sfp", limits=limits_of(args.limit)) as model:
        if model.kind != "sfp":
            raise CommandError(f"{args.source}: is already a safetensors file")
        for pattern in args.tensor or []:
            if not any(fnmatchcase(name, pattern) for name in model.specs):
                words = unmatched(pattern, model.specs, model.aliases())
                raise CommandError(f"{args.source}: {words}")
        chosen = {
            name: spec
            for name, spec in model.specs.items()
            if args.tensor is None or any(fnmatchcase(name, pattern) for pattern in args.tensor)
        }
        target = checked_target(args.output, model.paths())
        size = sum(spec.nbytes for spec in chosen.values())
        with progress(size, target.name) as shown, path_in_errors(target):
            if args.sharded:
                _write_shards(model, chosen, target.with_suffix(""), shown)
            else:
                _write_one(model, list(chosen.values()), model.metadata(), target, shown)
        read = model.stored_bytes
    seconds = time.monotonic() - start
    print(
        f"{counted(len(chosen), 'tensor')}, {bytes_words(read)} → {bytes_words(size)} "
        f"in {seconds_words(seconds)} ({bytes_words(round(size / max(seconds, 1e-9)))}/s)"
    )
    return 0


def _write_one(
    model: Model, specs: list[TensorSpec], metadata: dict[str, str], target: Path, shown: Progress
) -> None:
    with replacing(target) as file:
        ordered = in_aligned_order(specs)
        write_tensors(file, ordered, metadata, _arrays(model, ordered, shown))


def _write_shards(model: Model, chosen: dict[str, TensorSpec], stem: Path, shown: Progress) -> None:
    """Writes one safetensors file for each shard that has a chosen tensor, and an index.

    Renames all files to their final names at the end, the index last.
    """
    by_file = {
        name: specs
        for name in model.files
        if (specs := [chosen[tensor] for tensor in model.names_in(name) if tensor in chosen])
    }
    weight_map: dict[str, str] = {}
    size = sum(spec.nbytes for spec in chosen.values())
    with ReplacedTogether(stem.with_name(index_name(stem.name, _SUFFIX))) as new:
        for number, (file_name, specs) in enumerate(by_file.items(), 1):
            target = stem.with_name(shard_name(stem.name, number, len(by_file), _SUFFIX))
            file = new.add(target)
            ordered = in_aligned_order(specs)
            write_tensors(file, ordered, model.metadata_of(file_name), _arrays(model, ordered, shown))
            weight_map |= dict.fromkeys((spec.name for spec in ordered), target.name)
        new.index.write(ShardIndex(weight_map, {"total_size": size}).to_bytes())


def _arrays(model: Model, specs: list[TensorSpec], shown: Progress) -> Iterator[NDArray[np.generic]]:
    with model.ahead(spec.name for spec in specs):
        for spec in specs:
            shown.at(spec.name)
            yield model.read(spec.name)
            shown.advance(spec.nbytes)
