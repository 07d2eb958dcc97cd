"""Fine-tunes the demonstration's model and all-MiniLM-L6-v2, for the sizes of deltas.

``python -m tests.figures.fine_tunes demo FOLDER`` trains the demonstration's model on topics of Python's
language reference, ``python -m tests.figures.fine_tunes minilm FOLDER`` all-MiniLM-L6-v2 with a contrastive
loss on pairs: the first sentence of a docstring of the standard library and the rest of the docstring. Both
use AdamW in float32. They write ``FOLDER/f32-N.safetensors``, and the same weights cast to BF16 as
``FOLDER/bf16-N.safetensors``, after N = 0, 1, 10, 100 and 1,000 steps.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from sfpformat.demo.bundled import weights
from sfpformat.demo.language import language_model
from sfpformat.demo.model import encode_text
from sfpformat.demo.train import PROSE_TOPICS, draw_windows

from .bert import dense_model
from .model import model_path

KEPT = (0, 1, 10, 100, 1000)
PAIRS, TOKENS, TEMPERATURE = 4, 16, 0.05
WINDOWS, CONTEXT = 4, 128


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=("demo", "minilm"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rate", type=float, help="learning rate; default 1e-4 for demo, 2e-5 for minilm")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    if options.model == "demo":
        train(*demo(), options.rate or 1e-4, options.folder)
    else:
        train(*minilm(), options.rate or 2e-5, options.folder)


def train(model: nn.Module, loss_of: Callable[[int], Tensor], rate: float, folder: Path) -> None:
    """Trains a model, and writes its checkpoints.

    Args:
        model: the model.
        loss_of: returns the loss of a step.
        rate: the learning rate.
        folder: where the checkpoints are written.
    """
    optimiser = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)
    begin = time.perf_counter()
    for step in range(max(KEPT) + 1):
        if step in KEPT:
            state = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
            save_file(state, folder / f"f32-{step}.safetensors")
            halves = {name: tensor.bfloat16() for name, tensor in state.items()}
            save_file(halves, folder / f"bf16-{step}.safetensors")
            print(f"step {step}: {time.perf_counter() - begin:.0f} s", flush=True)
        loss = loss_of(step)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def demo() -> tuple[nn.Module, Callable[[int], Tensor]]:
    """Returns the demonstration's model and its loss on windows of prose."""
    model = language_model(weights()).float().train()
    text = "\n".join(topics[name] for name in sorted(topics) if name not in PROSE_TOPICS)
    tokens = torch.from_numpy(encode_text(text))
    generator = torch.Generator().manual_seed(0)

    def loss_of(step: int) -> Tensor:
        windows, targets = draw_windows(tokens, CONTEXT, WINDOWS, generator)
        return F.cross_entropy(model(windows).flatten(0, 1), targets.flatten())

    return model, loss_of


def minilm() -> tuple[nn.Module, Callable[[int], Tensor]]:
    """Returns the sentence model and its loss: each summary must find its own body among those of a step."""
    model = dense_model().train()
    transformers: Any = importlib.import_module("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_path().parent)
    pairs = docstring_pairs()
    order = torch.Generator().manual_seed(0)

    def embedded(texts: list[str]) -> Tensor:
        batch = tokenizer(texts, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt")
        hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).float()
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)

    def loss_of(step: int) -> Tensor:
        chosen = [pairs[i] for i in torch.randint(len(pairs), (PAIRS,), generator=order).tolist()]
        first, second = (embedded([pair[side] for pair in chosen]) for side in (0, 1))
        return F.cross_entropy(first @ second.T / TEMPERATURE, torch.arange(PAIRS))

    return model, loss_of


def docstring_pairs() -> list[tuple[str, str]]:
    """Returns the first paragraph and the rest of docstrings of Python's standard library."""
    found: dict[tuple[str, str], None] = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8", errors="replace"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)):
                text = inspect.cleandoc(ast.get_docstring(node) or "")
                summary, _, body = text.partition("\n\n")
                if len(summary) > 20 and len(body) > 40:
                    found[" ".join(summary.split()), " ".join(body.split())] = None
    return list(found)


if __name__ == "__main__":
    main()
