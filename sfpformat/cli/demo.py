"""``sfp demo``: what pruning and quantising cost, on a small language model that the package carries."""

from __future__ import annotations

import argparse
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from .console import number, percent, progress, show_json, show_table
from .parser import Parser, Subparsers, examples

_DESCRIPTION = """Packs a small language model in several ways, verifies every file, loads it back, and prints
its size, bits a weight, error, and the perplexity a character of the loaded model on text that it was never
trained on: source code and English prose. The model has about a million weights and comes with the package;
pruning goes by magnitude, over the linear layers."""


def add_parser(subparsers: Subparsers[Parser]) -> Parser:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "demo",
        help="show on a small language model what pruning costs",
        description=_DESCRIPTION,
        epilog=examples(
            ("sfp demo", "under a minute, nothing is downloaded"),
            ("sfp demo --keep packed/", "keep the files, to look at with sfp info"),
            ("sfp demo --json", "for a machine"),
        ),
    )
    parser.add_argument("--keep", metavar="FOLDER", type=Path, help="keep the packed files there")
    parser.add_argument("--json", action="store_true", help="as JSON")
    return parser


def run(args: argparse.Namespace) -> int:
    """Runs it."""
    from ..demo.carried import model_bytes, weights
    from ..demo.packing import VARIANTS, evaluate, run_all

    started = time.perf_counter()
    tensors = weights()
    raw = sum(array.nbytes for array in tensors.values())
    size = sum(array.size for array in tensors.values())
    with ExitStack() as stack:
        folder = args.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        shown = stack.enter_context(progress(len(VARIANTS) + 1, "the model as it is", steps=True))
        dense = {kind: evaluate(tensors, kind) for kind in ("code", "prose")}

        def at(name: str) -> None:
            shown.advance(1)
            shown.at(name)

        results = list(run_all(tensors, folder, at))
    seconds = time.perf_counter() - started
    if args.json:
        carried = {"weights": size, "raw_bytes": raw, "carried_bytes": len(model_bytes()), **dense}
        show_json({"model": carried, "results": [r.as_json() for r in results], "seconds": seconds})
        return 0 if all(result.verified for result in results) else 1
    print(
        f"A language model of {size:,} weights, {raw:,} bytes of BF16, carried in {len(model_bytes()):,}.\n"
    )
    header = ["packed", "zeros", "bytes", "bits/weight", "error dB", "code", "prose", "verified"]
    rows = [["BF16, not packed", percent(0.0), f"{raw:,}", "16.00", "exact", *_perplexities(dense), "–"]]
    for result in results:
        error = "exact" if result.error_db is None else number(result.error_db, 1)
        rows.append(
            [
                result.name,
                percent(result.sparsity),
                f"{result.file_bytes:,}",
                number(result.bits_per_weight),
                error,
                *_perplexities({"code": result.code, "prose": result.prose}),
                "yes" if result.verified else "NO",
            ]
        )
    show_table(header, rows)
    print(
        "\nzeros and error: of the linear layers. code, prose: perplexity a character of the model loaded"
        f"\nfrom the file, on held-out text; less is better. {seconds:.0f} seconds."
    )
    if args.keep:
        print(f"The files are in {folder}.")
    return 0 if all(result.verified for result in results) else 1


def _perplexities(values: dict[str, float]) -> list[str]:
    return [number(values[kind], 3) for kind in ("code", "prose")]
