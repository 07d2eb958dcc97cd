"""``sfp squash``: makes one delta of several."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..deltas.writing import DeltaWriter
from .console import bytes_words, progress, show_json
from .delta_files import add_deltas, chain_in_errors, kinds_of, open_result, result_specs, words_of
from .errors import checked_target, path_in_errors, require_suffix
from .limit_option import add_limits, limits_of
from .model_files import open_model, sub_byte_keys
from .parser import Parser, Subparsers, examples

_DESCRIPTION = """Writes one delta that has the effect of several, which form a chain. It needs the base,
because the order of the differences in a delta depends on it."""


def add_parser(subparsers: Subparsers[Parser]) -> Parser:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "squash",
        help="make one delta of several",
        description=_DESCRIPTION,
        epilog=examples(
            ("sfp squash base.safetensors d1.sfp d2.sfp -o d.sfp", "one delta instead of two"),
            ("sfp squash model/ d1.sfp d2.sfp d3.sfp -o d.sfp --json", "print the result as JSON"),
        ),
    )
    add_deltas(parser)
    parser.add_argument("-o", "--output", metavar="DELTA.sfp", required=True, help="the file to write")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    add_limits(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand. Returns the exit code."""
    require_suffix(args.output, ".sfp", what="'sfp squash'")
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
            name = base.path.name
            with DeltaWriter(target, base_name=name, metadata=result.metadata(), limits=limits) as writer:
                for spec in specs:
                    shown.at(spec.name)
                    before = base.specs.get(spec.name)
                    keys = sub_byte_keys(spec)
                    same = before is not None and before.sub_byte == spec.sub_byte
                    old = base.read(spec.name) if before is not None else None
                    other = None if same or (old is None and not keys) else keys
                    writer.add(spec.name, old, result.get_tensor(spec.name), other=other)
                    shown.advance(spec.nbytes)
                for gone in base.specs:
                    if gone not in result.specs:
                        writer.add(gone, base.read(gone), None)
                result.check_base()
                writer.close()
        found, size = writer.described, target.stat().st_size
    if args.json:
        show_json({"bytes": size, "kinds": kinds_of(found), "base": found.base})
    else:
        print(f"{len(args.deltas)} deltas → {bytes_words(size)}: {words_of(found)}")
    return 0
