"""The demonstration's model as a torch module, and windows of its training text. Needs torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .carried import linear_layers
from .model import Config, encode_text
from .train import LanguageModel, training_text

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Windows:
    """Random windows of the training text, the same each time they are gone through.

    Attributes:
        windows: in a batch, of the model's context.
        batches: how many.
        seed: what tells these from others.
    """

    windows: int
    batches: int
    seed: int

    def __iter__(self) -> Iterator[Batch]:
        """Tokens int64 [windows, context], and their successors."""
        tokens, context = training_tokens(), Config().context
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.batches):
            starts = torch.randint(len(tokens) - context, (self.windows, 1), generator=generator)
            found = tokens[starts + torch.arange(context + 1)].long()
            yield found[:, :-1], found[:, 1:]


@cache
def training_tokens() -> Tensor:
    """The training text, uint8: nothing of the held-out texts is in it."""
    return torch.from_numpy(encode_text(training_text()))


def language_model(tensors: Mapping[str, NDArray[np.generic]]) -> LanguageModel:
    """The model with these weights, float32."""
    model = LanguageModel(Config())
    model.load_state_dict(
        {name: torch.from_numpy(array.astype(np.float32)) for name, array in tensors.items()}
    )
    return model.eval()


def arrays_of(model: torch.nn.Module) -> dict[str, NDArray[np.generic]]:
    """The weights of a model as arrays over the same memory, by name."""
    return {name: np.asarray(tensor.detach().numpy()) for name, tensor in model.state_dict().items()}


def prunable_layers(model: torch.nn.Module) -> list[str]:
    """What the demonstration prunes: the matrices inside the layers."""
    return linear_layers(arrays_of(model))
