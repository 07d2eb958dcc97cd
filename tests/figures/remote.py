"""Reading over HTTP: requests and bytes for a slice, and seconds to load, beside safetensors over fsspec.

``python -m tests.figures.remote`` (needs the package of `tests.figures.model`, and safetensors) makes a model
of five copies of all-MiniLM-L6-v2 in BF16, 227 MB, and writes it as safetensors, as lossless `.sfp`, and as
`.sfp` pruned to 50 % with 4 bits per survivor. A server on this machine, in its own process, limits the rate
of all connections together. Contenders run round-robin; the table has the median of three rounds.

``--packing MEGABYTES`` instead packs eight shards of random BF16 weights, together of that size, with one and
with two processes.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import safetensors.torch
import torch

import sfpformat
from sfpformat import Options, Uniform
from sfpformat.torch import load_file, options_for_weights, save_file

from ..support.file_server import FileServer, serving
from .model import load_f32

_ROUNDS, _COPIES = 3, 5
_NAME = "copy.3.embeddings.word_embeddings.weight"
_ROWS = slice(1000, 1064)


def model() -> dict[str, torch.Tensor]:
    """The copies of the model, in BF16."""
    tensors = {name: torch.from_numpy(array) for name, array in load_f32().items()}
    return {
        f"copy.{i}.{name}": tensor.to(torch.bfloat16).clone()
        if tensor.is_floating_point()
        else tensor.clone()
        for i in range(_COPIES)
        for name, tensor in tensors.items()
    }


def write(folder: Path) -> None:
    """Writes the three files."""
    tensors = model()
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    save_file(tensors, folder / "lossless.sfp")
    pruned, masks = dict(tensors), {}
    for name in options_for_weights(tensors, Options(Uniform(bits=4))):
        magnitude = tensors[name].abs().float()
        mask = magnitude > magnitude.flatten().kthvalue(magnitude.numel() // 2).values
        pruned[name], masks[name] = tensors[name] * mask, mask
    options = {name: Options(Uniform(bits=4)) for name in masks}
    save_file(pruned, folder / "pruned.sfp", options=options, masks=masks)


# --------------------------------------------------------------------------------------------- requests


def slice_of_sfp(url: str) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """Opening, and reading a slice."""
    return lambda: sfpformat.open(url), lambda file: file.get_slice(_NAME)[_ROWS]


def slice_by_file(url: str) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """The same of safetensors, by a file object of fsspec with its default cache."""

    def opened() -> tuple[Any, dict[str, Any], int]:
        file = fsspec.open(url).open()
        size = int.from_bytes(file.read(8), "little")
        return file, json.loads(file.read(size)), 8 + size

    def read(state: tuple[Any, dict[str, Any], int]) -> bytes:
        file, header, begin = state
        row = 2 * header[_NAME]["shape"][1]
        file.seek(begin + header[_NAME]["data_offsets"][0] + _ROWS.start * row)
        return bytes(file.read((_ROWS.stop - _ROWS.start) * row))

    return opened, read


def slice_by_ranges(url: str) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """The same of safetensors, by exact ranges."""

    def opened() -> tuple[Any, dict[str, Any], int]:
        fs = fsspec.filesystem("http")
        size = int.from_bytes(fs.cat_file(url, 0, 8), "little")
        return fs, json.loads(fs.cat_file(url, 8, 8 + size)), 8 + size

    def read(state: tuple[Any, dict[str, Any], int]) -> bytes:
        fs, header, begin = state
        row = 2 * header[_NAME]["shape"][1]
        start = begin + header[_NAME]["data_offsets"][0] + _ROWS.start * row
        return bytes(fs.cat_file(url, start, start + (_ROWS.stop - _ROWS.start) * row))

    return opened, read


def requests(folder: Path) -> None:
    """Prints requests, rounds and bytes of opening and of a slice."""
    print("| | open: requests (rounds) | KB | slice: requests (rounds) | KB |\n|---|---|---|---|---|")
    for words, file, made in (
        (".sfp, lossless", "lossless.sfp", slice_of_sfp),
        (".sfp, pruned, 4 bits", "pruned.sfp", slice_of_sfp),
        ("safetensors, ranges by hand", "model.safetensors", slice_by_ranges),
        ("safetensors, file of fsspec", "model.safetensors", slice_by_file),
    ):
        with serving(folder) as server:
            server.latency = 0.05
            opened, read = made(f"{server.url}/{file}")
            state = opened()
            first = _counted(server)
            read(state)
            print(f"| {words} | {first} | {_counted(server)} |", flush=True)


def _counted(server: FileServer) -> str:
    words = f"{len(server.answered)} ({server.rounds}) | {server.size / 1e3:,.0f}"
    server.answered.clear()
    return words


# --------------------------------------------------------------------------------------------- loading


@contextmanager
def limited(folder: Path, rate: float) -> Iterator[str]:
    """Serves a folder at a rate in bytes per second. Yields the URL."""
    words = [sys.executable, "-m", "tests.support.limited_server", str(folder), str(rate)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        process.stdin.close()


def download(url: str) -> dict[str, torch.Tensor]:
    """Downloads a safetensors file to the disk, then loads it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        fsspec.filesystem("http").get_file(url, str(path))
        return {name: tensor.clone() for name, tensor in safetensors.torch.load_file(path).items()}


