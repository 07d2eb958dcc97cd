"""`kernels.tools.check`: each part on the host, and a run in which some parts fail."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kernels.tools import check, identity, inputs, machine, peers, shim, speed
from kernels.tools.report import tables
from sfpformat.engines import get_device_engine
from sfpformat.engines.cuda import driver, pinned_loading, work
from sfpformat.torch import device_deltas, device_memory, files

from ..support.programs import needs

pytestmark = needs("g++")

FACTS = {
    "device": "A Device",
    "capability": [9, 0],
    "date": "2026-01-02",
    "command": "python -m kernels.tools.check",
    "versions": {"torch": "2"},
}


@pytest.fixture
def on_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine, on the host's device."""
    monkeypatch.setattr(driver, "why_not", lambda: None)
    monkeypatch.setattr(pinned_loading, "open_device", shim.device_of())
    monkeypatch.setattr(work, "_thread", threading.local())
    some = list(inputs._kinds(1 << 10))[::9]
    monkeypatch.setattr(inputs, "_kinds", lambda chunk: iter(some))


@pytest.mark.usefixtures("on_host")
def test_files_are_compared_on_any_device() -> None:
    golden, made = len(list(identity.golden_files(60))), len(list(inputs.files(every=60)))
    assert golden > 30
    assert identity.compare_with_reference(damaged=20, every=60) == golden + 2 * made + 20


@pytest.mark.usefixtures("on_host")
def test_a_difference_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "outcome", lambda data, engine: [engine.encode()])
    with pytest.raises(AssertionError, match=r"files differ; file 0: "):
        identity.compare_with_reference(damaged=0, every=60)


def test_products_are_compared_on_any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    some = ((64, 1024, 0.5, None, 1), (70, 1152, 0.5, "row", 3), (9, 9, 9, None, 9))
    monkeypatch.setattr(identity, "_PRODUCTS", some)
    found = identity.compare_products(shim.HostDevice(), 2)
    assert [(own["dtype"], own["batch"]) for own in found] == [
        (d, b) for b in (1, 3) for d in ("BF16", "F16", "F32")
    ]


def test_deltas_are_compared_on_any_device() -> None:
    device = shim.HostDevice()
    assert 10 <= identity.compare_deltas(device, 20) < 20
    assert {"sum_keys", "flip_elements"} < set(device.launched)


def fake_clock(device: shim.HostDevice) -> Callable[[speed.Works], float]:
    """Runs each work twice and reports 2 ms for each."""

    def clock(works: speed.Works) -> float:
        for each in [*works, *works]:
            each()
            device.finish()
        return 2.0

    return clock


@pytest.mark.parametrize("name", speed.MATRICES)
def test_a_matrix_is_decoded_and_timed(name: str) -> None:
    device = shim.HostDevice()
    found = speed.decoding(name, device, 1e6, 128, fake_clock(device))
    assert found["kernel"] in device.launched
    assert device.launched.count(found["kernel"]) == 3
    stored = found["bits_a_weight"] * 128 * 128 / 8
    item = 4 if "F32" in name else 2
    assert found["floor_ms"] == pytest.approx((stored + item * 128 * 128) / 1e6 * 1e3)
    assert found["share_of_floor"] == found["floor_ms"] / 2
    assert found["output_bytes_a_second"] == item * 128 * 128 / 2e-3


def test_products_are_timed_beside_dense_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    device = shim.HostDevice()
    found = speed.products(device, 1e6, 256, fake_clock(device))
    assert [own["batch"] for own in found] == list(speed.BATCHES)
    assert {own["times_as_fast"] for own in found} == {1.0}
    assert device.launched.count("multiply_bf16") == 2 * len(speed.BATCHES)
    assert found[0]["bits_a_weight"] < 3.3


