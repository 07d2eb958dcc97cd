"""Inference engines load `.sfp` models: vLLM with ``--load-format sfp``, and SGLang.

Both find their functions by entry points of the installed package. Nothing here imports an engine before.
Each process of tensor parallelism decodes only the parts of weights that it keeps, as
`sfpformat.torch.lazy_tensor` describes.
"""

from __future__ import annotations

from .sglang import register_sglang_hook
from .vllm import register_vllm_loader, register_vllm_quantization

__all__ = ["register_sglang_hook", "register_vllm_loader", "register_vllm_quantization"]
