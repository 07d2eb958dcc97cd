"""Skips the first blocks of a model whose weights no longer change: they return their recorded outputs.

Rules: the blocks are the modules of the largest `nn.ModuleList` or `nn.Sequential`, if one run calls them
once each, in order. They are replayed only if each of them, and the model after them, returns the same
numbers, bit for bit, when all blocks before the last one are skipped. Thus a model in which an early block
has another effect, such as a skip connection, runs in full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

Run = Callable[[Any], object]  # runs the model on a batch, with its current weights


class Reached(Exception):
    """Raised by a hook to stop a run as soon as the tensor that it is for is recorded."""


class Replay:
    """The recorded outputs of the last block that no longer changes, for each batch.

    Memory: one output of a block for each batch.
    """

    def __init__(self, model: nn.Module, run: Run, batches: Sequence[Any]) -> None:
        """Args:
        model: in evaluation mode.
        run: runs the model on one of the batches.
        batches: the batches; a test with the first one decides whether blocks can be replayed.
        """
        self._run, self._batches = run, batches
        self._blocks = _blocks(model, run, batches[0])
        self._done = 0  # blocks
        self._outputs: list[Any] = []

    def advance(self, modules: Sequence[nn.Module]) -> None:
        """Records what the blocks before the first one with these modules return, with the current weights.

        Args:
            modules: the modules whose weights change next. Weights of earlier blocks no longer change. If one
                of the modules is outside of the blocks, nothing is recorded.
        """
        places = [
            next((i for i, block in enumerate(self._blocks) if module in set(block.modules())), 0)
            for module in modules
        ]
        place = min(places)
        if place <= self._done:
            return
        last = self._blocks[place - 1]
        found: list[Any] = []

        def see(block: nn.Module, args: Any, output: Any) -> None:
            found.append(_copied(output))
            raise Reached

        handle = last.register_forward_hook(see)
        try:
            for i, batch in enumerate(self._batches):
                with self.running(i), suppress(Reached):
                    self._run(batch)
        finally:
            handle.remove()
        self._outputs, self._done = found, place

    @contextmanager
    def running(self, batch: int) -> Iterator[None]:
        """Context in which a run on a batch, given by its index, skips the blocks that no longer change."""
        with _skipped(self._blocks[: self._done], self._outputs[batch] if self._done else None):
            yield


def _blocks(model: nn.Module, run: Run, batch: Any) -> list[nn.Module]:
    """Returns the blocks that can be replayed; an empty list if there are none."""
    lists = [list(m) for m in model.modules() if isinstance(m, (nn.ModuleList, nn.Sequential)) and len(m) > 1]
    if not lists:
        return []
    blocks = max(lists, key=lambda found: sum(p.numel() for block in found for p in block.parameters()))
    called: list[nn.Module] = []
    outputs: list[Any] = []

    def see(block: nn.Module, args: Any, output: Any) -> None:
        called.append(block)
        outputs.append(_copied(output))

    handles = [block.register_forward_hook(see) for block in blocks]
    try:
        result = _copied(run(batch))
    finally:
        for handle in handles:
            handle.remove()
    if len(called) != len(blocks) or any(one is not other for one, other in zip(called, blocks, strict=True)):
        return []
    try:
        same = all(_replays(blocks, i, outputs, run, batch) for i in range(1, len(blocks)))
        with _skipped(blocks[:-1], outputs[-2]):
            same = same and _equal(run(batch), result)
    except Exception:  # a model that cannot run without its first blocks; it then runs in full
        return []
    return blocks if same else []


def _replays(blocks: list[nn.Module], place: int, outputs: list[Any], run: Run, batch: Any) -> bool:
    """Returns whether a block returns the same if the blocks before it are skipped."""
    found: list[Any] = []

    def see(block: nn.Module, args: Any, output: Any) -> None:
        found.append(output)
        raise Reached

    handle = blocks[place].register_forward_hook(see)
    try:
        with _skipped(blocks[:place], outputs[place - 1]), suppress(Reached):
            run(batch)
    finally:
        handle.remove()
    return len(found) == 1 and _equal(found[0], outputs[place])


@contextmanager
def _skipped(blocks: Sequence[nn.Module], output: Any) -> Iterator[None]:
    """Context in which these blocks only return copies of an output."""
    before = [block.__dict__.get("forward") for block in blocks]
    for block in blocks:
        block.__dict__["forward"] = lambda *args, **kwargs: _copied(output)
    try:
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            del block.__dict__["forward"]
            if own is not None:
                block.__dict__["forward"] = own


def _copied(output: Any) -> Any:
    """Returns a copy, since modules may change tensors in place."""
    if isinstance(output, Tensor):
        return output.detach().clone()
    if type(output) in (tuple, list):
        return type(output)(_copied(part) for part in output)
    return output


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    if type(one) in (tuple, list) and type(one) is type(other) and len(one) == len(other):
        return all(map(_equal, one, other))
    return one is None and other is None
