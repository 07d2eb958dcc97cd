"""The quantization method ``sfp`` for vLLM: linear layers whose weights stay compressed. Imports vLLM.

Rules: a layer of vLLM that combines several matrices (query, key and value; gate and up) keeps one compressed
part for each. A whole tensor of the file keeps its encoded bytes; a part of a tensor, which a process of
tensor parallelism keeps, is encoded again, losslessly. Embeddings, and output heads that share their weight,
stay dense. Nothing else stays dense without a warning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from vllm.config.vllm import get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
from vllm.model_executor.parameter import ModelWeightParameter

from ..errors import OptionError, warn
from ..names import listed
from ..torch import SfpLinear
from ..torch.derivatives import How, linear
from ..torch.encoding_tensor import EncodedRows, EncodingTensor
from ..torch.packed import decode
from ..torch.weight_cache import KeptWeights
from .vllm import LOAD_FORMAT, QUANTIZATION

_PARTS = "sfp_parts"  # the attribute of a layer with its compressed parts
_logger: Any = init_logger("vllm.sfpformat")


class SfpQuantizationConfig(QuantizationConfig):  # type: ignore[misc]  # vLLM need not be installed
    """Keeps the linear layers of a model compressed: ``--quantization sfp --load-format sfp``.

    Attributes:
        kept: the cache of decoded weights, of all layers. Its size is the key ``keep`` of the loader.
        sizes: name of a layer -> bytes of its dense weight, and of its compressed parts; None if it is dense.
    """

    def __init__(self) -> None:
        """Has no options."""
        super().__init__()
        self.kept: KeptWeights | None = None
        self.sizes: dict[str, tuple[int, int | None]] = {}

    def get_name(self) -> str:
        """Returns ``sfp``."""
        return QUANTIZATION

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Returns the dtypes of activations."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Returns the lowest compute capability. A device without kernels lets the CPU decode."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Returns no names: the method has no file of its own."""
        return []

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> SfpQuantizationConfig:
        """Makes it from ``quantization_config`` of ``config.json``.

        Raises:
            OptionError: it has keys other than ``quant_method``.
        """
        more = sorted(set(config) - {"quant_method"})
        if more:
            raise OptionError(f"quantization_config: the method sfp has no option {listed(more)}")
        return cls()

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """Returns the method of a linear layer or output head; None for embeddings and attention.

        Raises:
            OptionError: the layer has experts; adapters (LoRA) are enabled; or the load format is another.
        """
        experts = {one.__name__ for one in type(layer).__mro__} & {"FusedMoE", "RoutedExperts"}
        if experts:
            raise OptionError(
                f"--quantization sfp: {prefix!r} has experts ({type(layer).__name__}), which cannot stay "
                "compressed; use --load-format sfp alone"
            )
        if not isinstance(layer, (LinearBase, ParallelLMHead)):
            return None
        if self.kept is None:
            self.kept = KeptWeights(_checked_keep())
        return SfpLinearMethod(self, prefix)

    def report(self) -> None:
        """Logs the bytes of the layers, and warns of those that are dense.

        Warns:
            SfpWarning: layers are dense because their compressed weights would not be smaller.
        """
        done = [(before, after) for before, after in self.sizes.values() if after is not None]
        dense = [name for name, (_, after) in self.sizes.items() if after is None]
        _logger.info(
            "%d layers keep their weights compressed: %.1f MB instead of %.1f MB",
            len(done),
            sum(after for _, after in done) / 1e6,
            sum(before for before, _ in done) / 1e6,
        )
        if dense:
            warn(
                f"--quantization sfp: {len(dense)} layers are dense, because their compressed weights "
                f"would not be smaller: {listed(dense)}"
            )


