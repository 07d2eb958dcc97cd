"""Texts as batches for transformers' models, and how well a model does on them.

Rules: causal and masked language models get windows of text, one after the other without padding; encoders
without a head get sentences, padded to the longest of their batch. Of every eight windows or sentences, one
is held out for choosing what was learned, and one for evaluation alone; these are never learned from.

transformers is not imported here: models and tokenizers are the caller's.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import OptionError
from .batches import IGNORED
from .task import CLASSIFY, Model, Task, evaluating

Batch = dict[str, Tensor]

_OF = 8  # windows of which one is held out and one evaluated
_MASKED = 0.15  # of the tokens of a masked language model, as BERT was trained
_SHARPNESS = 20.0  # of similarities as log-probabilities, as sentence encoders are trained

# What a model is, as its measure and its batches need to know it.
KINDS = ("causal", "masked", "encoder")


def read_texts(paths: Iterable[str | os.PathLike[str]]) -> Iterator[str]:
    """The texts of files: of ``.jsonl`` the item ``text`` of each line, of others the whole.

    Raises:
        OptionError: a line of a ``.jsonl`` file is no object with a string ``text``; a file is no UTF-8 text.
        OSError: a file cannot be read.
    """
    for path in map(Path, paths):
        try:
            content = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise OptionError(f"{path} is no UTF-8 text") from error
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
        raise OptionError(f"{path}, line {number}: no JSON") from error
    text = found.get("text") if isinstance(found, dict) else None
    if not isinstance(text, str):
        raise OptionError(f"{path}, line {number}: no object with a string 'text'")
    return text


@dataclass(frozen=True)
class TextData:
    """Batches of text.

    Attributes:
        learned_from: for statistics and learning.
        held_out: for choosing.
        evaluated: for evaluation.
        task: how they go through the model.
        causal: whether outputs are compared with the next label.
        measure: what `evaluate` gives: ``perplexity``, which is better the lower, or ``Spearman``.
    """

    learned_from: list[Batch]
    held_out: list[Batch]
    evaluated: list[Batch]
    task: Task
    causal: bool
    measure: str

    def evaluate(self, model: nn.Module, dense: nn.Module) -> float:
        """How well a model does on the batches for evaluation.

        Args:
            model: pruned, or the dense model itself.
            dense: the dense model, with whose similarities those of ``model`` are correlated.

        Returns:
            The perplexity a token; of an encoder Spearman's correlation of its sentences' similarities, pairs
            within a batch, with those of the dense model.
        """
        if self.measure == "Spearman":
            return _spearman(*(_similarities(one, self.evaluated) for one in (model, dense)))
        total, count = 0.0, 0
        with evaluating(model), torch.no_grad():
            for batch in self.evaluated:
                labels = batch["labels"]
                counted = int(((labels[:, 1:] if self.causal else labels) != IGNORED).sum())
                total += float(self.task.loss_of(model, batch)) * counted
                count += counted
        return math.exp(min(total / count, 700.0))


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
    """Texts as batches.

    Args:
        texts: any number.
        tokenizer: of transformers.
        kind: of the model, one of `KINDS`.
        window: tokens of a window, or the most of a sentence.
        batch: windows of a batch, of sentences four times as many.
        most: windows or sentences that are taken, of all of them evenly; None takes all.
        seed: of the order, and of the tokens that are masked.

    Raises:
        OptionError: there is too little text, or the tokenizer lacks a token that is needed.
    """
    if kind not in KINDS:
        raise OptionError(f"kind is {kind!r}, must be one of {', '.join(KINDS)}")
    if window < 2 or batch < 1:
        raise OptionError("window must be at least 2 and batch at least 1")
    generator = torch.Generator().manual_seed(seed)
    if kind == "encoder":
        batch *= 4
        pieces: list[list[int]] = _sentences(texts, tokenizer, window)
    else:
        pieces = _windows(texts, tokenizer, window)
    if most is not None and len(pieces) > most:
        pieces = [pieces[len(pieces) * i // most] for i in range(most)]
    if len(pieces) < _OF * (batch if kind == "encoder" else 1):
        unit = "sentences" if kind == "encoder" else f"windows of {window} tokens"
        needed = _OF * (batch if kind == "encoder" else 1)
        raise OptionError(f"there are {len(pieces)} {unit} of text, at least {needed} are needed")
    parts = [
        [piece for i, piece in enumerate(pieces) if i % _OF in places]
        for places in (range(_OF - 2), (_OF - 2,), (_OF - 1,))
    ]
    order = torch.randperm(len(parts[0]), generator=generator).tolist()
    parts[0] = [parts[0][i] for i in order]
    learned_from, held_out, evaluated = [_batches(part, tokenizer, kind, batch, generator) for part in parts]
    if kind == "encoder":
        return TextData(learned_from, held_out, evaluated, SIMILARITY, False, "Spearman")
    return TextData(learned_from, held_out, evaluated, CLASSIFY, kind == "causal", "perplexity")


def _windows(texts: Iterable[str], tokenizer: Any, window: int) -> list[list[int]]:
    """Texts one after the other, with the token for the end of a text between them, cut into windows."""
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
    """The lines of texts that are not empty, each once."""
    lines = dict.fromkeys(line.strip() for text in texts for line in text.splitlines())
    return [tokenizer(line, truncation=True, max_length=longest)["input_ids"] for line in lines if line]


def _batches(
    pieces: Sequence[list[int]], tokenizer: Any, kind: str, size: int, generator: torch.Generator
) -> list[Batch]:
    groups = [pieces[i : i + size] for i in range(0, len(pieces), size)]
    if kind == "encoder":  # a similarity needs two others to be told from
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
        chosen[:, 0] = True  # so that no batch is without
        out.append({"input_ids": ids.masked_fill(chosen, mask), "labels": ids.masked_fill(~chosen, IGNORED)})
    return out


def _padded(group: Sequence[list[int]], tokenizer: Any) -> Batch:
    longest = max(map(len, group))
    pad = tokenizer.pad_token_id or 0
    ids = torch.tensor([piece + [pad] * (longest - len(piece)) for piece in group])
    mask = torch.tensor([[1] * len(piece) + [0] * (longest - len(piece)) for piece in group])
    return {"input_ids": ids, "attention_mask": mask}


# -------------------------------------------------------------------------------------------- encoders


def similarities(model: Model, batch: Any) -> Tensor:
    """Which other sentence of its batch each one resembles: unnormalised log-probabilities [batch, batch].

    Sentences are the means of their tokens' last hidden states; similarities are cosines, made sharper. A
    sentence and itself have −∞.
    """
    hidden = model(**batch).last_hidden_state.float()
    counted = batch["attention_mask"][..., None].to(hidden)
    pooled = F.normalize((hidden * counted).sum(1) / counted.sum(1).clamp(min=1), dim=-1)
    cosines = _SHARPNESS * pooled @ pooled.T
    return cosines.masked_fill(torch.eye(len(cosines), dtype=torch.bool, device=cosines.device), -math.inf)


def _sampled_loss(outputs: Tensor, batch: Any) -> Tensor:
    """The cross-entropy of labels drawn from the outputs themselves, whose squared gradients are Fisher's
    information. There are no labels of similarities, and a distance from the dense model has no gradient at
    the dense model."""
    generator = torch.Generator().manual_seed(int(batch["input_ids"].sum()))
    chances = outputs.detach().softmax(-1).cpu()
    labels = torch.multinomial(chances, 1, generator=generator)[:, 0].to(outputs.device)
    return F.cross_entropy(outputs, labels)


SIMILARITY = Task(run=similarities, loss=_sampled_loss)


def _similarities(model: nn.Module, batches: Iterable[Batch]) -> Tensor:
    """All pairs within batches, flat."""
    found = []
    with evaluating(model), torch.no_grad():
        for batch in batches:
            outputs = similarities(model, batch)
            found.append(outputs[outputs > -math.inf])
    return torch.cat(found)


def _spearman(left: Tensor, right: Tensor) -> float:
    ranks = [x.argsort().argsort().double() for x in (left, right)]
    centred = [x - x.mean() for x in ranks]
    return float((centred[0] * centred[1]).sum() / (centred[0].norm() * centred[1].norm()).clamp(min=1e-30))
