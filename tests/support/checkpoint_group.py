"""Processes load and save checkpoints by ``torch.distributed.checkpoint``.

``python -m tests.support.checkpoint_group FOLDER``. Each of two processes writes ``FOLDER/RANK.json``: for
each scenario whether its tensors have the expected bits, the bytes that it read, or the words of its error.
Each of four processes writes ``FOLDER/grid-RANK.json``, for layouts on a grid.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from sfpformat import Options, Uniform
from sfpformat.io.positional import PositionalFile
from sfpformat.torch import save_file
from sfpformat.torch.distributed_checkpoint import SfpStorageReader, SfpStorageWriter
from sfpformat.torch.distributed_checkpoint import reader as reader_module
from sfpformat.torch.distributed_checkpoint import writer as writer_module

from .process_group import run_group

dcp: Any = torch.distributed.checkpoint  # torch's own types leave its functions out
WORLD, GRID = 2, 4
OBJECTS = {"epoch": 3, "rates": (0.1, float("inf"), -0.0), "names": ["a", None, {"b": True}], "none": {}}
QUANTISED = "model.layers.0.mlp.up_proj.weight"


def llama(seed: int) -> nn.Module:
    """A Llama with random weights; two processes do not divide its vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model.to(torch.bfloat16)


def sharded(model: nn.Module) -> nn.Module:
    """Applies FSDP2 to each layer and to the model."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh, shard = init_device_mesh("cpu", (WORLD,)), cast_any(fully_shard)
    for layer in cast_any(model).model.layers if hasattr(model, "model") else ():
        shard(layer, mesh=mesh)
    shard(model, mesh=mesh)
    return model


def parallel(model: nn.Module) -> nn.Module:
    """Applies tensor parallelism: Shard(0), Shard(1), and Replicate for the norms."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (WORLD,))
    plan: dict[str, Any] = {
        **{f"model.layers.*.{part}": ColwiseParallel() for part in ("self_attn.q_proj", "self_attn.k_proj")},
        **{f"model.layers.*.{part}": ColwiseParallel() for part in ("self_attn.v_proj", "mlp.gate_proj")},
        "model.layers.*.mlp.up_proj": ColwiseParallel(),
        "model.layers.*.self_attn.o_proj": RowwiseParallel(),
        "model.layers.*.mlp.down_proj": RowwiseParallel(),
        "lm_head": ColwiseParallel(),
    }
    return parallelize_module(model, mesh, plan)


def cast_any(value: Any) -> Any:
    """Returns a value without its type: torch's own types are narrower than its functions."""
    return value


