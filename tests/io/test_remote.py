"""Files behind URLs: a real server of HTTP, and ``memory://``. Requests and bytes are counted."""

from __future__ import annotations

import asyncio
import pickle
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from aiohttp import web
from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
from numpy.typing import NDArray

import sfpformat
from sfpformat import ClosedFileError, InvalidFileError, OptionError, RemoteError, SfpFile
from sfpformat.cli import main
from sfpformat.container.preamble import SIZE
from sfpformat.decode.shard_index import ShardIndex
from sfpformat.decode.shards import ShardedFile
from sfpformat.io.remote.ahead import MOST_BLOCK, Progress
from sfpformat.io.remote.ranges import TAIL
from sfpformat.numpy import load_file, save_file

from ..support.file_server import FileServer, Handler, serving

Arrays = dict[str, NDArray[Any]]
Capture = pytest.CaptureFixture[str]


def arrays(count: int = 6, size: int = 512, seed: int = 0) -> Arrays:
    """Pruned matrices of `size` x `size`, and vectors."""
    rng = np.random.default_rng(seed)
    out: Arrays = {}
    for i in range(count):
        weights = rng.standard_normal((size, size)).astype(np.float32)
        out[f"layer.{i}.weight"] = np.where(rng.random((size, size)) < 0.5, np.float32(0), weights)
        out[f"layer.{i}.bias"] = rng.standard_normal(size).astype(np.float32)
    return out


ARRAYS = arrays()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("remote")
    save_file(ARRAYS, path / "m.sfp", {"who": "me"})
    return path


@pytest.fixture
def server(folder: Path) -> Iterator[FileServer]:
    with serving(folder) as found:
        yield found


@pytest.fixture
def own(tmp_path: Path) -> Iterator[FileServer]:
    """A server of a folder that the test changes."""
    with serving(tmp_path) as found:
        yield found


def assert_same(found: Any, expected: Any) -> None:
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert np.array_equal(found[name], array)


def chunks_of(path: Path, name: str, number: int) -> tuple[int, int]:
    """The first and the last byte of a chunk."""
    with SfpFile(path) as file:
        entry = file.entry(name)
        start = file.chunk_offset(entry, number)
        return start, start + int(entry.chunks["length"][number]) - 1


# ------------------------------------------------------------------------------- the budget of requests


def test_opening_takes_one_round_of_two_requests_and_128_kib(server: FileServer, folder: Path) -> None:
    server.latency = 0.05
    with sfpformat.open(f"{server.url}/m.sfp") as file:
        assert file.keys() == list(ARRAYS)
        assert file.metadata() == {"who": "me"}
    assert [one.range for one in server.answered] in (
        ["bytes=0-63", f"bytes=-{TAIL}"],
        [f"bytes=-{TAIL}", "bytes=0-63"],
    )
    assert server.rounds == 1
    assert server.size == SIZE + TAIL


def test_a_directory_longer_than_the_tail_takes_a_second_round(own: FileServer, tmp_path: Path) -> None:
    many = {f"a.rather.long.name.of.a.tensor.{i}": np.full(1, i, np.float32) for i in range(4000)}
    save_file(many, tmp_path / "m.sfp")
    with SfpFile(tmp_path / "m.sfp") as local:
        preamble = local.preamble
    assert preamble.directory_length > TAIL
    own.latency = 0.05
    with sfpformat.open(f"{own.url}/m.sfp") as file:
        assert len(file) == 4000
        assert own.rounds == 2
        assert len(own.answered) == 3
        assert own.size == SIZE + preamble.directory_length


def test_a_slice_takes_one_request_for_its_chunk(server: FileServer, folder: Path) -> None:
    with sfpformat.open(f"{server.url}/m.sfp") as file:
        server.answered.clear()
        part = file.get_slice("layer.2.weight")[7:9, 3:200]
    assert np.array_equal(part, ARRAYS["layer.2.weight"][7:9, 3:200])
    assert server.ranges() == [chunks_of(folder / "m.sfp", "layer.2.weight", 0)]


