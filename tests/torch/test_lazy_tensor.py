"""`LazyTensor`: what is recorded, what is decoded, and that results are those of ordinary tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sfpformat.torch import TorchFile, TorchSlice, safe_open, save_file
from sfpformat.torch.lazy_tensor import LazyTensor, lazy_weights

Weights = dict[str, torch.Tensor]


def tensors() -> Weights:
    torch.manual_seed(0)
    return {
        "w": torch.randn(64, 32).to(torch.bfloat16),
        "e": torch.randn(4, 6, 5),
        "s": torch.tensor(3.0),
        "i": torch.arange(6),
    }


@pytest.fixture
def file(tmp_path: Path) -> Iterator[TorchFile]:
    save_file(tensors(), tmp_path / "m.sfp")
    with safe_open(tmp_path / "m.sfp") as opened:
        yield opened


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The elements of each decoding."""
    found: list[int] = []
    real = TorchSlice.__getitem__

    def get(self: TorchSlice, index: Any) -> torch.Tensor:
        out = real(self, index)
        found.append(out.numel())
        return out

    monkeypatch.setattr(TorchSlice, "__getitem__", get)
    return found


RECORDED: tuple[tuple[str, Callable[[Any], Any]], ...] = (
    ("w", lambda w: w.narrow(0, 32, 32)),
    ("w", lambda w: w.narrow(-1, start=8, length=8)),
    ("w", lambda w: w.narrow(0, -4, 2)),
    ("w", lambda w: torch.narrow(w, 1, 4, 28)),
    ("w", lambda w: w.narrow(0, 8, 40).narrow(0, 8, 8).narrow(1, 1, 3)),
    ("w", lambda w: w.chunk(3)[2]),
    ("w", lambda w: torch.chunk(w, 2, dim=1)[1]),
    ("w", lambda w: w.split([10, 54], dim=0)[1].narrow(1, 3, 4)),
    ("w", lambda w: w.split(20)[3]),
    ("w", lambda w: torch.split(w, 5, -1)[6]),
    ("w", lambda w: w[5]),
    ("w", lambda w: w[10:20, :4]),
    ("w", lambda w: w[-3:]),
    ("w", lambda w: w[5:2]),
    ("e", lambda e: e[1]),
    ("e", lambda e: e.select(1, -1)),
    ("e", lambda e: torch.select(e, dim=2, index=0)),
    ("e", lambda e: e[..., 2:4]),
    ("e", lambda e: e[1, ..., 2]),
    ("e", lambda e: e[-1, 1:3, 0]),
    ("e", lambda e: list(e)[2]),
    ("e", lambda e: e.unbind(2)[1]),
    ("e", lambda e: e[2].chunk(2)[0][1]),
    ("s", lambda s: s[...]),
)


@pytest.mark.parametrize("number", range(len(RECORDED)))
def test_boxes_are_recorded_and_decode_their_elements_once(
    file: TorchFile, sizes: list[int], number: int
) -> None:
    name, take = RECORDED[number]
    expected = take(tensors()[name])
    box = take(dict(lazy_weights(file))[name])
    assert type(box) is LazyTensor
    assert (box.shape, box.dtype, box.device) == (expected.shape, expected.dtype, torch.device("cpu"))
    assert (box.size(), box.dim(), box.numel()) == (expected.size(), expected.dim(), expected.numel())
    assert box.stride() == expected.contiguous().stride()
    assert sizes == []
    for _ in range(2):
        assert torch.equal(torch.zeros(expected.shape, dtype=expected.dtype).copy_(box), expected)
    assert sizes == [expected.numel()]


