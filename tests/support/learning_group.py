"""Four processes that learn together: ``python -m tests.support.learning_group FOLDER``.

Each process writes ``FOLDER/RANK.pt``: for each scenario its result, or the text of its error. The last
process ends during the last scenario without a report.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from sfpformat.errors import SfpError
from sfpformat.pruning.calibration import statistics
from sfpformat.pruning.learning import learn_importance
from sfpformat.pruning.learning_settings import Settings
from sfpformat.pruning.processes import Processes

from .pruning_nets import trained_net

WORLD = 4
SETTINGS: dict[str, Any] = {
    "method": "levels",
    "steps": 8,
    "network_rate": 1e-2,
    "network_every": 3,
    "logit_rate": 0.1,
}


class Odd(nn.Module):
    """A net in which some batches use a layer twice, and some batches do not use another layer."""

    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.net, self.other = net, nn.Linear(24, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.net[1](self.net[0](x))
        if x[0, 0] > x[0, 1]:
            x = self.net[3](x).relu()
        if x[0, 1] > x[0, 2]:
            x = self.other(x).relu() + x
        out: torch.Tensor = self.net[5](self.net[3](x).relu())
        return out


def learned(model: nn.Module, data: Any, group: Any, world: int, **more: Any) -> dict[str, Any]:
    settings = Settings(**{**SETTINGS, "batches": WORLD // world})
    found = learn_importance(model, data, (0.5, 0.7), settings=settings, group=group, **more)
    assert found.choice is not None
    return {
        "importances": found.importances,
        "history": found.history,
        "shares": found.choice.shares,
        "chosen": found.choice.chosen,
    }


def counted(model: nn.Module, data: Any, group: Any) -> dict[str, Any]:
    seen: list[int] = []
    found = statistics(
        model, data, group=group, single=True, batches=37, progress=lambda i, loss: seen.append(i)
    )
    parts = {name: (one.gradient, one.fisher, one.inputs) for name, one in found.items()}
    return {"seen": seen, "statistics": parts}


class Stopping:
    """Data whose iteration calls a function before batch 5."""

    def __init__(self, data: list[Any], stop: Callable[[], None]) -> None:
        self.data, self.stop = data, stop

    def __iter__(self) -> Iterator[Any]:
        for place, batch in enumerate(self.data):
            if place == 5:
                self.stop()
            yield batch


def scenarios(rank: int, folder: Path, net: nn.Sequential, batches: list[Any]) -> dict[str, Any]:
    """Runs all scenarios on one process."""
    groups = {4: dist.group.WORLD, 2: dist.new_group([0, 1])}
    results: dict[str, Any] = {}

    def attempt(name: str, scenario: Callable[[], Any]) -> None:
        try:
            results[name] = scenario()
        except SfpError as error:
            results[name] = f"{type(error).__name__}: {error}"

    torch.manual_seed(1)
    odd = Odd(net)
    start = {name: weight.detach().square() for name, weight in odd.named_parameters() if weight.dim() > 1}
    for world in (1, 2, 4):
        if rank >= world:
            continue
        group = groups.get(world)
        attempt(f"learned by {world}", partial(learned, odd, batches, group, world, start=start))
        attempt(f"statistics by {world}", partial(counted, odd, batches, group))
    attempt("whole", partial(learned, net, batches, groups[4], 4))
    all_of = groups[4]
    attempt("sums", lambda: sums(all_of))
    # A run that stops on four processes and is resumed by two.
    path = folder / "state.pt"
    stops = iter(
        [False, False, True]
    )  # statistics and the selection of held-out batches pass batch 5 before learning does

    def stop() -> None:
        if next(stops, False):
            raise KeyboardInterrupt

    with suppress(KeyboardInterrupt, SfpError):
        learned(net, Stopping(batches, stop), all_of, 4, checkpoint=path, every=1)
    dist.barrier()
    results["broken off after"] = torch.load(path)["step"]
    dist.barrier()
    if rank < 2:
        attempt("resumed", lambda: learned(net, batches, groups[2], 2, checkpoint=path))
    dist.barrier()
    attempt(
        "fewer",
        lambda: learned(net, batches[: 8 - rank // 3], all_of, 4, held_out=batches[:1], start=start_of(net)),
    )
    attempt("fewer statistics", lambda: statistics(net, batches[: 6 - 4 * (rank == 1)], group=all_of))
    attempt(
        "others", lambda: learned(net, batches if rank else batches[::-1], all_of, 4, start=start_of(net))
    )
    attempt("other statistics", lambda: statistics(net, batches if rank else batches[::-1], group=all_of))
    wrong = [(x * float("nan"), y) if i == 2 else (x, y) for i, (x, y) in enumerate(batches)]
    attempt("not finite", lambda: learned(net, wrong, all_of, 4, held_out=batches[:1], start=start_of(net)))
    torch.save(results, folder / f"{rank}.pt")
    last = Stopping(batches, (lambda: os._exit(7)) if rank == 3 else (lambda: None))
    begun = time.monotonic()
    attempt("gone", lambda: learned(net, last, all_of, 4, held_out=batches[:1], start=start_of(net)))
    results["gone after"] = time.monotonic() - begun
    return results


def start_of(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().square() for name, weight in net.named_parameters() if weight.dim() > 1}


def sums(group: Any) -> dict[int, bool]:
    """Sums of numbers that depend on the order, for sizes that are multiples of a share and for others."""
    processes = Processes(group)
    found = {}
    for size in (1, 63, 64, 1000):
        generator = torch.Generator().manual_seed(size)
        parts = torch.randn(WORLD, size, generator=generator) * 10 ** torch.randint(9, (WORLD, size))
        total = processes.added(parts[0].clone(), parts[processes.rank])
        expected = parts[0].clone()
        for part in parts:
            expected += part
        found[size] = torch.equal(total, expected) and torch.equal(
            processes.added(None, parts[processes.rank]), ((parts[0] + parts[1]) + parts[2]) + parts[3]
        )
    return found


def child(rank: int, folder: Path, net: nn.Sequential, batches: list[Any]) -> None:
    """Joins the group and runs the scenarios."""
    stores: Any = dist  # torch's own types omit the stores
    store = stores.FileStore(str(folder / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    torch.save(scenarios(rank, folder, net, batches), folder / f"{rank}.pt")


def main() -> None:
    """The command."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    net, batches = trained_net()
    children = []
    for rank in range(WORLD):
        process = os.fork()
        if not process:
            code = 1
            try:
                child(rank, folder, net, batches)
                code = 0
            except BaseException as error:
                print(rank, repr(error), file=sys.stderr)
                raise
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(process)
    print([os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in children])


if __name__ == "__main__":
    main()
