"""``sfp learn``: learns the importance of the weights of a transformers model, and writes it pruned."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SfpWarning
from .console import bytes_words, number, percent, progress, show_json, show_table
from .errors import CommandError, checked_target, require_file, require_suffix
from .parser import Parser, Subparsers, examples

if TYPE_CHECKING:
    from ..pruning.processes import Processes
    from ..pruning.texts import TextData
    from ..pruning.thresholds import Pattern, Sparsity

_DESCRIPTION = """Learns from text which weights of a model matter, prunes those that matter least, and writes
the survivors and their importances as one .sfp file. Survivors keep their values. FOLDER is a model that
transformers saved, with its tokenizer: a causal or masked language model, or an encoder.

Two of eight windows of the text are held out. One is used to choose how far to move from the importance that
learning starts with, so that the result is not worse than the start on it. The other is used to measure the
perplexity in the table, or for an encoder the rank correlation of its sentence similarities with those of the
dense model. Needs torch and transformers.

Several processes, which torchrun starts, learn together, each from its share of the batches. Each holds the
whole model and needs the same files. The first process writes OUT.sfp and prints the table."""


def add_parser(subparsers: Subparsers[Parser]) -> Parser:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "learn",
        help="learn which weights of a transformers model matter, and prune it",
        description=_DESCRIPTION,
        epilog=examples(
            ("sfp learn model/ --data texts/*.txt --sparsity 0.6 -o pruned.sfp", "100 steps of 512 tokens"),
            (
                "sfp learn model/ --data *.jsonl --sparsity 0.5 --minutes 30 --resume state.pt -o pruned.sfp",
                "at most 30 minutes of learning; an interrupted run resumes from state.pt",
            ),
            (
                "torchrun --nproc-per-node 8 -m sfpformat.cli learn model/ "
                "--data *.txt --sparsity 0.6 -o out.sfp",
                "eight processes; with --device cuda, eight GPUs",
            ),
        ),
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="a model as transformers saves it")
    parser.add_argument(
        "--data", metavar="FILE", nargs="+", required=True, help="text, or .jsonl with a 'text' in each line"
    )
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--sparsity", metavar="S", type=float, help="the share of weights to prune")
    how.add_argument(
        "--pattern", metavar="N:M", help="keep N of every M consecutive inputs of each output, such as 2:4"
    )
    parser.add_argument("-o", "--output", metavar="OUT.sfp", required=True, help="the file to write")
    parser.add_argument("--steps", metavar="N", type=int, default=100, help="steps of learning (100)")
    parser.add_argument(
        "--minutes",
        metavar="M",
        type=float,
        help="time limit of learning; statistics and the selection of the result come on top",
    )
    parser.add_argument(
        "--resume", metavar="STATE", help="a checkpoint: learning resumes from it if it exists"
    )
    parser.add_argument("--window", metavar="N", type=int, default=256, help="tokens in a window (256)")
    parser.add_argument("--batch", metavar="N", type=int, default=2, help="windows in a step (2)")
    parser.add_argument(
        "--batches",
        metavar="N",
        type=int,
        help="batches in a step, on all processes together (one on each process)",
    )
    parser.add_argument(
        "--calibration", metavar="N", type=int, default=64, help="windows for the statistics (64)"
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="seed for the order of windows (0)")
    parser.add_argument("--threads", metavar="N", type=int, help="number of threads of torch")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the model runs (cpu)")
    parser.add_argument("--json", action="store_true", help="the summary as JSON")
    return parser


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand, on each of its processes. Returns the exit code, the same on all."""
    for name in ("torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            raise CommandError(f"'sfp learn' needs {name}: pip install {name}")
    from ..pruning.launch import launched
    from ..pruning.processes import Processes

    with launched(args.device) as (group, device), warnings.catch_warnings():
        processes = Processes(group, device)
        if processes.rank:  # all processes have the same warnings
            warnings.simplefilter("ignore", SfpWarning)
        summary = _learned(args, processes, group, device)
        processes.led(lambda: _shown(summary, args.json))
    return 0


def _learned(args: argparse.Namespace, processes: Processes, group: Any, device: Any) -> dict[str, Any]:
    """Learns on all processes. The first one writes the file and measures it.

    Returns:
        The summary; empty on the other processes.
    """
    import torch

    from ..pruning import Settings, Sparsity, fisher, learn_importance, statistics
    from ..pruning.texts import read_texts, text_data

    transformers: Any = importlib.import_module("transformers")  # its functions have no types
    transformers.utils.logging.disable_progress_bar()
    begun = time.monotonic()

    def prepared() -> tuple[Any, Any, Any, Path]:
        """Returns what loads the model, the data, the dense model, and the file to write."""
        _require(args, processes.world)
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        kind, model_class = _kind_of(args.folder, transformers)
        target = Path(args.output)
        if processes.rank == 0:  # other machines may not have its folder
            target = checked_target(target, [Path(path) for path in args.data])
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.folder)
        data = text_data(
            read_texts(args.data), tokenizer, kind, window=args.window, batch=args.batch, seed=args.seed
        )

        # Learning computes in float32; the output keeps the dtypes of the model.
        def loaded(dtype: Any) -> Any:
            return model_class.from_pretrained(args.folder, dtype=dtype).eval()

        return loaded, data.to(device), loaded(torch.float32).to(device), target

    loaded, data, dense, target = processes.agreed(prepared)
    state = None if args.resume is None else Path(args.resume)
    kept = None if state is None else state.with_name(f"{state.name}.statistics")
    first = processes.rank == 0
    with progress(args.calibration, "statistics", steps=True, show=first) as shown:
        found = statistics(
            dense,
            data.learned_from,
            task=data.task,
            batches=args.calibration,
            single=data.measure == "perplexity",
            checkpoint=kept,
            progress=lambda batch, loss: shown.advance(1),
            group=group,
        )
    start = fisher(dense, found)
    del found
    threshold = Sparsity(args.sparsity) if args.pattern is None else _pattern_of(args.pattern)
    settings = Settings(
        steps=args.steps,
        batches=(args.batches or processes.world) // processes.world,
        minutes=args.minutes,
        method="levels",
        seed=args.seed,
    )
    with progress(args.steps, "learning", steps=True, show=first) as shown:
        learned = learn_importance(
            dense,
            data.learned_from,
            threshold.share if isinstance(threshold, Sparsity) else threshold,
            task=data.task,
            settings=settings,
            start=start,
            held_out=data.held_out[: settings.held_out],
            checkpoint=state,
            every=10,
            progress=lambda step, loss: shown.advance(1),
            chosen=lambda done, total: shown.at(f"selection, pass {done} of at most {total}"),
            group=group,
        )
    choice = learned.choice
    assert choice is not None
    summary: dict[str, Any] = {}

    def rest() -> Iterator[None]:
        measured, lost, positions = yield from _written(
            loaded, dense, start, learned.importances, threshold, data, target
        )
        summary.update(
            {
                "output": str(target),
                "kind": _kind_of(args.folder, transformers)[0],
                "measure": data.measure,
                **{name.replace(" ", "_").replace(",", ""): value for name, value in measured.items()},
                "sparsity": lost / max(positions, 1),
                "steps": len(learned.history),
                "processes": processes.world,
                "held_out_start": choice.start[0],
                "held_out_learned": choice.chosen[0],
                "shares": choice.shares,
                "model_bytes": _weights_bytes(args.folder),
                "output_bytes": target.stat().st_size,
                "seconds": round(time.monotonic() - begun, 3),
                "measured": measured,
            }
        )

    processes.led(rest)
    return summary


