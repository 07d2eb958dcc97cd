"""A server with the interface of the Hugging Face hub, for the client huggingface_hub itself.

It creates repositories, takes commits (plain files, and large ones by Git LFS), and serves revisions, trees
and files, with the headers and error codes that huggingface_hub 2.4 reads. Large files are redirected to
another host name, like those of the hub, which refuses a request with a token. Not served: Xet storage
(clients set ``HF_HUB_DISABLE_XET=1``), pull requests, data sets and spaces.

A command runs it: ``python -m tests.support.hub_server FOLDER`` prints the address, and serves until its
standard input ends.
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from .file_server import FileServer, serving

TOKEN = "hf_reader_and_writer"  # of a user with access to all repositories
STRANGER = "hf_stranger"  # of a user without access to private repositories
# Larger files, and those that are no text, are stored by LFS. The hub's own rule is not public.
_LARGE = 10_000_000


@dataclass(frozen=True)
class Blob:
    """A file: its SHA-256, its size in bytes, whether it is stored by LFS."""

    sha256: str
    size: int
    large: bool

    @property
    def oid(self) -> str:
        """The name that trees give to the file. That of the hub is Git's SHA-1."""
        return self.sha256[:40]


@dataclass
class Repository:
    """A repository: whether a token is needed, its commits (path -> file), and its branches and tags."""

    private: bool = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)


