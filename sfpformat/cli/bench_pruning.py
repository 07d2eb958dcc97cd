"""``sfp bench pruning``: measures pruning by each method on the small model of sfp demo."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .console import progress, show_json, show_table
from .errors import CommandError, checked_target, require_suffix
from .prune import parse_shares

NAME = "pruning"
WORDS = """sfp bench pruning prunes the linear layers of the model of sfp demo by each method, and measures
the perplexity on held-out code and prose. It needs torch. For further seeds it first trains models, which
takes most of the time, and caches them in ~/.cache/sfpformat, or in the folder that SFPFORMAT_CACHE names.
All methods together take about 10 minutes per seed and sparsity on one core. With --rows, an interrupted run
resumes. --json prints a list of objects; sfpformat/bench/pruning_rows.py describes their fields."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this benchmark. The namespace has only those that the user gives."""
    group = parser.add_argument_group("options of sfp bench pruning")

    def add(name: str, kind: Any, metavar: str, words: str) -> None:
        group.add_argument(name, type=kind, metavar=metavar, help=words, default=argparse.SUPPRESS)

    add("--sparsity", str, "S,...", "shares of the linear layers' weights to prune (0.7,0.8)")
    add("--seeds", int, "N", "number of seeds (3); 1 measures only the model in the package")
    add("--methods", str, "NAMES", "methods to measure (default: all)")
    add("--steps", int, "N", "number of steps of learning, and of tuning survivors (200)")
    add("--model-steps", int, "N", "number of steps of training the models of further seeds (3000)")
    add(
        "--rows",
        Path,
        "FILE",
        "append each row to this file as a line of JSON; skip rows that the file has",
    )


_OPTIONS = ("sparsity", "seeds", "methods", "steps", "model_steps", "rows")


def require_absent(args: argparse.Namespace) -> None:
    """Rejects the options of this benchmark in other runs of ``sfp bench``.

    Raises:
        CommandError: one of them was given.
    """
    for name in _OPTIONS:
        if hasattr(args, name):
            raise CommandError(f"--{name.replace('_', '-')} is an option of 'sfp bench {NAME}' only")


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark. Returns the exit code."""
    for name in ("only", "dtype", "device", "engines", "presets", "plot", "strict_index"):
        if getattr(args, name) not in (None, False):
            raise CommandError(f"'sfp bench {NAME}' does not accept --{name.replace('_', '-')}")
    try:
        import torch
    except ImportError as error:
        raise CommandError(f"'sfp bench {NAME}' needs torch: pip install 'sfpformat[torch]'") from error
    from ..bench.pruning import Plan, rows
    from ..bench.pruning_rows import summary
    from ..demo.methods import METHODS

    if hasattr(args, "rows"):
        require_suffix(args.rows, ".jsonl", ".json", what="--rows")
    given = {name: getattr(args, name) for name in _OPTIONS if hasattr(args, name)}
    if "methods" in given:
        given["methods"] = _methods(given["methods"], tuple(METHODS))
    if "sparsity" in given:
        given["sparsities"] = parse_shares(given.pop("sparsity"))
    for name in ("seeds", "steps", "model_steps"):
        if given.get(name, 1) < 1:
            raise CommandError(f"--{name.replace('_', '-')} is {given[name]}, must be at least 1")
    kept = None if "rows" not in given else checked_target(given.pop("rows"), [])
    plan = Plan(**given, threads=args.threads or torch.get_num_threads())
    with progress(plan.amount(), NAME, steps=True) as shown:
        found = list(rows(plan, shown.advance, shown.at, kept))
    if args.json:
        show_json(found)
        return 0
    header, table = summary(found)
    show_table(header, table, left=2)
    print(
        "\ncode, prose: perplexity per character on held-out text: mean, least and greatest over the seeds."
        "\nexcess: the rise above the dense model's perplexity, over that of Fisher's mask. seconds: time of"
        "\npruning, with its calibration and learning."
    )
    return 0


def _methods(words: str, known: tuple[str, ...]) -> tuple[str, ...]:
    names = [word.strip() for word in words.split(",") if word.strip()]
    for name in names:
        if name not in known:
            raise CommandError(f"unknown method {name!r}; choose from {', '.join(known)}")
    if not names:
        raise CommandError(f"the list of methods is empty; choose from {', '.join(known)}")
    return tuple(names)
