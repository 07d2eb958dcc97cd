"""The demonstration's model as a torch module, and windows of its training text. Needs torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .bundled import linear_layers
from .model import Config, encode_text
from .train import LanguageModel, draw_windows, training_text

Batch = tuple[Tensor, Tensor]

WINDOWS = 8  # in a batch for learning
CALIBRATION_WINDOWS = 2  # in a calibration batch; small batches approximate the Fisher information better
CALIBRATION_BATCHES = 64
# The first seeds of the windows, far above the seeds of training.
_CALIBRATION_SEED, _LEARNING_SEED = 1 << 20, 1 << 21


@dataclass(frozen=True)
class Windows:
    """Random windows of the training text, the same in each iteration.

    Attributes:
        windows: number of windows in a batch, each of the model's context length.
        batches: number of batches.
        seed: seed of the random windows.
    """

    windows: int
    batches: int
    seed: int

    def __iter__(self) -> Iterator[Batch]:
        """Yields tokens, int64 [windows, context], and their successors."""
        tokens, context = training_tokens(), Config().context
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.batches):
            yield draw_windows(tokens, context, self.windows, generator)


def calibration_windows(seed: int, batches: int) -> Windows:
    """Returns the calibration batches."""
    return Windows(CALIBRATION_WINDOWS, batches, _CALIBRATION_SEED + seed)


def learning_windows(seed: int, steps: int) -> Windows:
    """Returns the batches for learning importances and for tuning, one for each step."""
    return Windows(WINDOWS, steps, _LEARNING_SEED + seed)


@cache
def training_tokens() -> Tensor:
    """Returns the training text, uint8, without the held-out texts."""
    return torch.from_numpy(encode_text(training_text()))


def language_model(tensors: Mapping[str, NDArray[np.generic]]) -> LanguageModel:
    """Returns the model with these weights, float32, in evaluation mode."""
    model = LanguageModel(Config())
    model.load_state_dict(
        {name: torch.from_numpy(array.astype(np.float32)) for name, array in tensors.items()}
    )
    return model.eval()


def arrays_of(model: torch.nn.Module) -> dict[str, NDArray[np.generic]]:
    """Returns the weights of a model as arrays that share their memory, by name."""
    return {name: np.asarray(tensor.detach().numpy()) for name, tensor in model.state_dict().items()}


def prunable_layers(model: torch.nn.Module) -> list[str]:
    """Returns the names of the weights that the demonstration prunes: the matrices inside the layers."""
    return linear_layers(arrays_of(model))
