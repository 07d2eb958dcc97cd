"""Processes with a model after fully_shard write deltas of it.

``python -m tests.support.written_delta_group FOLDER``. Each process trains a step, writes the delta as one
file and in shards, and applies it to another sharded model. Process 0 writes the base and the result with
whole tensors. Each process writes ``FOLDER/RANK.json``: what it found, and the words of the error of each
wrong call.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sfpformat.container.delta_map import DeltaMap
from sfpformat.errors import SfpError
from sfpformat.torch import apply_delta, save_file, write_delta

from .process_group import run_group

WORLD = 2


class Net(nn.Module):
    """Layers that two processes do not divide evenly, tied weights, a frozen layer, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mid, self.frozen = nn.Embedding(23, 10), nn.Linear(10, 7), nn.Linear(7, 10)
        self.one, self.out = nn.Linear(10, 1), nn.Linear(10, 23, bias=False)
        self.out.weight = self.embed.weight
        self.frozen.requires_grad_(False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.to(torch.bfloat16)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.frozen(self.mid(self.embed(tokens)).tanh())
        out: Tensor = self.out(hidden) + self.one(hidden)
        return out


def made(mesh: Any) -> Net:
    """The model, after fully_shard."""
    from torch.distributed.fsdp import fully_shard

    model, shard = Net(), fully_shard
    for layer in (model.mid, model.frozen):
        shard(layer, mesh=mesh)
    shard(model, mesh=mesh)
    return model


def whole(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors, in all processes."""
    full = {n: t.full_tensor() if hasattr(t, "full_tensor") else t.clone() for n, t in state.items()}
    return {name: tensor.detach().clone() for name, tensor in full.items() if name != "out.weight"}


def step(model: nn.Module) -> None:
    """A step of training."""
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-2)
    model(torch.arange(12).reshape(3, 4)).float().square().mean().backward()
    optimiser.step()
    with torch.no_grad():
        model.get_buffer("steps").add_(1)


def described(found: DeltaMap) -> list[list[Any]]:
    """Name, kind and checksums of each tensor, sorted."""
    return sorted([t.name, t.kind, t.base, t.result] for t in found.tensors)


def scenarios(rank: int, folder: Path) -> dict[str, Any]:
    """Writes and applies deltas."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (WORLD,))
    model = made(mesh)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "out.weight"}
    old = whole(model.state_dict())
    step(model)
    new = whole(model.state_dict())
    if rank == 0:
        save_file(old, folder / "old.sfp")
        save_file(new, folder / "new.sfp")
    dist.barrier()
    found: dict[str, Any] = {}
    for name, base in (("d", before), ("from-file", folder / "old.sfp")):
        found[name] = described(write_delta(folder / f"{name}.sfp.index.json", base, model))
        found[f"{name}, one"] = described(write_delta(folder / f"{name}.sfp", base, model))
    worker = made(mesh)
    apply_delta(worker, folder / "d.sfp.index.json")
    now = whole(worker.state_dict())
    found["applied"] = now.keys() == new.keys() and all(torch.equal(now[name], new[name]) for name in new)

    def attempt(name: str, path: Path, base: Any, new: Any) -> None:
        try:
            write_delta(path, base, new)
        except SfpError as error:
            found[name] = f"{type(error).__name__}: {error}"
        except OSError as error:
            found[name] = type(error).__name__

    missing = folder / "missing.safetensors"
    attempt("no base in one process", folder / "x.sfp.index.json", missing if rank else before, model)
    attempt("no folder in one process", folder / ("no" if rank else ".") / "x.sfp.index.json", before, model)
    state = dict(model.state_dict())
    del state["out.weight"]
    if rank:
        state["only"] = torch.zeros(3)
    attempt("other names", folder / "x.sfp", before, state)
    strange = {**before, "steps": before["steps"].to(torch.complex32) if rank == 0 else before["steps"]}
    attempt("unknown dtype in one process", folder / "x.sfp.index.json", strange, model)
    dist.barrier()
    found["left"] = sorted(path.name for path in folder.iterdir() if "x" in path.name.partition(".")[0])
    return found


def main() -> None:
    """The command."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)

    def work(rank: int) -> None:
        (folder / f"{rank}.json").write_text(json.dumps(scenarios(rank, folder)))

    run_group(WORLD, folder, work)


if __name__ == "__main__":
    main()
