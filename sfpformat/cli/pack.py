"""``sfp pack``: converts a safetensors checkpoint to `.sfp`."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from .. import __version__
from ..decode.shard_index import index_name
from ..encode.arguments import is_text, require_name
from ..encode.pipeline import Pipeline
from ..encode.weights import Reason, not_weights
from ..errors import OptionError
from ..io.threads import Workers, default_threads
from ..limits import Limits
from ..names import quoted
from .console import Progress, progress
from .dry import sizes_of_file
from .errors import CommandError, checked_target, path_in_errors, require_suffix
from .limit_option import add_limits, limits_of
from .model_files import Model, add_strict_index, open_model
from .outcome import Outcome, outcome
from .pack_files import Job, count_zeros, job_key, pack_file
from .pack_importances import open_importances, require_use_of_importances
from .pack_processes import pack_in_processes
from .pack_result import Result, show, without_effect
from .pack_shards import pack_shards, shard_paths
from .parser import Parser, Subparsers, examples
from .prepare import Share, bytes_of_passes, find_not_finite, shares_of_model, with_shared_bits
from .report import total
from .rules import Rules, TensorConfig
from .tensor_options import add_tensor_options, parse_like

_DESCRIPTION = """Converts a safetensors checkpoint to .sfp, lossless unless an option changes values. SRC is
a .safetensors file, a .safetensors.index.json, or a folder that contains one of these.

A checkpoint of several files becomes one shard per file, OUT-00001-of-0000N.sfp, and the index
OUT.sfp.index.json. --single writes one file instead. If the files contradict their index, the command follows
the index and prints a warning; with --strict-index it stops with an error.

Options after --like GLOB, up to the next --like, apply only to tensors whose names match GLOB. If two rules
set the same option of a tensor, the later rule wins. The command replaces old output files only after it has
written all new ones. To resume an interrupted pack, run the same command again.

Weights that were pruned by multiplying with a mask, as torch.nn.utils.prune does, contain both +0 and -0. The
command keeps the signs of zeros, which costs about one bit per zero. --zeros positive writes +0 for -0; the
summary shows the saving if it exceeds 1 %.

F4 and F6 tensors have no .sfp dtype and are stored as bytes (U8). 'sfp unpack' restores them."""

_EXAMPLES = examples(
    ("sfp pack model.safetensors -o model.sfp", "lossless"),
    (
        "sfp pack checkpoint/ -o model.sfp --prune 0.5 --scope model",
        "prune the half of all weights that has the smallest magnitudes",
    ),
    (
        "sfp pack m.safetensors -o m.sfp --bits 4 --like '*embed*' --bits 6 --like 'lm_head*' --lossless",
        "4 bits per weight, 6 in embeddings; lm_head stays lossless",
    ),
    (
        "sfp pack m.safetensors -o m.sfp --prune 0.5 --budget 3 --dry-run",
        "show the sizes at 3 bits per position, masks included; write nothing",
    ),
)


def add_parser(subparsers: Subparsers[Parser]) -> Parser:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "pack",
        help="convert a safetensors checkpoint to .sfp",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        usage="sfp pack SRC -o OUT.sfp [options] [--like GLOB options]...",
    )
    parser.add_argument("source", metavar="SRC", help="the checkpoint to convert")
    parser.add_argument("-o", "--output", metavar="OUT.sfp", required=True, help="the file to write")
    parser.add_argument(
        "--single", action="store_true", help="write one file, even if the checkpoint has several"
    )
    parser.add_argument(
        "--keep",
        metavar="GLOB",
        action="append",
        default=[],
        help="keep tensors with matching names lossless, whatever other options change",
    )
    parser.add_argument(
        "--like", metavar="GLOB", help="apply the options that follow to tensors with matching names"
    )
    parser.add_argument(
        "--importance",
        metavar="FILE",
        help="a safetensors file with an importance for each weight, under the names of the tensors",
    )
    parser.add_argument(
        "--metadata",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="add metadata; replaces the checkpoint's value of the same key",
    )
    parser.add_argument("--no-metadata", action="store_true", help="do not copy the checkpoint's metadata")
    add_strict_index(parser)
    parser.add_argument(
        "--jobs",
        metavar="N",
        type=_count,
        default=1,
        help="write N shards at a time, each in a process of its own; default: 1",
    )
    parser.add_argument(
        "--verify", action="store_true", help="decode the output and compare it with the input"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="encode everything and show the sizes, but write nothing"
    )
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    add_limits(parser, "change a limit of readers; readers of the file then need the same value")
    add_tensor_options(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand. Returns the exit code."""
    start = time.monotonic()
    if args.dry_run and args.verify:
        raise CommandError("--verify checks a written file, but --dry-run writes none; omit one of them")
    with prepared(args) as found:
        if args.jobs > 1 and (args.dry_run or len(found.outputs) == 1):
            raise CommandError(
                "--jobs writes several shards at a time, but this pack writes at most one file"
            )
        result = _result(found.job, found.asked, found.target, found.outputs, args)
    unfit = {name: config.unfit for name, config in found.asked.items() if config.unfit}
    idle = list(without_effect(found.rules, found.asked, result))
    show(args, found.job.model, result, found.lossless, unfit, idle, time.monotonic() - start)
    return 1 if result.faults else 0