def into_memory(url: str) -> dict[str, torch.Tensor]:
    """Reads a safetensors file into memory with fsspec, then loads it."""
    return safetensors.torch.load(fsspec.filesystem("http").cat_file(url))


def loading(folder: Path, rates: list[float]) -> None:
    """Prints the seconds of loading all tensors."""
    contenders: dict[str, tuple[Callable[[str], Any], str]] = {
        "safetensors: download, load": (download, "model.safetensors"),
        "safetensors: fsspec, in memory": (into_memory, "model.safetensors"),
        ".sfp, lossless": (load_file, "lossless.sfp"),
        ".sfp, pruned, 4 bits": (load_file, "pruned.sfp"),
    }
    for load, file in contenders.values():  # imports, compiled kernels
        with limited(folder, 1e10) as url:
            load(f"{url}/{file}")
    print("| | MB | " + " | ".join(f"s at {rate / 1e6:,.0f} MB/s" for rate in rates) + " |")
    print("|---|---|" + "---|" * len(rates))
    times: dict[tuple[str, float], list[float]] = {}
    for rate in rates:
        for _ in range(_ROUNDS):
            for words, (load, file) in contenders.items():
                with limited(folder, rate) as url:
                    begin = time.perf_counter()
                    load(f"{url}/{file}")
                    times.setdefault((words, rate), []).append(time.perf_counter() - begin)
    for words, (_, file) in contenders.items():
        found = " | ".join(f"{statistics.median(times[words, rate]):.2f}" for rate in rates)
        print(f"| {words} | {(folder / file).stat().st_size / 1e6:,.0f} | {found} |", flush=True)


# --------------------------------------------------------------------------------------------- packing


def packing(folder: Path, megabytes: int) -> None:
    """Prints the seconds of packing eight shards, in one process and in two."""
    source = folder / "checkpoint"
    source.mkdir()
    weight_map: dict[str, str] = {}
    for shard in range(8):
        name = f"model-{shard + 1:05d}-of-00008.safetensors"
        rows = megabytes * 1_000_000 // (8 * 4 * 2 * 1024)
        tensors = {f"w.{shard}.{i}": (torch.randn(rows, 1024) * 0.02).to(torch.bfloat16) for i in range(4)}
        safetensors.torch.save_file(tensors, source / name)
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (source / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    print("| | s | processor s | peak MB of a process |\n|---|---|---|---|")
    for jobs in (1, 2):
        target = folder / f"out{jobs}"
        target.mkdir()
        words = [sys.executable, "-m", "sfpformat.cli", "pack", str(source), "-o", str(target / "m.sfp")]
        begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([*words, "--jobs", str(jobs)], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        seconds = time.perf_counter() - begin
        print(f"| --jobs {jobs} | {seconds:.1f} | {used:.1f} | {after.ru_maxrss / 1e3:,.0f} |", flush=True)
    one, two = ({p.name: p.read_bytes() for p in (folder / f"out{jobs}").iterdir()} for jobs in (1, 2))
    print("same bytes" if one == two else "DIFFERENT BYTES")


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packing", type=int, metavar="MEGABYTES")
    parser.add_argument("--rates", type=float, nargs="+", default=[100e6, 1000e6], help="bytes per second")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.packing is not None:
            packing(folder, args.packing)
            return
        write(folder)
        requests(folder)
        print()
        loading(folder, args.rates)


if __name__ == "__main__":
    main()
