"""The PyTorch functions for files: round trips, slices, sparse layouts, refusals."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sfpformat.numpy
from conformance.recipes.samples import everything
from sfpformat import (
    InvalidFileError,
    LimitError,
    Limits,
    MismatchError,
    MissingTensorError,
    OptionError,
    Options,
    Uniform,
)
from sfpformat.decode.shard_index import ShardIndex
from sfpformat.dtypes import DTYPES
from sfpformat.torch import load, load_file, safe_open, save, save_file
from sfpformat.torch.tensors import array_of, format_dtype, torch_dtype

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


def bits(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor."""
    return array_of(tensor).tobytes()


def sample(name: str, *shape: int, seed: int = 0) -> torch.Tensor:
    """A tensor of a dtype with every kind of bit pattern in it."""
    generator = torch.Generator().manual_seed(seed)
    if name == "BOOL":
        return torch.rand(shape, generator=generator) < 0.5
    dtype = torch_dtype(name)
    octets = torch.randint(0, 256, (*shape, DTYPES[name].itemsize), generator=generator, dtype=torch.uint8)
    return octets.view(dtype).reshape(shape)


def pruned(*shape: int, dtype: torch.dtype = torch.float32, density: float = 0.4) -> torch.Tensor:
    """Normal weights, pruned to a density."""
    generator = torch.Generator().manual_seed(1)
    kept = torch.rand(shape, generator=generator) < density
    return torch.where(kept, torch.randn(shape, generator=generator), 0).to(dtype)


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Names in order, dtypes, shapes, bits."""
    assert list(one) == list(other)
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert one[name].shape == other[name].shape, name
        assert bits(one[name]) == bits(other[name]), name


# ----------------------------------------------------------------------------------------- there and back


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, sfpformat, sfpformat.numpy; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", [(7, 33), (), (0, 3), (5000,)])
def test_every_dtype_is_restored_bit_for_bit(name: str, shape: tuple[int, ...]) -> None:
    tensors = {"t": sample(name, *shape)}
    data = save(tensors)
    assert_same(load(data), tensors)
    with safe_open(data) as file:
        assert file.info("t").dtype == name


@pytest.mark.parametrize("name", FLOATS)
def test_pruned_floats_are_restored_bit_for_bit(name: str) -> None:
    dtype = torch_dtype(name)
    tensors = {"t": torch.where(pruned(64, 96) != 0, sample(name, 64, 96).view(dtype).float(), 0).to(dtype)}
    data = save(tensors, options=Options(coding="fingerprint"))
    assert_same(load(data), tensors)


def test_dtypes_map_to_torch_and_back() -> None:
    for name, dtype in DTYPES.items():
        assert format_dtype(torch_dtype(name)) is dtype
        assert torch_dtype(name).itemsize == dtype.itemsize


def test_any_strides_and_layouts_are_written() -> None:
    w = pruned(40, 60)
    tensors = {
        "transposed": w.t(),
        "strided": w[::2, ::3],
        "expanded": w[:1].expand(5, 60),
        "conjugate": torch.complex(w, w).conj(),
        "negative": torch.complex(w, w).conj().imag,
        "sparse": w.to_sparse(),
        "parameter": torch.nn.Parameter(w + 1),
    }
    loaded = load(save(tensors))
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor.detach().to_dense().resolve_conj().resolve_neg()), name
        assert loaded[name].is_contiguous()
        assert not loaded[name].requires_grad


def test_torch_and_numpy_write_the_same_bytes(tmp_path: Path) -> None:
    w = pruned(200, 60)
    save_file({"w": w}, tmp_path / "a", {"format": "pt"})
    sfpformat.numpy.save_file({"w": w.numpy()}, tmp_path / "b", {"format": "pt"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert_same(load_file(tmp_path / "a"), {"w": w})


def test_options_masks_and_importances_are_written_and_read(tmp_path: Path) -> None:
    w = pruned(64, 48, density=1.0)
    mask, importance = w.abs() > 0.5, w.abs()
    save_file(
        {"w": w * mask, "v": w},
        tmp_path / "m",
        {"who": "me"},
        options={"v": Options(Uniform(bits=4.0))},
        masks={"w": mask},
        importances={"w": importance, "v": (importance.amax(1), importance.amax(0).numpy())},
    )
    with safe_open(tmp_path / "m") as file:
        assert file.metadata() == {"who": "me"}
        assert file.keys() == file.offset_keys() == list(file) == ["w", "v"]
        assert len(file) == 2
        assert "w" in file
        assert torch.equal(file.get_mask("w"), mask)
        assert file.get_mask("w").dtype == torch.bool
        kept = file.get_importance("w")
        assert kept is not None
        assert kept.dtype == torch.float32
        assert torch.allclose(kept, importance * mask, atol=float(importance.max()) / 126)
        assert file.info("v").quantiser == "uniform"
        with pytest.raises(MissingTensorError, match="'x'"):
            file.get_tensor("x")


def test_a_loaded_tensor_can_be_changed_and_trained() -> None:
    t = load(save({"t": pruned(30, 30)}))["t"]
    t.mul_(2)
    t.requires_grad_().sum().backward()
    assert t.grad is not None


def test_every_tensor_is_loaded_on_the_requested_device() -> None:
    tensors = {f"t{i}": pruned(40, 40 + i, dtype=torch.bfloat16) for i in range(3)}
    with safe_open(save(tensors), device="meta") as file:
        found = file.get_tensors()
        assert file.get_tensor("t1").is_meta
        assert file.get_slice("t1")[:3].shape == (3, 41)
    assert {name: (t.shape, t.dtype) for name, t in found.items()} == {
        name: (t.shape, t.dtype) for name, t in tensors.items()
    }


def test_a_model_in_shards_loads_as_one(tmp_path: Path) -> None:
    one, two = {"a": pruned(30, 40), "b": sample("BF16", 9)}, {"c": sample("I64", 4)}
    save_file(one, tmp_path / "1.sfp")
    save_file(two, tmp_path / "2.sfp")
    index = ShardIndex({"a": "1.sfp", "b": "1.sfp", "c": "2.sfp"}, {})
    (tmp_path / "m.sfp.index.json").write_bytes(index.to_bytes())
    assert_same(load_file(tmp_path / "m.sfp.index.json"), {**one, **two})
    with safe_open(tmp_path / "m.sfp.index.json") as file:
        assert torch.equal(file.get_tensor("a", layout="coo").to_dense(), one["a"])


# ------------------------------------------------------------------------------------------------- slices


@pytest.mark.parametrize(
    "index", [..., (slice(3, 9), slice(None, 5)), 4, (..., -1), (slice(None, None, 3),), (2, 3)]
)
@pytest.mark.parametrize("name", ["F32", "BF16", "F8_E4M3", "I16"])
def test_slices_equal_those_of_the_tensor(name: str, index: Any) -> None:
    tensor = sample(name, 40, 70)
    with safe_open(save({"t": tensor}, options=Options(segment=32, chunk=64))) as file:
        part = file.get_slice("t")
        assert part.get_shape() == [40, 70]
        assert part.get_dtype() == name
        assert isinstance(part[index], torch.Tensor)
        wanted = tensor.view(torch_dtype(name))[index]
        assert part[index].shape == wanted.shape
        assert bits(part[index]) == bits(wanted)


# ------------------------------------------------------------------------------------------------- sparse


@pytest.fixture
def beta_warning() -> Iterator[None]:
    """Makes torch repeat its warning that CSR is in beta, which it gives once per process, and expects it."""
    torch.set_warn_always(True)
    try:
        with pytest.warns(UserWarning, match="beta"):
            yield
    finally:
        torch.set_warn_always(False)


@pytest.mark.usefixtures("beta_warning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(40, 60), (0, 5), (5, 0), (1, 1), (3, 4000)])
def test_csr_holds_the_survivors(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    tensor = pruned(*shape, dtype=dtype)
    with safe_open(save({"t": tensor})) as file:
        sparse = file.get_tensor("t", layout="csr")
        assert sparse.layout == torch.sparse_csr
        assert file.get_tensor("t", layout=torch.sparse_csr).layout == torch.sparse_csr
    torch.sparse_csr_tensor(
        sparse.crow_indices(), sparse.col_indices(), sparse.values(), sparse.shape, check_invariants=True
    )
    assert sparse.dtype == dtype
    assert sparse.values().numel() == int((tensor != 0).sum())
    assert torch.equal(sparse.to_dense(), tensor)


@pytest.mark.parametrize("shape", [(40, 60), (6, 7, 8), (90,), (0, 3), ()])
@pytest.mark.parametrize("coding", ["raw", "fingerprint"])
def test_coo_holds_the_survivors(shape: tuple[int, ...], coding: str) -> None:
    tensor = pruned(*shape)
    with safe_open(save({"t": tensor}, options=Options(coding=coding))) as file:
        sparse = file.get_tensor("t", layout="coo")
    assert sparse.layout == torch.sparse_coo
    assert sparse.is_coalesced()
    torch.sparse_coo_tensor(sparse.indices(), sparse.values(), sparse.shape, check_invariants=True)
    assert sparse.values().numel() == int((tensor != 0).sum())
    assert torch.equal(sparse.to_dense(), tensor)


def test_survivors_that_are_zero_are_entries() -> None:
    mask = torch.tensor([[True, False], [True, True]])
    w = torch.tensor([[0.0, 0.0], [-0.0, 2.0]])
    with safe_open(save({"t": w}, masks={"t": mask})) as file:
        assert file.get_tensor("t", layout="coo").indices().tolist() == [[0, 1, 1], [0, 0, 1]]
    with safe_open(save({"t": w}, options=Options(coding="raw"))) as file:
        assert file.get_tensor("t", layout="coo").indices().tolist() == [[1, 1], [0, 1]]


def test_fp8_survivors_keep_their_dtype() -> None:
    tensor = pruned(30, 30, dtype=torch.float8_e4m3fn)
    with safe_open(save({"t": tensor}, options=Options(coding="fingerprint"))) as file:
        sparse = file.get_tensor("t", layout="coo")
    assert bits(sparse.values()) == bits(tensor.float()[tensor.float() != 0].to(torch.float8_e4m3fn))


# -------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"t": torch.empty(3, device="meta")}, "meta device"),
        ({"t": torch.zeros(3, dtype=torch.bits8)}, "does not support the dtype"),
        ({"t": np.zeros(3)}, "is not a tensor"),
        ({"t": None}, "is not a tensor"),
    ],
)
def test_tensors_that_cannot_be_written_are_refused(tensors: dict[str, torch.Tensor], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        save(tensors)


def test_names_that_share_memory_are_refused() -> None:
    w = pruned(30, 30)
    for tensors in ({"a": w, "b": w}, {"a": w, "b": w[5:]}, {"a": w[:10], "b": w[9:]}):
        with pytest.raises(OptionError, match="'a' and 'b' share memory"):
            save(tensors)
    apart = {"a": w[:10], "b": w[10:], "c": torch.zeros(0), "d": torch.zeros(0)}
    assert_same(load(save(apart)), apart)


def test_other_layouts_frameworks_and_shapes_are_refused() -> None:
    data = save({"t": pruned(3, 4, 5)})
    with pytest.raises(OptionError, match="framework"):
        safe_open(data, framework="tf")
    with safe_open(data, "pt") as file:
        with pytest.raises(OptionError, match="'coo', 'csr'"):
            file.get_tensor("t", layout="bsr")
        with pytest.raises(OptionError, match="'coo', 'csr'"):
            file.get_tensor("t", layout=torch.sparse_csc)
        with pytest.raises(MismatchError, match="two dimensions"):
            file.get_tensor("t", layout="csr")


def test_limits_apply_to_torch_functions() -> None:
    data = save({"t": pruned(30, 40)})
    with pytest.raises(LimitError):
        load(data, limits=Limits(tensor_bytes=1000))


def test_a_dtype_that_this_torch_lacks_raises_mismatch(monkeypatch: pytest.MonkeyPatch) -> None:
    data = save({"t": sample("F8_E5M2", 4)})
    monkeypatch.delitem(sfpformat.torch.tensors._TO_TORCH, "F8_E5M2")
    with pytest.raises(MismatchError, match="no dtype for F8_E5M2"):
        load(data)


def test_a_damaged_file_raises_and_returns_no_tensor() -> None:
    data = bytearray(everything())
    data[200] ^= 1
    with pytest.raises(InvalidFileError):
        load(data)
    with pytest.raises(InvalidFileError):
        load(b"PK\x03\x04 a pickle of torch.save")