OTHERS: tuple[Callable[[Any], Any], ...] = (
    lambda w: w.t(),
    lambda w: w.view(32, 64).narrow(0, 1, 2),
    lambda w: w[::2],
    lambda w: w[[1, 3]],
    lambda w: w[None],
    lambda w: w[w[:, 0] > 0],
    lambda w: w.to(torch.float32),
    lambda w: torch.cat([w, w], 1),
    lambda w: torch.stack([w.narrow(0, 0, 2), w.narrow(0, 2, 2)]),
    lambda w: torch.nn.functional.pad(w, (0, 1)),
    lambda w: w.data,
    lambda w: w.detach(),
    lambda w: w.clone(),
    lambda w: w + 1,
    lambda w: 1 - w,
    lambda w: torch.zeros(64, 32, dtype=w.dtype).add_(w),
    lambda w: torch.add(torch.ones_like(w), other=w),
    lambda w: w.tolist(),
    lambda w: w.float().numpy().tolist(),
    lambda w: str(w),
    lambda w: w.sum().item(),
    lambda w: bool((w == w).all()),
)


@pytest.mark.parametrize("number", range(len(OTHERS)))
def test_other_operations_give_what_ordinary_tensors_give(file: TorchFile, number: int) -> None:
    found = OTHERS[number](dict(lazy_weights(file))["w"])
    expected = OTHERS[number](tensors()["w"])
    if isinstance(expected, torch.Tensor):
        assert type(found) is torch.Tensor
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    else:
        assert found == expected


def test_indices_and_scalars_are_decoded(file: TorchFile) -> None:
    lazy = dict(lazy_weights(file))
    assert torch.equal(tensors()["w"][lazy["i"]], tensors()["w"][:6])
    assert (lazy["s"].item(), float(lazy["s"]), int(lazy["i"][2])) == (3.0, 3.0, 2)


@pytest.mark.parametrize(
    "take",
    [lambda w: w.narrow(0, 60, 8), lambda w: w[64], lambda w: w[0, 0, 0], lambda w: w.select(2, 0)],
)
def test_arguments_out_of_range_raise_what_torch_raises(
    file: TorchFile, sizes: list[int], take: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    with pytest.raises((IndexError, RuntimeError)) as expected:
        take(tensors()["w"])
    with pytest.raises(expected.type) as found:
        take(dict(lazy_weights(file))["w"])
    assert str(found.value) == str(expected.value)
    assert sizes == []


def test_changes_in_place_reach_every_box(file: TorchFile) -> None:
    expected = tensors()["w"]

    def change(w: torch.Tensor) -> None:
        w.narrow(0, 0, 4).mul_(2)
        w[4] = 7
        part = w.chunk(2)[1]
        part += 1
        torch.neg(w[5:6], out=w[5:6])

    lazy = dict(lazy_weights(file))["w"]
    early = lazy.narrow(0, 2, 40)
    assert torch.equal(early.clone(), expected[2:42])
    change(lazy)
    change(expected)
    assert torch.equal(early.clone(), expected[2:42])
    assert torch.equal(lazy.clone(), expected)


class Parameter(torch.nn.Parameter):
    """A parameter like those of vLLM, whose `__torch_function__` turns that of other classes off."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


def test_parameters_of_other_classes_and_modes_take_boxes(file: TorchFile, sizes: list[int]) -> None:
    w, lazy = tensors()["w"], dict(lazy_weights(file))["w"]
    parameter = Parameter(torch.zeros(32, 32, dtype=torch.bfloat16), requires_grad=False)
    parameter.copy_(lazy.narrow(0, 32, 32))
    assert torch.equal(parameter.data, w[32:])
    parameter.data.copy_(lazy.narrow(0, 0, 32))
    assert torch.equal(parameter.data, w[:32])
    parameter[:4] = lazy.narrow(0, 60, 4)
    assert torch.equal(parameter.data[:4], w[60:])
    assert sizes == [1024, 1024, 128]
    with torch.device("meta"), torch.inference_mode():
        assert torch.equal(lazy.narrow(0, 1, 2).float(), w[1:3].float())


def test_names_get_a_prefix_and_used_tensors_are_reported(file: TorchFile) -> None:
    used: set[str] = set()
    lazy = dict(lazy_weights(file, "model.", used))
    assert list(lazy) == ["model.w", "model.e", "model.s", "model.i"]
    assert lazy["model.w"].narrow(0, 0, 2).shape == (2, 32)
    assert used == set()
    lazy["model.w"].narrow(0, 0, 2).clone()
    lazy["model.s"].item()
    assert used == {"w", "s"}
