"""``sfp prune``: prunes an `.sfp` file further, by its stored importances."""

from __future__ import annotations

import argparse
import time
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from ..decode.opening import open_any
from ..decode.shard_index import index_name, shard_name
from ..decode.shards import ShardedFile
from ..errors import SfpError
from ..io.paths import local_model
from ..names import unmatched
from .console import bytes_words, percent, show_json
from .errors import CommandError, checked_target, local_path, path_in_errors, require_suffix
from .limit_option import add_limits, limits_of
from .model_files import open_model
from .parser import Parser, Subparsers, examples

if TYPE_CHECKING:
    from ..pruning.thresholds import Allocation, Pattern, Threshold

_DESCRIPTION = """Prunes an .sfp file further, by the importances stored in it. Needs no training data. Only
tensors with a stored importance change. Positions with an importance below a threshold are pruned; among
equal importances, those with the smallest magnitudes first. The other weights keep all their bits.

For a model in shards, the command writes new shards, OUT-00001-of-0000N.sfp, and the index
OUT.sfp.index.json. --single writes one file instead. 'sfp pack --importance', 'sfp learn' and
sfpformat.pruning write files with importances."""

_THRESHOLDS = """thresholds:
  --sparsity 0.8         prune 80 % of all positions, including those already pruned
  --threshold 2:4        keep 2 of every 4 consecutive inputs of each output, along the rows of a matrix or
                         the input channels of a kernel; a warning names tensors that this does not fit
  --threshold otsu       prune the lower of two classes of importances (Otsu); otsu-log uses their logarithms
  --threshold knee       prune importances below the knee of their sorted curve
  --threshold sigma:1    prune importances below their mean minus 1 standard deviation
  --threshold quantile:0.8   like --sparsity, but keep all importances equal to the threshold
  --threshold outliers:0.7   prune 70 % in total, less in tensors with many importances far above the mean
  --threshold rising:0.7     prune 70 % in total, more in each tensor than in the tensor before it"""

_EXAMPLES = examples(
    ("sfp prune model.sfp --sparsity 0.9 -o smaller.sfp", "prune 90 % of the model, by one threshold"),
    (
        "sfp prune model.sfp --threshold 2:4 --exempt '*head*' -o smaller.sfp",
        "prune to 2:4, except in the head",
    ),
    ("sfp prune model.sfp --sparsity 0.8 --scope tensor -o smaller.sfp", "prune 80 % of each tensor"),
)