def test_a_scattered_slice_fetches_its_chunks_concurrently(own: FileServer, tmp_path: Path) -> None:
    tensor = arrays(1, 2048)["layer.0.weight"]
    save_file({"w": tensor}, tmp_path / "m.sfp")
    own.latency = 0.05
    with sfpformat.open(f"{own.url}/m.sfp") as file:
        assert len(file.entry("w").chunks) > 4
        own.answered.clear()
        assert np.array_equal(file.get_slice("w")[::900], tensor[::900])
    assert own.rounds == 1
    assert own.size < (tmp_path / "m.sfp").stat().st_size


def test_loading_all_tensors_fetches_every_byte_once_and_in_one_round(
    server: FileServer, folder: Path
) -> None:
    server.latency = 0.05
    assert_same(load_file(f"{server.url}/m.sfp"), ARRAYS)
    size = (folder / "m.sfp").stat().st_size
    assert server.size == size
    assert server.rounds == 2
    ends = server.ranges()
    assert all(before[1] < after[0] for before, after in pairwise(ends))
    assert all(last - first < MOST_BLOCK for first, last in ends)


def test_a_small_file_is_read_from_the_bytes_of_opening(own: FileServer, tmp_path: Path) -> None:
    small: Arrays = {"a": np.arange(10, dtype=np.int64), "b": np.ones((3, 3), np.float32)}
    save_file(small, tmp_path / "m.sfp")
    assert_same(load_file(f"{own.url}/m.sfp"), small)
    assert len(own.answered) == 2


def test_survivors_masks_and_metadata_are_those_of_the_local_file(server: FileServer, folder: Path) -> None:
    name = "layer.1.weight"
    with sfpformat.open(f"{server.url}/m.sfp") as file, sfpformat.open(folder / "m.sfp") as local:
        assert np.array_equal(file.get_mask(name), local.get_mask(name))
        for found, expected in zip(file.get_survivors(name), local.get_survivors(name), strict=True):
            assert np.array_equal(found, expected)
        assert file.info(name) == local.info(name)
        out = np.empty_like(ARRAYS[name])
        file.read_into({name: out})
        assert np.array_equal(out, ARRAYS[name])
        assert sfpformat.validate(f"{server.url}/m.sfp").canonical


# ------------------------------------------------------------------------------------ shards, pickles


def sharded(folder: Path, shards: int = 3) -> Arrays:
    """Writes a model in shards, m.sfp.index.json."""
    tensors = arrays(shards)
    weight_map = {name: f"m-{int(name.split('.')[1]) + 1:05d}-of-{shards:05d}.sfp" for name in tensors}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / "m.sfp.index.json").write_bytes(ShardIndex(weight_map, {}).to_bytes())
    return tensors


def test_shards_are_opened_in_one_round_and_read_ahead_together(own: FileServer, tmp_path: Path) -> None:
    tensors = sharded(tmp_path)
    own.latency = 0.1
    with sfpformat.open(f"{own.url}/m.sfp.index.json") as file:
        assert isinstance(file, ShardedFile)
        assert own.rounds == 2  # the index, the shards
        own.answered.clear()
        assert_same(file.get_tensors(), tensors)
        assert own.rounds == 1
        assert np.array_equal(
            pickle.loads(pickle.dumps(file)).get_tensor("layer.1.bias"), tensors["layer.1.bias"]
        )


def test_a_missing_shard_is_named(own: FileServer, tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "m-00002-of-00003.sfp").unlink()
    with pytest.raises(FileNotFoundError, match="m-00002-of-00003"):
        sfpformat.open(f"{own.url}/m.sfp.index.json")


def test_an_open_file_is_pickled_with_its_url(server: FileServer) -> None:
    with sfpformat.open(f"{server.url}/m.sfp") as file:
        part = pickle.loads(pickle.dumps(file.get_slice("layer.0.bias")))
        assert np.array_equal(part[:9], ARRAYS["layer.0.bias"][:9])
    with pytest.raises(ClosedFileError):
        pickle.dumps(file)
    with pytest.raises(ClosedFileError):
        file.get_tensor("layer.0.weight")


