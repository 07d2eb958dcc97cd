"""vLLM's engines for weight transfer by deltas, with stand-ins for vLLM."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sfpformat import BaseMismatchError, MismatchError, OptionError, SfpWarning
from sfpformat.torch import write_delta
from sfpformat.torch.weight_sync import register_vllm_engines
from sfpformat.torch.weight_sync.vllm_plugin import ABSTRACT, BACKEND, INTERFACE, plugin

from ..support import vllm_stand_in
from ..support.signatures import parameters

Weights = dict[str, torch.Tensor]


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The stand-in for vLLM, with the engines registered."""
    for name, module in vllm_stand_in.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    vllm_stand_in.forget_engines()
    register_vllm_engines()
    yield
    vllm_stand_in.forget_engines()


def checkpoint() -> Weights:
    """The checkpoint of a model: names and shapes as on disk."""
    torch.manual_seed(0)
    names = {"q.weight": (8, 6), "k.weight": (4, 6), "o.weight": (6, 8), "norm.weight": (6,)}
    return {name: torch.randn(shape).to(torch.bfloat16) for name, shape in names.items()}


class Shard(nn.Module):
    """A part of the model as vLLM holds it: q and k in one parameter, by rows; o by columns."""

    def __init__(self, rank: int, world: int) -> None:
        super().__init__()
        self.rank, self.world, self.reloading = rank, world, False
        self.qk = nn.Parameter(torch.zeros(12 // world, 6, dtype=torch.bfloat16), requires_grad=False)
        self.o = nn.Parameter(torch.zeros(6, 8 // world, dtype=torch.bfloat16), requires_grad=False)
        self.norm = nn.Parameter(torch.zeros(6, dtype=torch.bfloat16), requires_grad=False)

    def load_weights(self, weights: Any, keep_nan: bool = False) -> list[str]:
        """Writes parts of tensors of the checkpoint into the parameters."""
        loaded = []
        for name, whole in weights:
            q = 8 // self.world
            place, part = {
                "q.weight": (self.qk[:q], whole.chunk(self.world)[self.rank]),
                "k.weight": (self.qk[q:], whole.chunk(self.world)[self.rank]),
                "o.weight": (self.o, whole.chunk(self.world, 1)[self.rank] if whole.ndim == 2 else whole),
                "norm.weight": (self.norm, whole),
            }[name]
            assert keep_nan != self.reloading
            place.copy_(torch.where(part.isnan(), place, part) if keep_nan else part)
            loaded.append(name)
        return loaded


class Source(vllm_stand_in.WeightSource):
    """The weights of a trainer."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights

    @property
    def metadata(self) -> list[Any]:
        return [(name, weight.dtype, weight.shape) for name, weight in self.weights.items()]

    def iter_full(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.weights.items()


class Server:
    """Workers that hold parts of the model, and vLLM's client for them."""

    def __init__(self, world: int, weights: Weights) -> None:
        make = vllm_stand_in.WeightTransferEngineFactory.create_engine
        self.models = [Shard(rank, world) for rank in range(world)]
        for model in self.models:
            model.reloading = True
            model.load_weights(weights.items())
            model.reloading = False
        self.engines = [make(BACKEND, None, torch.device("cpu"), model) for model in self.models]
        self.fails = False

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        for engine in self.engines:
            engine.init_transfer_engine(engine.parse_init_info(init_info))

    def start_weight_update(self) -> None:
        for engine in self.engines:
            engine.start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        if self.fails:
            raise RuntimeError("a worker is gone")
        for engine in self.engines:
            engine.update_weights(update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        for engine in self.engines:
            engine.finish_weight_update()

    def holds(self, weights: Weights) -> bool:
        """Whether the models have the weights, bit for bit."""
        for mine, other in zip(self.models, Server(len(self.models), weights).models, strict=True):
            pairs = zip(mine.parameters(), other.parameters(), strict=True)
            if not all(torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in pairs):
                return False
        return True


def step(weights: Weights) -> None:
    """Changes some elements of two tensors."""
    for name in ("q.weight", "o.weight"):
        weights[name].view(-1)[::7] += 0.125
    weights["q.weight"][0, 0] = -0.0


def trainer(client: Any, weights: Weights, folder: Path, base: Path | None, rank: int = 0) -> Any:
    """The engine of a trainer."""
    from sfpformat.torch.weight_sync.vllm_engine import DeltaTrainerInitInfo

    info = DeltaTrainerInitInfo(folder=str(folder), base=None if base is None else str(base), rank=rank)
    return vllm_stand_in.WeightTransferTrainerFactory.trainer_init(
        info, client=client, source=Source(weights)
    )


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("with_base", [True, False])
def test_workers_follow_the_trainer(tmp_path: Path, world: int, with_base: bool) -> None:
    weights = checkpoint()
    (tmp_path / "model").mkdir()
    save_file(weights, tmp_path / "model" / "model.safetensors")
    server = Server(world, weights)
    engine = trainer(server, weights, tmp_path / "sync", tmp_path / "model" if with_base else None)
    for number in range(1, 4):
        step(weights)
        assert not server.holds(weights)
        engine.send_weights()
        assert (engine.sent.number, engine.sent.whole) == (number, number == 1 and not with_base)
        assert server.holds(weights)
    engine.send_weights()  # no change
    assert server.holds(weights)
    for each in server.engines:
        each.shutdown()


@pytest.mark.usefixtures("vllm")
def test_a_worker_that_failed_gets_all_weights_next(tmp_path: Path) -> None:
    weights = checkpoint()
    server = Server(2, weights)
    engine = trainer(server, weights, tmp_path, None)
    engine.send_weights()
    step(weights)
    server.fails = True
    with pytest.raises(RuntimeError, match="a worker is gone"):
        engine.send_weights()
    server.fails = False
    engine.send_weights()
    assert engine.sent.whole
    assert server.holds(weights)


@pytest.mark.usefixtures("vllm")
def test_processes_that_do_not_send_only_iterate(tmp_path: Path) -> None:
    weights = checkpoint()
    engine = trainer(None, weights, tmp_path / "sync", None, rank=1)
    engine.send_weights()
    assert engine.sent is None
    assert not (tmp_path / "sync").exists()
    with pytest.raises(OptionError, match="iter_full"):
        type(engine).trainer_init(engine.init_info_cls(folder="x", rank=0), client=None, source=None)


@pytest.mark.usefixtures("vllm")
def test_updates_that_do_not_fit_are_refused_and_change_nothing(tmp_path: Path) -> None:
    weights = checkpoint()
    save_file(weights, tmp_path / "model.safetensors")
    server = Server(2, weights)
    server.init_weight_transfer_engine({"base": str(tmp_path / "model.safetensors")})
    new = {name: weight.clone() for name, weight in weights.items()}
    step(new)
    after = {name: weight.clone() for name, weight in new.items()}
    step(after)
    nan = {name: weight.clone() for name, weight in weights.items()}
    nan["norm.weight"][2] = torch.nan
    fewer = {name: weight for name, weight in new.items() if name != "k.weight"}
    cases: tuple[tuple[Weights, Weights, type[Exception], str], ...] = (
        (new, after, BaseMismatchError, "made from another base"),
        (weights, {**new, "extra": torch.ones(2)}, OptionError, "replaces or adds 'extra'"),
        (weights, nan, OptionError, "NaN into 'norm.weight'"),
        (weights, fewer, OptionError, "removes the tensor 'k.weight'"),
    )
    for before, result, kind, words in cases:
        write_delta(tmp_path / "d.sfp", before, result)
        with pytest.raises(kind, match=words):
            server.update_weights({"path": str(tmp_path / "d.sfp")})
        assert server.holds(weights)
    write_delta(tmp_path / "d.sfp", weights, new)
    server.update_weights({"path": str(tmp_path / "d.sfp")})
    assert server.holds(new)


@pytest.mark.usefixtures("vllm")
def test_engines_are_registered_once_and_by_the_entry_point() -> None:
    register_vllm_engines()
    plugin()
    assert BACKEND in vllm_stand_in.WeightTransferEngineFactory._registry
    assert BACKEND in vllm_stand_in.WeightTransferTrainerFactory._registry
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert 'sfpformat = "sfpformat.torch.weight_sync.vllm_plugin:plugin"' in text
    for found in entry_points(group="vllm.general_plugins"):
        if found.name == "sfpformat":
            assert found.load() is plugin


@pytest.mark.usefixtures("vllm")
def test_another_interface_of_vllm_is_refused_with_both_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    base = sys.modules["vllm.distributed.weight_transfer.base"]

    def other(self: Any, info: Any) -> None: ...

    changes: tuple[tuple[Any, str, Any, str], ...] = (
        (vllm_stand_in.WeightTransferEngine, "receive_weights", other, "has no parameter 'update_info'"),
        (
            vllm_stand_in.WeightTransferEngine,
            "__abstractmethods__",
            frozenset({"resume", *ABSTRACT["WeightTransferEngine"]}),
            "WeightTransferEngine also has 'resume'",
        ),
        (base, "WeightSource", None, "has no WeightSource.iter_full"),
    )
    for owner, name, value, words in changes:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            with pytest.raises(MismatchError, match=rf"another interface .* than 0\.33.*{words}"):
                register_vllm_engines()
            with pytest.warns(SfpWarning, match=words):
                plugin()
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "vllm.model_executor.model_loader.checkpoint_weight_patch")
        with pytest.raises(MismatchError, match="has no load_checkpoint_weight_patches"):
            register_vllm_engines()


# ---------------------------------------------------------------------------------------------- vLLM itself


def test_the_stand_ins_have_the_signatures_of_vllm() -> None:
    found = find_spec("vllm")
    places = [] if found is None else list(found.submodule_search_locations or ())
    if not places:
        pytest.skip("vLLM is not installed")
    mine = parameters(Path(vllm_stand_in.__file__))
    for module in {entry[0] for entry in INTERFACE}:
        theirs = parameters(Path(places[0]).joinpath(*module.split(".")[1:]).with_suffix(".py"))
        for _, name, method, used in (entry for entry in INTERFACE if entry[0] == module):
            what = f"{name}.{method}" if method else name
            assert set(used) <= set(theirs[what]), what
            if what in mine:
                assert mine[what] == theirs[what], what
        classes = {name.split(".")[0] for name in theirs}
        for name, methods in ABSTRACT.items():
            if name in classes:
                assert methods <= {what.split(".")[-1] for what in theirs if what.startswith(f"{name}.")}
