"""Layers that hold their weight compressed and decode it when they are called.

Rules: a layer keeps the interface, the hooks and the bias of its dense class. The output equals that of the
dense layer with the decoded weight, bit for bit. Exception: if a CUDA device multiplies without decoding, the
order of the sums differs. The common base class is in the module `compressed`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
from torch import nn

from ..errors import MismatchError, OptionError
from ..options import Options
from . import operators, packed
from .compressed import Compressed
from .decoded import BYTES, expire, unregister
from .derivatives import How, linear
from .files import Device, require_device
from .weight_cache import KeptWeights

# Device type -> whether autocast supports it. Evaluated at import, because the compilers of some versions of
# torch cannot trace the call.
_SUPPORTS_AUTOCAST: dict[str, bool] = {
    kind: torch.amp.is_autocast_available(kind) for kind in ("cpu", "cuda", "meta", "mps", "xla", "xpu")
}


class SfpLinear(Compressed, nn.Linear):
    """A linear layer whose weight stays compressed and is decoded when the layer is called.

    Input and bias have gradients, and, outside of ``torch.compile``, forward derivatives. `compress_model`
    and `of` create it. A layer created by its constructor gets its weight through ``load_state_dict``.

    Example: ``layer = SfpLinear.of(torch.nn.Linear(1024, 1024))``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Same arguments as `torch.nn.Linear`. The layer has no weight yet; the bias is 0.

        Raises:
            OptionError: the device does not exist.
        """
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        dtype = torch.get_default_dtype() if dtype is None else dtype
        device = None if device is None else require_device(device)
        zeros = torch.zeros(out_features, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if zeros is None else nn.Parameter(zeros))
        self._begin((out_features, in_features), dtype, torch.empty(0, dtype=torch.uint8, device=device))

    @classmethod
    def of(cls, dense: nn.Linear, options: Options | None = None) -> SfpLinear:
        """Returns a compressed layer with the weight of a dense one, and the same bias tensor.

        Args:
            dense: the layer; it is not changed.
            options: how to encode the weight; None is lossless.

        Raises:
            OptionError: the options do not fit the weight.
        """
        made = cls(dense.in_features, dense.out_features, False, dense.weight.device, dense.weight.dtype)
        made.bias = dense.bias
        made._put(packed.pack(dense.weight, options).to(dense.weight.device))
        return made.train(dense.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Maps [..., in_features] to [..., out_features].

        Raises:
            InvalidFileError, UnsupportedError, LimitError: the bytes are damaged or refused.
        """
        if isinstance(input, torch.fx.Proxy):
            return _called_symbolically(self, input)
        bias: torch.Tensor | None = self.bias
        compute = self.weight_dtype
        # Autocast does not cast for custom operators, so this code does what autocast does for a dense layer.
        if _autocasts(input.device.type) and torch.float64 not in (input.dtype, compute):
            compute = torch.get_autocast_dtype(input.device.type)
            input = input.to(compute)
            bias = None if bias is None else bias.to(compute)
        how = How(self.out_features, False, self.weight_dtype, compute, self.kept.token)
        return linear(input, bias, self.weight_sfp, how)