def test_a_delta_and_its_base_may_be_urls(own: FileServer, tmp_path: Path) -> None:
    new = {name: array.copy() for name, array in ARRAYS.items()}
    new["layer.3.weight"][5, :100] += 1
    save_file(ARRAYS, tmp_path / "base.sfp")
    sfpformat.write_delta(tmp_path / "delta.sfp", ARRAYS, new)
    with sfpformat.open(f"{own.url}/delta.sfp", base=f"{own.url}/base.sfp") as result:
        assert_same(result.get_tensors(), new)
    with pytest.raises(OptionError, match="is a delta"):
        sfpformat.open(f"{own.url}/delta.sfp")


# -------------------------------------------------------------------------------- servers that misbehave


def body(path: Path, change: Any) -> Any:
    """Answers ranges with explicit starts by (status, headers, body) = change(data, first, last)."""

    async def instead(request: web.Request, handler: Handler) -> web.StreamResponse:
        wanted = request.headers["Range"].removeprefix("bytes=")
        if wanted.startswith("-") or wanted == "0-63":
            return await handler(request)
        first, last = map(int, wanted.split("-"))
        status, extra, data = change(path.read_bytes(), first, last)
        return web.Response(status=status, headers=extra, body=data)

    return instead


def content_range(data: bytes, first: int, last: int) -> dict[str, str]:
    return {"Content-Range": f"bytes {first}-{last}/{len(data)}"}


def test_a_server_that_ignores_ranges_is_refused_before_the_file_is_sent(
    server: FileServer, folder: Path
) -> None:
    async def instead(request: web.Request, handler: Handler) -> web.StreamResponse:
        return web.Response(body=(folder / "m.sfp").read_bytes())

    server.instead = instead
    with pytest.raises(RemoteError, match="ignores ranges"):
        sfpformat.open(f"{server.url}/m.sfp")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data, first, last: (200, {}, data), "ignores ranges"),
        (
            lambda data, first, last: (206, content_range(data, first, last), data[first:last]),
            "only .* of .* bytes",
        ),
        (
            lambda data, first, last: (206, content_range(data, first, last - 9), data[first : last - 8]),
            "answers bytes",
        ),
        (
            lambda data, first, last: (206, content_range(data, first, last), data[first : last + 9]),
            "ignores ranges",
        ),
        (lambda data, first, last: (206, {}, data[first : last + 1]), "does not state the range"),
        (lambda data, first, last: (500, {}, b"no"), "answers 500"),
        (lambda data, first, last: (416, {"Content-Range": "bytes */70"}, b""), "has changed"),
        (lambda data, first, last: (412, {}, b""), "has changed"),
        (
            lambda data, first, last: (
                206,
                content_range(data + b"more", first, last),
                data[first : last + 1],
            ),
            "another length",
        ),
        (
            lambda data, first, last: (
                206,
                {**content_range(data, first, last), "ETag": '"other"'},
                data[first : last + 1],
            ),
            "another ETag",
        ),
        (
            lambda data, first, last: (
                206,
                {**content_range(data, first, last), "Content-Encoding": "gzip"},
                data[first : last + 1],
            ),
            "compresses",
        ),
    ],
)
def test_wrong_answers_are_errors_that_name_the_file(
    server: FileServer, folder: Path, change: Any, words: str
) -> None:
    with sfpformat.open(f"{server.url}/m.sfp") as file:
        server.instead = body(folder / "m.sfp", change)
        with pytest.raises(RemoteError, match=words) as caught:
            file.get_tensor("layer.0.weight")
        assert "/m.sfp" in str(caught.value)
        server.instead = None
        assert np.array_equal(file.get_tensor("layer.0.weight"), ARRAYS["layer.0.weight"])


def test_a_file_that_is_replaced_is_refused_by_its_etag(own: FileServer, tmp_path: Path) -> None:
    save_file(ARRAYS, tmp_path / "m.sfp")
    with sfpformat.open(f"{own.url}/m.sfp") as file:
        save_file(arrays(seed=1), tmp_path / "m.sfp")
        with pytest.raises(RemoteError, match="has changed since it was opened"):
            file.get_tensors()
        assert {one.status for one in own.answered if one.range not in ("bytes=0-63", f"bytes=-{TAIL}")} - {
            0
        } == {412}


