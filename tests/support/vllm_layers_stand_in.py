"""Stand-ins for the layers of vLLM 0.33 that `sfpformat.serving.vllm_linear` uses, with their signatures.

`tests/serving/test_vllm_linear.py` runs the same tests with vLLM's own layers where it is installed, and
compares the signatures.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from . import vllm_model_stand_in as loading

# Rank and number of processes of tensor parallelism; the tests set them.
TP: dict[str, int] = {"rank": 0, "size": 1}


class ModelWeightParameter(nn.Parameter):
    """A part of a weight, which takes its part of a whole tensor."""

    def __new__(cls, data: torch.Tensor | None, **kwargs: Any) -> ModelWeightParameter:
        return super().__new__(cls, data, requires_grad=False)

    def __init__(self, output_dim: int, **kwargs: Any) -> None:
        self.output_dim, self.input_dim = output_dim, kwargs["input_dim"]
        self.weight_loader = kwargs["weight_loader"]
        self.tp_rank = TP["rank"]

    def load(self, loaded: torch.Tensor, dim: int, rank: int, offset: int = 0, size: int = 0) -> None:
        """Writes a part of a tensor to rows."""
        place = self.data.narrow(0, offset, size) if size else self.data
        length = place.shape[dim]
        part = loaded.narrow(dim, rank * length, length)
        assert place.shape == part.shape
        place.copy_(part)


class QuantizationConfig(ABC):
    """The base of configurations."""

    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}

    @abstractmethod
    def get_name(self) -> str:
        """The name of the method."""

    @abstractmethod
    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Dtypes of activations."""

    @classmethod
    @abstractmethod
    def get_min_capability(cls) -> int:
        """The lowest compute capability."""

    @staticmethod
    @abstractmethod
    def get_config_filenames() -> list[str]:
        """Files of the configuration."""

    @classmethod
    @abstractmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """Makes a configuration."""

    @abstractmethod
    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """The method of a layer."""


class QuantizeMethodBase(ABC):
    """The base of methods."""

    @abstractmethod
    def create_weights(self, layer: nn.Module, *weight_args: Any, **extra_weight_attrs: Any) -> None:
        """Makes the weights of a layer."""

    @abstractmethod
    def apply(self, layer: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Multiplies."""

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        """Shares the weight of the embedding."""
        layer.weight = embed_tokens.weight
        return layer

    def process_weights_after_loading(self, layer: nn.Module) -> None:  # noqa: B027  # as in vLLM
        """Runs after loading."""


class LinearMethodBase(QuantizeMethodBase):
    """The base of methods of linear layers."""

    @abstractmethod
    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Makes the weights of a layer."""

    @abstractmethod
    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Multiplies."""


class _Dense(LinearMethodBase):
    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        shape = sum(output_partition_sizes), input_size_per_partition
        weight = nn.Parameter(torch.empty(shape, dtype=params_dtype), requires_grad=False)
        weight.__dict__.update(output_dim=0, input_dim=1, **extra_weight_attrs)
        layer.register_parameter("weight", weight)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return F.linear(x, layer.weight, bias)


class UnquantizedLinearMethod(_Dense):
    """Dense weights of linear layers."""


class UnquantizedEmbeddingMethod(_Dense):
    """Dense weights of embeddings."""


WEIGHT_LOADER_V2_SUPPORTED: list[str] = []


def register_weight_loader_v2_supported_method(cls: type) -> type:
    """Lets layers use the loaders of parameters for a method."""
    WEIGHT_LOADER_V2_SUPPORTED.append(cls.__name__)
    return cls


class LinearBase(nn.Module):
    """The base of linear layers."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = False,
        skip_bias_add: bool = False,
        params_dtype: torch.dtype | None = None,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        *,
        return_bias: bool = True,
        disable_tp: bool = False,
        tp_rank: int | None = None,
        tp_size: int | None = None,
    ) -> None:
        super().__init__()
        assert quant_config is not None
        self.tp_rank, self.tp_size = TP["rank"], TP["size"]
        self.quant_method = quant_config.get_quant_method(self, prefix)
        assert type(self.quant_method).__name__ in WEIGHT_LOADER_V2_SUPPORTED
        self.skip_bias_add = skip_bias_add

    def begin(self, columns: int, rows: list[int], dtype: torch.dtype, bias: bool) -> None:
        """Makes weight and bias."""
        self.quant_method.create_weights(
            layer=self,
            input_size_per_partition=columns,
            output_partition_sizes=rows,
            input_size=columns * self.tp_size,
            output_size=sum(rows) * self.tp_size,
            params_dtype=dtype,
            weight_loader=self.weight_loader_v2,
        )
        self.bias = nn.Parameter(torch.zeros(sum(rows), dtype=dtype), requires_grad=False) if bias else None

    def weight_loader_v2(self, param: Any, loaded_weight: torch.Tensor, shard: Any = None) -> None:
        """Writes a tensor of the checkpoint."""
        param.load(loaded_weight, 0, self.tp_rank)

    def forward(self, x: torch.Tensor) -> Any:
        """Returns the product, and a bias that is not added."""
        out = self.quant_method.apply(self, x, None if self.skip_bias_add else self.bias)
        return out, (self.bias if self.skip_bias_add else None)