class Hub:
    """The repositories, and the routes of their server. Contents of files lie in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.repositories: dict[str, Repository] = {}

    def store(self, data: bytes, *, large: bool) -> Blob:
        """Stores the content of a file."""
        sha256 = hashlib.sha256(data).hexdigest()
        (self.folder / sha256).write_bytes(data)
        return Blob(sha256, len(data), large)

    def commit(
        self, name: str, files: Path | dict[str, Blob], deleted: Iterable[str] = (), branch: str = "main"
    ) -> str:
        """Adds a commit to a repository, which is created if there is none. Returns the commit.

        Args:
            name: such as ``"organisation/model"``.
            files: the new files, or a folder whose files all become plain files.
            deleted: paths of files or folders that are removed first.
            branch: the branch that moves.
        """
        repository = self.repositories.setdefault(name, Repository())
        if isinstance(files, Path):
            files = {
                path.relative_to(files).as_posix(): self.store(path.read_bytes(), large=False)
                for path in files.rglob("*")
                if path.is_file()
            }
        before = repository.refs.get(branch, "")
        kept = {
            path: blob
            for path, blob in repository.commits.get(before, {}).items()
            if not any(path == one or path.startswith(one.rstrip("/") + "/") for one in deleted)
        }
        tree = {**kept, **files}
        words = json.dumps([before, sorted((path, blob.sha256) for path, blob in tree.items())])
        commit = hashlib.sha1(words.encode()).hexdigest()
        repository.commits[commit] = tree
        repository.refs[branch] = commit
        return commit

    def routes(self, router: web.UrlDispatcher) -> None:
        """Adds the routes of the hub."""
        model = "/api/models/{space}/{name}"
        router.add_post("/api/repos/create", self._create)
        router.add_post("/api/validate-yaml", self._validate_yaml)
        router.add_get(model, self._info)
        router.add_get(model + "/revision/{revision}", self._info)
        router.add_get(model + "/tree/{revision}", self._tree)
        router.add_get(model + "/tree/{revision}/{path:.+}", self._tree)
        router.add_post(model + "/paths-info/{revision}", self._paths_info)
        router.add_post(model + "/preupload/{revision}", self._preupload)
        router.add_post(model + "/commit/{revision}", self._commit)
        router.add_post(model + "/tag/{revision}", self._tag)
        router.add_post("/{space}/{name}.git/info/lfs/objects/batch", self._batch)
        router.add_put("/lfs/{sha256}", self._put)
        router.add_get("/lfs/{sha256}", self._large_file)
        router.add_get("/{space}/{name}/resolve/{revision}/{path:.+}", self._file)

    # ----------------------------------------------------------------------------------------- access

    def _repository(self, request: web.Request, *, write: bool = False) -> Repository:
        """Returns the repository of a request, or raises the hub's answer: 401 also hides what is missing."""
        found = self.repositories.get(f"{request.match_info['space']}/{request.match_info['name']}")
        token = _token(request)
        if token not in (None, TOKEN, STRANGER):
            raise _refused(401, "", "Invalid credentials in Authorization header")
        if found is None or (found.private and token != TOKEN):
            if token is None:
                raise _refused(401, "", "Invalid username or password.")
            raise _refused(404, "RepoNotFound", "Repository not found")
        if write and token != TOKEN:
            raise _refused(403, "", "You don't have the rights to write")
        return found

    def _at(self, request: web.Request) -> tuple[str, dict[str, Blob]]:
        """Returns the commit of a request's revision, and its files."""
        repository = self._repository(request)
        revision = request.match_info.get("revision", "main")
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            raise _refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, repository.commits[commit]

    # ---------------------------------------------------------------------------------------- reading

    async def _info(self, request: web.Request) -> web.StreamResponse:
        name = f"{request.match_info['space']}/{request.match_info['name']}"
        commit, files = self._at(request)
        siblings = [{"rfilename": path} for path in sorted(files)]
        private = self.repositories[name].private
        return web.json_response({"id": name, "sha": commit, "private": private, "siblings": siblings})

    async def _tree(self, request: web.Request) -> web.StreamResponse:
        _, files = self._at(request)
        under = request.match_info.get("path", "").strip("/")
        start = f"{under}/" if under else ""
        inside = {path: blob for path, blob in files.items() if path.startswith(start)}
        if under and not inside:
            raise _refused(404, "EntryNotFound", f"{under} does not exist")
        entries = []
        folders: set[str] = set()
        for path, blob in sorted(inside.items()):
            parts = path.removeprefix(start).split("/")
            folders.update(start + "/".join(parts[:end]) for end in range(1, len(parts)))
            if len(parts) == 1 or request.query.get("recursive", "").lower() == "true":
                entries.append(_entry(path, blob))
        entries += [{"type": "directory", "path": path, "oid": "0" * 40} for path in sorted(folders)]
        return web.json_response(entries)

    async def _paths_info(self, request: web.Request) -> web.StreamResponse:
        _, files = self._at(request)
        given = await request.post() if request.content_type.endswith("urlencoded") else None
        paths = [str(path) for path in given.getall("paths")] if given else (await request.json())["paths"]
        found = [_entry(path, files[path]) for path in paths if path in files]
        for path in paths:
            if any(one.startswith(path + "/") for one in files):
                found.append({"type": "directory", "path": path, "oid": "0" * 40})
        return web.json_response(found)

    async def _file(self, request: web.Request) -> web.StreamResponse:
        commit, files = self._at(request)
        headers = {"X-Repo-Commit": commit}
        blob = files.get(request.match_info["path"])
        if blob is None:
            raise _refused(404, "EntryNotFound", "Entry not found", headers)
        if not blob.large:
            return _plain(self.folder / blob.sha256, {**headers, "ETag": f'"{blob.oid}"'})
        headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size)}
        raise web.HTTPFound(f"http://localhost:{request.url.port}/lfs/{blob.sha256}", headers=headers)

    async def _large_file(self, request: web.Request) -> web.StreamResponse:
        if "Authorization" in request.headers:
            raise _refused(400, "", "Only one auth mechanism is allowed")  # that of S3
        sha256 = request.match_info["sha256"]
        return _plain(self.folder / sha256, {"ETag": f'"{sha256}"'})

    # ---------------------------------------------------------------------------------------- writing

    async def _create(self, request: web.Request) -> web.StreamResponse:
        words = await request.json()
        if _token(request) != TOKEN:
            raise _refused(401, "", "Invalid username or password.")
        name = f"{words['organization']}/{words['name']}"
        url = f"{request.url.origin()}/{name}"
        if name in self.repositories:
            return web.json_response({"error": "You already created this model repo", "url": url}, status=409)
        self.commit(name, {".gitattributes": self.store(b"*.sfp filter=lfs\n", large=False)})
        self.repositories[name].private = words.get("visibility") == "private"
        return web.json_response({"url": url})

    async def _validate_yaml(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"errors": [], "warnings": []})

    async def _preupload(self, request: web.Request) -> web.StreamResponse:
        self._repository(request, write=True)
        _, files = self._at(request)
        answers = []
        for file in (await request.json())["files"]:
            large = file["size"] > _LARGE or 0 in base64.b64decode(file["sample"])
            old = files.get(file["path"])
            answers.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": False,
                    "oid": old.sha256 if old is not None and old.large else None,
                }
            )
        return web.json_response({"files": answers})

    async def _batch(self, request: web.Request) -> web.StreamResponse:
        self._repository(request, write=True)
        objects: list[dict[str, Any]] = (await request.json())["objects"]
        for one in objects:
            if not (self.folder / one["oid"]).exists():
                one["actions"] = {"upload": {"href": f"{request.url.origin()}/lfs/{one['oid']}"}}
        return web.json_response({"transfer": "basic", "objects": objects})

    async def _put(self, request: web.Request) -> web.StreamResponse:
        data, sha256 = await request.read(), request.match_info["sha256"]
        if self.store(data, large=True).sha256 != sha256:
            raise _refused(400, "", "the content is not that of the SHA-256")
        return web.Response()

    async def _commit(self, request: web.Request) -> web.StreamResponse:
        self._repository(request, write=True)
        files, deleted = {}, []
        for line in (await request.read()).splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "file":
                files[value["path"]] = self.store(base64.b64decode(value["content"]), large=False)
            elif key == "lfsFile":
                if not (self.folder / value["oid"]).exists():
                    raise _refused(400, "", f"{value['path']} was not uploaded")
                files[value["path"]] = Blob(value["oid"], value["size"], large=True)
            elif key in ("deletedFile", "deletedFolder"):
                deleted.append(value["path"])
        name = f"{request.match_info['space']}/{request.match_info['name']}"
        commit = self.commit(name, files, deleted, request.match_info["revision"])
        url = f"{request.url.origin()}/{name}/commit/{commit}"
        return web.json_response({"success": True, "commitOid": commit, "commitUrl": url})

    async def _tag(self, request: web.Request) -> web.StreamResponse:
        repository = self._repository(request, write=True)
        commit, _ = self._at(request)
        repository.refs[(await request.json())["tag"]] = commit
        return web.Response(status=201)


