"""Stand-ins for the parts of vLLM 0.33 that `sfpformat.serving` uses, with their signatures; a small model.

`tests/serving/test_vllm.py` compares the signatures with vLLM where it is installed, and then also fills the
model through vLLM's own `ModelWeightParameter`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn


class BaseModelLoader(ABC):
    """The base of loaders."""

    def __init__(self, load_config: Any) -> None:
        self.load_config = load_config

    @abstractmethod
    def download_model(self, model_config: Any) -> None:
        """Fetches a model."""

    @abstractmethod
    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        """Fills a model."""

    def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> nn.Module:
        """Makes a model and fills it."""
        model: nn.Module = vllm_config.make()
        self.load_weights(model, model_config)
        return model


class DefaultModelLoader(BaseModelLoader):
    """The loader that has the rule for quantised models."""

    def track_weights_loading(
        self, model: nn.Module, loaded_weights: set[str] | None, quantized: bool = False
    ) -> None:
        """Adds the parameters that no checkpoint has, and raises if others are missing, as vLLM does."""
        assert quantized
        assert loaded_weights is not None
        loaded_weights |= {name for name, _ in model.named_parameters() if name.endswith("k_scale")}
        missing = {name for name, _ in model.named_parameters()} - loaded_weights
        if missing:
            raise ValueError(f"Following weights were not initialized from checkpoint: {missing}")


LOADERS: dict[str, type] = {}


def register_model_loader(load_format: str) -> Callable[[type], type]:
    """Registers a class."""

    def wrapper(kind: type) -> type:
        assert issubclass(kind, BaseModelLoader)
        assert load_format not in LOADERS
        LOADERS[load_format] = kind
        return kind

    return wrapper


def get_model_loader(load_config: Any) -> Any:
    """Makes the loader of a load format."""
    return LOADERS[load_config.load_format](load_config)


PARALLEL = SimpleNamespace(pipeline_parallel_size=1, enable_expert_parallel=False)


def get_current_vllm_config_or_none() -> Any:
    """The configuration of the process."""
    return SimpleNamespace(parallel_config=PARALLEL)


def modules() -> dict[str, ModuleType]:
    """The modules of the stand-in, by name, for ``sys.modules``."""
    loaders = "vllm.model_executor.model_loader"
    places: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.config": {},
        "vllm.config.vllm": {"get_current_vllm_config_or_none": get_current_vllm_config_or_none},
        "vllm.model_executor": {},
        loaders: {
            "register_model_loader": register_model_loader,
            "_LOAD_FORMAT_TO_MODEL_LOADER": LOADERS,
        },
        f"{loaders}.base_loader": {"BaseModelLoader": BaseModelLoader},
        f"{loaders}.default_loader": {"DefaultModelLoader": DefaultModelLoader},
    }
    out = {}
    for name, members in places.items():
        out[name] = ModuleType(name)
        out[name].__path__ = []
        for member, value in members.items():
            setattr(out[name], member, value)
    return out


# ------------------------------------------------------------------------------------------------ the model


class ModelWeightParameter(nn.Parameter):
    """A part of a weight; takes its part of a whole tensor as vLLM's class of this name does."""

    rank = 0

    def __new__(cls, data: torch.Tensor, **settings: Any) -> ModelWeightParameter:
        return super().__new__(cls, data, requires_grad=False)

    def __init__(self, *, data: torch.Tensor, input_dim: int, output_dim: int, weight_loader: Any) -> None:
        self.tp_rank = self.rank
        self.input_dim, self.output_dim = input_dim, output_dim

    def _load(self, place: torch.Tensor, whole: torch.Tensor, dim: int) -> None:
        part = whole.narrow(dim, self.tp_rank * place.shape[dim], place.shape[dim])
        assert place.shape == part.shape
        place.copy_(part)

    def load_column_parallel_weight(self, loaded_weight: torch.Tensor) -> None:
        self._load(self.data, loaded_weight, self.output_dim)

    def load_row_parallel_weight(self, loaded_weight: torch.Tensor) -> None:
        self._load(self.data, loaded_weight, self.input_dim)

    def load_qkv_weight(self, loaded_weight: torch.Tensor, **words: Any) -> None:
        place = self.data.narrow(self.output_dim, words["shard_offset"], words["shard_size"])
        self._load(place, loaded_weight, self.output_dim)


OUT, IN = 1024, 2048  # sizes of the weights of the model, in elements


def checkpoint() -> dict[str, torch.Tensor]:
    """The weights as on disk."""
    torch.manual_seed(0)
    shapes = {
        "embed.weight": (130, 64),
        "q.weight": (OUT, IN),
        "k.weight": (OUT, IN),
        "v.weight": (OUT, IN),
        "o.weight": (OUT, IN),
        "norm.weight": (64,),
    }
    return {name: torch.randn(shape).to(torch.bfloat16) for name, shape in shapes.items()}


class Model(nn.Module):
    """The part of a model that a rank of tensor parallelism holds: q, k, v by columns (fused), o by rows."""

    secondary_weights: tuple[Any, ...] = ()
    reports = True

    def __init__(self, kind: Any, world: int, rank: int) -> None:
        super().__init__()
        self.rank, self.world = rank, world

        def parameter(*shape: int) -> Any:
            data = torch.full(shape, torch.nan, dtype=torch.bfloat16)
            return kind(data=data, input_dim=1, output_dim=0, weight_loader=None)

        self.qkv = nn.ParameterDict({"weight": parameter(3 * OUT // world, IN)})
        self.o = nn.ParameterDict({"weight": parameter(OUT, IN // world)})
        self.embed = nn.Embedding(130 // world, 64, dtype=torch.bfloat16).requires_grad_(False)
        self.norm = nn.LayerNorm(64, bias=False, dtype=torch.bfloat16).requires_grad_(False)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str] | None:
        """Fills the parameters, as vLLM's models and layers do."""
        loaded = set()
        for name, whole in weights:
            size = OUT // self.world
            if name[0] in "qkv":
                words = {"shard_id": name[0], "shard_size": size, "num_heads": 1}
                self.qkv["weight"].load_qkv_weight(whole, shard_offset="qkv".index(name[0]) * size, **words)
                loaded.add("qkv.weight")
            elif name == "o.weight":
                self.o["weight"].load_row_parallel_weight(whole)
                loaded.add(name)
            elif name == "embed.weight":
                part = whole.narrow(0, self.rank * (130 // self.world), 130 // self.world)
                self.embed.weight[: part.shape[0]].data.copy_(part)
                loaded.add(name)
            elif name == "norm.weight":
                assert self.norm.weight.size() == whole.size()
                self.norm.weight.data.copy_(whole)
                loaded.add(name)
        return loaded if self.reports else None

    def has(self, weights: dict[str, torch.Tensor]) -> bool:
        """Whether the parameters have the bits of the parts of this rank."""
        qkv = [weights[f"{one}.weight"].chunk(self.world)[self.rank] for one in "qkv"]
        pairs = (
            (self.qkv["weight"], torch.cat(qkv)),
            (self.o["weight"], weights["o.weight"].chunk(self.world, 1)[self.rank]),
            (self.embed.weight, weights["embed.weight"].chunk(self.world)[self.rank]),
            (self.norm.weight, weights["norm.weight"]),
        )
        return all(
            torch.equal(mine.data.view(torch.int16), part.contiguous().view(torch.int16))
            for mine, part in pairs
        )
