"""Trains the demonstration model; reproduces the weights in the package.

All texts come from the Python standard library, which is under the PSF Licence Version 2.

- *Training*: the library's own modules, without tests, tables and applications (``SKIPPED``).
- *Held-out code* (``heldout.txt``): ``HELDOUT_MODULES``. Measurements use its beginning. Progress of
  training is measured on the rest, so that choices based on it do not bias the measurements.
- *Held-out prose* (``heldout_prose.txt``): topics of the language reference. The model sees
  English only in comments and docstrings, so this is a different kind of text.

Text and weights differ between Python versions; the package's are from 3.11. Needs torch.
"""

from __future__ import annotations

import argparse
import math
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from pydoc_data.topics import topics

import ml_dtypes
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfpformat.demo.model import Config, FloatArray, encode_text, perplexity, rotary_angles
from sfpformat.io.atomic import replacing
from sfpformat.numpy import save_file
from sfpformat.pruning.descent import rate_at

LIBRARY = Path(sysconfig.get_path("stdlib"))
HELDOUT_MODULES = ("bisect.py", "fnmatch.py", "sched.py", "shlex.py", "textwrap.py")
PROSE_TOPICS = ("objects", "execmodel", "import")

# Names of files and folders that are excluded from training: held-out prose, tests, applications, tables (of
# encodings, entities, and the build settings of this Python), and other packages.
SKIPPED = (
    *("pydoc_data", "test", "tests", "idlelib", "turtledemo", "__phello__*", "encodings"),
    *("entities.py", "_sysconfigdata_*", "config-*", "site-packages", "dist-packages"),
)

# Tokens at the beginning of heldout.txt that training never uses: 64 windows and one target.
MEASURED_TOKENS = 16385

# Usual settings of AdamW for language models; clipping only affects the first steps.
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
GRADIENT_CLIP = 1.0
WARMUP_STEPS = 200
FINAL_RATE_FRACTION = 0.01

EXAMPLES = """\
examples:
  train the bundled model (rounding differs between processors):
    python -m sfpformat.demo.train --out model.sfp --bfloat16 --compile
  train a model with another seed in a few minutes, for experiments:
    python -m sfpformat.demo.train --out quick.sfp --steps 1000 --seed 1
"""


class Attention(nn.Module):
    """Causal multi-head self-attention with rotary positions."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        square = (nn.Linear(config.width, config.width, bias=False) for _ in range(4))
        self.query, self.key, self.value, self.output = square

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Maps [windows, positions, width] to the same shape."""
        projected = (self.query(x), self.key(x), self.value(x))
        query, key, value = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in projected)
        query = _rotate(query, cosine, sine) * query.shape[-1] ** -0.5
        # Explicit products: on a CPU, the backward pass of torch's fused attention is much slower.
        scores = query @ _rotate(key, cosine, sine).transpose(-1, -2)
        future = torch.full(scores.shape[-2:], -torch.inf, device=x.device).triu(1)
        mixed = F.softmax(scores + future, dim=-1) @ value
        result: Tensor = self.output(mixed.transpose(1, 2).flatten(-2))
        return result


class MLP(nn.Module):
    """Two linear layers with a squared ReLU between them; maps [..., width] to the same shape."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(F.relu(self.up(x)).square())
        return result


class Layer(nn.Module):
    """Attention, then an MLP, each with pre-normalisation and a residual connection."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, config.epsilon)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.width, config.epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cosine, sine)
        result: Tensor = x + self.mlp(self.mlp_norm(x))
        return result


