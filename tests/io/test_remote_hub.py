"""Files of repositories of the Hugging Face hub, by huggingface_hub and a server with the hub's interface."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from aiohttp import web
from huggingface_hub import HfFileSystem

import sfpformat
from sfpformat import OptionError, RemoteError
from sfpformat.numpy import load_file, save_file

from ..support.file_server import FileServer, Handler, serving
from ..support.hub_server import STRANGER, TOKEN, Hub
from .test_remote import ARRAYS, arrays, assert_same, sharded

MODEL = "org/model"


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    """A hub with a model of two commits, of which ``main`` is the older one."""
    (tmp_path / "hub").mkdir()
    hub = Hub(tmp_path / "hub")
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        save_file(arrays(seed=seed), tmp_path / str(seed) / "m.sfp")
        hub.commit(MODEL, tmp_path / str(seed))
    hub.repositories[MODEL].refs["main"] = commits(hub)[0]
    return hub


def commits(hub: Hub) -> list[str]:
    """The commits of the model, the oldest first."""
    return list(hub.repositories[MODEL].commits)


@pytest.fixture
def server(hub: Hub, tmp_path: Path) -> Iterator[FileServer]:
    with serving(tmp_path, hub.routes) as found:
        yield found


def at(server: FileServer, path: str, token: str | bool = False) -> Any:
    """The file of the hub at the server. Users write ``"hf://..."``, for the hub itself."""
    fs = HfFileSystem(endpoint=server.url, token=token, skip_instance_cache=True)
    return fsspec.core.OpenFile(fs, path)


def test_a_branch_is_read_at_the_commit_that_it_had_at_opening(server: FileServer, hub: Hub) -> None:
    with sfpformat.open(at(server, "org/model/m.sfp")) as file:
        hub.repositories[MODEL].refs["main"] = commits(hub)[1]
        assert_same(file.get_tensors(), ARRAYS)
    assert_same(load_file(at(server, "org/model@main/m.sfp")), arrays(seed=1))
    assert_same(load_file(at(server, f"org/model@{commits(hub)[0]}/m.sfp")), ARRAYS)


def test_opening_asks_for_the_commit_and_then_for_two_ranges(server: FileServer, tmp_path: Path) -> None:
    server.latency = 0.05
    with sfpformat.open(at(server, "org/model@main/m.sfp")) as file:
        assert [one.method for one in server.answered] == ["GET", "HEAD", "GET", "GET"]
        assert server.rounds == 3
        server.answered.clear()
        assert_same(file.get_tensors(), ARRAYS)
        assert server.rounds == 1
    size = (tmp_path / "0" / "m.sfp").stat().st_size
    assert size - (130 << 10) < server.size < size


def test_a_commit_needs_no_head(server: FileServer, hub: Hub) -> None:
    with sfpformat.open(at(server, f"org/model@{commits(hub)[1]}/m.sfp")):
        assert [one.method for one in server.answered] == ["GET", "GET", "GET"]


def test_shards_are_of_the_commit_of_their_index(server: FileServer, hub: Hub, tmp_path: Path) -> None:
    tensors = sharded(tmp_path / "0")
    commit = hub.commit(MODEL, tmp_path / "0")
    with sfpformat.open(at(server, "org/model/m.sfp.index.json")) as file:
        assert_same(file.get_tensors(), tensors)
    paths = [one.path for one in server.answered if "-of-00003" in one.path]
    assert len(paths) >= 6
    assert all(commit in path for path in paths)


def test_a_repository_with_one_model_is_opened_by_its_name(server: FileServer) -> None:
    assert_same(load_file(at(server, "org/model")), ARRAYS)


def test_missing_files_and_revisions_are_named(server: FileServer) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file at this revision.*org/model@main/none\.sfp"):
        sfpformat.open(at(server, "org/model@main/none.sfp"))
    with pytest.raises(FileNotFoundError, match=r"no such revision.*nowhere"):
        sfpformat.open(at(server, "org/model@nowhere/m.sfp"))


@pytest.mark.parametrize(
    ("name", "token", "kind", "words"),
    [
        (MODEL, False, PermissionError, r"is private: log in \('hf auth login', or the variable HF_TOKEN\)"),
        (MODEL, "hf_wrong", PermissionError, "the hub does not know the token"),
        (MODEL, STRANGER, FileNotFoundError, "no such repository, or the token has no access to it"),
        ("org/none", False, PermissionError, "there is no such repository, or it is private"),
        ("org/none", TOKEN, FileNotFoundError, "no such repository"),
    ],
)
def test_repositories_without_access_say_how_to_log_in(
    server: FileServer, hub: Hub, name: str, token: str | bool, kind: type[OSError], words: str
) -> None:
    hub.repositories[MODEL].private = True
    for path in (name, f"{name}/m.sfp", f"{name}@main/m.sfp"):
        with pytest.raises(kind, match=words):
            sfpformat.open(at(server, path, token))
    assert_same(load_file(at(server, f"{MODEL}/m.sfp", TOKEN)), ARRAYS)


@pytest.mark.parametrize("url", ["hf://", "hf://organisation"])
def test_a_url_without_a_repository_is_refused(url: str) -> None:
    with pytest.raises(OptionError, match="names no repository: hf://organisation/name"):
        sfpformat.open(url)


@pytest.mark.parametrize(("status", "kind"), [(403, PermissionError), (200, RemoteError)])
def test_a_hub_that_refuses_or_ignores_ranges_is_an_error(
    server: FileServer, tmp_path: Path, status: int, kind: type[OSError]
) -> None:
    async def instead(request: web.Request, handler: Handler) -> web.StreamResponse:
        if "Range" not in request.headers:
            return await handler(request)
        return web.Response(status=status, body=b"everything")

    server.instead = instead
    with pytest.raises(kind, match=r"m\.sfp"):
        sfpformat.open(at(server, "org/model/m.sfp"))


def test_the_url_of_the_hub_needs_its_package() -> None:
    code = "import sys; sys.modules['huggingface_hub'] = None; import sfpformat; sfpformat.open('hf://a/b/m.sfp')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "OptionError: hf:// cannot be read" in run.stderr
    assert "pip install 'sfpformat[hub]'" in run.stderr
