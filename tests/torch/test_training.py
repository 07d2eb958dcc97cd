"""Attempts to train compressed weights: each gives a warning, and intended uses give none."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any, Literal

import peft
import pytest
import torch
from torch import nn

from sfpformat import SfpWarning
from sfpformat.torch import SfpLinear, compress_model, decompress_model

from .test_files import bits


def model() -> nn.Sequential:
    """Two linear layers, the second in a submodule, and a norm."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Sequential(nn.Linear(64, 64)))


def weight_bits(net: nn.Sequential, place: int) -> bytes:
    """The bytes of a layer's weight."""
    layer: Any = net[place]
    return bits(layer.weight)


def steps(net: nn.Module, optimizer: torch.optim.Optimizer, count: int = 2) -> None:
    """Some steps of training."""
    for _ in range(count):
        net(torch.ones(2, 64)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


OPTIMIZERS: list[Callable[..., torch.optim.Optimizer]] = [torch.optim.SGD, torch.optim.AdamW]


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_an_optimizer_made_before_compression_warns_once(
    make: Callable[..., torch.optim.Optimizer],
) -> None:
    net = model()
    optimizer = make(net.parameters(), lr=0.1)
    compress_model(net)
    with pytest.warns(SfpWarning, match=r"weights of '0', '2\.0'.*do not change.*decompress_model") as told:
        steps(net, optimizer)
    assert len(told) == 1


def test_an_optimizer_that_trained_before_compression_warns() -> None:
    compress_model(model())
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    steps(net, optimizer)
    compress_model(net)
    with pytest.warns(SfpWarning, match="do not change"):
        steps(net, optimizer)


def test_an_optimizer_of_parameters_listed_before_compression_warns() -> None:
    net = model()
    listed = list(net[2].parameters())
    compress_model(net)
    with pytest.warns(SfpWarning, match=r"dense weights of '2\.0', which"):
        steps(net, torch.optim.SGD([*listed, *net[1].parameters()], lr=0.1))


def test_an_optimizer_of_all_parameters_warns_that_compressed_weights_are_frozen() -> None:
    net = model()
    compress_model(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.warns(SfpWarning, match=r"all parameters.*weights of '0', '2\.0' are compressed") as told:
        steps(net, optimizer)
    assert len(told) == 1
    copied = copy.deepcopy(net)
    decompress_model(net)
    before = weight_bits(net, 0)
    steps(net, torch.optim.SGD(net.parameters(), lr=0.1))
    assert weight_bits(net, 0) != before
    del copied


def freeze_before(net: nn.Sequential) -> None:
    net.requires_grad_(False)
    compress_model(net)
    net[1].requires_grad_(True)


def freeze_after(net: nn.Sequential) -> None:
    compress_model(net)
    net.requires_grad_(False)
    net[1].requires_grad_(True)


def freeze_one_by_one(net: nn.Sequential) -> None:
    compress_model(net)
    for parameter in net.parameters():
        parameter.requires_grad = False
    net[1].requires_grad_(True)


@pytest.mark.parametrize("freeze", [freeze_before, freeze_after, freeze_one_by_one])
def test_a_part_that_trains_beside_frozen_weights_gives_no_warning(
    freeze: Callable[[nn.Sequential], None],
) -> None:
    net = model()
    freeze(net)
    before = weight_bits(net, 1)
    steps(net, torch.optim.SGD(net.parameters(), lr=0.1))
    steps(net, torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1))
    assert weight_bits(net, 1) != before


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("first", ["compress", "adapt"])
@pytest.mark.parametrize("bias", ["none", "all"])
def test_adapters_train_without_a_warning(first: str, bias: Literal["none", "all"]) -> None:
    net: nn.Module = model()
    config = peft.LoraConfig(target_modules=["0"], bias=bias, r=2)
    if first == "compress":
        compress_model(net)
    net = peft.get_peft_model(net, config)
    if first == "adapt":
        compress_model(net)
    before = {name: bits(value) for name, value in net.named_parameters()}
    steps(net, torch.optim.SGD(net.parameters(), lr=0.1))
    assert {name: bits(value) for name, value in net.named_parameters()} != before


def test_requires_grad_warns_and_names_the_compressed_layers() -> None:
    net = model()
    net.requires_grad_(False)
    compress_model(net)
    for part, names in ((net, r"'0', '2\.0'"), (net[2], "'0'"), (copy.deepcopy(net)[2], "'0'")):
        with pytest.warns(SfpWarning, match=f"has no effect on compressed weights: {names} stay frozen"):
            assert part.requires_grad_() is part
    assert all(parameter.requires_grad for parameter in net.parameters())
    decompress_model(net)
    assert net[0].weight.requires_grad  # as for the dense model, if it had requested gradients
    assert "requires_grad_" not in net.__dict__
    net.requires_grad_(True)


def test_a_long_list_of_layers_is_shortened() -> None:
    net = nn.Sequential(*[nn.Linear(64, 64) for _ in range(9)])
    compress_model(net)
    with pytest.warns(SfpWarning, match="'0', '1', '2' and 6 more stay frozen"):
        net.requires_grad_(True)


def test_requires_grad_false_survives_decompression() -> None:
    net = model()
    compress_model(net)
    net.requires_grad_(False)
    decompress_model(net)
    assert not any(parameter.requires_grad for parameter in net.parameters())


PROGRAM = """
import torch
from torch import nn
from torch.nn.modules import module
from torch.optim import optimizer
import sfpformat.torch
hooks = lambda: [len(module._global_module_registration_hooks), len(optimizer._global_optimizer_pre_hooks)]
before = hooks()
net = nn.Sequential(nn.Linear(64, 64))
net.requires_grad_(True)
sfpformat.torch.{make}
print(before, hooks())
"""


@pytest.mark.parametrize(
    ("make", "hooks"),
    [
        ("compress_model(net)", "[1, 1]"),
        ("SfpLinear.of(net[0])", "[1, 0]"),
        ("load_file.__doc__", "[0, 0]"),
    ],
)
def test_process_wide_hooks_are_installed_with_the_first_compressed_layer(make: str, hooks: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(make=make)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[0] == f"[0, 0] {hooks}"


def test_a_layer_without_a_dense_original_gives_no_warning() -> None:
    layer = SfpLinear.of(nn.Linear(64, 64))
    net = nn.Sequential(layer, nn.LayerNorm(64))
    steps(net, torch.optim.SGD(net.parameters(), lr=0.1))
