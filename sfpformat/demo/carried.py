"""What the package carries: the model's weights in an `.sfp` file, and text that it never saw."""

from __future__ import annotations

from importlib.resources import files

import numpy as np
from numpy.typing import NDArray

from ..decode.reader import SfpFile
from ..numpy import load
from .model import encode_text

MODEL = "model.sfp"
# Kinds of held-out text: source, which the model was trained on others of, and English prose.
TEXTS = {"code": "heldout.txt", "prose": "heldout_prose.txt"}


def model_bytes() -> bytes:
    """The carried `.sfp` file."""
    return files(__package__).joinpath(MODEL).read_bytes()


def weights() -> dict[str, NDArray[np.generic]]:
    """The model's weights, BF16, by name."""
    return load(model_bytes())


def importances() -> dict[str, NDArray[np.float32]]:
    """The grades of the linear layers' weights (`sfpformat.pruning.grades`), by name, as `importance` learned
    them."""
    found = {}
    with SfpFile(model_bytes()) as file:
        for name in file:
            importance = file.get_importance(name)
            if importance is not None:
                found[name] = importance
    return found


def heldout_tokens(kind: str, count: int) -> NDArray[np.uint8]:
    """The first tokens of a held-out text, ``code`` or ``prose``."""
    text = files(__package__).joinpath(TEXTS[kind]).read_text(encoding="utf-8")
    return encode_text(text)[:count]


def linear_layers(tensors: dict[str, NDArray[np.generic]]) -> list[str]:
    """The names of the matrices inside the layers; embedding and head are not among them."""
    return [name for name, array in tensors.items() if array.ndim == 2 and name.startswith("layers.")]
