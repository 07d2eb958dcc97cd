"""``sfp learn``: learns the importance of the weights of a transformers model, and writes it pruned."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .console import bytes_words, number, percent, progress, show_json, show_table
from .errors import CommandError, checked_target, require_file, require_suffix
from .parser import Parser, Subparsers, examples

_DESCRIPTION = """Learns from text which weights of a model matter, prunes those that matter least, and writes
the survivors and their importances as one .sfp file. Survivors keep their values. FOLDER is a model that
transformers saved, with its tokenizer: a causal or masked language model, or an encoder.

Two of eight windows of the text are held out. One is used to choose how far to move from the importance that
learning starts with, so that the result is not worse than the start on it. The other is used to measure the
perplexity in the table, or for an encoder the rank correlation of its sentence similarities with those of the
dense model. Needs torch and transformers."""


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
        ),
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="a model as transformers saves it")
    parser.add_argument(
        "--data", metavar="FILE", nargs="+", required=True, help="text, or .jsonl with a 'text' in each line"
    )
    parser.add_argument(
        "--sparsity", metavar="S", type=float, required=True, help="the share of weights to prune"
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
        "--calibration", metavar="N", type=int, default=64, help="windows for the statistics (64)"
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="seed for the order of windows (0)")
    parser.add_argument("--threads", metavar="N", type=int, help="number of threads of torch")
    parser.add_argument("--json", action="store_true", help="the summary as JSON")
    return parser


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand. Returns the exit code."""
    for name in ("torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            raise CommandError(f"'sfp learn' needs {name}: pip install {name}")
    _require(args)
    import torch

    from ..pruning import Settings, Sparsity, fisher, learn_importance, pack, prune, statistics
    from ..pruning.texts import read_texts, text_data
    from ..torch import load_model

    transformers: Any = importlib.import_module("transformers")  # its functions have no types
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    transformers.utils.logging.disable_progress_bar()
    begun = time.monotonic()
    kind, model_class = _kind_of(args.folder, transformers)
    target = checked_target(args.output, [Path(path) for path in args.data])
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.folder)
    data = text_data(
        read_texts(args.data), tokenizer, kind, window=args.window, batch=args.batch, seed=args.seed
    )

    # Learning computes in float32, because it runs on a CPU; the output keeps the dtypes of the model.
    def loaded(dtype: Any) -> Any:
        return model_class.from_pretrained(args.folder, dtype=dtype).eval()

    dense = loaded(torch.float32)
    state = None if args.resume is None else Path(args.resume)
    kept = None if state is None else state.with_name(f"{state.name}.statistics")
    single = data.measure == "perplexity"
    with progress(args.calibration, "statistics", steps=True) as shown:
        found = statistics(
            dense,
            data.learned_from,
            task=data.task,
            batches=args.calibration,
            single=single,
            checkpoint=kept,
            progress=lambda batch, loss: shown.advance(1),
        )
    start = fisher(dense, found)
    del found
    settings = Settings(steps=args.steps, minutes=args.minutes, method="levels", seed=args.seed)
    with progress(args.steps, "learning", steps=True) as shown:
        learned = learn_importance(
            dense,
            data.learned_from,
            args.sparsity,
            task=data.task,
            settings=settings,
            start=start,
            held_out=data.held_out[: settings.held_out],
            checkpoint=state,
            every=10,
            progress=lambda step, loss: shown.advance(1),
            chosen=lambda done, total: shown.at(f"selection, pass {done} of at most {total}"),
        )
    pruned = loaded("auto")
    masks = prune(pruned, learned.importances, Sparsity(args.sparsity))
    pack(pruned, target, masks, importances=learned.importances)
    del pruned
    restored = loaded("auto")
    for parameter in restored.parameters():  # a parameter that the file does not fill then shows as NaN
        parameter.data.fill_(float("nan"))
    load_model(restored, target)
    restored.float()
    by_start = loaded(torch.float32)
    prune(by_start, start, Sparsity(args.sparsity))
    measured = {
        "dense": data.evaluate(dense, dense),
        "pruned by Fisher": data.evaluate(by_start, dense),
        "pruned as learned, loaded from the file": data.evaluate(restored, dense),
    }
    positions = sum(mask.numel() for mask in masks.values())
    lost = sum(int((~mask).sum()) for mask in masks.values())
    assert learned.choice is not None
    summary = {
        "output": str(target),
        "kind": kind,
        "measure": data.measure,
        **{name.replace(" ", "_").replace(",", ""): value for name, value in measured.items()},
        "sparsity": lost / max(positions, 1),
        "steps": len(learned.history),
        "held_out_start": learned.choice.start[0],
        "held_out_learned": learned.choice.chosen[0],
        "shares": learned.choice.shares,
        "model_bytes": _weights_bytes(args.folder),
        "output_bytes": target.stat().st_size,
        "seconds": round(time.monotonic() - begun, 3),
    }
    if args.json:
        show_json(summary)
        return 0
    sizes = [bytes_words(_weights_bytes(args.folder)), "", bytes_words(target.stat().st_size)]
    rows = [
        [name, percent(0.0 if name == "dense" else lost / max(positions, 1)), number(value, 3), size]
        for (name, value), size in zip(measured.items(), sizes, strict=True)
    ]
    show_table(["", "pruned", data.measure, "size"], rows)
    return 0


def _require(args: argparse.Namespace) -> None:
    """Checks the arguments before any work is done.

    Raises:
        CommandError: an argument is invalid.
        OSError: a data file is missing.
    """
    require_suffix(args.output, ".sfp", what="'sfp learn'")
    if not args.folder.is_dir() or not (args.folder / "config.json").is_file():
        raise CommandError(
            f"{args.folder}: is no folder with a config.json; name a model that transformers saved"
        )
    if not 0 < args.sparsity < 1:
        raise CommandError(f"--sparsity is {args.sparsity}, must be between 0 and 1")
    for name in ("steps", "window", "batch", "calibration", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise CommandError(f"--{name} is {getattr(args, name)}, must be at least 1")
    if args.minutes is not None and not args.minutes > 0:
        raise CommandError(f"--minutes is {args.minutes}, must be above 0")
    for path in args.data:
        require_file(path)


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