@pytest.mark.parametrize("name", speed.STEPS)
def test_a_delta_is_applied_and_timed_on_both_ways(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ways: list[str | None] = []

    def on_device(where: torch.device, engine: str | None) -> bool:
        ways.append(engine)
        return engine is None

    monkeypatch.setattr(device_deltas, "is_decoded_on", on_device)
    monkeypatch.setattr(pinned_loading, "open_device", shim.device_of())
    monkeypatch.setattr(device_memory, "engine_of", lambda _: get_device_engine("cuda"))
    monkeypatch.setattr(device_memory, "stream_of", lambda _: (0, 0))
    monkeypatch.setattr(device_memory, "current", nullcontext)
    device = shim.HostDevice()
    found = speed.deltas(name, device, 1e6, 64, fake_clock(device), "cpu")
    assert ways == [None] * 6 + ["numba"] * 6
    assert 0 < found["changed"] < 1
    assert found["kernels_ms"] == found["flip_ms"] == 2.0
    assert found["floor_ms"] == pytest.approx(2 * 2 * 4 * 64 * 64 / 1e6 * 1e3)
    assert device.launched.count("place_changes_2") == 4
    assert device.launched.count("flip_elements") == 4


def test_masks_and_importances_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "is_decoded_on", lambda device, engine: engine == "cuda")
    monkeypatch.setattr(driver, "why_not", lambda: None)
    monkeypatch.setattr(pinned_loading, "open_device", shim.device_of())
    monkeypatch.setattr(device_memory, "engine_of", lambda _: get_device_engine("cuda"))
    monkeypatch.setattr(device_memory, "stream_of", lambda _: (0, 0))
    monkeypatch.setattr(device_memory, "current", nullcontext)
    monkeypatch.setattr(device_memory, "_thread", threading.local())
    golden, made = len(list(identity.golden_files(60))), len(list(inputs.files(every=60)))
    assert identity.compare_contents(20, 60, "cpu") == golden + 2 * made + 20
    monkeypatch.setattr(device_memory, "read_mask", lambda file, name, device: torch.zeros(1))
    with pytest.raises(AssertionError, match="file 0: another mask"):
        identity.compare_contents(0, 60, "cpu")


def test_codewords_are_laid_out_for_dfloat11() -> None:
    codes = {7: (1, 0b0), 9: (2, 0b10), 30: (11, 0b11000000001)}
    symbols = np.array([9, 7, 30, 7], np.uint8)
    packed, starts = peers._big_endian(symbols, codes)
    assert "".join(f"{byte:08b}" for byte in packed).rstrip("0") == "10" + "0" + "11000000001"
    assert starts.tolist() == [0, 2, 3, 14]


@pytest.mark.parametrize("peer", peers.PEERS)
def test_peers_that_are_not_installed_are_reported(peer: str) -> None:
    with pytest.raises(peers.Missing, match="not installed"):
        peers.PEERS[peer](128)


# --------------------------------------------------------------------------------------------- the report


def fails() -> None:
    raise RuntimeError("broken")


def is_missing() -> None:
    raise peers.Missing("not installed: x")


def test_a_failed_part_is_recorded_and_the_others_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = check.Report(tmp_path / "sub" / "device", FACTS, 100)
    report.run("copy rate", lambda: 4e12)
    report.run("peer: X", is_missing)
    assert not report.failed
    report.run("bad", fails)
    first = json.loads((tmp_path / "sub" / "device.json").read_text())
    assert [part["name"] for part in first["parts"]] == ["copy rate", "peer: X", "bad"]
    report.run("good", lambda: {"n": 3})
    parts = json.loads((tmp_path / "sub" / "device.json").read_text())["parts"]
    assert parts[2]["failure"] == "RuntimeError: broken"
    assert parts[3]["result"] == {"n": 3}
    assert report.failed
    page = (tmp_path / "sub" / "device.md").read_text()
    assert "* bad: FAILED: RuntimeError: broken" in page
    assert "* peer: X: not there: not installed: x" in page
    assert "4.00 TB/s" in page
    assert "bad (0.0 s)" in capsys.readouterr().out


