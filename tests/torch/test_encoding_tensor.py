"""`EncodingTensor`: what is written is encoded, whole tensors of a file keep their bytes, nothing is lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sfpformat import MismatchError, OptionError, Options
from sfpformat.torch import safe_open, save_file
from sfpformat.torch.encoding_tensor import EncodingTensor
from sfpformat.torch.lazy_tensor import lazy_weights
from sfpformat.torch.packed import cut_out, decode

BF16 = torch.bfloat16


def matrix(rows: int = 96, columns: int = 64) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(rows, columns).to(BF16)


def content(tensor: EncodingTensor) -> torch.Tensor:
    """The decoded rows."""
    return torch.cat([decode(data).to(tensor.rows.dtype) for _, data in tensor.rows.parts()])


def test_rows_that_are_written_by_parts_are_encoded_in_order() -> None:
    weight = EncodingTensor.make("w", (96, 64), BF16)
    assert (weight.shape, weight.dtype, weight.is_meta) == ((96, 64), BF16, True)
    value = matrix()
    weight.data.narrow(0, 64, 32).copy_(value[64:])
    weight[:40].data.copy_(value[:40])
    weight.detach()[40:64, :].copy_(value[40:64].float())  # converts
    assert [count for count, _ in weight.rows.parts()] == [40, 24, 32]
    assert torch.equal(content(weight), value)


def test_later_writes_replace_earlier_ones_that_they_cover() -> None:
    weight = EncodingTensor.make("w", (8, 64), BF16)
    value = matrix(8)
    weight.narrow(0, 0, 4).fill_(2)
    weight.data.zero_()
    weight.data.copy_(value)
    weight[8:].fill_(1)  # no rows
    assert torch.equal(content(weight), value)
    with pytest.raises(OptionError, match="rows 2 to 3 are written after rows 0 to 8"):
        weight[2:3].fill_(1)
    assert torch.equal(content(weight), value)


def test_a_whole_tensor_of_a_file_keeps_its_bytes_and_a_part_is_encoded(tmp_path: Path) -> None:
    value = matrix()
    save_file({"a": value, "b": value.clone()}, tmp_path / "m.sfp", options=Options(segment=1024))
    whole, part = (EncodingTensor.make("w", shape, BF16) for shape in ((96, 64), (48, 32)))
    used: set[str] = set()
    with safe_open(tmp_path / "m.sfp") as file:
        tensors = dict(lazy_weights(file, used=used))
        whole.data.copy_(tensors["a"].narrow(0, 0, 96))
        assert used == {"a"}
        part.data.copy_(tensors["b"].narrow(0, 48, 48).narrow(1, 32, 32))
        assert used == {"a", "b"}
        [(_, data)] = whole.rows.parts()
        assert torch.equal(data, cut_out(file.file, "a"))
    assert torch.equal(content(whole), value)
    assert torch.equal(content(part), value[48:, 32:])


def test_a_tensor_whose_bytes_exceed_the_dense_weight_is_encoded_in_its_dtype(tmp_path: Path) -> None:
    value = matrix().float() + 2**-20  # float32, of which bfloat16 keeps half
    save_file({"a": value}, tmp_path / "m.sfp")
    weight = EncodingTensor.make("w", (96, 64), BF16)
    with safe_open(tmp_path / "m.sfp") as file:
        weight.copy_(dict(lazy_weights(file))["a"])
    [(_, data)] = weight.rows.parts()
    assert data.numel() < value.numel() * 2
    assert torch.equal(content(weight), value.to(BF16))


@pytest.mark.parametrize(
    ("rows", "words"), [([], "0 to 8"), ([(0, 2), (4, 6)], "2 to 4, 6 to 8"), ([(2, 8)], "0 to 2")]
)
def test_rows_that_nothing_fills_raise_an_error_with_their_numbers(
    rows: list[tuple[int, int]], words: str
) -> None:
    weight = EncodingTensor.make("the weight of 'q'", (8, 64), BF16)
    for start, stop in rows:
        weight[start:stop].fill_(0.5)
    with pytest.raises(MismatchError, match=f"no tensor fills rows {words} of the weight of 'q'"):
        weight.rows.parts()


def test_another_shape_is_refused() -> None:
    weight = EncodingTensor.make("w", (8, 64), BF16)
    for value in (matrix(1), matrix(8, 32), torch.zeros(64, dtype=BF16)):
        with pytest.raises(MismatchError, match="does not fill rows 0 to 8 of 64 columns"):
            weight.copy_(value)  # torch would broadcast the first and the last


REFUSED: tuple[Callable[[Any], Any], ...] = (
    lambda w: w.add_(1),
    lambda w: w + 1,
    lambda w: w.data.view(-1),
    lambda w: w.t(),
    lambda w: w.chunk(2),
    lambda w: w[0],
    lambda w: w[::2],
    lambda w: w[:, :32],
    lambda w: w.narrow(1, 0, 32),
    lambda w: w.__setitem__(slice(0, 4), 1),
    lambda w: setattr(w, "data", matrix(8)),
    lambda w: w.to("cpu"),
    lambda w: w.to(torch.float32),
    lambda w: w.cpu(),
    lambda w: torch.zeros(8, 64).copy_(w),
    lambda w: torch.add(torch.zeros(8, 64), 1, out=w),
    lambda w: w.copy_(w),
    lambda w: w.untyped_storage(),
    lambda w: w.normal_(),
    lambda w: torch.cat([w, w]),
)


@pytest.mark.parametrize("act", REFUSED)
def test_operations_that_would_be_lost_are_refused(act: Callable[[Any], Any]) -> None:
    weight = EncodingTensor.make("w", (8, 64), BF16)
    with pytest.raises(OptionError, match=r"w is compressed while it is loaded, .* rows, not "):
        act(weight)


@pytest.mark.parametrize(
    "act",
    [lambda w: w.narrow(0, 4, 8), lambda w: w.narrow(2, 0, 1), lambda w: w[:, :, :]],
)
def test_invalid_selections_raise_errors(act: Callable[[Any], Any]) -> None:
    with pytest.raises((RuntimeError, IndexError, OptionError)):
        act(EncodingTensor.make("w", (8, 64), BF16))


def test_it_moves_to_the_meta_device_where_it_is() -> None:
    weight = EncodingTensor.make("w", (8, 64), BF16)
    weight.data.to("meta").copy_(matrix(8))
    assert torch.equal(content(weight), matrix(8))
