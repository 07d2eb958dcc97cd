"""Decides which tensors of a model are weights. Pruning and quantising skip all others by default.

Rules: pure functions of names and dtypes; only `has_values_beyond` reads values. Skipping a tensor costs a
few bytes; changing one by mistake can ruin the model. Therefore doubtful tensors are skipped.

The tables are from the code that writes such checkpoints:

* GPTQ, AWQ, AutoRound: `gptqmodel/nn_modules/qlinear` of GPTQModel, `awq/modules/linear` of AutoAWQ;
* compressed-tensors: `compression_param_names` in `compressed_tensors/compressors`;
* bitsandbytes: `QuantState.valid_qs_keys` in `bitsandbytes/functional.py`, `Linear8bitLt` in `nn/modules.py`;
* FP8 with block scales: `README_WEIGHTS.md` of DeepSeek-V3, `transformers/integrations/finegrained_fp8.py`;
* MXFP4: `gpt_oss/torch/weights.py` of gpt-oss, `transformers/quantizers/quantizer_mxfp4.py`;
* NVFP4: `modelopt/torch/export` of TensorRT Model Optimizer;
* HQQ: `HQQLinear.state_dict_keys` in `hqq/core/quantize.py`;
* quanto, torchao, EETQ, FBGEMM, Quark, HIGGS, FP-Quant, AQLM, VPTQ: `transformers/integrations`,
  `transformers/quantizers` and the packages that these import;
* MLX: `python/mlx/nn/layers/quantized.py`; Nunchaku: `nunchaku/models/linear.py`; ExLlama:
  `exllamav3/modules/quant/exl3.py`;
* buffers: `torch.nn.modules`, `torch.nn.utils`, and the buffers of `transformers/models`.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ..dtypes import Dtype, of_numpy
from ..errors import SfpWarning
from ..names import listed
from ..options import Options

# Smaller tensors stay lossless: the saving is not worth a loss.
MIN_ELEMENTS = 4096
# Elements processed at a time.
_BLOCK = 1 << 20


class Described(Protocol):
    """Name, dtype and shape of a tensor."""

    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> Dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


class Outline(NamedTuple):
    """Name, dtype and shape of a numpy array or a torch tensor."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]


class Kind(Enum):
    """Category of the reason why a tensor stays lossless. The value is a text for messages."""

    STORAGE = "parts of already quantised weights"
    COMPANION = "scales, zero points or tables of quantised weights"
    BUFFER = "buffers"
    BIAS = "biases"
    NORM = "gains of normalisation layers"
    NOT_FINITE = "with infinities, NaNs or values beyond float32"
    NOT_FLOAT = "not float"
    PATTERN = "that the pruning pattern does not fit"
    SMALL = "of rank below 2, or small"
    ASKED = "as requested"
    UNCHANGED = "no option changes their values"


class Reason(NamedTuple):
    """The reason why a tensor stays lossless.

    Attributes:
        kind: the category.
        because: the evidence, in words.
    """

    kind: Kind
    because: str


def _pattern(*names: str) -> re.Pattern[str]:
    """Compiles alternatives, each a regular expression for the whole last part of a name."""
    return re.compile("|".join(f"(?:{name})" for name in names))


# ------------------------------------------------------------------------------------------------ the tables

