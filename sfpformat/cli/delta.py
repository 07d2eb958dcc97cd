"""``sfp delta``: writes how a model differs from another one."""

from __future__ import annotations

import argparse
import time

from ..container.delta_map import DeltaMap
from ..deltas.writing import DeltaWriter
from .console import bytes_words, progress, show_json
from .delta_files import FILE_HELP, kinds_of, words_of
from .errors import checked_target, path_in_errors, require_suffix
from .limit_option import add_limits, limits_of
from .model_files import Model, open_model, sub_byte_keys
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
        ),
    )
    parser.add_argument("base", metavar="BASE", help=FILE_HELP)
    parser.add_argument("new", metavar="NEW", help=FILE_HELP)
    parser.add_argument("-o", "--output", metavar="DELTA.sfp", required=True, help="the file to write")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    add_limits(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand. Returns the exit code."""
    start = time.monotonic()
    require_suffix(args.output, ".sfp", what="'sfp delta'")
    limits = limits_of(args.limit)
    with open_model(args.base, limits=limits) as base, open_model(args.new, limits=limits) as new:
        target = checked_target(args.output, [*base.paths(), *new.paths()])
        with progress(new.nbytes, target.name) as shown, path_in_errors(target):
            writer = DeltaWriter(target, base_name=base.path.name, metadata=new.metadata(), limits=limits)
            with writer:
                for name, spec in new.specs.items():
                    shown.at(name)
                    _add(writer, name, base, new)
                    shown.advance(spec.nbytes)
                for name in base.specs:
                    if name not in new.specs:
                        writer.add(name, base.read(name), None)
                writer.close()
        found, size = writer.described, target.stat().st_size
        _show(found, size, new.nbytes, time.monotonic() - start, as_json=args.json)
    return 0


def _add(writer: DeltaWriter, name: str, base: Model, new: Model) -> None:
    """Adds a tensor of the result. One whose elements in safetensors change their size is stored whole."""
    keys = sub_byte_keys(new.specs[name])
    before = base.specs.get(name)
    same = before is not None and before.sub_byte == new.specs[name].sub_byte
    old = base.read(name) if before is not None else None
    writer.add(name, old, new.read(name), other=None if same or (old is None and not keys) else keys)


def _show(found: DeltaMap, size: int, decoded: int, seconds: float, *, as_json: bool) -> None:
    if as_json:
        show_json({"bytes": size, "decoded_bytes": decoded, "kinds": kinds_of(found), "base": found.base})
        return
    print(
        f"{words_of(found)}; {bytes_words(decoded)} → {bytes_words(size)}, "
        f"{decoded / max(size, 1):,.1f} times smaller, in {seconds:.1f} s"
    )
