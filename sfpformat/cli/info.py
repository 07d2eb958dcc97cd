"""``sfp info``: shows the tensors of a file, and the size of each part."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from fnmatch import fnmatchcase

from ..container.preamble import MAJOR
from ..names import quoted, unmatched
from .console import bytes_words, counted, number, percent, printable, show_json, show_table
from .delta_files import delta_of, kinds_of, words_of
from .errors import CommandError, path_in_errors
from .keyed_tables import keyed_of, table_json, table_words
from .limit_option import add_limits, limits_of
from .model_files import Model, open_model, sub_byte_of
from .parser import Parser, Subparsers, examples
from .report import TensorReport, Totals, report_tensor, total

_HEADER = ("tensor", "dtype", "shape", "coding", "pruned", "mask", "weights", "import.", "index", "all")
_TEXT_COLUMNS = 4
_DESCRIPTION = """Shows a table of the tensors of an .sfp file, or of all shards of an index: dtype, shape,
coding, the share of pruned weights, and the bits per weight for the mask, the weights (fingerprints and
vectors, or raw elements), the importance, and the segment index with padding.

Zeros of either sign count as pruned: positions that the mask prunes, and stored zeros, such as -0 or the
zeros of a tensor without a mask. To count stored zeros, the command decodes tensors whose code table shows
that more than about 1 % of their stored weights can be zeros. Of other tensors it reads only the directory
and the segment indices."""


def add_parser(subparsers: Subparsers[Parser]) -> Parser:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "info",
        help="show the tensors of a file and the size of each part",
        description=_DESCRIPTION,
        epilog=examples(
            ("sfp info model.sfp", "show all tensors"),
            ("sfp info model.sfp --tensors '*.mlp.*'", "show tensors with matching names"),
            ("sfp info model.sfp.index.json --json", "print the figures of all shards as JSON"),
            ("sfp info --engines", "list the engines"),
        ),
    )
    parser.add_argument(
        "file", metavar="FILE", nargs="?", help="an .sfp file, an .sfp.index.json, or a folder"
    )
    parser.add_argument(
        "--json", action="store_true", help="print JSON, with sizes in bytes, and parts in bits"
    )
    parser.add_argument("--tensors", metavar="GLOB", help="show only tensors with matching names")
    add_limits(parser)
    parser.add_argument(
        "--engines", action="store_true", help="list the engines, and whether each is available"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand. Returns the exit code."""
    if args.file is None and args.tensors is not None:
        raise CommandError("--tensors needs a FILE")
    if args.engines:
        _show_engines(args.json)
        if args.file is None:
            return 0
    if args.file is None:
        raise CommandError("name a file, or use --engines (see 'sfp info --help')")
    with open_model(args.file, kind="sfp", deltas=True, keyed=True, limits=limits_of(args.limit)) as model:
        if model.kind != "sfp":
            raise CommandError(f"{args.file}: is a safetensors file; 'sfp pack' converts it to .sfp")
        reports = report_model(model)
        totals = total(reports, model.stored_bytes)
        if args.tensors is not None:
            reports = [report for report in reports if fnmatchcase(report.entry.name, args.tensors)]
            if not reports:
                words = unmatched(args.tensors, model.specs, model.aliases())
                raise CommandError(f"{args.file}: {words}")
        if args.json:
            _show_json(model, reports, totals)
        else:
            _show(model, reports, totals)
    return 0


def report_model(model: Model) -> list[TensorReport]:
    """Returns the reports of all tensors."""
    out = []
    with ExitStack() as stack, path_in_errors(model.path):
        for file_name, file in model.files.items():
            stack.enter_context(file.heads_ahead(model.names_in(file_name)))
        for name in model.specs:
            out.append(report_tensor(model.file_of(name), name))
    return out


def _show_engines(as_json: bool) -> None:
    from ..engines import available

    engines = available()
    if as_json:
        states = {name: {"available": why is None, "why_not": why} for name, why in engines.items()}
        show_json({"engines": states})
        return
    for name, why in engines.items():
        print(f"engine {name}: {'available' if why is None else f'not available: {printable(why)}'}")


