"""Loading a real model into torch, and calling it compressed: time and memory, compared with safetensors.

``python -m tests.figures.torch_models`` measures all-MiniLM-L6-v2 in transformers' `BertModel`, in F32 and
BF16:

* fills a model from a file in the page cache, by our `load_model` and by that of safetensors, round-robin; *
calls a dense model, a compressed model, and a compressed model that keeps all decoded weights, round-robin; *
does each in a fresh process, and prints the rise of resident memory: at the peak of loading, after it, and at
the
  peak of the second of two calls (mapped files count, as in the system's figures).

Torch has one thread, and so has this package unless the output says otherwise. Times are medians of rounds;
MB are 10^6 bytes. Every result is compared bit for bit with that of the dense model.
"""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from sfpformat.torch import compress_model, load_model, save_model

from .bert import dense_model, empty_model, meta_model

ROUNDS = 15
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
# Number of sentences, and of tokens of each.
BATCHES = ((1, 16), (32, 128))
_KEEP_ALL = 1 << 30


def _safetensors(model: nn.Module, folder: Path) -> None:
    safetensors.torch.load_model(model, str(folder / "m.safetensors"))


def _assigned(model: nn.Module, folder: Path) -> None:
    model.load_state_dict(safetensors.torch.load_file(folder / "m.safetensors"), assign=True)


def _sfp(model: nn.Module, folder: Path) -> None:
    load_model(model, folder / "m.sfp", threads=1)


def _sfp_2(model: nn.Module, folder: Path) -> None:
    load_model(model, folder / "m.sfp", threads=2)


def _compressed(model: nn.Module, folder: Path) -> None:
    compress_model(model, folder / "m.sfp")


def _keeping(model: nn.Module, folder: Path) -> None:
    compress_model(model, folder / "m.sfp", keep=_KEEP_ALL)


Load = Callable[[nn.Module, Path], None]
FILLED: dict[str, Load] = {
    "safetensors load_model": _safetensors,
    "sfp load_model": _sfp,
    "sfp load_model, 2 threads": _sfp_2,
}
FROM_META: dict[str, Load] = {
    "safetensors load_file, assigned": _assigned,
    "sfp load_model": _sfp,
    "sfp compress_model": _compressed,
    "sfp compress_model, all kept": _keeping,
}


def tokens(sentences: int, length: int) -> torch.Tensor:
    """Random tokens, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1000, 30_000, (sentences, length), generator=generator)


def called(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The last hidden state, without gradients."""
    with torch.inference_mode():
        out: torch.Tensor = model(ids).last_hidden_state
    return out


def in_turns(works: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Returns the milliseconds of each work: the median over round-robin measurements."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(ROUNDS + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if turn:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    return {name: round(1e3 * statistics.median(spent), 1) for name, spent in times.items()}


def loading_times(folder: Path, dtype: torch.dtype, dense: nn.Module) -> dict[str, float]:
    """Returns the milliseconds for filling a model that has memory."""
    model = empty_model().to(dtype)
    found = in_turns({name: partial(load, model, folder) for name, load in FILLED.items()})
    require_same(model, dense)
    return found


def calling_times(folder: Path, dtype: torch.dtype, dense: nn.Module) -> dict[str, dict[str, float]]:
    """Returns the milliseconds of a call, by batch."""
    models = {"dense": dense, "compressed": empty_model().to(dtype), "all kept": empty_model().to(dtype)}
    _compressed(models["compressed"], folder)
    _keeping(models["all kept"], folder)
    for model in models.values():
        require_same(model, dense)
    return {
        f"{sentences} x {length}": in_turns(
            {name: partial(called, model, tokens(sentences, length)) for name, model in models.items()}
        )
        for sentences, length in BATCHES
    }


def require_same(model: nn.Module, dense: nn.Module) -> None:
    """Asserts that a model computes the bits of another."""
    ids = tokens(2, 32)
    assert torch.equal(called(model, ids), called(dense, ids)), "the bits are others"


# ---------------------------------------------------------------------------------- in a process of its own


def memory(way: str, start: str, dtype: str, folder: Path) -> dict[str, float]:
    """Returns the result of `measure_memory` in a fresh process."""
    command = [sys.executable, "-m", __spec__.name, way, start, dtype, str(folder)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, float] = json.loads(out.splitlines()[-1])
    return found


def measure_memory(way: str, start: str, dtype: str, folder: Path) -> dict[str, float]:
    """Returns the rise of resident memory since before loading, in MB.

    Args:
        way: a key of `FILLED` or `FROM_META`.
        start: ``memory`` for a model that has its memory before loading, or ``meta``.
        dtype: name of the model's dtype.
        folder: folder of the files.
    """
    _warm_up(folder / "small.sfp", DTYPES[dtype])
    model = (empty_model() if start == "memory" else meta_model()).to(DTYPES[dtype])
    for tensor in model.parameters() if start == "memory" else ():
        tensor.data.zero_()
    gc.collect()
    before = _reset_peak()
    (FILLED | FROM_META)[way](model, folder)
    found = {"peak": _resident("VmHWM") - before, "after": _resident("VmRSS") - before}
    if start == "meta":
        called(model, tokens(1, 16))
        _reset_peak()
        called(model, tokens(1, 16))
        found["peak of a call"] = _resident("VmHWM") - before
    return {name: round(size / 1e6, 1) for name, size in found.items()}


def _warm_up(path: Path, dtype: torch.dtype) -> None:
    """Loads what a process loads once, mainly the compiled engine."""
    small = nn.Sequential(nn.Embedding(600, 600), nn.Linear(600, 600)).to(dtype)
    save_model(small, path)
    load_model(small, path, engine="numba")
    compress_model(small, path)
    with torch.inference_mode():
        small(torch.arange(600))
        small(torch.arange(2))


def _reset_peak() -> int:
    """Resets the peak of resident memory (proc(5)). Returns the resident bytes now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def _resident(field: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def main() -> None:
    for name, dtype in DTYPES.items():
        with tempfile.TemporaryDirectory() as text:
            folder = Path(text)
            dense = dense_model().to(dtype)
            save_model(dense, folder / "m.sfp")
            safetensors.torch.save_model(dense, str(folder / "m.safetensors"))
            sizes = {file.name: round(file.stat().st_size / 1e6, 1) for file in sorted(folder.iterdir())}
            results: dict[str, Any] = {
                "MB of the files": sizes,
                "ms to fill a model": loading_times(folder, dtype, dense),
                "ms of a call": calling_times(folder, dtype, dense),
                "MB beyond a model that has its memory": {
                    way: memory(way, "memory", name, folder) for way in FILLED
                },
                "MB beyond a model on the meta device": {
                    way: memory(way, "meta", name, folder) for way in FROM_META
                },
            }
        print(name, json.dumps(results, indent=1), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        print(json.dumps(measure_memory(sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4]))))
    else:
        main()
