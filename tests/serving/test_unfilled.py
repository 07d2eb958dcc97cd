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


def names(marks: Marks) -> list[str]:
    return [one.name for one in marks.unfilled()]


def test_matrices_and_biases_without_values_are_named_with_their_rows() -> None:
    model: Any = nn.ModuleDict({"qkv": Combined(8, 8), "one": nn.Linear(8, 8)})
    before = model["one"].weight.detach().clone()
    marks = Marks(model)
    assert names(marks) == [
        f"qkv.{name}, rows {rows}" for name in ("weight", "bias") for rows in ("0 to 4", "4 to 6", "6 to 8")
    ]
    with torch.no_grad():
        model["qkv"].weight[:6] = 1
        model["qkv"].bias[:] = 1
    assert names(marks) == ["qkv.weight, rows 6 to 8"]
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


def test_layers_with_one_matrix_are_marked_if_asked_for() -> None:
    model: Any = nn.ModuleDict({"o": nn.Linear(8, 8), "norm": nn.LayerNorm(8), "other": nn.Linear(8, 8)})
    model["o"].quant_method = model["norm"].quant_method = object()
    assert not names(Marks(model))
    marks = Marks(model, every=True)
    assert names(marks) == ["o.weight"]
    [found] = marks.unfilled()
    assert found.layer is model["o"]
    torch.nn.init.ones_(found.layer.get_parameter("weight"))
    assert not names(marks)