# The last part of names that only the storage of quantised weights has. Its dtype may be float, but its bits
# are packed integers, which arithmetic would destroy.
_STORAGE = _pattern(
    r"(\w+_)?qweight",  # GPTQ, AWQ, AutoRound, HIGGS, FP-Quant, Nunchaku
    r"W_q",  # HQQ, SINQ; float with `view_as_float`
    r"(\w+_)?weight_packed",  # compressed-tensors
    r"(\w+_)?blocks",  # gpt-oss
    r"(\w+_)?qdata",  # torchao
    r"_data",  # quanto: `weight._data`
    r"(\w+_)?quantized",  # the embedding of Gemma's checkpoints
    r"q_weight",  # EXL2
    r"trellis",  # EXL3
    r"(\w+_)?codes",  # AQLM
    r"(res_|outlier_)?indices",  # VPTQ; float with `indices_as_float`
    r"Qidxs\w*",  # QuIP#
)
# The same for integer tensors only. Float tensors with these names are weights.
_INTEGER_STORAGE = _pattern(
    r"weight",  # bitsandbytes, EETQ, FBGEMM, MLX, compressed-tensors
    r"B(_24)?",  # Marlin, QQQ
)
# The last part of names that only scales, zero points and tables of quantised weights have.
_COMPANION = _pattern(
    r"\w+_scales?(_inv|_2|_ub|_max|_and_zero|_shift)?",  # weight_scale_inv, input_scale, k_scale
    r"_scale(_shift)?|_shift",  # quanto: `weight._scale`
    r"scales?_(inv|2|packed)",
    r"scale_(weight|input|output)",  # ComfyUI
    r"(\w+_)?scaling_factor(_2)?",  # TensorRT-LLM
    r"(\w*_)?zero_?points?",
    r"[wq]zeros|qbiases",
    r"w[tc]?scales?|smooth_factor(_orig)?",  # Nunchaku
    r"(nested_)?(absmax|quant_map)|SCB|bitsandbytes__\w+",  # bitsandbytes
    r"(\w+_)?g_idx",
    r"bitmask|row_offsets",  # compressed-tensors, sparse
    r"(forward_|backward_)?hadamard_matrix",  # FP-Quant
    r"s[uv]h?|S[UV]",  # EXL3, QuIP#
    r"q_(scale|scale_max|groups|group_map|invperm|perm)",  # EXL2
)
# The last two parts of names, if the last alone is not sufficient.
_COMPANION_PAIR = re.compile(
    r"(?:^|\.)(?:(?:res_|outlier_)?centroids\.weight"  # VPTQ
    r"|(?:weight|bias|input|output)_quantizer\.(?:scale|zero_point|_amax|_scale))$"  # Quark, ModelOpt
)
# The greatest number of words, separated by underscores, in a scale's suffix such as "_weight_scale_inv".
_MOST_PARTS = 5
# Words in names of scales and zero points, if the module has an FP8 weight.
_SCALE = re.compile(r"scale|zero|shift|amax|absmax|quant")
_BUFFER = _pattern(
    r"running_(mean|var|std)|num_batches_tracked",
    r"(\w+_)?inv_freq|inv_timescales|freqs(_\w+)?|rope_freqs|frequencies",
    r"(cos|sin)(_cached|_cache|_table|_emb)?",
    r"(\w+_)?(position|token_type|relative_position)_(ids|index|indices)",
    r"relative_(coords|position)_(table|index)",
    r"(\w+_)?masks?",  # attention masks, and those of torch.nn.utils.prune
    r"masked_bias",
    r"(attn_|attention_)?alibi(_\w+)?|slopes|slope_rate|(query|key|diagonal)_decay",
    r"pe|pos_encoding|embed_positions",  # sines stored as buffers
    r"embed_(avg|sum)|ema_(avg|sum|count)|cluster_(size|usage)",  # for updating a codebook in training
    r"mel_(filters|basis|fb)|(\w+_)?window|dft_mat_\w+",
    r"anchors|anchor_grid|box_bias",
    r"weight_[uv]",  # torch.nn.utils.spectral_norm
)
_BIAS = _pattern(r"(\w+_)?bias(es)?", r"bias_[kv]", r"(\w+_)?bias_table")
_NORM = re.compile(
    r"(?:^|\.)(?:(?:\w*_)?(?:layer_?norm|group_?norm|batch_?norm|rms_?norm|norm|ln|bn)"
    r"(?:_?\d+|_f|_pre|_post|_final)?\.(?:weight|scale|gamma|gain|g)"
    r"|(?:\w+_)?scale_shift_table|modulation)$",  # of adaptive normalisation
    re.IGNORECASE,
)


# ---------------------------------------------------------------------------------------------- the functions