class ReplicatedLinear(LinearBase):
    """Whole in each process."""

    def __init__(self, input_size: int, output_size: int, bias: bool = True, **rest: Any) -> None:
        super().__init__(input_size, output_size, bias, **rest)
        self.begin(input_size, [output_size], rest["params_dtype"], bias)

    def weight_loader_v2(self, param: Any, loaded_weight: torch.Tensor, shard: Any = None) -> None:
        assert param.size() == loaded_weight.size()
        param.data.copy_(loaded_weight)


class MergedColumnParallelLinear(LinearBase):
    """Several matrices, each split by rows."""

    def __init__(self, input_size: int, output_sizes: list[int], bias: bool = True, **rest: Any) -> None:
        super().__init__(input_size, sum(output_sizes), bias, **rest)
        self.sizes = [size // self.tp_size for size in output_sizes]
        self.begin(input_size, self.sizes, rest["params_dtype"], bias)

    def weight_loader_v2(self, param: Any, loaded_weight: torch.Tensor, shard: Any = None) -> None:
        param.load(loaded_weight, 0, self.tp_rank, sum(self.sizes[:shard]), self.sizes[shard])


class QKVParallelLinear(MergedColumnParallelLinear):
    """Query, key and value."""

    def __init__(
        self,
        hidden_size: int,
        head_size: int,
        total_num_heads: int,
        total_num_kv_heads: int,
        bias: bool = True,
        **rest: Any,
    ) -> None:
        heads = [total_num_heads, total_num_kv_heads, total_num_kv_heads]
        super().__init__(hidden_size, [head_size * number for number in heads], bias, **rest)

    def weight_loader_v2(self, param: Any, loaded_weight: torch.Tensor, shard: Any = None) -> None:
        super().weight_loader_v2(param, loaded_weight, "qkv".index(shard))


class RowParallelLinear(LinearBase):
    """Split within rows."""

    def __init__(self, input_size: int, output_size: int, bias: bool = True, **rest: Any) -> None:
        self.reduce_results = rest.pop("reduce_results", True)
        super().__init__(input_size, output_size, bias, **rest)
        self.begin(input_size // self.tp_size, [output_size], rest["params_dtype"], bias)

    def weight_loader_v2(self, param: Any, loaded_weight: torch.Tensor, shard: Any = None) -> None:
        param.load(loaded_weight, 1, self.tp_rank)


class VocabParallelEmbedding(nn.Module):
    """An embedding whose rows are padded to a multiple of 64, and split."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        params_dtype: torch.dtype | None = None,
        quant_config: Any = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        assert params_dtype is not None
        method = quant_config.get_quant_method(self, prefix)
        self.quant_method = UnquantizedEmbeddingMethod() if method is None else method
        self.rows, self.padded = num_embeddings, -(-num_embeddings // 64) * 64 // TP["size"]
        self.bias = None
        self.quant_method.create_weights(
            layer=self,
            input_size_per_partition=embedding_dim,
            output_partition_sizes=[self.padded],
            input_size=embedding_dim,
            output_size=num_embeddings,
            params_dtype=params_dtype,
            weight_loader=self.weight_loader,
        )

    def weight_loader(self, param: Any, loaded_weight: torch.Tensor) -> None:
        """As vLLM's."""
        start = min(TP["rank"] * self.padded, self.rows)
        part = loaded_weight.narrow(0, start, min(start + self.padded, self.rows) - start)
        param[: part.shape[0]].data.copy_(part)
        param[part.shape[0] :].data.fill_(0)


class ParallelLMHead(VocabParallelEmbedding):
    """An output head."""

    def tie_weights(self, embed_tokens: VocabParallelEmbedding) -> nn.Module:
        """Shares the weight of the embedding."""
        tied: nn.Module = self.quant_method.tie_weights(self, embed_tokens)
        return tied


METHODS: dict[str, type] = {}


def register_quantization_config(quantization: str) -> Any:
    """Registers a configuration."""

    def wrapper(kind: type) -> type:
        assert issubclass(kind, QuantizationConfig)
        METHODS[quantization] = kind
        return kind

    return wrapper


def modules() -> dict[str, ModuleType]:
    """The modules of both stand-ins, by name, for ``sys.modules``."""
    layers = "vllm.model_executor.layers"
    places: dict[str, dict[str, Any]] = {
        "vllm.config.vllm": {"get_current_vllm_config_or_none": lambda: None},
        "vllm.logger": {"init_logger": logging.getLogger},
        layers: {},
        f"{layers}.linear": {
            kind.__name__: kind
            for kind in (LinearBase, LinearMethodBase, UnquantizedLinearMethod, QKVParallelLinear)
        }
        | {"register_weight_loader_v2_supported_method": register_weight_loader_v2_supported_method},
        f"{layers}.quantization": {
            "register_quantization_config": register_quantization_config,
            "_CUSTOMIZED_METHOD_TO_QUANT_CONFIG": METHODS,
        },
        f"{layers}.quantization.base_config": {"QuantizationConfig": QuantizationConfig},
        f"{layers}.vocab_parallel_embedding": {
            kind.__name__: kind
            for kind in (ParallelLMHead, VocabParallelEmbedding, UnquantizedEmbeddingMethod)
        },
        "vllm.model_executor.parameter": {"ModelWeightParameter": ModelWeightParameter},
    }
    linear = places[f"{layers}.linear"]
    linear.update(
        {one.__name__: one for one in (ReplicatedLinear, MergedColumnParallelLinear, RowParallelLinear)}
    )
    out = loading.modules()
    for name, members in places.items():
        out.setdefault(name, ModuleType(name)).__path__ = []
        for member, value in members.items():
            setattr(out[name], member, value)
    return out
