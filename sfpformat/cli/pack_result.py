"""Prints the result of ``sfp pack``, as a summary or as JSON."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..coding.quantisers import Exact
from ..decode.shard_index import index_name
from ..encode.weights import Kind, Reason
from ..names import listed
from ..pruning.masks import reasons
from .console import bytes_words, number, percent, printable, show_json, show_table
from .model_files import Model
from .outcome import Group, Outcome, groups, lines
from .pack_files import NegativeZeros
from .report import Totals
from .rules import Rules, TensorConfig

# The summary mentions the cost of -0 if it exceeds this fraction of the output, as a divisor: 1 %.
_WORTH_SAYING = 100


@dataclass(frozen=True)
class Result:
    """The result of a pack or of a dry run.

    Attributes:
        outputs: the paths of the output files; a dry run does not write them.
        resumed: number of tensors that an earlier run had written.
        outcomes: the outcomes of all tensors.
        totals: sums over all tensors and files.
        faults: descriptions of the faults that ``--verify`` found.
        zeros: the counts of -0, per tensor.
    """

    outputs: list[Path]
    resumed: int
    outcomes: list[Outcome]
    totals: Totals
    faults: list[str]
    zeros: Collection[NegativeZeros]


def show(
    args: argparse.Namespace,
    model: Model,
    result: Result,
    lossless: dict[str, Reason],
    unfit: dict[str, str],
    idle: list[tuple[str, str]],
    seconds: float,
) -> None:
    """Prints the result, as JSON with ``--json``.

    Args:
        args: the parsed arguments of the command.
        model: the checkpoint.
        result: the result of the pack or of the dry run.
        lossless: name -> why the tensor stayed lossless.
        unfit: name -> why the pattern does not fit the tensor.
        idle: the result of `without_effect`.
        seconds: how long the command took.
    """
    size, outputs, totals, faults = model.stored_bytes, result.outputs, result.totals, result.faults
    zeros = result.zeros
    if args.json:
        show_json(
            {
                "outputs": [str(path) for path in outputs],
                "input_bytes": size,
                "output_bytes": totals.file_bytes,
                "ratio": size / totals.file_bytes,
                "bits_per_weight": totals.bits_per_weight,
                "sparsity": totals.sparsity,
                "stored_zeros": totals.stored_zeros,
                "negative_zeros": {
                    "kept": sum(each.number for each in zeros if not each.positive),
                    "made_positive": sum(each.number for each in zeros if each.positive),
                    "saving_bytes": sum(each.saving for each in zeros),
                },
                "tensors": totals.tensors,
                "resumed_tensors": result.resumed,
                "dry_run": args.dry_run,
                "quantised": [group.to_json() for group in groups(result.outcomes, quantised=True)],
                "pruned_or_cast": [group.to_json() for group in groups(result.outcomes, quantised=False)],
                "kept_lossless": [each.name for each in result.outcomes if each.kept_lossless],
                **({"sizes": [_sizes(each) for each in result.outcomes]} if args.dry_run else {}),
                "lossless": [
                    {"name": name, "kind": reason.kind.name.lower(), "because": reason.because}
                    for name, reason in lossless.items()
                ],
                "unpruned": [{"name": name, "because": because} for name, because in unfit.items()],
                "without_effect": [{"option": option, "because": why} for option, why in idle],
                "verified": not faults if args.verify else None,
                "faults": faults,
                "seconds": round(seconds, 3),
            }
        )
        return
    for words in faults:
        print(words)
    if args.dry_run:
        show_table(_SIZES, [_row(each) for each in result.outcomes], 4)
    if result.resumed:
        print(f"resumed after {result.resumed} of {totals.tensors} tensors")
    written = outputs[0].name if len(outputs) == 1 else f"{len(outputs)} shards, {_index(outputs[0])}"
    print(f"{model.path.name} → {written}{', not written' if args.dry_run else ''}")
    print(
        f"{bytes_words(size)} → {bytes_words(totals.file_bytes)}, ratio {size / totals.file_bytes:.2f}; "
        f"{number(totals.bits_per_weight, 3)} bits per weight, {percent(totals.sparsity)} pruned; "
        f"{seconds:.1f} s{'; verified' if args.verify and not faults else ''}"
    )
    for line in lines(result.outcomes):
        print(printable(line))
    for line in _about_zeros(totals, zeros):
        print(line)
    for option, why in idle:
        print(f"{option} had no effect: {why}")
    if unfit:
        print(printable(f"{len(unfit):,} not pruned because the pattern does not fit: {reasons(unfit)}"))
    for line in _by_kind(lossless):
        print(printable(line))


def without_effect(
    rules: Rules, configs: Mapping[str, TensorConfig], result: Result
) -> Iterator[tuple[str, str]]:
    """Yields options that are given but change no tensor of the result, each with the reason."""
    entries = [each.report.entry for each in result.outcomes]
    streams = {entry.name: entry.fingerprints for entry in entries if entry.fingerprints is not None}
    made = [each.number for each in result.zeros if each.positive]
    if made and not any(made):
        yield "--zeros positive", "no weight is -0"
    if rules.gives("window") and not any(
        streams[name].table.window is not None for name in streams if configs[name].options.window is not None
    ):
        yield "--window", "in every tensor too many levels are outside of the windows, or it is stored raw"
    if rules.gives("mantissa_bits") and not any(
        isinstance(streams[name].quantiser, Exact)
        for name in streams
        if configs[name].options.mantissa_bits is not None
    ):
        yield "--mantissa-bits", "no tensor stores its weights as bit patterns in classes"


_SIZES = (
    "tensor",
    "dtype",
    "shape",
    "requested",
    "pruned",
    "bits/survivor",
    "bits/position",
    "error dB",
    "bytes",
)


def _sizes(each: Outcome) -> dict[str, object]:
    """Returns the figures of one tensor of a dry run as JSON values."""
    alone, entry = Group(each.asked, [each]), each.report.entry
    return {
        "name": each.name,
        "dtype": entry.dtype.name,
        "shape": list(entry.shape),
        "asked": each.asked,
        "quantised": each.is_quantised,
        "sparsity": each.report.sparsity,
        "bits_per_survivor": alone.bits_per_survivor,
        "bits_per_position": alone.bits_per_position,
        "error_db": alone.error_db,
        "total_error_db": alone.total_error_db,
        "stored_bytes": entry.stored_bytes,
    }


def _row(each: Outcome) -> list[str]:
    alone, entry = Group(each.asked, [each]), each.report.entry
    asked = f"{each.asked} (not quantised)" if each.kept_lossless else each.asked or "lossless"
    return [
        each.name,
        entry.dtype.name,
        "×".join(map(str, entry.shape)),
        asked,
        percent(each.report.sparsity),
        number(alone.bits_per_survivor, 3),
        number(alone.bits_per_position, 3),
        number(alone.total_error_db),
        f"{entry.stored_bytes:,}",
    ]


def _about_zeros(totals: Totals, zeros: Collection[NegativeZeros]) -> Iterator[str]:
    """Yields summary lines about -0: how many became +0, and what ``--zeros positive`` would save."""
    made = [each.number for each in zeros if each.positive]
    tensors = sum(number > 0 for number in made)
    if tensors:
        yield f"{sum(made):,} weights of {tensors:,} tensor{'s' * (tensors != 1)} changed from -0 to +0"
    saving = sum(each.saving for each in zeros)
    if saving * _WORTH_SAYING > totals.file_bytes:
        costly = [each for each in zeros if each.saving]
        count = sum(each.number for each in costly)
        yield (
            f"{percent(count / totals.positions)} of all weights are -0, in {len(costly):,} "
            f"tensor{'s' * (len(costly) != 1)}: --zeros positive writes them as +0 and saves about "
            f"{bytes_words(saving)} ({percent(saving / totals.file_bytes)})"
        )


def _by_kind(lossless: dict[str, Reason]) -> Iterator[str]:
    """Yields one line for each reason why tensors stayed lossless, with some of their names."""
    by_kind: dict[Kind, list[str]] = {}
    for name, reason in lossless.items():
        if reason.kind is Kind.PATTERN:
            continue  # `show` already lists these
        by_kind.setdefault(reason.kind, []).append(name)
    for kind in Kind:
        names = by_kind.get(kind, [])
        if not names:
            continue
        yield f"{len(names):,} lossless, {kind.value}: {listed(names, 3)}"


def _index(shard: Path) -> str:
    return index_name(shard.name.rsplit("-", 3)[0])
