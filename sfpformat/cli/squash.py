"""``sfp squash``: makes one delta of several."""

from __future__ import annotations

import argparse

from ..deltas.writing import DeltaWriter
from .console import bytes_words, show_json
from .delta_files import add_deltas, add_output, add_tensors, kinds_of, opened_chain, separator_of, words_of
from .errors import require_suffix
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
    add_output(parser, "DELTA.sfp", "the file to write")
    return parser


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand. Returns the exit code."""
    require_suffix(args.output, ".sfp", what="'sfp squash'")
    with opened_chain(args) as chain:
        base, result = chain.base, chain.result
        writer = DeltaWriter(
            chain.target,
            base_name=base.path.name,
            metadata=result.metadata(),
            separator=separator_of(base, chain.specs),
            limits=chain.limits,
        )
        with writer:
            add_tensors(writer, base, chain.specs, result, chain.shown)
            result.check_base()
    found, size = writer.described, chain.target.stat().st_size
    if args.json:
        show_json({"bytes": size, "kinds": kinds_of(found), "base": found.base})
    else:
        print(f"{len(args.deltas)} deltas → {bytes_words(size)}: {words_of(found)}")
    return 0