def add_parser(subparsers: Subparsers[Parser]) -> Parser:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "prune",
        help="prune an .sfp file further, by its stored importances",
        description=_DESCRIPTION,
        epilog=f"{_THRESHOLDS}\n\n{_EXAMPLES}",
    )
    parser.add_argument("source", metavar="FILE.sfp", help="an .sfp file, an .sfp.index.json, or a folder")
    parser.add_argument("-o", "--output", metavar="OUT.sfp", required=True, help="the file to write")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--sparsity", metavar="S", type=float, help="share of positions to prune, such as 0.9")
    how.add_argument("--threshold", metavar="T", help="another threshold; the kinds are listed below")
    parser.add_argument(
        "--scope",
        choices=("model", "tensor", "row"),
        help="what one threshold applies to (default: model; for outliers and rising: tensor)",
    )
    parser.add_argument(
        "--exempt",
        metavar="GLOB",
        action="append",
        default=[],
        help="do not prune tensors with matching names",
    )
    parser.add_argument(
        "--floor",
        metavar="F",
        type=float,
        default=0.0,
        help="least share of positions that each tensor keeps (0)",
    )
    parser.add_argument("--drop-importance", action="store_true", help="do not write the importances")
    parser.add_argument("--single", action="store_true", help="write one file, even for a model in shards")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    add_limits(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand. Returns the exit code."""
    from ..pruning.repruning import reprune
    from ..pruning.thresholds import Allocation, Sparsity

    start = time.monotonic()
    require_suffix(args.output, ".sfp", what="'sfp prune'")
    threshold: Threshold | Pattern | Allocation
    threshold = Sparsity(args.sparsity) if args.threshold is None else parse_threshold(args.threshold)
    with path_in_errors(args.source):
        source = local_model(local_path(args.source, "'sfp prune'"))
    with open_model(source, limits=limits_of(args.limit)) as model:  # refuses deltas
        if model.kind != "sfp":
            raise CommandError(f"{source}: is a safetensors file; 'sfp pack' converts it to .sfp")
    target = checked_target(args.output, [source])
    with path_in_errors(source), open_any(source, limits=limits_of(args.limit)) as file:
        shards = list(file.files) if isinstance(file, ShardedFile) else [source.name]
        sources = [source.with_name(name) for name in shards]
        sharded = isinstance(file, ShardedFile) and not args.single
        if sharded:
            stem = target.with_suffix("")
            for number in range(1, len(shards) + 1):
                checked_target(stem.with_name(shard_name(stem.name, number, len(shards))), sources)
        for pattern in args.exempt:
            if not any(fnmatchcase(name, pattern) for name in file):
                raise CommandError(f"--exempt: {source}: {unmatched(pattern, file)}")
        found = reprune(
            file,
            target,
            threshold,
            scope=args.scope or ("tensor" if isinstance(threshold, Allocation) else "model"),
            exempt=args.exempt,
            floor=args.floor,
            keep_importance=not args.drop_importance,
            single=args.single,
        )
    before, after = (sum(path.stat().st_size for path in paths) for paths in (sources, found.outputs))
    written = stem.with_name(index_name(stem.name)) if sharded else target
    shares = [count / max(found.positions, 1) for count in (found.before, found.after)]
    seconds = time.monotonic() - start
    if args.json:
        show_json(
            {
                "output": str(written),
                "pruned_tensors": len(found.pruned),
                "unpruned": [{"name": name, "because": because} for name, because in found.unfit.items()],
                "positions": found.positions,
                "sparsity_before": shares[0],
                "sparsity": shares[1],
                "input_bytes": before,
                "output_bytes": after,
                "seconds": round(seconds, 3),
            }
        )
        return 0
    print(f"{source.name} → {written.name}")
    print(
        f"{len(found.pruned)} tensor{'s' * (len(found.pruned) != 1)}, "
        f"{percent(shares[0])} → {percent(shares[1])} pruned; "
        f"{bytes_words(before)} → {bytes_words(after)}; {seconds:.1f} s"
    )
    return 0


def parse_threshold(words: str) -> Threshold | Pattern | Allocation:
    """Parses a threshold of the command line.

    Raises:
        CommandError: the name is unknown, or its argument is not a number.
        OptionError: its number is out of range.
    """
    from ..pruning.allocation import Outliers, Rising
    from ..pruning.thresholds import Knee, MeanSigma, Otsu, Pattern, Quantile

    plain: dict[str, Threshold] = {"otsu": Otsu(), "otsu-log": Otsu(log=True), "knee": Knee()}
    if words in plain:
        return plain[words]
    first, colon, second = words.partition(":")
    try:
        if first == "sigma":
            return MeanSigma(float(second))
        if first == "quantile":
            return Quantile(float(second))
        if first == "outliers":
            return Outliers(float(second))
        if first == "rising":
            return Rising(float(second))
        if colon and first.isdecimal():
            return Pattern.parse(words)
    except ValueError as error:
        if isinstance(error, SfpError):
            raise
    raise CommandError(
        f"--threshold {words!r} is not one of {', '.join(plain)}, sigma:K, quantile:Q, "
        "outliers:S, rising:S, N:M"
    )


def parse_shares(words: str) -> tuple[float, ...]:
    """Parses the ``--sparsity`` of commands that accept several shares.

    Raises:
        CommandError: a share is not a number, or is not between 0 and 1.
    """
    try:
        shares = tuple(float(word) for word in words.split(","))
    except ValueError as error:
        raise CommandError(f"--sparsity {words!r} is not a list of shares such as 0.7,0.8") from error
    if not all(0 < share < 1 for share in shares):
        raise CommandError(f"--sparsity {words!r}: shares must be between 0 and 1")
    return shares