class Prepared(NamedTuple):
    """What a pack needs before it writes.

    Attributes:
        job: the job.
        rules: the rules of the command.
        asked: tensor name -> its configuration, without the shares of the model's budget.
        lossless: tensor name -> why it stays lossless.
        target: the path given for the output.
        outputs: the paths of the files.
    """

    job: Job
    rules: Rules
    asked: dict[str, TensorConfig]
    lossless: dict[str, Reason]
    target: Path
    outputs: list[Path]


@contextmanager
def prepared(args: argparse.Namespace, number: int | None = None) -> Iterator[Prepared]:
    """Opens the checkpoint, checks the options, and computes what depends on the whole model.

    Args:
        args: the arguments of the command.
        number: the number of the only shard that will be written, whose tensors alone are examined for
            infinities, unless others matter for it. None examines all.

    Raises:
        CommandError, OptionError: an argument is wrong.
        OSError: the checkpoint cannot be read.
    """
    require_suffix(args.output, ".sfp", what="'sfp pack'")
    rules = Rules(args.tensor_options, [parse_like(words) for words in args.likes], args.keep)
    metadata = _metadata(args.metadata)
    limits = limits_of(args.limit)
    with open_model(args.source, kind="safetensors", strict_index=args.strict_index) as model:
        if model.kind != "safetensors":
            raise CommandError(
                f"{args.source}: is already an .sfp file; 'sfp unpack' converts it to safetensors"
            )
        model.keeps_metadata = not args.no_metadata
        target = checked_target(args.output, model.paths())
        outputs = _outputs(model, target, single=args.single)
        if number is not None and not 1 <= number <= len(outputs):
            raise OptionError(f"number is {number!r}, but the checkpoint has {len(outputs)} shards, from 1")
        _require_storable(model, metadata, limits)
        named = rules.with_aliases(model.specs, model.aliases())
        own = None if number is None or len(outputs) == 1 else list(model.files)[number - 1]
        first, configs, lossless = _configs(named, model, own)
        importances = open_importances(args.importance, model)
        try:
            require_use_of_importances(args.importance, rules, configs, importances)
            job = _job(model, first, configs, importances, metadata, limits)
            yield Prepared(job, rules, configs, lossless, target, outputs)
        finally:
            if importances is not None:
                importances.close()


def _outputs(model: Model, target: Path, *, single: bool) -> list[Path]:
    """Returns the paths of the output files: one, or without ``single`` one per file of the checkpoint.

    Raises:
        CommandError: one of these files, or the index, cannot be written.
    """
    if single or len(model.files) == 1:
        return [target]
    stem = target.with_suffix("")
    shards = shard_paths(stem, len(model.files))
    for path in (*shards, stem.with_name(index_name(stem.name))):
        checked_target(path, model.paths())
    return shards


def _result(
    job: Job, asked: dict[str, TensorConfig], target: Path, outputs: list[Path], args: argparse.Namespace
) -> Result:
    """Encodes the tensors and measures the quantised ones. Writes the files unless ``--dry-run`` is given."""
    if args.dry_run:
        outcomes, size = _dry_run(job, asked, sharded=len(outputs) > 1)
        resumed, faults = 0, list[str]()
    else:
        resumed = _write(job, target, args.jobs, sharded=len(outputs) > 1)
        outcomes, size, faults = _outcomes(job, asked, outputs, verify=args.verify)
    count_zeros(job, [each.report.entry for each in outcomes])
    totals = total((each.report for each in outcomes), size)
    return Result(outputs, resumed, outcomes, totals, faults, job.zeros.values())


def _configs(
    rules: Rules, model: Model, own: str | None
) -> tuple[dict[str, TensorConfig], dict[str, TensorConfig], dict[str, Reason]]:
    """Returns the configuration of each tensor, and the reason for each that stays lossless.

    Reads all tensors that are changed; only those of the file ``own``, unless tensors depend on each other.

    Returns:
        The configurations that the options and the names give; the same after a look at the values; reasons.
    """
    specs = model.specs.values()
    excluded = not_weights(specs) if rules.changes_values or rules.changes_signs else {}
    first = configs = rules.configs(specs, excluded)
    if (
        own is None
        or bytes_of_passes(model, configs)
        or any(config.shares_bits for config in configs.values())
    ):
        examined = configs
    else:
        examined = {name: configs[name] for name in model.names_in(own)}
    size = sum(model.specs[name].nbytes for name, config in examined.items() if not config.lossless)
    if size:
        with progress(size, "infinities") as shown, path_in_errors(model.path):
            not_finite = find_not_finite(model, examined, shown.advance)
        if not_finite:
            excluded = {**excluded, **not_finite}
            configs = rules.configs(specs, excluded)
    return first, configs, rules.why_lossless(specs, configs, excluded)


