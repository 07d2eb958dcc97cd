"""``sfp demo``: measures pruning and quantisation on a small language model in the package."""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from .console import number, percent, progress, show_json, show_table
from .errors import CommandError, checked_target, require_suffix
from .parser import Parser, Subparsers, examples
from .prune import parse_shares

if TYPE_CHECKING:
    from ..demo.variants import Result, Row, Tensors

_DESCRIPTION = """Packs a small language model in several ways, verifies each file and loads it. Prints the
size, bits per weight, error, and perplexity per character of the loaded model on held-out source code and
English prose. The model has about a million weights and is part of the package. Its linear layers are
pruned by magnitude, in each layer, or by the importance stored in the file, over all layers. With --sparsity,
the command prunes by both to the given shares; --plot draws the curves.

With --learn, which needs torch, the command learns a new importance in some minutes. It then prunes the model
by this importance and by other methods, to several sparsities. The error of the survivors is the same for all
methods, -20 dB."""


def add_parser(subparsers: Subparsers[Parser]) -> Parser:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "demo",
        help="measure pruning and quantisation on a small language model",
        description=_DESCRIPTION,
        epilog=examples(
            ("sfp demo", "takes about a minute, without downloads"),
            (
                "sfp demo --sparsity 0.5,0.7,0.9 --plot demo.png",
                "prune by magnitude and by importance to these shares; plot (needs matplotlib)",
            ),
            ("sfp demo --keep packed/", "keep the files, to inspect them with sfp info"),
            (
                "sfp demo --learn --plot demo.png",
                "learn, compare with other methods, and plot (needs torch and matplotlib)",
            ),
        ),
    )
    parser.add_argument(
        "--sparsity", metavar="S,...", help="shares of the linear layers' weights to prune, such as 0.5,0.9"
    )
    parser.add_argument(
        "--keep", metavar="FOLDER", type=Path, help="write the packed files to this folder and keep them"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument(
        "--learn", action="store_true", help="learn a new importance, and compare it with other methods"
    )
    parser.add_argument("--steps", metavar="N", type=int, help="number of learning steps, with --learn (200)")
    parser.add_argument(
        "--plot",
        metavar="PICTURE",
        type=Path,
        help="with --sparsity or --learn: plot perplexity against size to this .png or .svg file",
    )
    return parser


_KINDS = ("code", "prose")
_HEADER = ("zeros", "bytes", "bits/weight", "error dB", *_KINDS, "verified")


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand. Returns the exit code."""
    from ..demo.bundled import model_bytes, weights

    started = time.perf_counter()
    _require_learning(args)
    _require_plot(args)
    shares = None if args.sparsity is None else parse_shares(args.sparsity)
    tensors = weights()
    if not args.json:
        size = sum(array.size for array in tensors.values())
        print(
            f"The language model has {size:,} weights, {_raw_bytes(tensors):,} bytes in BF16. Its .sfp file "
            f"has {len(model_bytes()):,} bytes, with an importance of each weight of the linear layers.\n"
        )
    with ExitStack() as stack:
        folder = args.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        code = (_learn if args.learn else _pack)(args, shares, tensors, folder, started)
    if args.keep and not args.json:
        print(f"The files are in {folder}.")
    return code


def _pack(
    args: argparse.Namespace, shares: Sequence[float] | None, tensors: Tensors, folder: Path, started: float
) -> int:
    """Packs every variant and shows the results. Returns the exit code."""
    from ..demo.variants import PRUNED_BY, VARIANTS, evaluate, rows_of, run_all, variants_of

    variants = VARIANTS if shares is None else variants_of(shares)
    with progress(len(variants) + 1, "the unchanged model", steps=True) as shown:
        dense = {kind: evaluate(tensors, kind) for kind in _KINDS}

        def at(name: str) -> None:
            shown.advance(1)
            shown.at(name)

        results = list(run_all(tensors, variants, folder, at))
    _draw(args, rows_of(variants, results), PRUNED_BY, dense)
    seconds = time.perf_counter() - started
    if args.json:
        _show_json(tensors, dense, [result.as_json() for result in results], seconds)
    else:
        rows = [["BF16, not packed", *_dense_row(tensors, dense)]]
        show_table(["packed", *_HEADER], rows + [[result.name, *_cells(result)] for result in results])
        _explain(seconds)
    return 0 if all(result.verified for result in results) else 1


def _learn(
    args: argparse.Namespace, shares: Sequence[float] | None, tensors: Tensors, folder: Path, started: float
) -> int:
    """Learns importances, prunes by each method and shows the results. Returns the exit code."""
    from ..demo.learned import COMPARED, SPARSITIES, STEPS, amount, rows
    from ..demo.variants import evaluate

    sparsities = SPARSITIES if shares is None else shares
    steps = STEPS if args.steps is None else args.steps
    dense = {kind: evaluate(tensors, kind) for kind in _KINDS}
    with progress(amount(steps, sparsities), "", steps=True) as shown:
        found = list(rows(tensors, sparsities, folder, steps, lambda: shown.advance(1), shown.at))
    _draw(args, found, COMPARED, dense)
    seconds = time.perf_counter() - started
    if args.json:
        _show_json(tensors, dense, [row.as_json() for row in found], seconds)
    else:
        ordered = sorted(found, key=lambda row: row.asked)
        cells = [[COMPARED[row.method], *_cells(row.result)] for row in ordered]
        show_table(["pruned by", *_HEADER], [["BF16, not pruned", *_dense_row(tensors, dense)], *cells])
        _explain(seconds)
    return 0 if all(row.result.verified for row in found) else 1


def _draw(
    args: argparse.Namespace, found: Sequence[Row], words: Mapping[str, str], dense: Mapping[str, float]
) -> None:
    if args.plot is not None:
        from ..demo.perplexity_plot import draw

        draw(found, words, dense, args.plot)


def _require_learning(args: argparse.Namespace) -> None:
    """Checks the options of learning before any work is done.

    Raises:
        CommandError: torch is not installed, or an option is invalid.
    """
    if args.steps is not None and not args.learn:
        raise CommandError("--steps needs --learn")
    if args.learn and importlib.util.find_spec("torch") is None:
        raise CommandError("--learn needs torch: pip install 'sfpformat[torch]'")
    if args.steps is not None and args.steps < 1:
        raise CommandError(f"--steps is {args.steps}, must be at least 1")


def _require_plot(args: argparse.Namespace) -> None:
    """Checks ``--plot`` before any work is done.

    Raises:
        CommandError: matplotlib is not installed, there are no curves, or the picture cannot be written.
    """
    from ..bench.size_speed_plot import SUFFIXES, why_not

    if args.plot is None:
        return
    if not args.learn and args.sparsity is None:
        raise CommandError("--plot needs --sparsity or --learn")
    require_suffix(args.plot, *SUFFIXES, what="--plot")
    reason = why_not()
    if reason is not None:
        raise CommandError(f"--plot: {reason}")
    checked_target(args.plot, [])


def _raw_bytes(tensors: Tensors) -> int:
    return sum(array.nbytes for array in tensors.values())


def _show_json(tensors: Tensors, dense: dict[str, float], results: Sequence[object], seconds: float) -> None:
    from ..demo.bundled import model_bytes

    carried = {
        "weights": sum(array.size for array in tensors.values()),
        "raw_bytes": _raw_bytes(tensors),
        "carried_bytes": len(model_bytes()),
        **dense,
    }
    show_json({"model": carried, "results": results, "seconds": seconds})


def _dense_row(tensors: Tensors, dense: dict[str, float]) -> list[str]:
    return [percent(0.0), f"{_raw_bytes(tensors):,}", "16.00", "exact", *_perplexities(dense), "–"]


def _cells(result: Result) -> list[str]:
    return [
        percent(result.sparsity),
        f"{result.file_bytes:,}",
        number(result.bits_per_weight),
        "exact" if result.error_db is None else number(result.error_db, 1),
        *_perplexities({"code": result.code, "prose": result.prose}),
        "yes" if result.verified else "NO",
    ]


def _explain(seconds: float) -> None:
    print(
        "\nzeros and error: in the linear layers. code, prose: perplexity per character, on held-out text,"
        f"\nof the model loaded from the file; lower is better. Time: {seconds:.0f} seconds."
    )


def _perplexities(values: dict[str, float]) -> list[str]:
    return [number(values[kind], 3) for kind in _KINDS]
