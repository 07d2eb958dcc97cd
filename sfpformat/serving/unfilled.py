"""Finds matrices of combined layers that a checkpoint does not fill: of query, key and value, or gate and up.

vLLM reports a combined parameter as filled as soon as one of its matrices is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..torch.encoding_tensor import EncodingTensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Marks:
    """Marks of NaN in the parameters of a model, which loading overwrites.

    Marked are the first row of each matrix of a combined weight, and each part of its bias. Parameters of
    8 bits are not marked. Compressed weights have a check of their own.
    """

    def __init__(self, model: nn.Module) -> None:
        """Writes the marks.

        Args:
            model: a model whose parameters have no values yet. Layers with several matrices have the
                attribute ``output_partition_sizes``: the rows of each.
        """
        self._marked: list[tuple[str, torch.Tensor]] = []
        for path, module in model.named_modules():
            sizes: Any = getattr(module, "output_partition_sizes", ())
            if len(sizes) < 2:
                continue
            for name, parameter in module.named_parameters(recurse=False):
                is_whole = parameter.dim() in (1, 2) and parameter.shape[0] == sum(sizes)
                if not is_whole or parameter.dtype not in _DTYPES or isinstance(parameter, EncodingTensor):
                    continue
                start = 0
                for size in sizes:
                    stop = start + (1 if parameter.dim() == 2 else size)
                    words = f"{path}.{name}, rows {start} to {start + size}"
                    mark = parameter.data[start:stop]
                    mark.fill_(torch.nan)
                    self._marked.append((words, mark))
                    start += size

    def unfilled(self) -> list[str]:
        """Returns the names and rows of the matrices that still have their marks."""
        return [words for words, mark in self._marked if mark.numel() and bool(mark.isnan().all())]