def not_weights(tensors: Iterable[Described]) -> dict[str, Reason]:
    """Returns the tensors that are not weights: name -> reason. Uses names, dtypes and related tensors.

    FP8 with a scale is storage: its numbers are valid only with the scale, and quantising them again would
    round twice. FP8 without a scale is storage too if other FP8 tensors of the model have scales, because
    its scale may be in a missing shard. In other models FP8 is a weight.

    Args:
        tensors: all tensors of the model, because the role of a tensor may depend on others.
    """
    model = _Model.of(tensors)
    reasons = ((name, model.reason(name)) for name in model.tensors)
    out = {name: reason for name, reason in reasons if reason is not None}
    fp8 = [name for name, tensor in model.tensors.items() if _is_fp8(tensor.dtype)]
    scaled = next((name for name in fp8 if name in out and out[name].kind is Kind.STORAGE), None)
    if scaled is not None:
        for name in fp8:
            words = f"{model.tensors[name].dtype.name}, as {scaled!r}, which has a scale"
            out.setdefault(name, Reason(Kind.STORAGE, words))
    return out


def is_large_float(tensor: Described) -> bool:
    """Whether a tensor is float, of rank at least 2, and has at least `MIN_ELEMENTS` elements."""
    return tensor.dtype.is_float and len(tensor.shape) >= 2 and math.prod(tensor.shape) >= MIN_ELEMENTS


def is_packed_storage(tensor: Described, reasons: Mapping[str, Reason]) -> bool:
    """Whether a float tensor stores packed weights, so that its elements, -0 included, are bit fields.

    Args:
        tensor: any tensor.
        reasons: the result of `not_weights` for all tensors.
    """
    reason = reasons.get(tensor.name)
    is_storage = reason is not None and reason.kind is Kind.STORAGE
    return is_storage and tensor.dtype.is_float and not _is_fp8(tensor.dtype)


def options_for(tensors: Iterable[Described], options: Options) -> dict[str, Options]:
    """Returns name -> options for the weights that pruning and quantising change by default."""
    known = list(tensors)
    left = not_weights(known)
    return {t.name: options for t in known if is_large_float(t) and t.name not in left}


def warn_of_quantised(tensors: Iterable[Described], options: object) -> None:
    """Warns if options for all tensors change parts of weights that are already quantised.

    Lossy options change all such parts that are float. ``zeros="positive"`` without a lossy option changes
    only float tensors that store packed weights.

    Args:
        tensors: all tensors to write.
        options: one `Options` for all tensors. Options by name do not warn, because the caller chose them.
    """
    if not isinstance(options, Options) or (options.lossless and options.zeros == "keep"):
        return
    known = {tensor.name: tensor for tensor in tensors}
    reasons = not_weights(known.values())
    names = [
        name
        for name, reason in reasons.items()
        if reason.kind in (Kind.STORAGE, Kind.COMPANION) and known[name].dtype.is_float
    ]
    if options.lossless:
        names = [name for name in names if is_packed_storage(known[name], reasons)]
    if names:
        words = f"options for all tensors change parts of already quantised weights ({len(names):,})"
        advice = "options_for_weights returns options for the weights only"
        warnings.warn(f"{words}: {listed(names)}; {advice}", SfpWarning, stacklevel=5)


