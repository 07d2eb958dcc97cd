"""``sfp bench --device``: tensors decoded by kernels on the host, and errors without a device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.tools import shim
from sfpformat.bench import device_runners as bench_device
from sfpformat.engines.cuda import driver

from ..cuda.test_torch import devices
from ..support.programs import needs
from .test_bench import Capture, answer, model
from .test_main import error_of, run

pytestmark = needs("g++")

__all__ = ["devices"]  # a fixture
QUICK = ("--rounds", 1, "--device", "cuda")


@pytest.fixture
def pretended(devices: list[shim.HostDevice], monkeypatch: pytest.MonkeyPatch) -> list[shim.HostDevice]:
    """A device that uses host memory."""
    monkeypatch.setattr(bench_device, "why_not", lambda name: None)
    monkeypatch.setattr(bench_device, "device_of", lambda name: torch.device("cpu"))
    return devices


def test_sections_are_decoded_on_the_device(
    tmp_path: Path, capsys: Capture, pretended: list[shim.HostDevice]
) -> None:
    found = answer(capsys, model(tmp_path / "m.safetensors"), *QUICK, "--threads", 2)
    assert found["device"] == "cuda"
    assert set(found["rounds"]) == {"lossless", "sparse", "load"}
    assert found["refused"] == []
    ours = [row for row in found["results"] if row["contender"] == "sfp"]
    assert {(row["engine"], row["preset"]) for row in ours} == {("cuda", "default"), ("cuda", "gpu")}
    assert {row["threads"] for row in ours if row["section"] == "load"} == {1, 2}
    others = {(row["contender"], row["section"]) for row in found["results"]} - {
        ("sfp", s) for s in found["rounds"]
    }
    assert others <= {("safetensors", "load")}
    for row in ours:
        measured = row.get("decode_mb_s") or row["load_mb_s"]
        assert measured["median"] > 0
    kernels = {kernel for own in pretended for kernel in own.launched}
    assert {"index_chunks", "fill_tables"} < kernels
    assert any(kernel.startswith("dense_4") for kernel in kernels)


def test_the_device_is_named(tmp_path: Path, capsys: Capture, pretended: list[shim.HostDevice]) -> None:
    path = model(tmp_path / "m.safetensors")
    assert run("bench", path, *QUICK, "--only", "lossless", "--threads", 1, "--presets", "gpu") == 0
    out = capsys.readouterr().out
    assert "cores, decoded on cuda" in out
    assert "sfp cuda gpu" in out


def test_wrongly_decoded_sections_are_excluded_and_the_exit_code_is_1(
    tmp_path: Path, capsys: Capture, pretended: list[shim.HostDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = bench_device.load

    def wrong(readable: Any, name: str, threads: int) -> dict[str, Any]:
        return {key: tensor * 2 for key, tensor in real(readable, name, threads).items()}

    monkeypatch.setattr(bench_device, "load", wrong)
    found = answer(
        capsys, model(tmp_path / "m.safetensors"), *QUICK, "--threads", 1, "--presets", "gpu", code=1
    )
    assert {(row["section"], row["contender"]) for row in found["refused"]} == {
        (section, "sfp") for section in ("lossless", "sparse", "load")
    }


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["--device", "cuda", "--only", "memory"],
            "unknown section 'memory'; choose from",
        ),
        (["--device", "cuda", "--engines", "cuda"], "omit --engines"),
        (["--device", "cpu"], "only CUDA devices, not 'cpu'"),
        (["--device", "warp"], "--device warp: "),
        (["pruning", "--device", "cuda"], "does not accept --device"),
    ],
)
def test_wrong_arguments_end_with_one_line(words: list[str], told: str, capsys: Capture) -> None:
    assert told in error_of(capsys, "bench", *words)


@pytest.mark.parametrize(
    "why", ["no CUDA driver or device: libcuda.so was not found", "the device is too old"]
)
def test_a_missing_device_ends_bench_with_the_reason(
    why: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "why_not", lambda: why)
    assert error_of(capsys, "bench", "--device", "cuda") == f"sfp: error: --device cuda: {why}\n"


def test_a_torch_without_devices_ends_bench_with_the_reason(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "why_not", lambda: None)
    assert "finds no CUDA device" in error_of(capsys, "bench", "--device", "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert "no device 'cuda:2'; the number of CUDA devices that torch finds is 2" in error_of(
        capsys, "bench", "--device", "cuda:2"
    )
    assert bench_device.why_not("cuda:1") is None
    monkeypatch.setattr(bench_device, "device_of", lambda name: (_ for _ in ()).throw(ImportError("torch")))
    assert "torch is not installed" in (bench_device.why_not("cuda") or "")
