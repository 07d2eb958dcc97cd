"""The real model in transformers' `BertModel`, and sentences that need no download."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import random
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sfpformat.torch import parameters_on_meta, safe_open

from .model import model_path

PAIRS = 200
_SEED = 0
_LENGTHS = range(30, 160)  # minimum and maximum number of characters of a sentence


def transformers() -> Any:
    """The package, without its progress bars."""
    try:
        package = importlib.import_module("transformers")
    except ImportError:
        raise SystemExit("pip install -r tests/figures/requirements.txt") from None
    package.utils.logging.disable_progress_bar()
    package.utils.logging.set_verbosity_error()
    return package


def dense_model() -> nn.Module:
    """all-MiniLM-L6-v2 as transformers loads it from its safetensors file."""
    model: nn.Module = transformers().BertModel.from_pretrained(model_path().parent)
    return model.eval()


def empty_model() -> nn.Module:
    """The same architecture with other weights."""
    package = transformers()
    model: nn.Module = package.BertModel(package.AutoConfig.from_pretrained(model_path().parent))
    return model.eval()


def model_of_slices(path: Path) -> nn.Module:
    """The model that transformers creates from slices of a file, each decoded when it is needed."""
    package = transformers()
    config = package.AutoConfig.from_pretrained(model_path().parent, dtype="float32")
    with safe_open(path) as file:
        slices = {name: file.get_slice(name) for name in file}
        model, info = package.BertModel.from_pretrained(
            None, config=config, state_dict=slices, output_loading_info=True
        )
    assert not info["missing_keys"], info
    result: nn.Module = model
    return result.eval()


def meta_model() -> nn.Module:
    """The same architecture without memory for its weights."""
    with parameters_on_meta():
        return empty_model()


def sentences() -> list[str]:
    """The first sentences of docstrings of Python's standard library, by module, without duplicates.

    They are read from the sources, so that no module is imported. They depend on the release of Python.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    found: dict[str, None] = {}
    for module in sorted(pkgutil.iter_modules([str(folder)]), key=lambda module: module.name):
        source = folder / f"{module.name}.py"
        if not source.exists():
            continue
        for node in ast.walk(ast.parse(source.read_bytes())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)):
                first = _first_sentence(ast.get_docstring(node) or "")
                if len(first) in _LENGTHS and first.isascii():
                    found.setdefault(first)
    return list(found)


def _first_sentence(text: str) -> str:
    paragraph = " ".join(inspect.cleandoc(text).split("\n\n")[0].split())
    return paragraph.split(". ")[0].rstrip(".")


def sentence_pairs() -> list[tuple[str, str]]:
    """200 pairs: every second one of neighbours, which are often similar; the others are random."""
    rng = random.Random(_SEED)
    every = sentences()
    starts = rng.sample(range(len(every) - 1), PAIRS)
    return [
        (every[start], every[start + 1] if i % 2 else rng.choice(every)) for i, start in enumerate(starts)
    ]


class Encoder:
    """Maps sentences to vectors as the model's authors do: the mean over the tokens, with length 1."""

    def __init__(self, texts: list[str]) -> None:
        tokenizer = transformers().AutoTokenizer.from_pretrained(model_path().parent)
        self._batches = [
            tokenizer(texts[i : i + 50], padding=True, truncation=True, return_tensors="pt")
            for i in range(0, len(texts), 50)
        ]

    def __call__(self, model: nn.Module) -> torch.Tensor:
        """Vectors, [sentences, 384]."""
        out = []
        with torch.inference_mode():
            for batch in self._batches:
                tokens = model(**batch).last_hidden_state
                there = batch["attention_mask"][..., None].to(tokens.dtype)
                mean = (tokens * there).sum(1) / there.sum(1)
                out.append(nn.functional.normalize(mean))
        return torch.cat(out)
