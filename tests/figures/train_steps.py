"""Consecutive BF16 checkpoints of a real training run of SmolLM2-135M.

``python -m tests.figures.train_steps MODEL FOLDER --rate 1e-6 --steps 8`` trains the model that
``python -m tests.figures.smollm2 WORK --make`` wrote to ``MODEL = WORK/model``: float32 master weights, Adam
(0.9, 0.95), 512 tokens of Python source a step, cast to BF16 after each step. The gradient is computed in
float32 at the BF16 weights. It writes ``FOLDER/step-N.safetensors`` for step 0 and for the steps given by
``--keep`` (default: all).
"""

from __future__ import annotations

import argparse
import importlib
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WINDOW, WINDOWS = 256, 2  # tokens, windows a step
BETAS, EPSILON = (0.9, 0.95), 1e-8


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rate", type=float, required=True, help="learning rate")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--keep", type=int, nargs="*", help="steps whose checkpoint is written")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    transformers: Any = importlib.import_module("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    # Float32 is several times faster than BF16 on a processor without instructions for it.
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    batches = _batches(tokenizer, options.steps)
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    master = {name: weight.detach().clone() for name, weight in parameters.items()}
    means = {name: torch.zeros_like(weight) for name, weight in master.items()}
    squares = {name: torch.zeros_like(weight) for name, weight in master.items()}
    _write(options.folder / "step-0.safetensors", parameters)
    for step in range(1, options.steps + 1):
        begin = time.perf_counter()
        ids = batches[step - 1]
        logits = model(input_ids=ids).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        with torch.no_grad():
            for name, weight in parameters.items():
                if weight.grad is None:
                    raise SystemExit(f"{name} has no gradient")
                gradient = weight.grad
                means[name].lerp_(gradient, 1 - BETAS[0])
                squares[name].lerp_(gradient * gradient, 1 - BETAS[1])
                mean = means[name] / (1 - BETAS[0] ** step)
                square = squares[name] / (1 - BETAS[1] ** step)
                master[name] -= options.rate * mean / (square.sqrt() + EPSILON)
                weight.copy_(master[name].bfloat16())
                weight.grad = None
        if options.keep is None or step in options.keep:
            _write(options.folder / f"step-{step}.safetensors", parameters)
        print(f"step {step}: loss {loss.item():.4f}, {time.perf_counter() - begin:.1f} s", flush=True)


def _batches(tokenizer: Any, steps: int) -> Tensor:
    """Token ids of Python source files, int64, shape (steps, windows, tokens)."""
    ids: list[int] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[::5]:
        ids += tokenizer(path.read_text(errors="ignore")).input_ids
    return torch.tensor(ids[: WINDOW * WINDOWS * steps]).view(steps, WINDOWS, WINDOW)


def _write(path: Path, parameters: dict[str, Tensor]) -> None:
    """Writes the parameters as a safetensors file."""
    save_file = importlib.import_module("safetensors.torch").save_file
    save_file({name: weight.detach().bfloat16() for name, weight in parameters.items()}, path)


if __name__ == "__main__":
    main()