def whole(tensor: Tensor) -> Tensor:
    """Gathers a DTensor."""
    full: Tensor = cast_any(tensor).full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def equal(state: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Whether two nested states have the same bits."""
    if state.keys() != expected.keys():
        return False
    for name, value in state.items():
        other = expected[name]
        if isinstance(value, dict):
            if not equal(value, other):
                return False
        elif isinstance(value, Tensor):
            one, two = whole(value), whole(other)
            if one.dtype != two.dtype or not torch.equal(one, two):
                return False
        elif repr(value) != repr(other):
            return False
    return True


@contextmanager
def counted() -> Iterator[list[int]]:
    """Counts the bytes that this process reads from files."""
    real: Callable[..., int] = PositionalFile.read_into
    sizes: list[int] = []

    def read_into(self: PositionalFile, view: memoryview, offset: int) -> int:
        sizes.append(real(self, view, offset))
        return sizes[-1]

    cast_any(PositionalFile).read_into = read_into
    try:
        yield sizes
    finally:
        cast_any(PositionalFile).read_into = real


@contextmanager
def small_rooms() -> Iterator[None]:
    """Lets processes exchange a few kilobytes at a time."""
    real = cast_any(reader_module).plan_reading, cast_any(writer_module).plan_writing
    cast_any(reader_module).plan_reading = partial(real[0], room=5000)
    cast_any(writer_module).plan_writing = partial(real[1], room=5000)
    try:
        yield
    finally:
        cast_any(reader_module).plan_reading, cast_any(writer_module).plan_writing = real


def trained(model: nn.Module, seed: int) -> torch.optim.Optimizer:
    """Makes a step of AdamW with gradients that do not depend on the layout."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.8, 0.95))
    torch.manual_seed(seed)
    for weight in model.parameters():
        gradient = torch.randn(weight.shape, dtype=weight.dtype)
        if hasattr(weight, "full_tensor"):
            from torch.distributed.tensor import distribute_tensor

            own = cast_any(weight)
            weight.grad = distribute_tensor(gradient, own.device_mesh, own.placements)
        else:
            weight.grad = gradient
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of a training."""
    return {
        "model": get_model_state_dict(model),
        "optim": get_optimizer_state_dict(model, optimizer),
        "other": dict(OBJECTS),
    }


class Failing(DefaultSavePlanner):
    """A planner that fails in process 1 when it resolves a tensor."""

    def resolve_data(self, write_item: Any) -> Any:
        if dist.get_rank() == 1 and "layers.1.mlp" in write_item.index.fqn:
            raise ValueError("the tensor is gone")
        return super().resolve_data(write_item)


def scenarios(rank: int, folder: Path) -> dict[str, Any]:
    """Loads and saves."""
    found: dict[str, Any] = {}
    expected = dict(llama(0).state_dict())
    for name, layout in (("fsdp", sharded), ("parallel", parallel)):
        for file in ("model.sfp", "shards/model.sfp.index.json"):
            model = layout(llama(1))
            loaded: dict[str, Any] = get_model_state_dict(model)
            with counted() as sizes:
                dcp.load(loaded, storage_reader=SfpStorageReader(folder / file))
            set_model_state_dict(model, loaded)
            found[f"{name}, {file}"] = [equal(dict(model.state_dict()), expected), sum(sizes)]

    model = sharded(llama(2))
    optimizer = trained(model, 3)
    saved = state_of(model, optimizer)
    dcp.save(saved, storage_writer=SfpStorageWriter(folder / "fsdp", metadata={"step": "1"}))
    dist.barrier()
    other = parallel(llama(4))
    second = trained(other, 5)
    state: dict[str, Any] = state_of(other, second)
    with counted() as sizes:
        dcp.load(state, checkpoint_id=folder / "fsdp", storage_reader=SfpStorageReader())
    set_model_state_dict(other, state["model"])
    set_optimizer_state_dict(other, second, state["optim"])
    found["fsdp to parallel"] = [equal(state_of(other, second), saved), sum(sizes)]
    options = {QUANTISED: Options(Uniform(bits=4))}
    dcp.save(state, storage_writer=SfpStorageWriter(folder / "parallel", metadata={"step": "1"}))
    named = {"model": state["model"]}
    for target, of in (("quantised", named), ("quantised-fsdp", {"model": saved["model"]})):
        own = {f"model.{name}": value for name, value in options.items()}
        dcp.save(of, storage_writer=SfpStorageWriter(folder / target, options=own))

    with small_rooms():
        dcp.save(saved, storage_writer=SfpStorageWriter(folder / "rounds"))
        dist.barrier()
        state = state_of(other, second)
        dcp.load(state, storage_reader=SfpStorageReader(folder / "rounds"))
    found["many rounds"] = equal(state, saved)

    group = dist.new_group([1, 0])
    few = sharded(nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 2)))  # process 1 has no part of a bias
    writer = SfpStorageWriter(folder / "few", process_group=group)
    dcp.save(few.state_dict(), storage_writer=writer, process_group=group)
    dist.barrier()
    again = sharded(nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 2)))
    reader = SfpStorageReader(folder / "few", process_group=group)
    dcp.load(again.state_dict(), storage_reader=reader, process_group=group)
    found["few elements, a group"] = equal(dict(again.state_dict()), dict(few.state_dict()))
    mine = {"w": torch.full((3,), float(rank))}
    dcp.save(mine, storage_writer=SfpStorageWriter(folder / f"own-{rank}"), no_dist=True)
    dcp.load(mine, storage_reader=SfpStorageReader(folder / f"own-{rank}"), no_dist=True)
    found["alone"] = mine["w"].tolist() == [rank] * 3

    pending = dcp.async_save(saved, storage_writer=SfpStorageWriter(folder / "async"))
    pending.result()
    dist.barrier()

    def attempt(name: str, work: Callable[[], object]) -> None:
        try:
            work()
            found[name] = ["no error"]
        except dcp.CheckpointException as error:
            found[name] = [f"{type(one[0]).__name__}: {one[0]}" for _, one in sorted(error.failures.items())]
        dist.barrier()

    def load(path: str, state: dict[str, Any]) -> Callable[[], object]:
        return lambda: dcp.load(state, storage_reader=SfpStorageReader(folder / path))

    other_file = "model.sfp" if rank else "shards/model.sfp.index.json"
    attempt("other files of processes", load(other_file, get_model_state_dict(model)))
    attempt("damaged", load("damaged.sfp", get_model_state_dict(model)))
    attempt("no file", load("none.sfp", get_model_state_dict(model)))
    attempt("missing", load("model.sfp", {**get_model_state_dict(model), "more": torch.zeros(2)}))
    attempt("shape", load("model.sfp", {"lm_head.weight": torch.zeros(98, 64)}))
    attempt("delta", load("d.sfp", get_model_state_dict(model)))

    def save(path: str, state: dict[str, Any], **arguments: Any) -> Callable[[], object]:
        planner = arguments.pop("planner", None)
        writer = SfpStorageWriter(folder / path, **arguments)
        return lambda: dcp.save(state, storage_writer=writer, planner=planner)

    (folder / "old").mkdir(exist_ok=True)
    attempt("earlier", save("old", {"w": torch.arange(6.0)}))
    attempt("a process fails", save("old", saved, planner=Failing()))
    attempt("object", save("old", {**saved, "what": {"a", "b"}}))
    attempt("dtype", save("old", {"w": torch.zeros(2, dtype=torch.complex32)}))
    attempt("class", save("old", {**saved, "what": Path("a")}))
    attempt("option", save("old", saved, options=options))
    attempt("other files", save("shards", saved))
    found["left"] = sorted(path.name for path in (folder / "old").iterdir())
    return found


def grids(rank: int, folder: Path) -> dict[str, Any]:
    """Loads and saves on a grid of processes: FSDP2 with replicas, and FSDP2 of tensor parallelism."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = cast_any(init_device_mesh("cpu", (2, GRID // 2), mesh_dim_names=("data", "tensor")))
    shard = cast_any(fully_shard)

    def replicated(model: nn.Module) -> nn.Module:
        shard(model, mesh=mesh)
        return model

    def both(model: nn.Module) -> nn.Module:
        plan = {
            "model.layers.*.mlp.up_proj": ColwiseParallel(),
            "model.layers.*.mlp.gate_proj": ColwiseParallel(),
        }
        rows = {"model.layers.*.mlp.down_proj": RowwiseParallel()}
        parallelize_module(model, mesh["tensor"], {**plan, **rows})
        shard(model, mesh=mesh["data"])
        return model

    found: dict[str, Any] = {}
    expected = dict(llama(0).state_dict())
    for name, layout in (("replicated", replicated), ("both", both)):
        model = layout(llama(1))
        state: dict[str, Any] = get_model_state_dict(model)
        with counted() as sizes:
            dcp.load(state, storage_reader=SfpStorageReader(folder / "model.sfp"))
        set_model_state_dict(model, state)
        found[name] = [equal(dict(model.state_dict()), expected), sum(sizes)]
        dcp.save(state, storage_writer=SfpStorageWriter(folder / name))
        dist.barrier()
    return found


def main() -> None:
    """The command."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    written(folder)

    def work(rank: int) -> None:
        (folder / f"{rank}.json").write_text(json.dumps(scenarios(rank, folder)))

    def work_on_grid(rank: int) -> None:
        (folder / f"grid-{rank}.json").write_text(json.dumps(grids(rank, folder)))

    run_group(WORLD, folder, work)
    run_group(GRID, folder, work_on_grid)


def written(folder: Path) -> None:
    """Writes the files that the processes load."""
    from sfpformat.decode.shard_index import ShardIndex
    from sfpformat.torch import write_delta

    state = dict(llama(0).state_dict())
    save_file(state, folder / "model.sfp")
    write_delta(folder / "d.sfp", state, llama(1))
    data = bytearray((folder / "model.sfp").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "damaged.sfp").write_bytes(data)
    (folder / "shards").mkdir()
    names = sorted(state)
    files = {"a.sfp": names[::2], "b.sfp": names[1::2]}
    for file, some in files.items():
        save_file({name: state[name] for name in some}, folder / "shards" / file)
    index = ShardIndex.of_files(files, sum(tensor.nbytes for tensor in state.values()))
    (folder / "shards" / "model.sfp.index.json").write_bytes(index.to_bytes())


if __name__ == "__main__":
    main()