def _written(
    loaded: Callable[[Any], Any],
    dense: Any,
    start: Mapping[str, Any],
    importances: Mapping[str, Any],
    threshold: Sparsity | Pattern,
    data: TextData,
    target: Path,
) -> Generator[None, None, tuple[dict[str, float], int, int]]:
    """Prunes the model, writes it, and measures what the file restores. Yields after each part of the work.

    Args:
        loaded: returns the dense model with weights of a dtype.
        dense: the dense model, on the device of the data.
        start: the importances that learning started with.
        importances: the learned ones.
        threshold: what to prune.
        data: batches to measure on.
        target: the file to write.

    Returns:
        What was measured by name, the number of pruned weights, and that of all weights in masks.
    """
    import torch

    from ..pruning import pack, prune
    from ..torch import load_model

    device = next(dense.parameters()).device
    pruned = loaded("auto")
    masks = prune(pruned, importances, threshold)
    yield
    pack(pruned, target, masks, importances=importances)
    del pruned
    yield
    restored = loaded("auto")
    for parameter in restored.parameters():  # a parameter that the file does not fill then shows as NaN
        parameter.data.fill_(float("nan"))
    load_model(restored, target)
    yield
    restored.float().to(device)
    by_start = loaded(torch.float32).to(device)
    prune(by_start, {name: start[name] for name in importances}, threshold)
    yield
    measured = {}
    for name, model in {
        "dense": dense,
        "pruned by Fisher": by_start,
        "pruned as learned, loaded from the file": restored,
    }.items():
        measured[name] = yield from data.evaluation(model, dense)
    return measured, sum(int((~m).sum()) for m in masks.values()), sum(m.numel() for m in masks.values())


