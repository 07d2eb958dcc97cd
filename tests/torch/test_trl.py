"""TRL itself trains on a CPU, and a worker in another process follows its weights.

Needs TRL (``pip install trl``), which is not among the packages of CI.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from sfpformat.torch.weight_sync import DeltaWeightTransfer
from sfpformat.torch.weight_sync.trl_transfer import ServerClient, require_interface

from ..support.trl_run import STEPS, saved_model
from .test_weight_sync import Client

pytestmark = pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed")

FOLLOWER = """
import sys, time, torch
from sfpformat.torch.weight_sync import DeltaReceiver
receiver, last = DeltaReceiver(sys.argv[1]), int(sys.argv[3])
end = time.monotonic() + 200
while receiver.number < last and time.monotonic() < end:
    receiver.catch_up(sys.argv[2])
    time.sleep(0.05)
torch.save(dict(receiver.tensors), sys.argv[4])
"""


def test_workers_follow_the_trainers_of_trl(tmp_path: Path) -> None:
    model = saved_model(tmp_path)
    workers = {}
    for name, last in (
        ("sft", STEPS),
        ("grpo", STEPS + 1),
    ):  # AsyncGRPOTrainer also sends before the first step
        (tmp_path / name).mkdir()
        words = [str(model), str(tmp_path / name), str(last), str(tmp_path / f"{name}-received.pt")]
        workers[name] = subprocess.Popen([sys.executable, "-c", FOLLOWER, *words])
    try:
        done = subprocess.run(
            [sys.executable, "-m", "tests.support.trl_run", str(tmp_path)],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        assert done.returncode == 0, done.stderr
        for worker in workers.values():
            assert worker.wait(timeout=200) == 0
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    for name in workers:
        trained, received = torch.load(tmp_path / f"{name}.pt"), torch.load(tmp_path / f"{name}-received.pt")
        assert trained.keys() == received.keys()
        assert all(torch.equal(received[each], trained[each]) for each in trained)
    found = json.loads((tmp_path / "sent.json").read_text())
    assert [(number, whole) for number, whole, _ in found["sft"]] == [(i + 1, False) for i in range(STEPS)]
    assert found["versions"] == list(range(1, STEPS + 2))


def test_the_protocols_of_trl_are_those_of_the_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.async_grpo.async_grpo_trainer import WeightTransferProtocol
    from trl.experimental.async_grpo.vllm_client import VLLMClient

    require_interface()
    for name, method in vars(WeightTransferProtocol).items():
        if callable(method) and not name.startswith("_"):
            mine = inspect.signature(getattr(DeltaWeightTransfer, name)).parameters
            assert list(mine) == list(inspect.signature(method).parameters), name
    for name, method in vars(ServerClient).items():
        if callable(method) and not name.startswith("_"):
            theirs = inspect.signature(getattr(VLLMClient, name)).parameters
            assert set(inspect.signature(method).parameters) <= set(theirs), name
            stand_in = inspect.signature(getattr(Client, name)).parameters
            assert list(stand_in) == list(theirs), name
