"""``sfp learn``: learns the importance of the weights of a transformers model, and prunes the model."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import OptionError, SfpWarning
from .console import Progress, bytes_words, number, percent, progress, show_json, show_table
from .errors import CommandError, checked_target, require_file, require_suffix
from .parser import Parser, Subparsers, examples

if TYPE_CHECKING:
    from ..pruning.processes import Processes
    from ..pruning.texts import TextData
    from ..pruning.thresholds import Pattern, Sparsity

_DESCRIPTION = """Learns from text how important each weight of a model is, prunes the least important
weights, and writes the other weights and their importances to one .sfp file. Weights that are not pruned keep
their values. FOLDER contains a model and its tokenizer, as transformers saves them: a causal or masked
language model, or an encoder.

Of every eight windows of the text, six serve for learning, one for selecting the result, and one for the
final measurement. On the windows for selecting, the result is never worse than the importance from which
learning starts. The final measurement is the perplexity; for an encoder, the rank correlation of its sentence
similarities with those of the dense model. Needs torch and transformers.

With torchrun, several processes learn together. Each process takes a share of the batches, holds the whole
model, and needs the same files. The first process writes OUT.sfp and prints the table."""


def add_parser(subparsers: Subparsers[Parser]) -> Parser:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "learn",
        help="learn the importance of the weights of a transformers model, and prune it",
        description=_DESCRIPTION,
        epilog=examples(
            (
                "sfp learn model/ --data texts/*.txt --sparsity 0.6 -o pruned.sfp",
                "learn in 100 steps of 512 tokens, prune 60 %",
            ),
            (
                "sfp learn model/ --data *.jsonl --sparsity 0.5 --minutes 30 --resume state.pt -o pruned.sfp",
                "learn for at most 30 minutes; after an interruption, the same command resumes",
            ),
            (
                "torchrun --nproc-per-node 8 -m sfpformat.cli learn model/ "
                "--data *.txt --sparsity 0.6 -o out.sfp",
                "learn on eight processes; add --device cuda for eight GPUs",
            ),
        ),
    )
    parser.add_argument(
        "folder", metavar="FOLDER", type=Path, help="a folder with a model, as transformers saves it"
    )
    parser.add_argument(
        "--data",
        metavar="FILE",
        nargs="+",
        required=True,
        help="a text file, or a .jsonl file with a 'text' in each line",
    )
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument(
        "--sparsity",
        metavar="S",
        type=float,
        help="share of the weights to prune, such as 0.6: of all linear and convolutional layers together. "
        "Embeddings, normalisation and biases are neither pruned nor counted",
    )
    how.add_argument(
        "--pattern", metavar="N:M", help="keep N of every M consecutive inputs of each output, such as 2:4"
    )
    parser.add_argument("-o", "--output", metavar="OUT.sfp", required=True, help="the file to write")
    parser.add_argument("--steps", metavar="N", type=int, default=100, help="number of learning steps (100)")
    parser.add_argument(
        "--minutes",
        metavar="M",
        type=float,
        help="time limit of the learning steps; the statistics and the selection are not included",
    )
    parser.add_argument(
        "--resume", metavar="STATE", help="a checkpoint file; if it exists, learning resumes from it"
    )
    parser.add_argument("--window", metavar="N", type=int, default=256, help="tokens per window (256)")
    parser.add_argument("--batch", metavar="N", type=int, default=2, help="windows per batch (2)")
    parser.add_argument(
        "--batches",
        metavar="N",
        type=int,
        help="batches per step, over all processes together (one per process)",
    )
    parser.add_argument(
        "--calibration", metavar="N", type=int, default=64, help="windows for the statistics (64)"
    )
    parser.add_argument(
        "--seed", metavar="N", type=int, default=0, help="seed for the order of the windows (0)"
    )
    parser.add_argument("--threads", metavar="N", type=int, help="number of threads that torch uses")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="the device that runs the model (cpu)"
    )
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    return parser


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand. Each process calls it, and gets the same exit code."""
    for name in ("torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            raise CommandError(f"'sfp learn' needs {name}: pip install {name}")
    if os.environ.get("WORLD_SIZE", "1") == "1":
        # Before the slow imports. Several processes first meet, so that an error of one ends all.
        _require(args, 1)
        _kind_of(args.folder)
        _checked_outputs(args)
    from ..pruning.launch import launched
    from ..pruning.processes import Processes

    with launched(args.device) as (group, device), warnings.catch_warnings():
        processes = Processes(group, device)
        if processes.rank:  # the first process shows the same warnings
            warnings.simplefilter("ignore", SfpWarning)
        summary = _learn(args, processes, group, device)
        processes.led(lambda: _show_summary(summary, args.json))
    return 0


def _learn(args: argparse.Namespace, processes: Processes, group: Any, device: Any) -> dict[str, Any]:
    """Learns on all processes. The first process writes the file and measures it.

    Returns:
        The summary by name, on the first process; an empty dict on all others.
    """
    import torch

    from ..pruning import Settings, Sparsity, best_start, learn_importance, statistics
    from ..pruning.texts import read_texts, text_data

    transformers: Any = importlib.import_module("transformers")  # its functions have no types
    transformers.utils.logging.disable_progress_bar()
    begun = time.monotonic()

    def prepare() -> tuple[str, Any, Any, Any, Path]:
        """Returns the model's kind, a function that loads it, the data, the dense model, the output path."""
        _require(args, processes.world)
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        kind = _kind_of(args.folder)
        model_class = getattr(transformers, _CLASSES[kind])
        target = Path(args.output)
        if processes.rank == 0:  # the folders may not exist on other machines
            target = _checked_outputs(args)
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.folder)
        data = text_data(
            read_texts(args.data), tokenizer, kind, window=args.window, batch=args.batch, seed=args.seed
        )

        # Learning needs float32. The output keeps the dtypes of the model.
        def load(dtype: Any) -> Any:
            return model_class.from_pretrained(args.folder, dtype=dtype).eval()

        return kind, load, data.to(device), load(torch.float32).to(device), target

    first = processes.rank == 0
    with progress(1, "reading the model and the texts", steps=True, show=first, lines=True):
        kind, load, data, dense, target = processes.agreed(prepare)
    state = None if args.resume is None else Path(args.resume)
    kept = None if state is None else state.with_name(f"{state.name}.statistics")
    threshold = Sparsity(args.sparsity) if args.pattern is None else _pattern_of(args.pattern)
    wanted = threshold.share if isinstance(threshold, Sparsity) else threshold
    held_out = data.held_out[: Settings.held_out]
    with progress(args.calibration, "statistics", steps=True, show=first, lines=True) as shown:
        found = statistics(
            dense,
            data.learned_from,
            task=data.task,
            batches=args.calibration,
            single=data.measure == "perplexity",
            checkpoint=kept,
            progress=lambda batch, loss: shown.advance(1),
            resumed=lambda batches: _resumed(shown, kept, "window", batches, first),
            group=group,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SfpWarning)  # learning warns of the same tensors
            start = best_start(
                dense,
                found,
                held_out,
                wanted,
                task=data.task,
                progress=lambda done, total: shown.at(f"start, pass {done} of {total}"),
                group=group,
            )
    del found
    settings = Settings(
        steps=args.steps,
        batches=(args.batches or processes.world) // processes.world,
        minutes=args.minutes,
        method="levels",
        seed=args.seed,
    )
    with progress(args.steps, "learning", steps=True, show=first, lines=True) as shown:
        learned = learn_importance(
            dense,
            data.learned_from,
            wanted,
            task=data.task,
            settings=settings,
            start=start.importances,
            held_out=held_out,
            checkpoint=state,
            every=10,
            progress=lambda step, loss: shown.advance(1),
            chosen=lambda done, total: shown.at(f"selection, pass {done} of at most {total}"),
            resumed=lambda step: _resumed(shown, state, "step", step, first),
            group=group,
        )
    choice = learned.choice
    assert choice is not None
    summary: dict[str, Any] = {}

    def finish() -> Iterator[None]:
        measured, lost, positions = yield from _write_and_measure(
            load, dense, start.importances, learned.importances, threshold, data, target
        )
        summary.update(
            {
                "output": str(target),
                "kind": kind,
                "measure": data.measure,
                **measured,
                "sparsity": lost / max(positions, 1),
                "steps": len(learned.history),
                "processes": processes.world,
                "start": start.name,
                "start_losses": start.losses,
                "held_out_start": choice.start[0],
                "held_out_learned": choice.chosen[0],
                "shares": choice.shares,
                "model_bytes": _weights_bytes(args.folder),
                "output_bytes": target.stat().st_size,
                "seconds": round(time.monotonic() - begun, 3),
            }
        )

    processes.led(finish)
    return summary


