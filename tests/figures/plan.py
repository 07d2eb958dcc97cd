"""Memory, bytes on the wire and time a step of learning importances of large models: computed, not measured.

``python -m tests.figures.plan`` prints the table of `.github/guides/prune.md`.
"""

from __future__ import annotations

from dataclasses import dataclass

from sfpformat.pruning.learning import bytes_per_weight
from sfpformat.pruning.learning_settings import Settings

TOKENS = 2048  # of a process in a step

# NVIDIA's data sheet of the H200 (SXM): memory, its bandwidth, and dense products a second by bytes a weight.
MEMORY, BANDWIDTH = 141e9, 4.8e12
PRODUCTS = {4: 67e12, 2: 989e12}
# Bytes a second that a GPU sends: NVLink within a node, one port of 400 Gbit/s between nodes.
LINK = {False: 450e9, True: 50e9}
SHARE = 0.4  # assumed: share of these products that a step reaches

# Bytes a weight that the operations of a step read and write, each counted as its own pass, with logits and
# moments of 16 bits and weights of 2 bytes: the mask forward and backward, the gradient, and the optimiser.
MASK, GRADIENT, OPTIMISER = 40, 90, 300


@dataclass(frozen=True)
class Model:
    """A decoder as Llama 3: each block has four matrices of attention and three of the MLP."""

    name: str
    blocks: int
    hidden: int
    keys: int  # outputs of the key matrix
    inner: int
    vocabulary: int = 128_256

    @property
    def pruned(self) -> int:
        """The number of weights that are pruned: linear layers, the head included."""
        attention = 2 * self.hidden * (self.hidden + self.keys)
        return self.blocks * (attention + 3 * self.hidden * self.inner) + self.largest

    @property
    def largest(self) -> int:
        """The number of weights of the largest tensor, the head."""
        return self.vocabulary * self.hidden

    @property
    def weights(self) -> int:
        """The number of all weights: those of the embedding too."""
        return self.pruned + self.largest

    @property
    def activations(self) -> int:
        """Numbers that a token keeps for the backward pass, without checkpoints of activations."""
        return self.blocks * (10 * self.hidden + 4 * self.keys + 4 * self.inner) + 4 * self.vocabulary


@dataclass(frozen=True)
class Way:
    """How a model is learned.

    Attributes:
        name: its name in the table.
        width: bytes of a weight of the model.
        given: whether the caller holds the importances that learning starts from.
        sharded: whether weights and state are divided among the processes; else each holds all.
    """

    name: str
    width: int
    given: bool
    sharded: bool


SMALL, LARGE = Model("8 B", 32, 4096, 1024, 14_336), Model("70 B", 80, 8192, 1024, 28_672)
COMMAND = Way("`sfp learn`, F32", 4, True, False)
WHOLE = Way("`learn_importance`, BF16", 2, False, False)
SHARDED = Way("the same, sharded", 2, False, True)
CASES = (
    (SMALL, 8, COMMAND),
    (SMALL, 8, WHOLE),
    (SMALL, 8, SHARDED),
    (LARGE, 32, WHOLE),
    (LARGE, 32, SHARDED),
)


def memory(model: Model, processes: int, way: Way) -> dict[str, float]:
    """Returns the bytes of each part on one GPU."""
    parts = processes if way.sharded else 1
    state = bytes_per_weight(Settings()) + 4 * way.given
    # The float32 gradient and a masked copy of the largest tensor, and three buffers of its exchange.
    largest = (4 + way.width + 3 * 4) * model.largest
    if way.sharded:  # the largest block is gathered
        largest += way.width * max(model.largest, (model.weights - 2 * model.largest) // model.blocks)
    return {
        "weights": way.width * model.weights / parts,
        "state": state * model.pruned / parts,
        "largest": largest,
        "activations": way.width * model.activations * TOKENS,
    }


def sent(model: Model, processes: int, way: Way) -> float:
    """Returns the bytes that a process sends in a step.

    Whole weights: float32 gradients are divided among the processes, added, and returned to all
    (`Processes.added`). Sharded ones: the weights are gathered for the dense model, the masked model and the
    backward pass, masks of 1 byte for the masked model, float32 scores for the backward pass, and each
    float32 gradient goes to the process that has its rows.
    """
    others = (processes - 1) / processes
    if way.sharded:
        return others * (3 * way.width * model.weights + (1 + 4 + 4) * model.pruned)
    return others * 2 * 4 * model.pruned


def seconds(model: Model, processes: int, way: Way) -> dict[str, float]:
    """Returns the seconds of each part of a step, if none of them overlap."""
    parts = processes if way.sharded else 1
    # For a weight and a token: two operations in each of two forward passes, two for the gradient of the
    # layer's input, and two for that of the weight.
    products = 8 * model.weights * TOKENS / (SHARE * PRODUCTS[way.width])
    # Of sharded weights, each process computes the masks of its rows, and the gradients of all rows.
    moved = (MASK + OPTIMISER) / parts + MASK + GRADIENT
    return {
        "products": products,
        "state": moved * model.pruned / BANDWIDTH,
        "wire": sent(model, processes, way) / LINK[processes > 8],
    }


def table() -> str:
    """Returns the table in Markdown."""
    lines = [
        "| model, GPUs | way | weights + state + largest tensor + activations, GB a GPU "
        "| sent, GB a GPU and step | products + state + wire, s a step |",
        "|---|---|---|---|---|",
    ]
    for model, processes, way in CASES:
        parts = memory(model, processes, way)
        total = sum(parts.values())
        fits = "" if total < MEMORY else ", does not fit"
        times = seconds(model, processes, way)
        lines.append(
            f"| {model.name}, {processes} | {way.name} "
            f"| {_sum(parts, 1e9, 0)}{fits} "
            f"| {sent(model, processes, way) / 1e9:.0f} | {_sum(times, 1, 2)} |"
        )
    return "\n".join(lines) + "\n"


def _sum(parts: dict[str, float], unit: float, digits: int) -> str:
    words = " + ".join(f"{value / unit:.{digits}f}" for value in parts.values())
    return f"{words} = {sum(parts.values()) / unit:.{digits}f}"


if __name__ == "__main__":
    print(table(), end="")
