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
from sfpformat import RemoteError
from sfpformat.numpy import load_file, save_file

from ..support.file_server import FileServer, Handler, serving
from .test_remote import ARRAYS, arrays, assert_same, sharded

OLD, NEW = "a" * 40, "b" * 40


class Hub:
    """A repository ``org/model`` with two commits, each a folder; ``main`` is one of them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.main = folder, OLD

    def routes(self, router: web.UrlDispatcher) -> None:
        router.add_get("/api/models/org/model/revision/{revision}", self._info)
        router.add_get("/api/models/org/model", self._info)
        router.add_get("/org/model/resolve/{revision}/{name}", self._file)
        router.add_get("/api/models/org/model/tree/{revision}", self._tree)

    def _commit(self, request: web.Request) -> str:
        commit = request.match_info.get("revision", "main")
        commit = self.main if commit == "main" else commit
        if not (self.folder / commit).is_dir():
            raise web.HTTPNotFound(headers={"X-Error-Code": "RevisionNotFound"})
        return commit

    async def _info(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"id": "org/model", "sha": self._commit(request), "siblings": []})

    async def _tree(self, request: web.Request) -> web.StreamResponse:
        files = (self.folder / self._commit(request)).iterdir()
        entries = [
            {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": "0"} for path in files
        ]
        return web.json_response(entries)

    async def _file(self, request: web.Request) -> web.StreamResponse:
        commit = self._commit(request)
        path = self.folder / commit / request.match_info["name"]
        if not path.exists():
            raise web.HTTPNotFound(headers={"X-Error-Code": "EntryNotFound"})
        return web.FileResponse(path, headers={"X-Repo-Commit": commit})


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    for commit, seed in ((OLD, 0), (NEW, 1)):
        (tmp_path / commit).mkdir()
        save_file(arrays(seed=seed), tmp_path / commit / "m.sfp")
    return Hub(tmp_path)


@pytest.fixture
def server(hub: Hub, tmp_path: Path) -> Iterator[FileServer]:
    with serving(tmp_path, hub.routes) as found:
        yield found


def at(server: FileServer, path: str) -> Any:
    """The file of the hub at the server. Users write ``"hf://..."``, for the hub itself."""
    fs = HfFileSystem(endpoint=server.url, token=False, skip_instance_cache=True)
    return fsspec.core.OpenFile(fs, path)


def test_a_branch_is_read_at_the_commit_that_it_had_at_opening(server: FileServer, hub: Hub) -> None:
    with sfpformat.open(at(server, "org/model/m.sfp")) as file:
        hub.main = NEW
        assert_same(file.get_tensors(), ARRAYS)
    assert_same(load_file(at(server, "org/model@main/m.sfp")), arrays(seed=1))
    assert_same(load_file(at(server, f"org/model@{OLD}/m.sfp")), ARRAYS)


def test_opening_asks_for_the_commit_and_then_for_two_ranges(server: FileServer, tmp_path: Path) -> None:
    server.latency = 0.05
    with sfpformat.open(at(server, "org/model@main/m.sfp")) as file:
        assert [one.method for one in server.answered] == ["GET", "HEAD", "GET", "GET"]
        assert server.rounds == 3
        server.answered.clear()
        assert_same(file.get_tensors(), ARRAYS)
        assert server.rounds == 1
    size = (tmp_path / OLD / "m.sfp").stat().st_size
    assert size - (130 << 10) < server.size < size


def test_a_commit_needs_no_head(server: FileServer) -> None:
    with sfpformat.open(at(server, f"org/model@{NEW}/m.sfp")):
        assert [one.method for one in server.answered] == ["GET", "GET", "GET"]


def test_shards_are_of_the_commit_of_their_index(server: FileServer, hub: Hub, tmp_path: Path) -> None:
    tensors = sharded(tmp_path / OLD)
    with sfpformat.open(at(server, "org/model/m.sfp.index.json")) as file:
        assert_same(file.get_tensors(), tensors)
    paths = [one.path for one in server.answered if "-of-00003" in one.path]
    assert len(paths) >= 6
    assert all(OLD in path for path in paths)


def test_a_repository_with_one_model_is_opened_by_its_name(server: FileServer) -> None:
    assert_same(load_file(at(server, "org/model")), ARRAYS)


def test_missing_files_and_revisions_are_named(server: FileServer) -> None:
    with pytest.raises(FileNotFoundError, match=r"org/model@main/none\.sfp"):
        sfpformat.open(at(server, "org/model@main/none.sfp"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        sfpformat.open(at(server, "org/model@nowhere/m.sfp"))


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
