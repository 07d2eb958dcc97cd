"""The importance network: maps the features of a weight to its score, with a logit for each weight.

score = z(start + MLP(features)) + logit, where z standardises over the model. All weights of all tensors
share the MLP, which can be transferred to another model. The MLP's last layer and the logits are initialised
to zero, so that the initial scores have the same order as the start: that of w² g².
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .calibration_sums import Statistics
from .features import FEATURES, features, standardised

WIDTH = 32
_CHUNK = 1 << 16  # weights in one batch of the MLP


class ImportanceNetwork:
    """The scores of all weights of a model, and their training.

    Attributes:
        mlp: features [n, features] -> [n, 1].
        logits: float32 [weights], or None if there is only the MLP.
        base: start + MLP(features), float32 [weights], as of the last `refresh`. Accumulates the gradient for
            the MLP.
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
        weights: the weights by name.
        found: the calibration statistics of the weights.
        logits: whether each weight has its own logit.
        seed: seed of the MLP's first layers.
        """
        self.shapes = {name: weight.shape for name, weight in weights.items()}
        self.features = features(weights, found)
        start = [(w.float().square() * found[name].fisher).reshape(-1) for name, w in weights.items()]
        self.start = standardised((torch.cat(start) + 1e-30).log())
        self.mlp = _mlp(seed).to(self.start.device)
        self.logits = torch.zeros_like(self.start).requires_grad_() if logits else None
        self.base = self.start.clone().requires_grad_()

    def scores(self) -> Tensor:
        """Returns the scores, float32 [weights], differentiable with respect to `logits` and `base`."""
        standard = standardised(self.base)
        return standard if self.logits is None else standard + self.logits

    def learn_base(self) -> None:
        """Backpropagates the accumulated gradient of `base` to the MLP, in batches, and resets it."""
        if self.base.grad is None:
            return
        for start in range(0, len(self.features), _CHUNK):
            part = slice(start, start + _CHUNK)
            out = self.mlp(self.features[part].float())[:, 0]
            torch.autograd.backward(out, self.base.grad[part])
        self.base.grad = None

    def refresh(self) -> None:
        """Recomputes `base` with the current MLP."""
        with torch.no_grad():
            for start in range(0, len(self.features), _CHUNK):
                part = slice(start, start + _CHUNK)
                out = self.mlp(self.features[part].float())[:, 0]
                self.base[part] = self.start[part] + out

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Splits a flat tensor, with one number per weight, into a view for each weight tensor, by name."""
        sizes = [shape.numel() for shape in self.shapes.values()]
        parts = torch.split(flat, sizes)
        return {
            name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def state(self) -> dict[str, Any]:
        """Returns the state for a checkpoint."""
        return {"mlp": self.mlp.state_dict(), "logits": self.logits, "base": self.base.detach()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restores the state of an earlier run."""
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
