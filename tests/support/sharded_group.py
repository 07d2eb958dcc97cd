"""Processes with a model after fully_shard prune it: ``python -m tests.support.sharded_group FOLDER``.

Each process writes ``FOLDER/WORLD-RANK.pt``: for each scenario its result, with whole tensors, or the words
of its error. ``FOLDER/whole.pt`` has the results of this process alone, with the same functions.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sfpformat.errors import SfpError
from sfpformat.pruning import (
    Learned,
    Otsu,
    Outliers,
    Pattern,
    Settings,
    Sparsity,
    apply_masks,
    fisher,
    learn_importance,
    magnitude,
    pack,
    prune,
    statistics,
    wanda,
)

from .process_group import run_group
from .pruning_nets import WIDTH

WORLDS = (2, 4)


class Net(nn.Module):
    """Rows that divide badly, a layer that is used twice, a convolution, and a weight that is used alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.last = nn.Linear(WIDTH, 22), nn.Linear(22, 22), nn.Linear(22, 5)
        self.mixed, self.alone = nn.Conv1d(4, 6, 3, padding=1), nn.Linear(22, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mixed(x.view(-1, 4, WIDTH // 4)).mean((1, 2))[:, None]
        x = self.first(x).relu()
        x = self.again(self.again(x).relu()).relu()
        out: Tensor = self.last(x) + mixed + nn.functional.linear(x, self.alone.weight).sum(1, keepdim=True)
        return out


def made() -> tuple[Net, list[tuple[Tensor, Tensor]]]:
    """The model, with equal and zero weights, and batches."""
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        net.again.weight[3:9] = net.again.weight[0]
        net.first.weight[:, 2] = 0
        net.last.weight.mul_(1e3)
    return net, [(torch.randn(16, WIDTH), torch.randint(5, (16,))) for _ in range(5)]


def results(net: Net, batches: Any, group: Any, folder: Path) -> dict[str, Any]:
    """Runs all scenarios; ``net`` is whole or sharded."""
    found: dict[str, Any] = {}

    def attempt(name: str, scenario: Callable[[], Any]) -> Any:
        try:
            result = scenario()
        except SfpError as error:
            found[name] = f"{type(error).__name__}: {error}"
            return None
        found[name] = whole(result)
        return result

    known = attempt("statistics", lambda: statistics(net, batches, batches=4, group=group))
    state = folder / f"state-{0 if group is None else dist.get_world_size()}.pt"
    attempt("interrupted", lambda: statistics(net, batches, batches=2, group=group))
    statistics(net, batches, batches=4, group=group, checkpoint=state, every=2)
    attempt("resumed", lambda: statistics(net, batches, batches=4, group=group, checkpoint=state))
    by_fisher = attempt("fisher", lambda: fisher(net, known))
    by_wanda = attempt("wanda", lambda: wanda(net, {k: v for k, v in known.items() if k != "mixed.weight"}))
    by_magnitude = attempt("magnitude", lambda: magnitude(net))
    world = 1 if group is None else dist.get_world_size()
    by_learning = attempt("learned", lambda: learned(net, batches, group, world))
    by_pattern = attempt("learned with a pattern", lambda: learned(net, batches, group, world, Pattern(1, 2)))
    attempt("learned from Fisher", lambda: learned(net, batches, group, world, (0.4, 0.7), start=by_fisher))
    with suppress(KeyboardInterrupt, SfpError):
        learned(net, Stopping(batches, 3), group, world, checkpoint=folder / f"learn-{world}.pt", every=1)
    again = folder / f"learn-{world}.pt"
    written = (
        [again] if group is None else sorted(folder.glob(f"learn-{world}.pt.?.{dist.get_rank()}-{world}"))
    )
    found["broken off after"] = max(torch.load(path)["step"] for path in written)
    attempt("learned in two parts", lambda: learned(net, batches, group, world, checkpoint=again))
    before = [parameter.detach().clone() for parameter in net.parameters()]
    cases: tuple[tuple[str, Any, Any, dict[str, Any]], ...] = (
        ("masks at 60 %", by_fisher, Sparsity(0.6), {}),
        ("masks at 0 %", by_fisher, 0.0, {}),
        ("masks at 100 %", by_fisher, 1.0, {}),
        ("masks of equal numbers", by_magnitude, 0.35, {"exempt": "last*"}),
        ("masks a tensor", by_fisher, Sparsity(0.5), {"scope": "tensor"}),
        ("masks a row", by_wanda, Sparsity(0.5), {"scope": "row"}),
        ("masks of a pattern", by_wanda, Pattern(1, 2), {}),
        ("masks of learned importances", by_learning.importances, 0.6, {}),
        ("masks of a learned pattern", by_pattern.importances, Pattern(1, 2), {}),
        ("otsu", by_fisher, Otsu(), {}),
        ("outliers", by_fisher, Outliers(0.5), {"scope": "row"}),
    )
    for name, importances, threshold, more in cases:
        attempt(name, partial(prune, net, importances, threshold, **more))
        found[f"weights, {name}"] = {k: whole(w.detach()).clone() for k, w in net.named_parameters()}
        with torch.no_grad():
            for parameter, value in zip(net.parameters(), before, strict=True):
                parameter.copy_(value)
    if group is not None:
        dist.barrier()
        for path in folder.glob(f"learn-{world}.pt.*.1-{world}"):
            if dist.get_rank() == 0:
                path.write_bytes(b"no checkpoint")
        dist.barrier()
        attempt("damaged", lambda: learned(net, batches, group, world, checkpoint=again))
        attempt(
            "by weights", lambda: learn_importance(net, batches, 0.5, settings=Settings(method="weights"))
        )
        attempt(
            "by a network", lambda: learn_importance(net, batches, 0.5, settings=Settings(network_rate=0.1))
        )
        bad = dict(by_fisher)
        bad["last.weight"] = bad["last.weight"].clone()
        if not dist.get_rank():
            bad["last.weight"].to_local().neg_()
        attempt("negative start", lambda: learned(net, batches, group, world, start=bad))
        attempt("multiplied", lambda: apply_masks(net, {"last.weight": torch.ones(5, 22)}))
        attempt("packed", lambda: pack(net, folder / "never.sfp", {}))
        attempt("plain importances", lambda: prune(net, {"last.weight": torch.rand(5, 22)}, 0.5))
    return found


class Stopping:
    """Data whose iteration stops the program at a batch, the fifth time that it gets there."""

    def __init__(self, data: Any, place: int) -> None:
        self.data, self.place, self.left = data, place, 5

    def __iter__(self) -> Iterator[Any]:
        for place, batch in enumerate(self.data):
            if place == self.place:
                self.left -= 1
                if not self.left:
                    raise KeyboardInterrupt
            yield batch


def learned(
    net: nn.Module, batches: Any, group: Any, world: int, sparsity: Any = 0.6, **more: Any
) -> Learned:
    """Learns with four batches a step."""
    settings = Settings(steps=6, batches=4 // world, logit_rate=0.1, shared_rate=0.1)
    return learn_importance(net, batches, sparsity, settings=settings, group=group, **more)


def whole(value: Any) -> Any:
    """Whole tensors in place of sharded ones, in containers too."""
    if isinstance(value, Tensor):
        return value.full_tensor() if hasattr(value, "full_tensor") else value
    if isinstance(value, dict):
        return {name: whole(part) for name, part in value.items()}
    if isinstance(value, Learned):
        choice: Any = value.choice
        parts = {"importances": whole(value.importances), "history": value.history, "start": value.start}
        return {**parts, "losses": value.start_losses, "shares": choice.shares, "chosen": choice.chosen}
    if hasattr(value, "fisher"):
        return [whole(part) for part in (value.gradient, value.fisher, value.inputs)]
    return value


def child(rank: int, world: int, folder: Path) -> None:
    """Shards the model and runs the scenarios."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net, batches = made()
    mesh = init_device_mesh("cpu", (world,))
    shard: Any = fully_shard
    for part in (net.first, net.again):
        shard(part, mesh=mesh)
    shard(net, mesh=mesh)  # the others belong to the outermost module
    torch.save(results(net, batches, dist.group.WORLD, folder), folder / f"{world}-{rank}.pt")


def main() -> None:
    """The command."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    net, batches = made()
    torch.save(results(copy.deepcopy(net), batches, None, folder), folder / "whole.pt")
    for world in WORLDS:
        run_group(world, folder, partial(child, world=world, folder=folder))


if __name__ == "__main__":
    main()
