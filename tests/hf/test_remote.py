"""Models of transformers from folders behind URLs: weights are read by ranges, ahead of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from sfpformat.errors import OptionError
from sfpformat.hf import from_pretrained, save_pretrained
from sfpformat.torch import SfpLinear

from ..io.test_remote_hub import at
from ..support.file_server import FileServer, serving
from ..support.hub_server import Hub
from .test_folders import IDS, llama

WEIGHTS = "model.sfp"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("remote-model")
    save_pretrained(llama(), path)
    assert (path / WEIGHTS).exists()
    return path


@pytest.fixture
def server(folder: Path) -> Iterator[FileServer]:
    with serving(folder) as found:
        yield found


@pytest.fixture
def memory(folder: Path) -> Iterator[str]:
    fs = fsspec.filesystem("memory")
    fs.put(str(folder) + "/", "/hub/small/", recursive=True)
    yield "memory://hub/small"
    fs.rm("/hub", recursive=True)


def assert_like_llama(model: Any) -> None:
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, llama()(IDS).logits)
    assert model.generation_config.max_new_tokens == 7


def test_a_model_is_loaded_over_http_and_each_byte_once(
    server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ranges", "http"):
        monkeypatch.setattr(f"sfpformat.io.remote.{name}.TAIL", 10_000)  # the file is small
    assert_like_llama(from_pretrained(server.url))
    weights = [one for one in server.answered if one.path == f"/{WEIGHTS}"]
    server.answered[:] = weights
    assert len(weights) <= 4
    assert all(before[1] < after[0] for before, after in pairwise(server.ranges()))


def test_a_model_is_loaded_from_a_folder_of_another_file_system(memory: str) -> None:
    model = from_pretrained(memory)
    assert_like_llama(model)
    assert model.name_or_path == memory
    compressed = from_pretrained(memory, stay_compressed=True)
    assert any(isinstance(module, SfpLinear) for module in compressed.modules())
    assert_like_llama(compressed)


def test_a_model_on_a_hub_is_loaded_at_its_commit_and_generates(folder: Path, tmp_path: Path) -> None:
    hub = Hub(tmp_path)
    commit = hub.commit("org/model", folder)
    with serving(tmp_path, hub.routes) as server:
        model = from_pretrained(at(server, "org/model@main"))
        assert_like_llama(model)
        assert torch.equal(model.generate(IDS), llama().generate(IDS))
        fetched = [one.path for one in server.answered if "/resolve/" in one.path]
        assert [path for path in fetched if commit not in path] == ["/org/model/resolve/main/config.json"]


def test_a_url_without_configuration_and_a_revision_are_refused(memory: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        from_pretrained("memory://hub")
    with pytest.raises(OptionError, match="names its revision itself"):
        from_pretrained(memory, revision="v1")