@register_weight_loader_v2_supported_method
class SfpLinearMethod(LinearMethodBase):  # type: ignore[misc]  # vLLM need not be installed
    """Multiplies by compressed weights, as `SfpLinear`: without decoding where a CUDA device can."""

    # No parameter has to be moved before `process_weights_after_loading`.
    requires_device_loading: ClassVar[bool] = False

    def __init__(self, config: SfpQuantizationConfig, name: str) -> None:
        """Is for one layer.

        Args:
            config: the configuration of the model, which has the cache and gets the sizes.
            name: the layer's name, for messages.
        """
        self.config, self.name = config, name

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Gives a layer a weight without memory, which encodes what vLLM's loaders write to it."""
        shape = sum(output_partition_sizes), input_size_per_partition
        rows = EncodedRows(f"the weight of {self.name!r}", shape, params_dtype)
        weight_loader = extra_weight_attrs.pop("weight_loader")
        data = torch.empty(shape, dtype=params_dtype, device="meta")
        make: Any = _Weight
        weight = make(data=data, input_dim=1, output_dim=0, weight_loader=weight_loader)
        weight.rows, weight.start = rows, 0
        layer.register_parameter("weight", weight)
        for key, value in extra_weight_attrs.items():
            setattr(weight, key, value)
        layer.sfp_device = _device()

    def process_weights_after_loading(self, layer: Any) -> None:
        """Replaces the weight by compressed parts on the device; or by a dense one, if it is smaller.

        Raises:
            MismatchError: no tensor has filled some rows.
        """
        rows: EncodedRows = layer.weight.rows
        parts = rows.parts()
        before = rows.shape[0] * rows.shape[1] * rows.dtype.itemsize
        after = sum(data.nbytes for _, data in parts)
        del layer.weight
        if after >= before:
            self.config.sizes[self.name] = before, None
            self._make_dense(layer, [data for _, data in parts], rows.dtype)
            return
        self.config.sizes[self.name] = before, after
        made = nn.ModuleList()
        for count, data in parts:
            part = SfpLinear(rows.shape[1], count, bias=False, device=layer.sfp_device, dtype=rows.dtype)
            part.load_state_dict({"weight": data.to(layer.sfp_device)}, assign=True)
            part.layer_name = self.name
            if self.config.kept is not None:
                part.kept = self.config.kept
            made.append(part)
        layer.register_module(_PARTS, made)

    def _make_dense(self, layer: Any, parts: list[torch.Tensor], dtype: torch.dtype) -> None:
        dense = torch.cat([decode(data).to(dtype) for data in parts]).to(layer.sfp_device)
        layer.register_parameter("weight", nn.Parameter(dense, requires_grad=False))
        is_head = isinstance(layer, ParallelLMHead)
        layer.quant_method = UnquantizedEmbeddingMethod() if is_head else UnquantizedLinearMethod()
        layer.quant_method.process_weights_after_loading(layer)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Returns x @ weight.T + bias.

        Args:
            layer: the layer of vLLM.
            x: [..., columns].
            bias: [rows], or None.

        Returns:
            [..., rows].

        Raises:
            InvalidFileError: the bytes are damaged.
        """
        out, start = [], 0
        for part in getattr(layer, _PARTS):
            count: int = part.out_features
            own = None if bias is None else bias[start : start + count]
            how = How(count, False, part.weight_dtype, x.dtype, part.kept.token)
            out.append(linear(x, own, part.weight_sfp, how))
            start += count
        return out[0] if len(out) == 1 else torch.cat(out, -1)

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """Gives an output head the dense weight of the embedding."""
        del layer.weight
        layer.quant_method = UnquantizedEmbeddingMethod()
        return layer.quant_method.tie_weights(layer, embed_tokens)


class _Weight(EncodingTensor, ModelWeightParameter):  # type: ignore[misc]  # vLLM need not be installed
    """A weight of vLLM's loaders, of which each process takes its part."""


def _checked_keep() -> int:
    """Returns the size of the cache, after a check of vLLM's configuration.

    Raises:
        OptionError: the load format is another, or adapters are enabled.
    """
    config = get_current_vllm_config_or_none()
    if config is None:
        return 0
    if config.load_config.load_format != LOAD_FORMAT:
        raise OptionError(
            f"--quantization sfp needs --load-format sfp, not {config.load_config.load_format!r}"
        )
    if config.lora_config is not None:
        raise OptionError(
            "--quantization sfp: vLLM cannot add LoRA adapters to compressed layers; use --load-format sfp "
            "alone, or merge the adapter"
        )
    keep: int = config.load_config.model_loader_extra_config.get("keep", 0)
    return keep


def _device() -> torch.device:
    """Returns the device of the model."""
    config = get_current_vllm_config_or_none()
    return torch.empty(0).device if config is None else torch.device(config.device_config.device)