def test_a_weak_etag_is_compared_but_not_sent(server: FileServer, folder: Path) -> None:
    data, etags = (folder / "m.sfp").read_bytes(), ['W/"1"']

    async def instead(request: web.Request, handler: Handler) -> web.StreamResponse:
        assert "If-Match" not in request.headers
        first, last = request.headers["Range"].removeprefix("bytes=").split("-")
        start = int(first) if first else len(data) - int(last)
        stop = int(last) + 1 if first else len(data)
        extra = {"ETag": etags[0], **content_range(data, start, stop - 1)}
        return web.Response(status=206, headers=extra, body=data[start:stop])

    server.instead = instead
    with sfpformat.open(f"{server.url}/m.sfp") as file:
        assert np.array_equal(file.get_tensor("layer.0.weight"), ARRAYS["layer.0.weight"])
        etags[0] = 'W/"2"'
        with pytest.raises(RemoteError, match="another ETag"):
            file.get_tensor("layer.1.weight")


def test_a_server_without_ranges_from_the_end_takes_one_more_round(server: FileServer) -> None:
    async def instead(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.headers["Range"].startswith("bytes=-"):
            return web.Response(status=501)
        return await handler(request)

    server.instead, server.latency = instead, 0.05
    assert_same(load_file(f"{server.url}/m.sfp"), ARRAYS)
    assert server.rounds == 3


@pytest.mark.parametrize(
    ("status", "kind"), [(404, FileNotFoundError), (403, PermissionError), (401, PermissionError)]
)
def test_a_refused_file_raises_the_error_of_a_local_one(
    server: FileServer, status: int, kind: type[OSError]
) -> None:
    async def instead(request: web.Request, handler: Handler) -> web.StreamResponse:
        return web.Response(status=status)

    server.instead = instead
    with pytest.raises(kind, match=f"the server answers {status}"):
        sfpformat.open(f"{server.url}/m.sfp")


def test_a_server_that_is_not_there_raises(server: FileServer) -> None:
    with pytest.raises(RemoteError, match=r"127\.0\.0\.1"):
        sfpformat.open("http://127.0.0.1:9/m.sfp")


def test_messages_have_no_password_and_no_query(server: FileServer) -> None:
    url = server.url.replace("http://", "http://me:secret@") + "/none.sfp?token=secret"
    with pytest.raises(FileNotFoundError) as caught:
        sfpformat.open(url)
    assert "secret" not in str(caught.value)
    assert "/none.sfp" in str(caught.value)


def test_a_damaged_remote_file_has_the_fault_of_a_local_one(own: FileServer, tmp_path: Path) -> None:
    save_file(ARRAYS, tmp_path / "m.sfp")
    data = bytearray((tmp_path / "m.sfp").read_bytes())
    data[chunks_of(tmp_path / "m.sfp", "layer.0.weight", 0)[0] + 50] ^= 1
    (tmp_path / "m.sfp").write_bytes(data)
    with sfpformat.open(f"{own.url}/m.sfp") as file, pytest.raises(InvalidFileError, match="R-LAY-004"):
        file.get_tensors()
    for junk in (b"", b"<html>"):
        (tmp_path / "j.sfp").write_bytes(junk)
        with pytest.raises(InvalidFileError):
            sfpformat.open(f"{own.url}/j.sfp")


# --------------------------------------------------------------------------------- other file systems


@pytest.fixture
def memory(folder: Path) -> Iterator[Any]:
    fs = fsspec.filesystem("memory")
    fs.pipe("/models/m.sfp", (folder / "m.sfp").read_bytes())
    yield fs
    fs.rm("/models", recursive=True)


def test_memory_urls_folders_and_open_files_are_read(memory: Any) -> None:
    assert_same(load_file("memory://models/m.sfp"), ARRAYS)
    assert_same(load_file("memory://models"), ARRAYS)
    assert_same(load_file(fsspec.open("memory://models/m.sfp")), ARRAYS)
    memory.pipe("/models/n.sfp", b"")
    with pytest.raises(OptionError, match="several models"):
        load_file("memory://models")
    with pytest.raises(FileNotFoundError, match="memory:/"):
        load_file("memory://models/none.sfp")


def test_a_file_system_without_etags_reports_a_change_when_a_checksum_fails(memory: Any) -> None:
    with sfpformat.open("memory://models/m.sfp") as file:
        data = bytearray(memory.cat("/models/m.sfp"))
        data[SIZE + 50 : SIZE + 5000] = bytes(4950)
        memory.pipe("/models/m.sfp", bytes(data))
        with pytest.raises(RemoteError, match="has changed since it was opened"):
            file.get_tensor("layer.0.weight")
        memory.pipe("/models/m.sfp", bytes(data[:500]))
        with pytest.raises(RemoteError, match=r"only .* bytes"):
            file.get_tensor("layer.1.weight")


def test_an_asynchronous_file_system_is_read_concurrently(
    memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """s3fs, gcsfs and adlfs are asynchronous."""
    running, most = 0, 0
    fs = AsyncFileSystemWrapper(memory)
    fetch = fs._cat_file

    async def slow(*words: Any, **named: Any) -> bytes:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.05)
        running -= 1
        data: bytes = await fetch(*words, **named)
        return data

    monkeypatch.setattr(fs, "_cat_file", slow)
    assert_same(load_file(fsspec.core.OpenFile(fs, "/models/m.sfp")), ARRAYS)
    assert most > 1
    with pytest.raises(FileNotFoundError):
        load_file(fsspec.core.OpenFile(fs, "/models/none.sfp"))
    with pytest.raises(OptionError, match="asynchronous=True"):
        sfpformat.open(
            fsspec.core.OpenFile(AsyncFileSystemWrapper(memory, asynchronous=True), "/models/m.sfp")
        )


def test_a_url_without_its_package_names_the_package() -> None:
    with pytest.raises(OptionError, match=r"s3://.*s3fs"):
        sfpformat.open("s3://bucket/m.sfp")
    with pytest.raises(OptionError, match="nonsense"):
        sfpformat.open("nonsense://bucket/m.sfp")
    for missing in ("fsspec", "aiohttp"):
        code = f"import sys; sys.modules[{missing!r}] = None; import sfpformat; sfpformat.open('https://a/m.sfp')"
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "pip install 'sfpformat[remote]'" in run.stderr


def test_importing_the_package_imports_neither_fsspec_nor_aiohttp() -> None:
    code = "import sys, sfpformat, sfpformat.numpy, sfpformat.io.source; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"fsspec", "aiohttp", "huggingface_hub", "asyncio"} & set(run.stdout.split())


# -------------------------------------------------------------------------------------------- commands


def test_info_verify_diff_and_unpack_take_urls(
    server: FileServer, folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    url = f"{server.url}/m.sfp"
    assert main(["info", url]) == 0
    remote = capsys.readouterr().out
    assert main(["info", str(folder / "m.sfp")]) == 0
    assert remote.replace(url, "m.sfp") == capsys.readouterr().out.replace(str(folder / "m.sfp"), "m.sfp")
    assert main(["verify", url, "--canonical"]) == 0
    assert f"{url}: no faults, canonical" in capsys.readouterr().out
    assert main(["diff", url, str(folder / "m.sfp")]) == 0
    assert main(["unpack", url, "-o", str(tmp_path / "m.safetensors")]) == 0
    assert main(["diff", str(tmp_path / "m.safetensors"), url]) == 0
    capsys.readouterr()
    assert main(["info", f"{server.url}/none.sfp"]) == 2
    assert "/none.sfp: no such file" in capsys.readouterr().err
    assert main(["prune", url, "-o", str(tmp_path / "p.sfp"), "--sparsity", "0.5"]) == 2
    assert "download the file first" in capsys.readouterr().err


def test_info_of_a_remote_file_reads_only_the_heads_of_chunks(server: FileServer, folder: Path) -> None:
    server.latency = 0.05
    assert main(["info", f"{server.url}/m.sfp"]) == 0
    assert server.rounds == 2
    assert server.size < (folder / "m.sfp").stat().st_size / 2


def test_commands_take_the_index_of_remote_shards(own: FileServer, tmp_path: Path, capsys: Capture) -> None:
    sharded(tmp_path)
    url = f"{own.url}/m.sfp.index.json"
    assert main(["info", url]) == 0
    assert "3 shards" in capsys.readouterr().out
    assert main(["verify", url]) == 0
    assert main(["diff", url, str(tmp_path / "m.sfp.index.json")]) == 0


def test_names_that_only_look_like_urls_are_paths() -> None:
    for name in ("c://m.sfp", "a::b.sfp", "https:m.sfp"):
        with pytest.raises(FileNotFoundError, match="No such file"):
            sfpformat.open(name)


def test_a_cached_url_is_read_from_the_cache(server: FileServer, tmp_path: Path) -> None:
    cache = fsspec.open(f"simplecache::{server.url}/m.sfp", simplecache={"cache_storage": str(tmp_path)})
    assert_same(load_file(cache), ARRAYS)
    server.answered.clear()
    assert_same(load_file(cache), ARRAYS)
    assert {one.method for one in server.answered} <= {"HEAD"}


# -------------------------------------------------------------------------------------------- prefetch


def test_prefetch_yields_tensors_and_slices_in_the_order_given(server: FileServer) -> None:
    server.latency = 0.05
    items: list[Any] = [
        "layer.4.weight",
        ("layer.1.weight", np.s_[3:5, ::7]),
        "layer.0.bias",
        "layer.0.weight",
    ]
    seen = list[Progress]()
    with sfpformat.open(f"{server.url}/m.sfp") as file:
        server.answered.clear()
        found = list(file.prefetch(items, progress=seen.append))
    assert [item for item, _ in found] == items
    expected = [ARRAYS[i] if isinstance(i, str) else ARRAYS[i[0]][i[1]] for i in items]
    for (_, array), right in zip(found, expected, strict=True):
        assert np.array_equal(array, right)
    assert server.rounds == 1
    ends = server.ranges()
    assert all(before[1] < after[0] for before, after in pairwise(ends))
    assert seen[-1].done == seen[-1].total == server.size


def test_prefetch_keeps_within_its_memory(
    own: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = arrays(6, 512)
    save_file(tensors, tmp_path / "m.sfp")
    monkeypatch.setattr("sfpformat.decode.prefetch._GROUP_BYTES", 1)
    monkeypatch.setattr("sfpformat.io.remote.ahead.MOST_BLOCK", 100_000)
    held: list[int] = []
    with sfpformat.open(f"{own.url}/m.sfp") as file:
        size = (tmp_path / "m.sfp").stat().st_size
        own.answered.clear()
        read = 0
        for name, array in file.prefetch(memory=600_000):
            assert np.array_equal(array, tensors[str(name)])
            held.append(own.size - read)
            read += file.info(str(name)).stored_bytes
    assert max(held) <= 600_000 + file.info("layer.0.weight").stored_bytes < size / 2
    assert own.size < size


def test_other_reads_in_a_prefetch_use_what_it_fetched(server: FileServer) -> None:
    server.latency = 0.05
    with sfpformat.open(f"{server.url}/m.sfp") as file:
        server.answered.clear()
        names = [name for name in ARRAYS if name.endswith("weight")]
        with file.prefetch(names):
            for name in names:
                assert np.array_equal(file.get_slice(name)[...], ARRAYS[name])
        assert server.rounds == 1


def test_a_local_file_yields_the_same_and_reports_progress(folder: Path) -> None:
    seen = list[Progress]()
    with sfpformat.open(folder / "m.sfp") as file:
        assert_same(dict(file.prefetch(progress=seen.append)), ARRAYS)
        assert seen[-1].done == seen[-1].total > 0


def test_wrong_items_of_a_prefetch_are_refused(folder: Path, memory: Any) -> None:
    for readable in (folder / "m.sfp", "memory://models/m.sfp"):
        with sfpformat.open(readable) as file:
            with pytest.raises(sfpformat.MissingTensorError, match="'none'"):
                file.prefetch(["none"])
            with pytest.raises(IndexError):
                file.prefetch([("layer.0.bias", np.s_[0, 0])])
            wrong: Any
            for wrong in ("layer.0.bias", [3], [("layer.0.bias",)]):
                with pytest.raises(OptionError):
                    file.prefetch(wrong)
            for wrong in (0, -1, 1.5, True):
                with pytest.raises(OptionError, match="memory"):
                    file.prefetch(memory=wrong)
