"""Torch's functions with URLs: every byte is fetched once, and requests run ahead of the decoder."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from sfpformat.torch import compress_model, load_file, load_model, parameters_on_meta, safe_open, save_model

from ..support.file_server import FileServer, serving


def network(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(384, 384) for _ in range(6)]
    return torch.nn.Sequential(torch.nn.Embedding(1000, 384), *layers)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FileServer]:
    save_model(network(), tmp_path / "m.sfp")
    with serving(tmp_path) as found:
        found.latency = 0.05
        yield found


def assert_each_byte_once(server: FileServer) -> None:
    assert all(before[1] < after[0] for before, after in pairwise(server.ranges()))


def test_a_model_is_loaded_in_two_rounds(server: FileServer) -> None:
    model = network(1)
    load_model(model, f"{server.url}/m.sfp")
    for name, tensor in network().state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert server.rounds == 2
    assert_each_byte_once(server)


def test_a_module_in_another_dtype_is_loaded_in_two_rounds(server: FileServer) -> None:
    model = network(1).double()
    load_model(model, f"{server.url}/m.sfp")
    assert torch.equal(model.state_dict()["1.weight"], network().state_dict()["1.weight"].double())
    assert server.rounds == 2
    assert_each_byte_once(server)


def test_a_model_is_compressed_from_a_url_in_two_rounds(server: FileServer) -> None:
    with parameters_on_meta():
        model = network(1)
    compress_model(model, f"{server.url}/m.sfp")
    ids = torch.arange(10)
    assert torch.equal(model(ids), network()(ids))
    assert server.rounds == 2
    assert_each_byte_once(server)


def test_slices_and_prefetched_tensors_are_on_the_device(server: FileServer) -> None:
    state = network().state_dict()
    with safe_open(f"{server.url}/m.sfp") as file:
        assert torch.equal(file.get_slice("0.weight")[5:9], state["0.weight"][5:9])
        for name, tensor in file.prefetch(["2.weight", "1.bias"]):
            assert torch.equal(tensor, state[str(name)])
    with safe_open(f"{server.url}/m.sfp", device="meta") as file:
        assert dict(file.prefetch(["1.bias"]))["1.bias"].is_meta
    assert load_file(f"{server.url}/m.sfp").keys() == state.keys()
