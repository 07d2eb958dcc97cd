"""``sfp delta``: writes how a model differs from another one."""

from __future__ import annotations

import argparse
import time

from ..container.delta_map import DeltaMap
from ..deltas.writing import DeltaWriter
from .console import bytes_words, progress, show_json
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
from .model_files import open_model
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
    return parser


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand. Returns the exit code."""
    start = time.monotonic()
    require_suffix(args.output, ".sfp", what="'sfp delta'")
    limits = limits_of(args.limit)
    with open_model(args.base, limits=limits) as base, open_model(args.new, limits=limits) as new:
        target = checked_target(args.output, [*base.paths(), *new.paths()])
        with progress(new.nbytes, target.name) as shown, path_in_errors(target):
            specs = new.specs.values()
            writer = DeltaWriter(
                target,
                base_name=base.path.name,
                metadata=new.metadata(),
                separator=separator_of(base, specs),
                limits=limits,
            )
            with writer:
                add_tensors(writer, base, specs, ModelTensors(new), shown, parts=not args.elements)
        found, size = writer.described, target.stat().st_size
        _show(found, size, new.nbytes, time.monotonic() - start, as_json=args.json)
    return 0


def _show(found: DeltaMap, size: int, decoded: int, seconds: float, *, as_json: bool) -> None:
    if as_json:
        show_json({"bytes": size, "decoded_bytes": decoded, "kinds": kinds_of(found), "base": found.base})
        return
    print(
        f"{words_of(found)}; {bytes_words(decoded)} → {bytes_words(size)}, "
        f"{decoded / max(size, 1):,.1f} times smaller, in {seconds:.1f} s"
    )
