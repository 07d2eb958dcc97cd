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
from .train import LanguageModel, draw_windows, training_text

Batch = tuple[Tensor, Tensor]

WINDOWS = 8  # a batch of what is learned from
CALIBRATION_WINDOWS = 2  # a batch of what statistics are taken of: for Fisher's information, few are better
CALIBRATION_BATCHES = 64
# Seeds of the windows begin there; those of training are far under them.
_CALIBRATION_SEED, _LEARNING_SEED = 1 << 20, 1 << 21


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
            yield draw_windows(tokens, context, self.windows, generator)


def calibration_windows(seed: int, batches: int) -> Windows:
    """What statistics are taken of."""
    return Windows(CALIBRATION_WINDOWS, batches, _CALIBRATION_SEED + seed)


def learning_windows(seed: int, steps: int) -> Windows:
    """What importances and survivors learn from, a batch a step."""
    return Windows(WINDOWS, steps, _LEARNING_SEED + seed)


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