@dataclass(frozen=True)
class _Model:
    """Index of a model's tensors.

    Attributes:
        tensors: name -> tensor.
        stored: module -> up to two of its tensors that store its weight, packed or in integers.
        scales: prefix of a name -> a tensor with that prefix and a scale's suffix, such as ``_scale_inv``.
    """

    tensors: dict[str, Described]
    stored: dict[str, list[str]]
    scales: dict[str, str]

    @classmethod
    def of(cls, tensors: Iterable[Described]) -> _Model:
        """Builds the index in one pass over the names."""
        known = {tensor.name: tensor for tensor in tensors}
        stored: dict[str, list[str]] = {}
        scales: dict[str, str] = {}
        for name, tensor in known.items():
            module, last = _parts(name)
            is_integer = not tensor.dtype.is_float and tensor.dtype.name != "BOOL"
            if _STORAGE.fullmatch(last) or (is_integer and _INTEGER_STORAGE.fullmatch(last)):
                some = stored.setdefault(module, [])
                some += [name] if len(some) < 2 else []
            if _SCALE.search(last):
                scales.setdefault(module, name)
                end = len(last)
                for _ in range(_MOST_PARTS):
                    end = last.rfind("_", 0, end)
                    if end > 0 and _SCALE.search(last, end + 1):
                        scales.setdefault(name[: len(name) - len(last) + end], name)
        return cls(known, stored, scales)

    def reason(self, name: str) -> Reason | None:
        """Returns the reason why a tensor is not a weight, or None."""
        tensor = self.tensors[name]
        _, last = _parts(name)
        words = f"named {last!r}"
        kind = _kind_by_last(last)
        if kind in (Kind.STORAGE, Kind.COMPANION):
            return Reason(kind, words)
        if _COMPANION_PAIR.search(name):
            return Reason(Kind.COMPANION, words)
        if not re.fullmatch(r"(\w+_)?bias", last) or last == "weight_bias":  # of VPTQ: a companion
            found = self._companion(name) or (self._storage(name) if tensor.dtype.is_float else None)
            if found is not None:
                return found
        if kind is not None:
            return Reason(kind, words)
        return Reason(Kind.NORM, words) if _NORM.search(name) else None

    def _companion(self, name: str) -> Reason | None:
        """Returns the reason if the module stores its weight packed, or has an FP8 weight with this scale."""
        module, last = _parts(name)
        for stored in self.stored.get(module, []):
            if stored != name:
                return Reason(Kind.COMPANION, f"beside {stored!r} of {self.tensors[stored].dtype.name}")
        weight = self.tensors.get(f"{module}.weight" if module else "weight")
        if weight is not None and weight.name != name and _is_fp8(weight.dtype) and _SCALE.search(last):
            return Reason(Kind.COMPANION, f"beside {weight.name!r} of {weight.dtype.name}")
        return None

    def _storage(self, name: str) -> Reason | None:
        """Returns the reason if a float tensor has its own scales: FP8, or packed integers as floats."""
        module, last = _parts(name)
        for part in ("absmax", "quant_map", "quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4"):
            if f"{name}.{part}" in self.tensors:
                return Reason(Kind.STORAGE, f"with {name + '.' + part!r}")
        bitmask = f"{module}.bitmask" if module else "bitmask"
        if last == "compressed" and bitmask in self.tensors:
            return Reason(Kind.STORAGE, f"with {bitmask!r}")
        dtype = self.tensors[name].dtype
        scale = self.scales.get(name) or (self.scales.get(module) if last == "weight" else None)
        return Reason(Kind.STORAGE, f"{dtype.name} with {scale!r}") if scale and _is_fp8(dtype) else None


@lru_cache(1 << 14)  # a model has few different last parts
def _kind_by_last(last: str) -> Kind | None:
    """Returns the kind that follows from the last part of a name alone, or None."""
    tables = {Kind.STORAGE: _STORAGE, Kind.COMPANION: _COMPANION, Kind.BUFFER: _BUFFER, Kind.BIAS: _BIAS}
    return next((kind for kind, table in tables.items() if table.fullmatch(last)), None)


def _parts(name: str) -> tuple[str, str]:
    """Returns the module and the last part of a tensor's name."""
    module, _, last = name.rpartition(".")
    return module, last


def _is_fp8(dtype: Dtype) -> bool:
    return dtype.is_float and dtype.bits == 8


def has_values_beyond(array: NDArray[np.generic], *, float32: bool) -> bool:
    """Whether an array of floats has infinities or NaNs.

    Args:
        array: of a registered float dtype, any shape, contiguous.
        float32: whether finite values beyond the range of float32 count too; only F64 has them.
    """
    dtype = of_numpy(array.dtype)
    assert dtype is not None
    assert dtype.nonfinite is not None
    flat = array.reshape(-1)
    for start in range(0, flat.size, _BLOCK):
        block = flat[start : start + _BLOCK]
        if float32 and dtype.bits == 64:
            with np.errstate(over="ignore"):
                block = block.astype(np.float32)
            if not np.isfinite(block).all():
                return True
            continue
        magnitudes = block.view(dtype.pattern) & dtype.pattern.type((1 << (dtype.bits - 1)) - 1)
        if int(magnitudes.max()) >= dtype.nonfinite:
            return True
    return False
