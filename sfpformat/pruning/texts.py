"""Batches of text for transformers' models, and their evaluation.

Rules: causal and masked language models get consecutive windows of text without padding. Encoders without a
head get sentences, padded to the longest of their batch. Of every eight windows or sentences, one is held out
to select the result, and one is only for evaluation; learning uses neither.

This module does not import transformers: the caller provides models and tokenizers.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import OptionError
from .batches import IGNORED
from .task import CLASSIFY, Model, Task, divergence, evaluating

Batch = dict[str, Tensor]

_OF = 8  # one of 8 windows or sentences is held out, and one is for evaluation
_MASKED = 0.15  # share of masked tokens, as in BERT's training
_SHARPNESS = 20.0  # factor from cosines to log-probabilities, as in the training of sentence encoders

# The kinds of models, which determine batches and measure.
KINDS = ("causal", "masked", "encoder")


def read_texts(paths: Iterable[str | os.PathLike[str]]) -> Iterator[str]:
    """Yields the texts of files: from ``.jsonl`` files the item ``text`` of each line, else the whole file.

    Raises:
        OptionError: a line of a ``.jsonl`` file is not an object with a string ``text``; or a file is not
            UTF-8 text.
        OSError: a file cannot be read.
    """
    for path in map(Path, paths):
        try:
            content = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise OptionError(f"{path} is not UTF-8 text") from error
        if path.suffix != ".jsonl":
            yield content
            continue
        for number, line in enumerate(content.splitlines(), 1):
            if line.strip():
                yield _text_of(path, number, line)


def _text_of(path: Path, number: int, line: str) -> str:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise OptionError(f"{path}: line {number} is not JSON") from error
    text = found.get("text") if isinstance(found, dict) else None
    if not isinstance(text, str):
        raise OptionError(f"{path}: line {number} is not an object with a string 'text'")
    return text


@dataclass(frozen=True)
class TextData:
    """Batches of text.

    Attributes:
        learned_from: batches for statistics and learning.
        held_out: batches to select the result.
        evaluated: batches for evaluation.
        task: runs the model and computes the loss.
        causal: whether outputs are compared with the next label.
        measure: the result of `evaluate`: ``perplexity`` (lower is better) or ``Spearman`` (higher is
            better).
    """

    learned_from: list[Batch]
    held_out: list[Batch]
    evaluated: list[Batch]
    task: Task
    causal: bool
    measure: str

    def evaluate(self, model: nn.Module, dense: nn.Module) -> float:
        """Evaluates a model on the batches for evaluation.

        Args:
            model: the pruned model, or the dense model itself.
            dense: the dense model, the reference for similarities.

        Returns:
            The perplexity per token. For an encoder, Spearman's correlation between the similarities of
            sentence pairs within a batch and those of the dense model.
        """
        parts = self.evaluator(dense)(model)
        while True:
            try:
                next(parts)
            except StopIteration as end:
                return float(end.value)

    def evaluator(self, dense: nn.Module) -> Callable[[nn.Module], Generator[None, None, float]]:
        """Returns a function that evaluates a model as `evaluate`, and yields after each batch.

        The caller can show progress. For an encoder, the similarities of the dense model are computed only
        for the first model.
        """
        if self.measure == "perplexity":
            return self._perplexity
        wanted: list[Tensor] = []

        def correlation(model: nn.Module) -> Generator[None, None, float]:
            found = []
            for number, batch in enumerate(self.evaluated):
                if number == len(wanted):
                    wanted.append(_pairs(dense, batch))
                found.append(wanted[number] if model is dense else _pairs(model, batch))
                yield
            return _spearman(torch.cat(found), torch.cat(wanted))

        return correlation

    def _perplexity(self, model: nn.Module) -> Generator[None, None, float]:
        total, count = 0.0, 0
        for batch in self.evaluated:
            labels = batch["labels"]
            counted = int(((labels[:, 1:] if self.causal else labels) != IGNORED).sum())
            with evaluating(model), torch.no_grad():
                total += float(self.task.loss_of(model, batch)) * counted
            count += counted
            yield
        return math.exp(min(total / count, 700.0))

    def to(self, device: torch.device) -> TextData:
        """Returns the same batches on a device."""

        def moved(batches: list[Batch]) -> list[Batch]:
            return [{name: x.to(device) for name, x in batch.items()} for batch in batches]

        return replace(
            self,
            learned_from=moved(self.learned_from),
            held_out=moved(self.held_out),
            evaluated=moved(self.evaluated),
        )


def text_data(
    texts: Iterable[str],
    tokenizer: Any,
    kind: str,
    *,
    window: int = 256,
    batch: int = 2,
    most: int | None = None,
    seed: int = 0,
) -> TextData:
    """Makes batches from texts.

    Example: ``text_data(read_texts(["prose.txt"]), tokenizer, "causal")``.

    Args:
        texts: any number of texts.
        tokenizer: a tokenizer of transformers.
        kind: the kind of the model, one of `KINDS`.
        window: number of tokens of a window, or the maximum of a sentence.
        batch: number of windows in a batch; of sentences, four times as many.
        most: maximum number of windows or sentences, taken evenly from all; None takes all.
        seed: seed of the order and of the masked tokens.

    Raises:
        OptionError: an argument is invalid, there is too little text, or the tokenizer lacks the mask token.
    """
    if kind not in KINDS:
        raise OptionError(f"kind is {kind!r}, must be one of {', '.join(KINDS)}")
    if window < 2 or batch < 1:
        raise OptionError(f"window is {window}, must be at least 2; batch is {batch}, must be at least 1")
    generator = torch.Generator().manual_seed(seed)
    if kind == "encoder":
        batch *= 4
        pieces: list[list[int]] = _sentences(texts, tokenizer, window)
    else:
        pieces = _windows(texts, tokenizer, window)
    if most is not None and len(pieces) > most:
        pieces = [pieces[len(pieces) * i // most] for i in range(most)]
    if len(pieces) < _OF * (batch if kind == "encoder" else 1):
        few = len(pieces) == 1
        unit = "sentence" if few else "sentences"
        if kind != "encoder":
            unit = f"{'window' if few else 'windows'} of {window} tokens"
        needed = _OF * (batch if kind == "encoder" else 1)
        raise OptionError(
            f"the texts give {len(pieces)} {unit}, but at least {needed} are needed; give more text"
        )
    parts = [
        [piece for i, piece in enumerate(pieces) if i % _OF in places]
        for places in (range(_OF - 2), (_OF - 2,), (_OF - 1,))
    ]
    order = torch.randperm(len(parts[0]), generator=generator).tolist()
    parts[0] = [parts[0][i] for i in order]
    learned_from, held_out, evaluated = [_batches(part, tokenizer, kind, batch, generator) for part in parts]
    if kind == "encoder":
        return TextData(learned_from, held_out, evaluated, ENCODER, False, "Spearman")
    return TextData(learned_from, held_out, evaluated, CLASSIFY, kind == "causal", "perplexity")


def _windows(texts: Iterable[str], tokenizer: Any, window: int) -> list[list[int]]:
    """Concatenates texts, each followed by the end token if there is one, and cuts them into windows."""
    end = next(
        (i for i in (tokenizer.eos_token_id, getattr(tokenizer, "sep_token_id", None)) if i is not None), None
    )
    tokens: list[int] = []
    for text in texts:
        tokens += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if end is not None:
            tokens.append(end)
    return [tokens[i : i + window] for i in range(0, len(tokens) - window + 1, window)]


def _sentences(texts: Iterable[str], tokenizer: Any, longest: int) -> list[list[int]]:
    """Returns the tokens of the non-empty lines of the texts, without duplicates."""
    lines = dict.fromkeys(line.strip() for text in texts for line in text.splitlines())
    return [tokenizer(line, truncation=True, max_length=longest)["input_ids"] for line in lines if line]


def _batches(
    pieces: Sequence[list[int]], tokenizer: Any, kind: str, size: int, generator: torch.Generator
) -> list[Batch]:
    groups = [pieces[i : i + size] for i in range(0, len(pieces), size)]
    if kind == "encoder":  # a sentence needs at least two others to compare
        return [_padded(group, tokenizer) for group in groups if len(group) > 2]
    batches = [torch.tensor(group) for group in groups]
    if kind == "causal":
        return [{"input_ids": ids, "labels": ids} for ids in batches]
    mask = tokenizer.mask_token_id
    if mask is None:
        raise OptionError("the tokenizer has no mask token, which a masked language model needs")
    out = []
    for ids in batches:
        chosen = torch.rand(ids.shape, generator=generator) < _MASKED
        chosen[:, 0] = True  # so that every batch has masked tokens
        out.append({"input_ids": ids.masked_fill(chosen, mask), "labels": ids.masked_fill(~chosen, IGNORED)})
    return out


def _padded(group: Sequence[list[int]], tokenizer: Any) -> Batch:
    longest = max(map(len, group))
    pad = tokenizer.pad_token_id or 0
    ids = torch.tensor([piece + [pad] * (longest - len(piece)) for piece in group])
    mask = torch.tensor([[1] * len(piece) + [0] * (longest - len(piece)) for piece in group])
    return {"input_ids": ids, "attention_mask": mask}


# -------------------------------------------------------------------------------------------- encoders


def token_states(model: Model, batch: Any) -> Tensor:
    """Returns the last hidden state of each token, float32 [batch, positions, features]."""
    states: Tensor = model(**batch).last_hidden_state.float()
    return states


def similarities(states: Tensor, batch: Any) -> Tensor:
    """Returns the similarities of the sentences of a batch as unnormalised log-probabilities [batch, batch].

    The embedding of a sentence is the mean of its tokens' states. A similarity is the cosine times a
    constant. The diagonal is −∞.

    Args:
        states: the result of `token_states`.
        batch: has ``attention_mask``.
    """
    counted = _counted(states, batch)
    pooled = F.normalize((states * counted).sum(1) / counted.sum(1).clamp(min=1), dim=-1)
    cosines = _SHARPNESS * pooled @ pooled.T
    return cosines.masked_fill(torch.eye(len(cosines), dtype=torch.bool, device=cosines.device), -math.inf)


def _pairs(model: nn.Module, batch: Batch) -> Tensor:
    """Returns the similarities of the pairs of sentences of a batch, both ways, float32 [pairs]."""
    with evaluating(model), torch.no_grad():
        outputs = similarities(token_states(model, batch), batch)
    return outputs[outputs > -math.inf]


def _counted(states: Tensor, batch: Any) -> Tensor:
    """Returns 1 for tokens and 0 for padding, [batch, positions, 1], of the dtype of the states."""
    mask: Tensor = batch["attention_mask"][..., None]
    return mask.to(states)


def _distance_of_states(outputs: Tensor, dense: Tensor, batch: Any) -> Tensor:
    """Returns the squared error of the tokens' states relative to their squares, plus the divergence of the
    similarities.

    The states give a learning signal for each token and feature; the similarities are what encoders are for.
    """
    counted = _counted(outputs, batch)
    error = ((outputs - dense).square() * counted).sum() / (dense.square() * counted).sum().clamp(min=1e-30)
    return error + divergence(similarities(outputs, batch), similarities(dense, batch))


def _random_projection(outputs: Tensor, batch: Any) -> Tensor:
    """Returns the product of the tokens' states with random numbers.

    An encoder has no labels, and the gradient of a distance from the dense model is zero at the dense model.
    The squared gradients of this loss estimate the second derivatives of the squared error of the states
    (Gauss-Newton), as the squared gradients of a likelihood estimate the Fisher information.
    """
    generator = torch.Generator().manual_seed(int(batch["input_ids"].sum()))
    random = torch.randn(outputs.shape, generator=generator).to(outputs)
    counted = _counted(outputs, batch)
    size = outputs.detach().norm(dim=-1, keepdim=True).clamp(min=1e-30)
    loss: Tensor = (outputs / size * random * counted).sum() / counted.sum().clamp(min=1).sqrt()
    return loss


ENCODER = Task(run=token_states, loss=_random_projection, distance=_distance_of_states)


def _spearman(left: Tensor, right: Tensor) -> float:
    ranks = [x.argsort().argsort().double() for x in (left, right)]
    centred = [x - x.mean() for x in ranks]
    return float((centred[0] * centred[1]).sum() / (centred[0].norm() * centred[1].norm()).clamp(min=1e-30))