class SfpEmbedding(Compressed, nn.Embedding):
    """An embedding whose weight stays compressed. For few rows, only their segments are decoded.

    `compress_model` and `of` create it. A layer created by its constructor gets its weight through
    ``load_state_dict``.

    Example: ``layer = SfpEmbedding.of(torch.nn.Embedding(32000, 1024))``.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        device: Device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Same arguments as `torch.nn.Embedding`; the layer has no weight yet.

        ``padding_idx`` has an effect only after the layer becomes dense.

        Raises:
            MismatchError: ``padding_idx`` is out of range.
            OptionError: the device does not exist.
        """
        nn.Module.__init__(self)
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise MismatchError(
                f"padding_idx is {padding_idx}, must be {-num_embeddings} to {num_embeddings - 1}"
            )
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = None if padding_idx is None else padding_idx % num_embeddings
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        dtype = torch.get_default_dtype() if dtype is None else dtype
        device = None if device is None else require_device(device)
        self._begin((num_embeddings, embedding_dim), dtype, torch.empty(0, dtype=torch.uint8, device=device))

    @classmethod
    def of(cls, dense: nn.Embedding, options: Options | None = None) -> SfpEmbedding:
        """Returns a compressed layer with the weight of a dense one.

        Args:
            dense: the layer; it is not changed.
            options: how to encode the weight; None is lossless.

        Raises:
            OptionError: the options do not fit the weight.
            MismatchError: the layer changes its weight when it is called (``max_norm``).
        """
        if dense.max_norm is not None:
            raise MismatchError(
                "an embedding with max_norm changes its weight during a call and cannot be compressed"
            )
        weight = dense.weight
        made = cls(dense.num_embeddings, dense.embedding_dim, dense.padding_idx, weight.device, weight.dtype)
        made.norm_type, made.scale_grad_by_freq = dense.norm_type, dense.scale_grad_by_freq
        made.sparse = dense.sparse
        made._put(packed.pack(weight, options).to(weight.device))
        return made.train(dense.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Maps row indices, int32 or int64 [...], to [..., embedding_dim].

        Raises:
            IndexError: an index is out of range.
            InvalidFileError, UnsupportedError, LimitError: the bytes are damaged or refused.
        """
        if isinstance(input, torch.fx.Proxy):
            return _called_symbolically(self, input)
        out: torch.Tensor = operators.embedding(
            input, self.weight_sfp, self.embedding_dim, self.weight_dtype, self.kept.token
        )
        return out


# --------------------------------------------------------------- conversion between dense and compressed


def compressed_class(module: nn.Module) -> type[Compressed] | None:
    """Returns the compressed class of a layer; None if it cannot be compressed.

    Subclasses of Linear and Embedding return None: they may compute differently.
    """
    if "weight" not in module._parameters:
        return None
    if type(module) is nn.Linear:
        return SfpLinear
    if type(module) is nn.Embedding and module.max_norm is None:
        return SfpEmbedding
    return None


def compressed_weights(model: nn.Module) -> set[str]:
    """Returns the names of the compressed weights in the ``state_dict``."""
    return {
        f"{path}.weight" if path else "weight"
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, Compressed)
    }


def make_compressed(module: nn.Module, data: torch.Tensor, kept: KeptWeights, name: str) -> None:
    """Turns a dense layer into a compressed one. The object stays the same, so references stay valid.

    Args:
        module: a layer with a `compressed_class`.
        data: the compressed bytes of its weight.
        kept: the cache of decoded weights.
        name: the layer's name in messages.
    """
    wanted = compressed_class(module)
    weight = module._parameters.pop("weight")
    assert wanted is not None
    assert weight is not None
    module.__class__ = wanted
    assert isinstance(module, Compressed)
    rows, columns = weight.shape
    module._begin((rows, columns), weight.dtype, data)
    module.weight_trains, module.kept, module.layer_name = weight.requires_grad, kept, name


def make_dense(module: Compressed, weight: nn.Parameter) -> None:
    """Turns a compressed layer into a dense one with the given weight. The object stays the same."""
    unregister(module)
    data = module._buffers.pop(BYTES, None)  # a shallow copy has the same dictionary
    if data is not None:
        expire(data)
    module._non_persistent_buffers_set.discard(BYTES)
    for name in ("weight_shape", "weight_dtype", "weight_trains", "kept", "layer_name"):
        del module.__dict__[name]
    others = module._parameters
    dense: nn.Module = module
    dense.__class__ = nn.Linear if isinstance(module, SfpLinear) else nn.Embedding
    dense._parameters = {"weight": weight, **others}


def _called_symbolically(layer: Compressed, input: torch.fx.Proxy) -> Any:
    """Adds a call of the layer to a `torch.fx` graph, as torch does for a dense layer. Returns its node.

    Raises:
        OptionError: the traced module is the layer itself.
    """
    tracer: Any = input.tracer
    path = tracer.path_of_module(layer)
    if not path:
        raise OptionError(f"{layer.title()} cannot be traced by itself; trace a model that contains it")
    return tracer.create_proxy("call_module", path, (input,), {})


def _autocasts(kind: str) -> bool:
    """Returns whether autocast is enabled for a device type."""
    supported = _SUPPORTS_AUTOCAST.get(kind)
    if supported is None:  # a custom device type
        supported = torch.amp.is_autocast_available(kind)
    return supported and torch.is_autocast_enabled(kind)
