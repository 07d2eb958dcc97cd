"""The processor's time of a call of a layer that multiplies on a GPU, without its kernel.

``python -m tests.figures.layer_calls`` prepares a small matrix on a simulated device, makes launches do
nothing, and measures calls beside those of a dense layer on the CPU, whose time includes the product (128
columns, 64 rows). On a GPU, the launch, torch's current stream and the change of the device come on top.
"""

from __future__ import annotations

import statistics
import time
from contextlib import nullcontext
from unittest.mock import patch

import torch
from torch import nn

from kernels.tools import shim
from sfpformat import PRESETS, Table
from sfpformat.engines import get_device_engine
from sfpformat.engines.cuda import driver, pinned_loading
from sfpformat.torch import SfpLinear, device_memory, operators, resident_weight

CALLS, ROUNDS = 2_000, 11


def microseconds(layers: dict[str, nn.Module], x: torch.Tensor) -> dict[str, list[float]]:
    """Returns microseconds of processor time per call, for each layer and round."""
    found: dict[str, list[float]] = {name: [] for name in layers}
    for _ in range(ROUNDS):
        for name, layer in layers.items():
            begun = time.process_time()
            for _ in range(CALLS):
                layer(x)
            found[name].append((time.process_time() - begun) / CALLS * 1e6)
    return found


def main() -> None:
    """The command."""
    torch.set_num_threads(1)
    devices: list[shim.HostDevice] = []

    def opening(number: int, stream: int | None) -> shim.HostDevice:
        devices.append(shim.HostDevice(at_once=True))
        return devices[-1]

    dense = nn.Linear(128, 64, bias=False, dtype=torch.bfloat16)
    layer = SfpLinear.of(dense, PRESETS["fused"].but(quantiser=Table(centroids=8)))
    x = torch.randn(1, 128, dtype=torch.bfloat16)
    with (
        torch.no_grad(),
        patch.object(driver, "why_not", lambda: None),
        patch.object(pinned_loading, "open_device", opening),
        patch.object(device_memory, "engine_of", lambda device: get_device_engine("cuda")),
        patch.object(device_memory, "stream_of", lambda device: (0, 0)),
        patch.object(device_memory, "current", nullcontext),
        patch.object(operators, "is_decoded_on", lambda device, engine: True),
        patch.object(resident_weight, "capability_of", lambda device: (9, 0)),
    ):
        layer(x)
        assert devices[-1].launched[-1] == "multiply_bf16"
        with patch.object(shim.HostDevice, "launch", lambda *arguments: None):
            found = microseconds({"compressed, without its kernel": layer, "dense, on the CPU": dense}, x)
    for name, times in found.items():
        print(f"{name}: {statistics.median(times):.1f} µs ({min(times):.1f} to {max(times):.1f})")


if __name__ == "__main__":
    main()