class LanguageModel(nn.Module):
    """The model of ``model.py`` as a torch module: same names, same shapes, same function."""

    cosine: Tensor
    sine: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, config.epsilon)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        cosine, sine = rotary_angles(config, config.context)
        self.register_buffer("cosine", torch.from_numpy(cosine), persistent=False)
        self.register_buffer("sine", torch.from_numpy(sine), persistent=False)
        # Each layer is initialised as the identity: its residual branches are zero.
        for name, weight in self.named_parameters():
            if name.endswith(("output.weight", "down.weight", "head.weight")):
                nn.init.zeros_(weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps integer tokens [windows, positions] to logits [windows, positions, vocabulary]."""
        cosine, sine = self.cosine[: tokens.shape[1]], self.sine[: tokens.shape[1]]
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, cosine, sine)
        result: Tensor = self.head(self.norm(x))
        return result


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotates each pair (feature i, feature i + half) of [..., positions, head_width]."""
    first, second = x.chunk(2, dim=-1)
    turned = (first * cosine - second * sine, first * sine + second * cosine)
    return torch.cat(turned, dim=-1).type_as(x)


def training_text() -> str:
    """Returns all modules of the standard library that are neither skipped nor held out."""
    names = {path.relative_to(LIBRARY).as_posix() for path in LIBRARY.rglob("*.py")}
    skipped = {name for name in names for part in SKIPPED if fnmatch(f"/{name}/", f"*/{part}/*")}
    return _texts(sorted(names - skipped - set(HELDOUT_MODULES)))


def heldout_code() -> str:
    """Returns the held-out modules."""
    return _texts(HELDOUT_MODULES)


def heldout_prose() -> str:
    """Returns topics of the language reference as plain text."""
    return "\n".join(topics[name].strip() + "\n" for name in PROSE_TOPICS)


def _texts(names: Iterable[str]) -> str:
    return "\n".join((LIBRARY / name).read_text("utf-8") for name in names)


def draw_windows(
    tokens: Tensor, context: int, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Returns random windows of a text: tokens, int64 [count, context], and their successors."""
    starts = torch.randint(len(tokens) - context, (count, 1), generator=generator)
    windows = tokens[starts + torch.arange(context + 1)].long()
    return windows[:, :-1], windows[:, 1:]


@dataclass(frozen=True)
class Schedule:
    """The training schedule: ``batch`` windows of the context length in each of ``steps`` steps."""

    steps: int = 24000
    batch: int = 8
    rate: float = 2e-3
    seed: int = 0

    def rate_at(self, step: int) -> float:
        """Returns the learning rate: linear warm-up, then half a cosine to 1 % of the peak."""
        return rate_at(self.rate, step, self.steps, warmup=WARMUP_STEPS, final=FINAL_RATE_FRACTION)


class Trainer:
    """A model, its optimiser and the number of steps done, which together form a checkpoint."""

    def __init__(self, config: Config, schedule: Schedule, tokens: Tensor) -> None:
        torch.manual_seed(schedule.seed)
        self.config, self.schedule, self.tokens, self.step = config, schedule, tokens, 0
        self.model = LanguageModel(config)
        # RMSNorm's gains belong near one, so only matrices decay towards zero.
        parts = self.model.parameters()
        groups = [{"params": part, "weight_decay": WEIGHT_DECAY * (part.dim() == 2)} for part in parts]
        self.optimiser = torch.optim.AdamW(groups, betas=BETAS, fused=True)

    def train_step(self, bfloat16: bool) -> Tensor:
        """Takes one optimiser step and returns the loss in nats per character."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.schedule.rate_at(self.step)
        inputs, targets = self._draw()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
            scores = self.model(inputs)
        loss = F.cross_entropy(scores.float().flatten(0, 1), targets.flatten())
        self.optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_CLIP)
        self.optimiser.step()
        self.step += 1
        return loss.detach()

    def _draw(self) -> tuple[Tensor, Tensor]:
        """Draws random windows [batch, context] and their successors."""
        # Seeded by the step, so that a resumed run draws the same numbers as an uninterrupted one.
        generator = torch.Generator().manual_seed(self.schedule.seed << 32 | self.step)
        return draw_windows(self.tokens, self.config.context, self.schedule.batch, generator)

    def weights(self) -> dict[str, FloatArray]:
        """Returns the weights as float32 arrays, by the names of ``model.weight_shapes``."""
        return {name: weight.numpy().copy() for name, weight in self.model.state_dict().items()}

    def save(self, path: Path) -> None:
        """Writes a checkpoint atomically."""
        states = self.model.state_dict(), self.optimiser.state_dict()
        with replacing(path) as file:
            torch.save((asdict(self.schedule), self.step, *states), file)

    def load(self, path: Path) -> None:
        """Resumes from a checkpoint; exits if its schedule differs."""
        schedule, self.step, model, optimiser = torch.load(path)
        if schedule != asdict(self.schedule):
            raise SystemExit(f"{path} was written with other options: {schedule}; remove it, or use the same")
        self.model.load_state_dict(model)
        self.optimiser.load_state_dict(optimiser)


def train(trainer: Trainer, checkpoint: Path, options: argparse.Namespace) -> None:
    """Runs the remaining steps; writes checkpoints and progress every ``options.every`` steps."""
    watched = encode_text(heldout_code())[MEASURED_TOKENS:]
    losses: list[Tensor] = []
    while trainer.step < trainer.schedule.steps:
        losses.append(trainer.train_step(options.bfloat16))
        if trainer.step % options.every and trainer.step != trainer.schedule.steps:
            continue
        trainer.save(checkpoint)
        if sys.stdout.isatty() or options.verbose:
            trained = math.exp(float(torch.stack(losses).mean()))
            held_out = perplexity(trainer.weights(), trainer.config, watched)
            print(f"step {trainer.step}: perplexity {trained:.3f}, held out {held_out:.3f}", flush=True)
        losses.clear()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m sfpformat.demo.train",
        description="Train the demonstration model; write its weights, in BF16, and the held-out texts.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="the weights: an .sfp file")
    add("--steps", type=int, default=Schedule.steps, help="default: %(default)s")
    add("--batch", type=int, default=Schedule.batch, help="windows per step; default: %(default)s")
    add("--rate", type=float, default=Schedule.rate, help="peak learning rate; %(default)s")
    add("--seed", type=int, default=Schedule.seed, help="default: %(default)s")
    add("--threads", type=int, default=1, help="number of CPU threads; default: %(default)s")
    add("--bfloat16", action="store_true", help="matrix products in BF16 (needs AMX to be fast)")
    add("--compile", action="store_true", help="use torch.compile (needs a C++ compiler)")
    add("--every", type=int, default=500, help="steps between checkpoints; default: %(default)s")
    add("--resume", action="store_true", help="resume the same command after an interruption")
    add("--verbose", action="store_true", help="show progress even if the output is not a terminal")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; ``--help`` describes its options."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    schedule = Schedule(options.steps, options.batch, options.rate, options.seed)
    trainer = Trainer(Config(), schedule, torch.from_numpy(encode_text(training_text())))
    checkpoint = options.out.with_suffix(".checkpoint")
    if options.resume:
        trainer.load(checkpoint)
    if options.compile:
        trainer.model.compile()
    train(trainer, checkpoint, options)
    weights = {name: array.astype(ml_dtypes.bfloat16) for name, array in trainer.weights().items()}
    save_file(weights, options.out)
    for name, text in (("heldout.txt", heldout_code()), ("heldout_prose.txt", heldout_prose())):
        with replacing(options.out.with_name(name)) as file:
            file.write(text.encode())


if __name__ == "__main__":
    main()
