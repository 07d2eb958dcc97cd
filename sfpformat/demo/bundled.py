"""Data files of the package: the model's weights in an `.sfp` file, and held-out texts."""

from __future__ import annotations

from importlib.resources import files

import numpy as np
from numpy.typing import NDArray

from ..decode.reader import SfpFile
from ..numpy import load
from .model import encode_text

MODEL = "model.sfp"
# Kinds of held-out text: source code, like the training text, and English prose.
TEXTS = {"code": "heldout.txt", "prose": "heldout_prose.txt"}


def model_bytes() -> bytes:
    """Returns the bytes of the package's `.sfp` file."""
    return files(__package__).joinpath(MODEL).read_bytes()


def weights() -> dict[str, NDArray[np.generic]]:
    """Returns the model's weights, BF16, by name."""
    return load(model_bytes())


def importances() -> dict[str, NDArray[np.float32]]:
    """Returns the learned grades of the linear layers' weights (`sfpformat.pruning.grades`), by name."""
    found = {}
    with SfpFile(model_bytes()) as file:
        for name in file:
            importance = file.get_importance(name)
            if importance is not None:
                found[name] = importance
    return found


def heldout_tokens(kind: str, count: int) -> NDArray[np.uint8]:
    """Returns the first tokens of a held-out text, ``code`` or ``prose``."""
    text = files(__package__).joinpath(TEXTS[kind]).read_text(encoding="utf-8")
    return encode_text(text)[:count]


def linear_layers(tensors: dict[str, NDArray[np.generic]]) -> list[str]:
    """Returns the names of the matrices inside the layers, without embedding and head."""
    return [name for name, array in tensors.items() if array.ndim == 2 and name.startswith("layers.")]
