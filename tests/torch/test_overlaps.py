"""Deltas and tensors that share memory."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import sfpformat
from sfpformat.errors import MismatchError, OptionError
from sfpformat.torch import apply_delta, compress_model, decompress_model, write_delta
from sfpformat.torch.overlaps import overlaps_itself, share_elements

from .test_files import assert_same

State = dict[str, Tensor]


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Embedding(30, 8)
        self.last = torch.nn.Linear(8, 30, bias=False)
        self.last.weight = self.first.weight


def copies(state: State) -> State:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def columns() -> State:
    whole = torch.randn(6, 10)
    return {"left": whole[:, :4], "right": whole[:, 4:], "other": torch.ones(3)}


def rows() -> State:
    whole = torch.randn(6, 10)
    return {"top": whole[:3], "bottom": whole[3:]}


def overlapping() -> State:
    whole = torch.randn(6, 10)
    return {"a": torch.zeros(5), "top": whole[:4], "bottom": whole[2:]}


def overlapping_columns() -> State:
    whole = torch.randn(6, 10)
    return {"a": torch.zeros(5), "left": whole[:, :6], "right": whole[:, 4:]}


def twice() -> State:
    one = torch.randn(4, 4)
    return {"a": torch.zeros(5), "one": one, "two": one}


def transposed() -> State:
    one = torch.randn(4, 4)
    return {"a": torch.zeros(5), "one": one, "two": one.t()}


@pytest.mark.parametrize("make", [columns, rows])
def test_parts_of_one_memory_that_do_not_overlap_are_changed(
    make: Callable[[], State], tmp_path: Path
) -> None:
    state = make()
    new = {name: tensor + i + 1 for i, (name, tensor) in enumerate(copies(state).items())}
    write_delta(tmp_path / "d.sfp", copies(state), new)
    apply_delta(state, tmp_path / "d.sfp")
    assert_same(state, new)


@pytest.mark.parametrize("make", [overlapping, overlapping_columns, twice, transposed])
@pytest.mark.parametrize("both", [True, False])
def test_memory_that_would_need_two_values_is_refused_and_nothing_changes(
    make: Callable[[], State], both: bool, tmp_path: Path
) -> None:
    state = make()
    before = copies(state)
    names = list(state)
    new = {name: tensor + i for i, (name, tensor) in enumerate(copies(state).items())}
    new[names[0]] = before[names[0]] + 1
    if not both:
        new[names[1]] = before[names[1]]
    write_delta(tmp_path / "d.sfp", before, new)
    with pytest.raises(OptionError, match=f"'{names[1]}' and '{names[2]}' share memory|'{names[2]}' and"):
        apply_delta(state, tmp_path / "d.sfp")
    assert_same(state, before)


def test_a_tensor_of_repeated_elements_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    state = {"a": torch.zeros(64), "w": torch.ones(1, 64).expand(64, 64)}
    before = copies(state)
    write_delta(tmp_path / "d.sfp", before, {"a": torch.ones(64), "w": torch.randn(64, 64)})
    with pytest.raises(OptionError, match=r"'w': its elements share memory"):
        apply_delta(state, tmp_path / "d.sfp")
    assert_same(state, before)


def test_a_tie_takes_one_value_and_no_two(tmp_path: Path) -> None:
    model = Tied()
    state = copies(dict(model.state_dict()))
    one = {name: tensor + 1 for name, tensor in state.items()}
    write_delta(tmp_path / "one.sfp", state, one)
    write_delta(tmp_path / "two.sfp", one, one | {"last.weight": one["last.weight"] + 1})
    apply_delta(model, tmp_path / "one.sfp")
    assert_same(dict(model.state_dict()), one)
    for target in (model, model.state_dict()):
        with pytest.raises(OptionError, match="share memory"):
            apply_delta(target, tmp_path / "two.sfp")
    assert_same(dict(model.state_dict()), one)


def test_a_module_refuses_another_dtype_and_nothing_changes(tmp_path: Path) -> None:
    model = torch.nn.Linear(8, 8)
    before = copies(dict(model.state_dict()))
    new = {"weight": before["weight"] + 1, "bias": before["bias"].bfloat16()}
    write_delta(tmp_path / "d.sfp", before, new)
    with pytest.raises(OptionError, match=r"'bias', which a module cannot"):
        apply_delta(model, tmp_path / "d.sfp")
    assert_same(dict(model.state_dict()), before)
    apply_delta(before, tmp_path / "d.sfp")
    assert_same(before, new)


def test_compressed_layers_have_no_elements_for_a_delta(tmp_path: Path) -> None:
    model = torch.nn.Linear(64, 64)
    before = copies(dict(model.state_dict()))
    write_delta(tmp_path / "d.sfp", before, {name: tensor + 1 for name, tensor in before.items()})
    compress_model(model)
    for call in (
        lambda: apply_delta(model, tmp_path / "d.sfp"),
        lambda: write_delta(tmp_path / "e.sfp", model, before),
    ):
        with pytest.raises(OptionError, match=r"compressed.*'weight'; call decompress_model first"):
            call()
    decompress_model(model)
    apply_delta(model, tmp_path / "d.sfp")
    assert_same(dict(model.state_dict()), {name: tensor + 1 for name, tensor in before.items()})


def test_arrays_that_share_memory_take_one_value_and_no_two() -> None:
    whole = np.zeros(60, np.float32)
    cases: list[tuple[dict[str, Any], bool]] = [
        ({"a": whole, "b": whole}, False),
        ({"a": whole[:40], "b": whole[20:]}, False),
        ({"a": whole[:30], "b": whole[30:]}, True),
    ]
    for arrays, fine in cases:
        data = io.BytesIO()
        base = {name: array.copy() for name, array in arrays.items()}
        new = {name: array + i + 1 for i, (name, array) in enumerate(base.items())}
        sfpformat.write_delta(data, base, new)
        if fine:
            sfpformat.apply_delta(arrays, data)
            assert all(np.array_equal(arrays[name], new[name]) for name in new)
        else:
            with pytest.raises(MismatchError, match="'a' and 'b' share memory"):
                sfpformat.apply_delta(arrays, data)
            assert not whole.any()


@pytest.mark.parametrize("make", [lambda x: x, lambda x: x.t()])
def test_autograd_notices_that_a_saved_tensor_was_changed(
    make: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    leaf = make(torch.full((4, 4), 2.0)).requires_grad_()
    loss = (leaf * leaf).sum()
    write_delta(tmp_path / "d.sfp", {"w": leaf.detach()}, {"w": leaf.detach() + 1})
    apply_delta({"w": leaf}, tmp_path / "d.sfp")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.zeros(3, 4), False),
        (torch.zeros(3, 4).t(), False),
        (torch.zeros(6, 8)[::2, ::3], False),
        (torch.zeros(1, 4).expand(3, 4), True),
        (torch.zeros(1, 1).expand(1, 1), False),
        (torch.zeros(10).as_strided((4, 3), (2, 1)), True),
        (torch.zeros(()), False),
    ],
)
def test_elements_that_share_memory_are_found(tensor: Tensor, expected: bool) -> None:
    assert overlaps_itself(tensor) == expected


def test_bytes_that_two_tensors_share_are_found() -> None:
    whole = torch.zeros(6, 8)
    assert share_elements(whole, whole)
    assert share_elements(whole[2], whole[:, 3])
    assert share_elements(whole.view(torch.int16), whole[5:])
    assert not share_elements(whole[::2], whole[1::2])
    assert not share_elements(whole[:, :4], whole[:, 4:])
