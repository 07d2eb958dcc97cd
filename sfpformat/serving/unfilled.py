"""Finds weights, and matrices of combined layers, that a checkpoint does not fill.

vLLM reports a combined parameter (query, key and value; gate and up) as filled as soon as one of its matrices
is. SGLang reports nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Unfilled(NamedTuple):
    """A matrix or bias without values.

    Attributes:
        name: name of the parameter; with its rows, if the layer has several matrices.
        layer: the layer.
    """

    name: str
    layer: nn.Module


class Marks:
    """Marks of NaN in the parameters of a model, which loading overwrites.

    Marked are the first row of each matrix of a combined weight, and each part of its bias; and, if asked
    for, the first row of each other weight of a linear layer, embedding or head. Parameters of 8 bits and
    tensors on the meta device are not marked. Compressed weights have a check of their own.
    """

    def __init__(self, model: nn.Module, every: bool = False) -> None:
        """Writes the marks.

        Args:
            model: a model whose parameters have no values yet. Layers with several matrices have the
                attribute ``output_partition_sizes``: the rows of each. Linear layers, embeddings and heads
                have the attribute ``quant_method``.
            every: whether layers with one matrix are marked, too.
        """
        self._marked: list[tuple[Unfilled, torch.Tensor]] = []
        for path, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dtype in _DTYPES and not parameter.is_meta and parameter.dim() in (1, 2):
                    self._mark(module, f"{path}.{name}", parameter, every)

    def _mark(self, module: nn.Module, name: str, parameter: nn.Parameter, every: bool) -> None:
        rows = parameter.shape[0]
        sizes: Any = getattr(module, "output_partition_sizes", ())
        if len(sizes) < 2 or sum(sizes) != rows:
            if not every or parameter.dim() != 2 or not hasattr(module, "quant_method"):
                return
            sizes = (rows,)
        start = 0
        for size in sizes:
            mark = parameter.data[start : start + (1 if parameter.dim() == 2 else size)]
            mark.fill_(torch.nan)
            words = f"{name}, rows {start} to {start + size}" if len(sizes) > 1 else name
            self._marked.append((Unfilled(words, module), mark))
            start += size

    def unfilled(self) -> list[Unfilled]:
        """Returns what still has its marks."""
        return [what for what, mark in self._marked if mark.numel() and bool(mark.isnan().all())]