def _resumed(shown: Progress, path: Path | None, unit: str, done: int, show: bool) -> None:
    """Reports that work resumes from a checkpoint."""
    shown.advance(done)
    if show:
        print(f"sfp: {path}: resumed at {unit} {done}", file=sys.stderr, flush=True)


def _write_and_measure(
    load: Callable[[Any], Any],
    dense: Any,
    start: Mapping[str, Any],
    importances: Mapping[str, Any],
    threshold: Sparsity | Pattern,
    data: TextData,
    target: Path,
) -> Generator[None, None, tuple[dict[str, float], int, int]]:
    """Prunes the model, writes it, and measures the model loaded from the file.

    Yields after each part of the work.

    Args:
        load: returns the dense model with weights of the given dtype.
        dense: the dense model, on the device of the data.
        start: the importances from which learning started, by name.
        importances: the learned importances, by name.
        threshold: the sparsity or the pattern.
        data: the batches for the measurement.
        target: the file to write.

    Returns:
        Model -> measured value, the number of pruned weights, and the number of weights in all masks.
    """
    import torch

    from ..pruning import pack, prune
    from ..torch import load_model

    device = next(dense.parameters()).device
    with progress(3, f"writing {target.name}", steps=True, lines=True) as shown:
        pruned = load("auto")
        masks = prune(pruned, importances, threshold)
        shown.advance(1)
        yield
        pack(pruned, target, masks, importances=importances)
        del pruned
        shown.advance(1)
        yield
        restored = load("auto")
        for parameter in restored.parameters():  # so that a parameter that the file lacks gives NaNs
            parameter.data.fill_(float("nan"))
        load_model(restored, target)
        shown.advance(1)
        yield
    restored.float().to(device)
    by_start = load(torch.float32).to(device)
    prune(by_start, {name: start[name] for name in importances}, threshold)
    yield
    models = {"dense": dense, "pruned_by_start": by_start, "pruned_as_learned": restored}
    with progress(len(models) * len(data.evaluated), "measuring", steps=True, lines=True) as shown:
        measured = {}
        measure = data.evaluator(dense)
        for name, model in models.items():
            parts = measure(model)
            while True:
                try:
                    next(parts)
                except StopIteration as end:
                    measured[name] = float(end.value)
                    break
                shown.advance(1)
                yield
    return measured, sum(int((~m).sum()) for m in masks.values()), sum(m.numel() for m in masks.values())