def _count(text: str) -> int:
    """Parses a whole number of at least 1."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _metadata(pairs: list[str]) -> dict[str, str]:
    out = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise CommandError(f"--metadata {pair!r} is not KEY=VALUE")
        if key.startswith("sfp."):
            raise CommandError(f"--metadata {key!r}: keys that begin with 'sfp.' are reserved for the format")
        out[key] = value
    return out


def _require_storable(model: Model, metadata: dict[str, str], limits: Limits) -> None:
    """Checks that `.sfp` and its readers support all names, shapes and metadata.

    Called before anything is written.

    Args:
        model: the checkpoint.
        metadata: the caller's metadata, which override those of the checkpoint.
        limits: the limits of readers.

    Raises:
        CommandError: a name, a shape or a metadata entry is not supported.
    """
    with path_in_errors(model.path):
        for name, spec in model.specs.items():
            require_name(name, limits)
            limits.require_written("rank", len(spec.shape), f"tensor {quoted(name)}")
    for file_name in model.files:
        for key, value in model.metadata_of(file_name).items():
            if is_text(key) and (is_text(value) or key in metadata):
                continue
            remedy = (
                f"replace it with --metadata {key}=VALUE"
                if is_text(key)
                else "omit all metadata with --no-metadata"
            )
            raise CommandError(
                f"{model.path}: metadata {quoted(key)}: .sfp requires UTF-8 without U+0000; {remedy}"
            )


def _job(
    model: Model,
    first: dict[str, TensorConfig],
    configs: dict[str, TensorConfig],
    importances: Model | None,
    metadata: dict[str, str],
    limits: Limits,
) -> Job:
    options = [
        __version__,
        model.keeps_metadata,
        metadata,
        dataclasses.asdict(limits),
        {name: repr(config) for name, config in first.items()},  # the values are those of the sources
    ]
    key = job_key(model, importances, options)
    passes = bytes_of_passes(model, configs)
    shares: dict[str, Share] = {}
    if passes:
        with progress(passes, "magnitudes") as shown:
            shares = shares_of_model(model, configs, shown.advance)
    sharing = sum(model.specs[name].nbytes for name, t in configs.items() if t.shares_bits)
    if sharing:
        with progress(sharing, "bits") as shown:
            configs = with_shared_bits(model, configs, shares, importances, shown.advance)
    return Job(model, configs, shares, importances, metadata, key, limits)


def _dry_run(job: Job, asked: dict[str, TensorConfig], *, sharded: bool) -> tuple[list[Outcome], int]:
    """Returns the outcome of each tensor, and the size in bytes of all files that would be written."""
    model = job.model
    parts = [(list(model.specs), model.metadata())]
    if sharded:
        parts = [(model.names_in(name), model.metadata_of(name)) for name in model.files]
    outcomes, size = list[Outcome](), 0
    with progress(model.nbytes, "encode") as shown:
        for names, metadata in parts:
            found, more = sizes_of_file(job, asked, names, metadata, shown)
            outcomes += found
            size += more
    return outcomes, size


def _write(job: Job, target: Path, jobs: int, *, sharded: bool) -> int:
    """Writes the files. Returns the number of tensors that an earlier run had written."""
    with progress(job.model.nbytes, target.name) as shown:
        if sharded and jobs > 1:
            return pack_in_processes(job, target.with_suffix(""), jobs, shown)
        if sharded:
            return pack_shards(job, target.with_suffix(""), shown)
        return pack_file(job, list(job.model.specs), job.model.metadata(), target, shown)


def _outcomes(
    job: Job, asked: dict[str, TensorConfig], outputs: list[Path], *, verify: bool
) -> tuple[list[Outcome], int, list[str]]:
    """Measures what was written.

    Returns:
        The outcome of each tensor, the size of all files in bytes, and with ``verify`` the faults found.
    """
    from ..decode.validate import validate

    outcomes, size, faults = list[Outcome](), 0, list[str]()
    with progress(job.model.nbytes, "verify" if verify else "measure") as shown:
        for path in outputs:
            if verify:
                faults += [f"{path}: {fault}" for fault in validate(path, limits=job.limits).faults]
            with path_in_errors(path), Model(path, limits=job.limits) as packed:
                size += packed.stored_bytes
                found = _outcomes_of_file(job, asked, packed, shown, compare=verify)
                outcomes += found
                faults += [f"{path}: {words}" for each in found for words in each.faults]
    return outcomes, size, faults


def _outcomes_of_file(
    job: Job, asked: dict[str, TensorConfig], packed: Model, shown: Progress, *, compare: bool
) -> list[Outcome]:
    """Measures the tensors of a written file, several at a time."""
    outcomes, workers = list[Outcome](), Workers(default_threads())
    pipeline = Pipeline(workers)

    def finish(found: Outcome) -> None:
        outcomes.append(found)
        shown.advance(packed.specs[found.name].nbytes)

    try:
        for name, spec in packed.specs.items():
            shown.at(name)
            work = partial(outcome, job, asked[name], packed.file_of(name), name, compare=compare)
            pipeline.put(work, 2 * spec.nbytes, finish)  # the tensor before and after
        pipeline.drain()
    finally:
        workers.stop()
    return outcomes