def _shown(summary: dict[str, Any], as_json: bool) -> Iterator[None]:
    """Prints the summary."""
    measured = summary.pop("measured")
    if as_json:
        show_json(summary)
    else:
        sizes = [bytes_words(summary["model_bytes"]), "", bytes_words(summary["output_bytes"])]
        rows = [
            [name, percent(0.0 if name == "dense" else summary["sparsity"]), number(value, 3), size]
            for (name, value), size in zip(measured.items(), sizes, strict=True)
        ]
        show_table(["", "pruned", summary["measure"], "size"], rows)
    yield


def _require(args: argparse.Namespace, processes: int) -> None:
    """Checks the arguments before any work is done.

    Args:
        args: the arguments.
        processes: the number of processes.

    Raises:
        CommandError: an argument is invalid.
        OSError: a data file is missing.
    """
    require_suffix(args.output, ".sfp", what="'sfp learn'")
    if not args.folder.is_dir() or not (args.folder / "config.json").is_file():
        raise CommandError(
            f"{args.folder}: is no folder with a config.json; name a model that transformers saved"
        )
    if args.pattern is not None:
        _pattern_of(args.pattern)
    elif not 0 < args.sparsity < 1:
        raise CommandError(f"--sparsity is {args.sparsity}, must be between 0 and 1")
    for name in ("steps", "window", "batch", "batches", "calibration", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise CommandError(f"--{name} is {getattr(args, name)}, must be at least 1")
    if args.batches is not None and args.batches % processes:
        raise CommandError(f"--batches is {args.batches}, must be a multiple of the {processes} processes")
    if args.minutes is not None and not args.minutes > 0:
        raise CommandError(f"--minutes is {args.minutes}, must be above 0")
    for path in args.data:
        require_file(path)


def _pattern_of(words: str) -> Pattern:
    """Parses the value of ``--pattern``.

    Raises:
        CommandError: it is malformed.
        OptionError: its numbers are out of range.
    """
    from ..pruning.thresholds import Pattern

    keep, _, of = words.partition(":")
    if not (keep.isdecimal() and of.isdecimal()):
        raise CommandError(f"--pattern {words!r} is not N:M, such as 2:4")
    return Pattern(int(keep), int(of))


def _kind_of(folder: Path, transformers: Any) -> tuple[str, Any]:
    """Returns the kind of a model (`texts.KINDS`), and the class of transformers that loads it.

    Raises:
        CommandError: it is neither a language model nor an encoder.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names: Sequence[str] = config.get("architectures") or []
    name = names[0] if names else ""
    if config.get("is_encoder_decoder"):
        raise CommandError(
            f"{folder} is an encoder-decoder model ({name}), which 'sfp learn' does not "
            "support; use sfpformat.pruning"
        )
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal", transformers.AutoModelForCausalLM
    if name.endswith("ForMaskedLM"):
        return "masked", transformers.AutoModelForMaskedLM
    if name.endswith("Model"):
        return "encoder", transformers.AutoModel
    raise CommandError(
        f"{folder} is a {name or 'model without an architecture'}, no language model and no encoder without "
        "a head; use sfpformat.pruning in Python"
    )


def _weights_bytes(folder: Path) -> int:
    """Returns the total size of the model's weight files in bytes."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