def _show_summary(summary: dict[str, Any], as_json: bool) -> Iterator[None]:
    """Prints the summary."""
    if as_json:
        show_json(summary)
    else:
        pruned = percent(summary["sparsity"])
        rows = [
            ["dense", percent(0.0), "dense", bytes_words(summary["model_bytes"])],
            [f"pruned by {summary['start']} importances", pruned, "pruned_by_start", ""],
            ["pruned as learned, loaded from the file", pruned, "pruned_as_learned"],
        ]
        rows[2].append(bytes_words(summary["output_bytes"]))
        rows = [[name, share, number(summary[key], 3), size] for name, share, key, size in rows]
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
            f"{args.folder}: is not a folder with a config.json; name a folder that transformers saved"
        )
    if args.pattern is not None:
        _pattern_of(args.pattern)
    elif not 0 < args.sparsity < 1:
        raise CommandError(f"--sparsity is {args.sparsity}, must be between 0 and 1")
    for name in ("steps", "window", "batch", "batches", "calibration", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise CommandError(f"--{name} is {getattr(args, name)}, must be at least 1")
    if args.batches is not None and args.batches % processes:
        raise CommandError(
            f"--batches is {args.batches}, must be a multiple of {processes}, the number of processes"
        )
    if args.minutes is not None and not args.minutes > 0:
        raise CommandError(f"--minutes is {args.minutes}, must be above 0")
    for path in args.data:
        require_file(path)


def _pattern_of(words: str) -> Pattern:
    """Parses the value of ``--pattern``.

    Raises:
        CommandError: it is malformed, or its numbers are out of range.
    """
    from ..pruning.thresholds import Pattern

    try:
        return Pattern.parse(words)
    except OptionError as error:
        raise CommandError(f"--pattern: {error}") from error


def _checked_outputs(args: argparse.Namespace) -> Path:
    """Checks the paths of the files to write. Returns that of the model with links resolved.

    Raises:
        CommandError: a file cannot be written, or its folder does not exist.
    """
    if args.resume is not None:
        checked_target(args.resume, [Path(path) for path in args.data])
    return checked_target(args.output, [Path(path) for path in args.data])


# Kind of a model, one of `texts.KINDS` -> the class of transformers that loads it.
_CLASSES = {"causal": "AutoModelForCausalLM", "masked": "AutoModelForMaskedLM", "encoder": "AutoModel"}


def _kind_of(folder: Path) -> str:
    """Returns the kind of a model, one of `texts.KINDS`.

    Raises:
        CommandError: it is neither a language model nor an encoder.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names: Sequence[str] = config.get("architectures") or []
    name = names[0] if names else ""
    if config.get("is_encoder_decoder"):
        raise CommandError(
            f"{folder}: 'sfp learn' does not support encoder-decoder models ({name}); "
            "use sfpformat.pruning in Python"
        )
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal"
    if name.endswith("ForMaskedLM"):
        return "masked"
    if name.endswith("Model"):
        return "encoder"
    raise CommandError(
        f"{folder}: {name or 'the model, which has no architecture,'} is neither a language model nor an "
        "encoder without a head; use sfpformat.pruning in Python"
    )


def _weights_bytes(folder: Path) -> int:
    """Returns the total size of the model's weight files in bytes."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