def test_no_part_starts_after_the_time_limit(tmp_path: Path) -> None:
    report = check.Report(tmp_path / "device", FACTS, 0)
    report.run("late", fails)
    assert report.parts[0]["failure"] == "the time limit was reached"
    assert report.failed


def decoded(share: float, made: float) -> dict[str, Any]:
    return {
        "kernel": "k",
        "bits_a_weight": 2.5,
        "ms": 0.5,
        "floor_ms": 0.25,
        "share_of_floor": share,
        "weights_a_second": made / 2,
        "output_bytes_a_second": made,
    }


def test_the_page_states_which_targets_are_reached() -> None:
    product = {
        "batch": 1,
        "bits_a_weight": 3.0,
        "ms": 0.01,
        "dense_ms": 0.03,
        "times_as_fast": 3.0,
        "share_of_floor": 0.4,
    }
    parts: list[dict[str, Any]] = [
        {"name": "decoding: BF16, preset gpu", "result": decoded(0.6, 2e12)},
        {"name": "decoding: BF16, 50 % pruned, 4 bits, preset gpu", "result": decoded(0.2, 1e12)},
        {"name": "peer: nvCOMP ANS, all bytes", "result": {"ms": 1.0, "made": 10**9, "stored": 1}},
        {"name": "products", "result": [product]},
        {"name": "layers", "result": [{"batch": 1, "dense_s": 0.5}]},
    ]
    page = tables(FACTS, parts)
    assert "| BF16, preset gpu: share of the floor | 0.50 | 0.60 | reached |" in page
    assert "| BF16, 50 % pruned, 4 bits, preset gpu: share of the floor | 0.35 | 0.20 | NOT REACHED |" in page
    assert "over the best of the others | 1.50 | 2.00 | reached |" in page
    assert "times as fast as the dense one | 1.50 | 3.00 | reached |" in page
    assert "| nvCOMP ANS, all bytes | | | 1.000 | | | | 1000 |" in page
    assert "* layers: batch 1, dense_s 0.5" in page
    assert "not measured" in tables(FACTS, parts[:1])


# -------------------------------------------------------------------------------------------- the command


