"""The importance network: features of a weight to its score, and a logit of its own for each weight.

score = z(start + MLP(features)) + logit, where z standardises over the model. The MLP is shared by all
weights of all tensors: it is what can be carried over to another model. It begins with a last layer of
zeros, the logits begin as zeros: so before the first step scores order weights as the start does, w² g².
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .calibration import Statistics
from .features import FEATURES, features, standardised

WIDTH = 32
_CHUNK = 1 << 16  # weights that the MLP sees at once


class ImportanceNetwork:
    """The scores of all weights of a model, and how they learn.

    Attributes:
        mlp: features [n, features] -> [n, 1].
        logits: float32 [weights], or None where the MLP is alone.
        base: start + MLP(features), float32 [weights], as of the last `refresh`; its gradient gathers there.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        found: Mapping[str, Statistics],
        *,
        logits: bool = True,
        seed: int = 0,
    ) -> None:
        """Args:
        weights: by name.
        found: their statistics.
        logits: whether each weight has one of its own.
        seed: of the MLP's first layers.
        """
        self.shapes = {name: weight.shape for name, weight in weights.items()}
        self.features = features(weights, found)
        start = [(w.float().square() * found[name].fisher).reshape(-1) for name, w in weights.items()]
        self.start = standardised((torch.cat(start) + 1e-30).log())
        self.mlp = _mlp(seed).to(self.start.device)
        self.logits = torch.zeros_like(self.start).requires_grad_() if logits else None
        self.base = self.start.clone().requires_grad_()

    def scores(self) -> Tensor:
        """float32 [weights]; gradients go to `logits` and `base`."""
        standard = standardised(self.base)
        return standard if self.logits is None else standard + self.logits

    def learn_base(self) -> None:
        """Brings the gradient that has gathered at `base` to the MLP's weights, in bounded memory."""
        if self.base.grad is None:
            return
        for start in range(0, len(self.features), _CHUNK):
            part = slice(start, start + _CHUNK)
            out = self.mlp(self.features[part].float())[:, 0]
            torch.autograd.backward(out, self.base.grad[part])
        self.base.grad = None

    def refresh(self) -> None:
        """Computes `base` anew from the MLP as it is now."""
        with torch.no_grad():
            for start in range(0, len(self.features), _CHUNK):
                part = slice(start, start + _CHUNK)
                out = self.mlp(self.features[part].float())[:, 0]
                self.base[part] = self.start[part] + out

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """A number a weight, flat, as one view a tensor, by name."""
        sizes = [shape.numel() for shape in self.shapes.values()]
        parts = torch.split(flat, sizes)
        return {
            name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"mlp": self.mlp.state_dict(), "logits": self.logits, "base": self.base.detach()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes up the state of an earlier run."""
        self.mlp.load_state_dict(state["mlp"])
        with torch.no_grad():
            self.base.copy_(state["base"])
            if self.logits is not None:
                self.logits.copy_(state["logits"])


def _mlp(seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first = nn.Linear(len(FEATURES), WIDTH)
        second = nn.Linear(WIDTH, WIDTH)
        last = nn.Linear(WIDTH, 1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(first, nn.GELU(), second, nn.GELU(), last)
