"""Processes that hold parts of a Llama apply deltas: ``python -m tests.support.delta_group FOLDER``.

Each process writes ``FOLDER/WORLD-RANK.json``: for each scenario whether its part has the bits of the result,
or the words of its error and whether the part is unchanged.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfpformat.errors import SfpError
from sfpformat.torch import apply_delta, write_delta

from .process_group import run_group

WORLDS = (2, 4)


def made() -> nn.Module:
    """A Llama with sizes that four processes do not divide, and tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=42,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model.to(torch.bfloat16)


def stepped(model: nn.Module) -> nn.Module:
    """Changes a model as a step of training does."""
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(2e-4 * torch.randn_like(weight))
    return model


def placements_of(name: str, mesh: Any) -> list[Any]:
    """Tensor parallelism as transformers uses it. On a grid, processes of a column hold the same, or rows."""
    from torch.distributed.tensor import Replicate, Shard

    columns = name.endswith(("o_proj.weight", "down_proj.weight"))
    last = Shard(1) if columns else Replicate() if "norm" in name else Shard(0)
    if mesh.ndim == 1:
        return [last]
    return [Shard(0) if "mlp" in name else Replicate(), last]


def distributed(model: nn.Module, mesh: Any) -> nn.Module:
    """Replaces the parameters of a model by DTensors; tied ones stay tied."""
    from torch.distributed.tensor import distribute_tensor

    new: dict[int, nn.Parameter] = {}
    for path, module in list(model.named_modules()):
        for name, weight in list(module.named_parameters(recurse=False)):
            whole = distribute_tensor(weight.detach(), mesh, placements_of(f"{path}.{name}", mesh))
            setattr(module, name, new.setdefault(id(weight), nn.Parameter(whole)))
    return model


def local(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the parts that this process holds."""
    with torch.no_grad():
        return {
            name: (tensor.to_local() if hasattr(tensor, "to_local") else tensor).clone()
            for name, tensor in state.items()
        }


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two models have the same names and bits."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def scenarios(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Applies deltas to several layouts."""
    from torch.distributed.device_mesh import init_device_mesh

    delta = folder / "d.sfp"
    found: dict[str, Any] = {}

    def attempt(
        name: str, target: Any, expected: Mapping[str, Tensor], slices: Any = None, path: Path = delta
    ) -> None:
        state = target.state_dict if isinstance(target, nn.Module) else lambda: target
        before = local(state())
        try:
            apply_delta(target, path, slices=slices)
        except (SfpError, OSError) as error:
            found[name] = [f"{type(error).__name__}: {error}", same(local(state()), before)]
            return
        found[name] = [same(local(state()), expected), not same(before, expected)]

    shapes = [(world,)] if world == 2 else [(world,), (2, world // 2)]
    for shape in shapes:
        mesh = init_device_mesh("cpu", shape)
        model = distributed(made(), mesh)
        expected = local(distributed(stepped(made()), mesh).state_dict())
        name = f"mesh {list(shape)}"
        attempt(name, model, expected)
        attempt(f"{name}, again", model, expected)
    mesh = init_device_mesh("cpu", (world,))
    wrong = distributed(made(), mesh)
    if rank == world - 1:
        with torch.no_grad():
            weight: Any = wrong.get_parameter("model.layers.1.mlp.down_proj.weight")
            weight.to_local()[3, 1] += 1
    attempt("wrong base", wrong, {})

    rows = {"model.layers.0.mlp.up_proj.weight": 0, "model.layers.1.self_attn.o_proj.weight": 1}
    slices: dict[str, Any] = {}
    for name, dim in rows.items():
        size = made().get_parameter(name).shape[dim]
        chunk = -(-size // world)
        part = slice(rank * chunk, min((rank + 1) * chunk, size))
        slices[name] = part if dim == 0 else (slice(None), part)

    def cut(model: nn.Module) -> dict[str, Tensor]:
        state = dict(model.state_dict())
        del state["model.embed_tokens.weight"]  # tied to lm_head.weight, which the delta lists
        return {n: (w[slices[n]].contiguous() if n in slices else w).clone() for n, w in state.items()}

    parts, goal = cut(made()), cut(stepped(made()))
    attempt("named slices", parts, goal, slices)
    strided = {
        name: weight.t().contiguous().t() if weight.ndim == 2 else weight
        for name, weight in cut(made()).items()
    }
    attempt("strided slices", strided, goal, slices)
    for name, index in (("step", slice(None, None, 2)), ("size", slice(0, 1))):
        bad = {**slices, "model.layers.0.mlp.up_proj.weight": index}
        attempt(f"wrong {name}", cut(made()), {}, bad)
    attempt("unknown name", cut(made()), {}, {"unknown": slice(0, 1)})
    last = rank == world - 1
    attempt("one process: unknown name", cut(made()), {}, {"unknown": slice(0, 1)} if last else slices)
    attempt("one process: no file", cut(made()), {}, slices, folder / "none.sfp" if last else delta)
    return found


def main() -> None:
    """The command."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    write_delta(folder / "d.sfp", made(), stepped(made()), block=5000)
    for world in WORLDS:

        def work(rank: int, world: int = world) -> None:
            (folder / f"{world}-{rank}.json").write_text(json.dumps(scenarios(rank, world, folder)))

        run_group(world, folder, work)


if __name__ == "__main__":
    main()
