"""Matrices of combined layers that a checkpoint does not fill are found."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sfpformat.serving.unfilled import Marks
from sfpformat.torch.encoding_tensor import EncodingTensor


class Combined(nn.Linear):
    """A layer of three matrices."""

    output_partition_sizes = (4, 2, 2)


def test_matrices_and_biases_without_values_are_named_with_their_rows() -> None:
    model: Any = nn.ModuleDict({"qkv": Combined(8, 8), "one": nn.Linear(8, 8)})
    before = model["one"].weight.detach().clone()
    marks = Marks(model)
    assert marks.unfilled() == [
        f"qkv.{name}, rows {rows}" for name in ("weight", "bias") for rows in ("0 to 4", "4 to 6", "6 to 8")
    ]
    with torch.no_grad():
        model["qkv"].weight[:6] = 1
        model["qkv"].bias[:] = 1
    assert marks.unfilled() == ["qkv.weight, rows 6 to 8"]
    with torch.no_grad():
        model["qkv"].weight[6:] = 0
    assert not marks.unfilled()
    assert torch.equal(model["one"].weight, before)


def test_parameters_of_other_shapes_and_dtypes_and_compressed_ones_are_not_marked() -> None:
    layer: Any = Combined(8, 8)
    del layer.weight, layer.bias
    layer.register_parameter("codes", nn.Parameter(torch.zeros(8, 8, dtype=torch.uint8), requires_grad=False))
    layer.register_parameter("scale", nn.Parameter(torch.zeros(3)))
    layer.weight = EncodingTensor.make("w", (8, 8), torch.bfloat16)
    assert not Marks(layer).unfilled()
    assert not layer.scale.isnan().any()
