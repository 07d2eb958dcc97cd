"""``sfp delta``: writes how a model differs from another one."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from ..container.delta_map import DeltaMap
from ..decode.shard_index import index_name, shard_name
from ..deltas.indices import rename_with_index
from ..deltas.writing import DeltaWriter
from ..io.atomic import AtomicFile
from ..limits import Limits
from .console import Progress, bytes_words, progress, seconds_words, show_json
from .delta_files import (
    FILE_HELP,
    ModelTensors,
    add_output,
    add_tensors,
    kinds_of,
    separator_of,
    words_of,
)
from .errors import checked_target, path_in_errors, require_suffix
from .limit_option import limits_of
from .model_files import Model, open_model
from .parser import Parser, Subparsers, examples

_DESCRIPTION = """Writes a delta: an .sfp file that stores how the tensors of NEW differ from those of BASE.
'sfp apply' makes NEW from BASE and the delta, bit for bit. The delta names its base by the checksum of each
tensor, and fits no other one."""


def add_parser(subparsers: Subparsers[Parser]) -> Parser:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "delta",
        help="write how a model differs from another one",
        description=_DESCRIPTION,
        epilog=examples(
            ("sfp delta step-17.safetensors step-18.safetensors -o step-18.sfp", "a step of training"),
            ("sfp delta base/ fine-tuned/ -o fine-tuned.sfp", "a fine-tune beside its base"),
            ("sfp delta base/ new/ -o d.sfp --sharded", "a file per shard of new/, and d.sfp.index.json"),
            (
                "sfp delta 17.sfp 18.sfp -o d.sfp --elements",
                "for weights in memory",
            ),
        ),
    )
    parser.add_argument("base", metavar="BASE", help=FILE_HELP)
    parser.add_argument("new", metavar="NEW", help=FILE_HELP)
    parser.add_argument(
        "--elements",
        action="store_true",
        help="compare only elements, not masks, levels and importances; the delta then fits any base with "
        "the same elements, such as the weights of a running model",
    )
    add_output(parser, "DELTA.sfp", "the file to write")
    parser.add_argument(
        "--sharded",
        action="store_true",
        help="write one file per shard of NEW, and an index, DELTA.sfp.index.json, which names the delta",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand. Returns the exit code."""
    start = time.monotonic()
    require_suffix(args.output, ".sfp", what="'sfp delta'")
    limits = limits_of(args.limit)
    with open_model(args.base, limits=limits) as base, open_model(args.new, limits=limits) as new:
        target = checked_target(args.output, [*base.paths(), *new.paths()])
        with progress(new.nbytes, target.name) as shown, path_in_errors(target):
            write = _write_shards if args.sharded else _write_one
            found, size = write(base, new, target, shown, parts=not args.elements, limits=limits)
        _show(found, size, new.nbytes, time.monotonic() - start, as_json=args.json)
    return 0


def _write_one(
    base: Model, new: Model, target: Path, shown: Progress, *, parts: bool, limits: Limits
) -> tuple[DeltaMap, int]:
    """Writes a file. Returns what it says of the tensors, and its size in bytes."""
    specs = new.specs.values()
    writer = DeltaWriter(
        target,
        base_name=base.path.name,
        metadata=new.metadata(),
        separator=separator_of(base, specs),
        limits=limits,
    )
    with writer:
        add_tensors(writer, base, specs, ModelTensors(new), shown, parts=parts)
    return writer.described, target.stat().st_size


def _write_shards(
    base: Model, new: Model, target: Path, shown: Progress, *, parts: bool, limits: Limits
) -> tuple[DeltaMap, int]:
    """Writes a file for each shard of the new model, and the index. Same results as `_write_one`.

    Tensors that the new model does not have are in the last file.

    Raises:
        CommandError: a file to write is one of those to read.
    """
    stem, count = target.with_suffix(""), len(new.files)
    removed = [name for name in base.specs if name not in new.specs]
    separator = separator_of(base, new.specs.values())
    files: list[AtomicFile] = []
    try:
        for number, source in enumerate(new.files, 1):
            output = stem.with_name(shard_name(stem.name, number, count))
            file = AtomicFile(checked_target(output, [*base.paths(), *new.paths()]))
            files.append(file)
            writer = DeltaWriter(
                file.file,
                base_name=base.path.name,
                metadata=new.metadata_of(source),
                separator=separator,
                shard=number,
                limits=limits,
            )
            with writer:
                specs = [new.specs[name] for name in new.names_in(source)]
                gone = removed if number == count else []
                add_tensors(writer, base, specs, ModelTensors(new), shown, parts=parts, removed=gone)
            file.finish()
        index = stem.with_name(index_name(stem.name))
        found = rename_with_index([(file.path, file.target) for file in files], index, limits)
    finally:
        for file in files:
            file.abort()
    return found, sum(file.target.stat().st_size for file in files)


def _show(found: DeltaMap, size: int, decoded: int, seconds: float, *, as_json: bool) -> None:
    if as_json:
        show_json({"bytes": size, "decoded_bytes": decoded, "kinds": kinds_of(found), "base": found.base})
        return
    print(
        f"{words_of(found)}; {bytes_words(decoded)} → {bytes_words(size)}, "
        f"{decoded / max(size, 1):,.1f} times smaller, in {seconds_words(seconds)}"
    )