def test_without_a_device_check_prints_the_reason_and_exits_with_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "why_not", lambda: "there is no CUDA device")
    assert check.main([]) == 2
    assert capsys.readouterr().err == "there is no CUDA device\n"


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that reports to be available, with few calls implemented."""
    monkeypatch.setattr(check, "why_not", lambda: None)
    monkeypatch.setattr(check, "CudaDevice", lambda number, stream=None: shim.HostDevice())
    monkeypatch.setattr(check, "facts_of", lambda words: FACTS)
    monkeypatch.setattr(check, "compiled", lambda arch: {"arch": arch})
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: type("Stream", (), {"cuda_stream": 0}))
    monkeypatch.setattr(identity, "compare_products", lambda device, every: [])
    monkeypatch.setattr(identity, "compare_with_reference", lambda damaged, every: 12)
    monkeypatch.setattr(identity, "compare_deltas", lambda device, blocks: blocks)
    monkeypatch.setattr(identity, "compare_contents", lambda damaged, every: 5)
    monkeypatch.setattr(identity, "compare_layers", lambda: 3)
    monkeypatch.setattr(identity, "sanitize", lambda tool, arguments, seconds: {"said": tool})
    monkeypatch.setattr(speed, "copy_rate", lambda: 4e12)
    monkeypatch.setattr(speed, "products", lambda device, rate, side: [])
    monkeypatch.setattr(speed, "decoding", lambda name, device, rate, side: decoded(1.0, 1e12))
    monkeypatch.setattr(speed, "layers", lambda side: [])
    monkeypatch.setattr(speed, "loading", lambda side: {"sfp": 1.0})
    monkeypatch.setattr(speed, "deltas", lambda name, device, rate, side: {"apply_s": 1.0})


@pytest.mark.usefixtures("pretended")
def test_all_parts_run_and_the_exit_code_reports_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check.main(["--out", str(tmp_path)]) == 0
    whole = json.loads((tmp_path / "a-device.json").read_text())
    names = [part["name"] for part in whole["parts"]]
    assert names[:8] == [
        "kernels compiled",
        "files as by the reference",
        "products as in double precision",
        "deltas as by the reference",
        "masks and importances as by the reference",
        "layers as dense ones",
        "copy rate",
        "products",
    ]
    assert names[-4:] == [f"compute-sanitizer: {tool}" for tool in identity.TOOLS]
    assert {f"peer: {name}" for name in peers.PEERS} | {f"delta: {name}" for name in speed.STEPS} < set(names)
    monkeypatch.setattr(speed, "layers", lambda side: fails())
    assert check.main(["--out", str(tmp_path), "--no-sanitizer"]) == 1
    monkeypatch.setattr(speed, "copy_rate", fails)
    assert check.main(["--out", str(tmp_path), "--no-sanitizer"]) == 1
    assert len(json.loads((tmp_path / "a-device.json").read_text())["parts"]) == 7


@pytest.mark.usefixtures("pretended")
def test_deltas_alone_are_checked_with_results_of_their_own(tmp_path: Path) -> None:
    assert check.main(["--only-deltas", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    assert path.name == "a-device-deltas.json"
    names = [part["name"] for part in json.loads(path.read_text())["parts"]]
    steps = [f"delta: {name}" for name in speed.STEPS]
    assert names == ["kernels compiled", "deltas as by the reference", "copy rate", *steps]


@pytest.mark.usefixtures("pretended")
def test_kernels_that_do_not_compile_end_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "compiled", lambda arch: fails())
    assert check.main(["--out", str(tmp_path)]) == 1
    (part,) = json.loads((tmp_path / "a-device.json").read_text())["parts"]
    assert (part["name"], "failure" in part) == ("kernels compiled", True)


def test_spilled_registers_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = {"any_1": machine.Usage(200, 0, 0), "any_2": machine.Usage(255, 8, 0)}
    monkeypatch.setattr(machine, "compile_with_usage", lambda arch: (b"", usage, ""))
    with pytest.raises(AssertionError, match="sm_90: registers are spilled in any_2"):
        check.compiled("sm_90")
    del usage["any_2"]
    assert check.compiled("sm_90") == {"arch": "sm_90", "registers": {"any_1": 200}}


def test_a_torch_without_devices_is_reported(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "why_not", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert check.main([]) == 2
    assert "finds no CUDA device" in capsys.readouterr().err


@pytest.mark.usefixtures("pretended")
def test_identity_alone_raises_on_a_difference_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--only-identity", "--out", str(tmp_path / "none")]
    assert check.main(words) == 0
    monkeypatch.setattr(identity, "compare_with_reference", lambda damaged, every: fails())
    with pytest.raises(RuntimeError, match="broken"):
        check.main(words)
    assert not (tmp_path / "none").exists()


def test_sanitiser_findings_and_timeouts_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="not installed"):
        identity.sanitize("memcheck", (), 10)
    program = tmp_path / "compute-sanitizer"
    monkeypatch.setattr(shutil, "which", lambda name: str(program))
    for script, seconds, words in (
        ("echo all well", 10.0, None),
        ("echo ERROR SUMMARY: 3 errors; exit 9", 10.0, "exit 9: ERROR SUMMARY: 3 errors"),
        ("sleep 5", 0.2, "not finished within 0 s"),
    ):
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        if words is None:
            assert identity.sanitize("memcheck", ("--only-identity",), seconds) == {"said": "all well"}
        else:
            with pytest.raises(RuntimeError, match=words):
                identity.sanitize("memcheck", (), seconds)


def test_the_command_has_help() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "kernels.tools.check", "--help"], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "--no-sanitizer" in done.stdout