def _token(request: web.Request) -> str | None:
    given = request.headers.get("Authorization")
    return None if given is None else given.removeprefix("Bearer ")


def _entry(path: str, blob: Blob) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": blob.size, "oid": blob.oid}
    if blob.large:
        entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 134}
    return entry


def _plain(path: Path, headers: dict[str, str]) -> web.StreamResponse:
    if not path.exists():
        raise _refused(404, "", "no such object")
    return web.FileResponse(path, headers={**headers, "Content-Type": "application/octet-stream"})


def _refused(
    status: int, code: str, message: str, headers: dict[str, str] | None = None
) -> web.HTTPException:
    """Returns an answer of the hub that refuses a request."""
    answer = web.HTTPException(text=json.dumps({"error": message}), content_type="application/json")
    answer.set_status(status)
    answer.headers.update({**(headers or {}), "X-Error-Message": message})
    if code:
        answer.headers["X-Error-Code"] = code
    return answer


def settings(server: FileServer, cache: Path, token: str | None = None) -> dict[str, str]:
    """Returns environment variables for a process that uses the server in place of the hub.

    Args:
        server: the server.
        cache: the folder that replaces ``~/.cache/huggingface``.
        token: the token of the user; None stands for no user.
    """
    return {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_OFFLINE": "0",
        "TRANSFORMERS_OFFLINE": "0",
        "HF_TOKEN": token or "",  # replaces one of the environment
    }


def main() -> None:
    """Runs the command."""
    folder = Path(sys.argv[1])
    hub = Hub(folder)
    with serving(folder, hub.routes) as server:
        print(server.url, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
