"""Small networks and data on which pruning takes seconds."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTH, CLASSES = 12, 5


def trained_net(seed: int = 0, useful: int = 6) -> tuple[nn.Sequential, list[tuple[Tensor, Tensor]]]:
    """A net of two hidden layers, and batches whose labels depend on its first ``useful`` inputs alone.

    The weights of the other inputs are the greatest, and these inputs are almost zero, so that pruning by
    magnitude prunes the wrong weights.
    """
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(CLASSES, useful, generator=generator)
    batches = []
    for _ in range(8):
        x = torch.randn(64, WIDTH, generator=generator)
        labels = (x[:, :useful] @ teacher.T).argmax(1)
        x[:, useful:] *= 1e-3
        batches.append((x, labels))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Linear(WIDTH, 24),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Linear(24, 24),
            nn.ReLU(),
            nn.Linear(24, CLASSES),
        )
    optimiser = torch.optim.Adam(net.parameters(), 1e-2)
    net.eval()
    for step in range(200):
        x, labels = batches[step % len(batches)]
        optimiser.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(net(x), labels))
        optimiser.step()
    with torch.no_grad():
        first = net.get_parameter("0.weight")
        first[:, useful:] = torch.randn(24, WIDTH - useful, generator=generator) * 2
    return net.train(), batches


def loss_of(net: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    """The mean cross-entropy, in nats."""
    net.eval()
    with torch.no_grad():
        return sum(float(nn.functional.cross_entropy(net(x), y)) for x, y in batches) / len(batches)