def _version(model: Model) -> str:
    minors = [file.preamble.minor for file in model.files.values()]
    return f"{MAJOR}.{max(minors, default=0)}"


def _delta_json(model: Model) -> dict[str, object]:
    delta = delta_of(model)
    assert delta is not None
    return {
        "base": delta.base,
        "kinds": kinds_of(delta),
        "tensors": [
            {
                "name": tensor.name,
                "kind": tensor.kind,
                "dtype": tensor.dtype.name,
                "shape": list(tensor.shape),
                "base": f"{tensor.base:08x}",
                "result": f"{tensor.result:08x}",
                **({} if tensor.structure is None else {"structure": tensor.structure.to_map()}),
            }
            for tensor in delta.tensors
        ],
    }


def _show_json(model: Model, reports: list[TensorReport], totals: Totals) -> None:
    show_json(
        {
            "file": str(model.path),
            "format": _version(model),
            "shards": list(model.files) if model.sharded else [],
            "metadata": model.metadata(),
            "delta": None if delta_of(model) is None else _delta_json(model),
            "keyed": [table_json(table) for table in keyed_of(model)],
            "totals": totals.to_json(),
            "tensors": [report.to_json() for report in reports],
        }
    )


def _show(model: Model, reports: list[TensorReport], totals: Totals) -> None:
    show_table(_HEADER, [_row(report) for report in reports], _TEXT_COLUMNS)
    shards = f", {len(model.files)} shards" if model.sharded else ""
    print(f"{printable(str(model.path))}: format {_version(model)}{shards}")
    delta = delta_of(model)
    if delta is not None:
        base = "" if delta.base is None else f" of {printable(quoted(delta.base))}"
        print(f"a delta{base}: {words_of(delta)}; the table shows the tensors that it stores")
    for table in keyed_of(model):
        print(f"keyed table {printable(quoted(table.name))}: {table_words(table)}")
    for key, value in model.metadata().items():
        print(f"metadata {printable(key)}: {printable(value[:200])}{' …' if len(value) > 200 else ''}")
    parts = ", ".join(
        f"{words} {bytes_words(-(-totals.bits[part] // 8))}"
        for part, words in (
            ("mask", "masks"),
            ("fingerprints", "fingerprints"),
            ("importance", "importances"),
            ("vectors", "vectors"),
            ("raw", "raw"),
            ("other", "index and padding"),
        )
        if totals.bits[part]
    )
    directory = bytes_words(totals.file_bytes - totals.stored_bytes)
    stored = f", {totals.stored_zeros:,} of them stored as zeros" if totals.stored_zeros else ""
    pruned = f"{percent(totals.sparsity)} pruned{stored}"
    if delta is None:
        tensors, weights = counted(totals.tensors, "tensor"), counted(totals.positions, "weight")
        print(f"{tensors}, {weights}, {pruned}")
    print(f"{totals.file_bytes:,} bytes: {parts}{', ' if parts else ''}preamble and directory {directory}")
    if delta is None:  # those of a delta describe its numbers, not weights
        print(
            f"{number(totals.bits_per_weight, 3)} bits per weight; "
            f"{bytes_words(totals.decoded_bytes)} decoded, {totals.ratio:.2f} times the file"
        )


def _row(report: TensorReport) -> list[str]:
    entry = report.entry
    weights = report.bits["fingerprints"] + report.bits["raw"] + report.bits["vectors"]
    parts = (
        report.bits["mask"] if entry.mask else None,
        weights,
        report.bits["importance"] if entry.importance else None,
        report.bits["other"],
        8 * entry.stored_bytes,
    )
    sub_byte = sub_byte_of(entry)
    share = [None if bits is None or not entry.positions else bits / entry.positions for bits in parts]
    return [
        entry.name,
        entry.dtype.name if sub_byte is None else f"{entry.dtype.name} of {sub_byte.dtype}",
        "×".join(map(str, entry.shape)) or "scalar",
        report.coding,
        percent(report.sparsity),
        *(number(bits, 3) for bits in share),
    ]
