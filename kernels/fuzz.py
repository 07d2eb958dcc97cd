"""Damaged chunks to the kernels on the host: each is judged as by the reference, and nothing else is touched.

``python -m kernels.fuzz`` decodes 200,000 of them with address and undefined-behaviour sanitisers; every
chunk, output and table lies in memory of its own whose surroundings are poisoned. Checksums are not compared:
it is as if each had been mended.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

import sfpformat
from sfpformat import ImportanceOptions, Options
from sfpformat.checksum import crc32
from sfpformat.codec.decode import TensorDecoder
from sfpformat.coding.bits import Bytes
from sfpformat.container.preamble import SIZE, Preamble
from sfpformat.engines import Engine, Run, get_engine
from sfpformat.engines.cuda import layout
from sfpformat.engines.cuda.batch import Task, plan_batch
from sfpformat.engines.cuda.loaded import Recipes
from sfpformat.engines.cuda.recipe import make_recipe
from sfpformat.errors import FileFault
from sfpformat.numpy import save

from . import shim

INPUTS = 200_000
_EXTREMES = (0, 1, 2, 31, 32, 33, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1)


# -------------------------------------------------------------------------------------------- what is damaged


@dataclass(frozen=True)
class Sample:
    """A chunk of a tensor, and who decodes it beside the kernels."""

    name: str
    decoder: TensorDecoder
    reference: TensorDecoder
    data: Bytes
    k: int


def _weights(rows: int, columns: int, density: float) -> NDArray[np.float32]:
    rng = np.random.default_rng(rows * columns)
    spread = 2.0 ** (-np.arange(rows) // 2)
    values = rng.normal(size=(rows, columns)) * spread[:, None] * (rng.random((rows, columns)) < density)
    values[:2] = values[:2].astype(np.float16)
    return values.astype(np.float32)


def _kinds(chunk: int) -> Iterator[tuple[str, Any, Options, float, str]]:
    """Name, dtype, options, density, form of the importance: every path that the kernels have."""
    small = Options(segment=32, chunk=chunk)
    for dtype in (ml_dtypes.bfloat16, np.float32, np.float16, np.float64, ml_dtypes.float8_e4m3fn):
        name = np.dtype(dtype).name
        for codes, limit in ((1, 8), (16, 8), (1, 12), (16, 12)):
            options = small.but(codes=codes, code_limit=limit, coding="fingerprint", mask="none", trim=False)
            yield f"{name} dense {codes} {limit}", dtype, options, 1.0, "none"
        yield f"{name} trims", dtype, small.but(coding="fingerprint", mask="none", narrow=False), 1.0, "none"
        for mask, polarity in (("octets", None), ("runs", 0), ("runs", 1)):
            options = small.but(mask=mask, polarity=polarity, coding="fingerprint")
            yield f"{name} {mask} {polarity}", dtype, options, 0.4, "none"
        for scale in ("row", "column", 7):
            options = small.but(quantiser="uniform", bits=3.0, scale=scale, group=2)
            yield f"{name} scale {scale}", dtype, options, 0.6, "none"
        for form, over in (("each", "survivors"), ("each", "all"), ("factors", "survivors")):
            kept = ImportanceOptions(role="multiplier", over=over)
            options = small.but(quantiser="table", centroids=9, importance=kept)
            yield f"{name} {form} {over}", dtype, options, 0.5, form
            options = small.but(quantiser="exact", narrow=True, coding="fingerprint", importance=kept)
            yield f"{name} exact {form} {over}", dtype, options, 0.5, form


def files(
    rows: int = 6, columns: int = 51, *, chunk: int = 128, every: int = 1
) -> Iterator[tuple[str, bytes]]:
    """For every kind of tensor, or every so many, its name and a file with a tensor ``w`` of that shape.

    Args:
        chunk: positions a chunk; a segment has 32.
    """
    for name, dtype, options, density, form in islice(_kinds(chunk), 0, None, every):
        array = _weights(rows, columns, density).astype(dtype)
        importance: Any = np.abs(_weights(rows, columns, 1.0)) if form == "each" else None
        if form == "factors":
            each = np.arange(max(rows, columns), dtype=np.float32)
            importance = each[:rows] + 1, each[:columns] / 7
        given = {} if importance is None else {"w": importance}
        yield name, save({"w": array}, options=options, importances=given, engine="python")


def samples(engine: Engine) -> list[Sample]:
    """A chunk or two of every kind of tensor."""
    found = []
    reference = get_engine("python")
    # The larger ones give all warps of a block something to do.
    for name, data in chain(files(), files(30, 160, chunk=1 << 13, every=7)):
        with sfpformat.open(data) as file:
            entry = file.entry("w")
            vectors = None if entry.vectors is None else file.read_checked(entry, -1)
            for k in sorted({0, len(entry.chunks) - 1}):
                own, plain = TensorDecoder(entry, vectors, engine), TensorDecoder(entry, vectors, reference)
                own.expect(entry.positions)
                found.append(Sample(f"{name}, chunk {k}", own, plain, file.read_checked(entry, k), k))
    return [sample for sample in found if sample.decoder.entry.coding == "fingerprint"]


def damage(data: Bytes, rng: np.random.Generator) -> Bytes:
    """A copy with one to three changes, more of them in header and index."""
    out = data.copy()
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(len(out) if rng.random() < 0.5 else min(len(out), 96)))
        what = rng.integers(5)
        if what < 2:
            out[at] ^= 1 << rng.integers(8)
        elif what == 2:
            out[at] = rng.choice([0, 1, 32, 33, 127, 128, 255])
        elif what == 3:
            value = np.array([rng.choice(_EXTREMES)], "<u4").view(np.uint8)
            out[at // 4 * 4 : at // 4 * 4 + 4] = value
        else:
            stop = min(at + int(rng.integers(1, 40)), len(out))
            out[at:stop] = rng.integers(0, 256, stop - at)
    return out


def damaged_file(data: bytes, rng: np.random.Generator) -> bytes:
    """A file with one tensor, one of its chunks damaged, its checksums mended."""
    with sfpformat.open(data) as file:
        entry, directory = file.entry("w"), file.directory
        chunks = [file.read_checked(entry, k) for k in range(len(entry.chunks))]
        vectors = [] if entry.vectors is None else [file.read_checked(entry, -1)]
    k = int(rng.integers(len(chunks)))
    chunks[k] = damage(chunks[k], rng)
    records = entry.chunks.copy()
    records["crc"][k] = crc32(chunks[k].data)
    mended = replace(directory, tensors={"w": replace(entry, chunks=records)}).to_bytes()
    body = b"".join(chunk.tobytes() for chunk in (*vectors, *chunks))
    end = SIZE + len(body)
    preamble = Preamble(end, len(mended), end + len(mended), crc32(mended))
    return preamble.to_bytes() + body + mended


# ---------------------------------------------------------------------------------------------- who judges


class Kernels:
    """The kernels on the host, everything in memory of its own."""

    def __init__(self, checked: bool) -> None:
        """Compiles them."""
        library = shim.build(shim.CHECKED if checked else shim.PLAIN)
        self._device = shim.HostDevice(library, poison=checked)
        self._recipes = Recipes(self._device)
        self._made: dict[int, Any] = {}

    def weights(self, sample: Sample, data: Bytes) -> tuple[int, NDArray[np.uint32], bytes]:
        """The status word, the error words and the weights of a chunk."""
        entry = sample.decoder.entry
        recipe = self._made.setdefault(id(sample), make_recipe(entry, sample.decoder.vectors))
        assert recipe is not None
        self._recipes.load([recipe])
        first, stop = entry.segments_of_chunk(sample.k)
        start = first * entry.segment
        total = min((stop - first) * entry.segment, entry.positions - start)
        device = self._device
        chunk, out = device.allocate(len(data)), device.allocate(total * entry.dtype.itemsize)
        chunk.bytes[:] = data
        at = self._recipes.address(recipe)
        plan = plan_batch([Task(recipe, at, data, total, start, 0, stop - first, out.address)])
        plan.jobs["data"] = chunk.address
        jobs, parts = device.allocate(plan.jobs.nbytes), plan.parts[recipe.kernel]
        warps, status = device.allocate(parts.nbytes), device.allocate(4)
        index, errors = device.allocate(4 * plan.index_words), device.allocate(4 * plan.error_words)
        jobs.bytes[:], warps.bytes[:] = plan.jobs.view(np.uint8), parts.view(np.uint8)
        status.bytes[:], errors.bytes[:], out.bytes[:] = 0, 0, 0
        places = [np.uint64(memory.address) for memory in (jobs, warps, index, status, errors)]
        device.launch("index_chunks", 1, [places[0], places[2], places[3]])
        device.launch(recipe.kernel, len(parts) // layout.WARPS, [*places, np.uint64(0)])
        device.finish()
        word = int(status.bytes.view(np.uint32)[0])
        return word, errors.bytes.view(np.uint32).copy(), out.bytes.tobytes()


def reference_weights(sample: Sample, data: Bytes) -> bytes | None:
    """The weights of a chunk by the processor; None where it is refused."""
    entry = sample.decoder.entry
    first, stop = entry.segments_of_chunk(sample.k)
    positions = min((stop - first) * entry.segment, entry.positions - first * entry.segment)
    out = np.empty(positions, entry.dtype.numpy)
    run: Run | None = sample.decoder.run(data, sample.k, 0, stop - first, out)
    if run is not None and sample.decoder.engine.decode_runs([run])[0]:
        return out.tobytes()
    try:
        sample.reference.weights_into(data, sample.k, 0, stop - first, out)
    except FileFault:
        return None
    return out.tobytes()


def compare(kernels: Kernels, sample: Sample, data: Bytes) -> bool:
    """Whether the chunk was accepted; raises AssertionError where the two do not agree."""
    status, errors, found = kernels.weights(sample, data)
    expected = reference_weights(sample, data)
    assert (status == 0) == (expected is not None), f"{sample.name}: status {status}, {expected is not None}"
    assert expected is None or found == expected, f"{sample.name}: other weights"
    assert np.bitwise_or.reduce(errors) & ~np.uint32(status) == 0, f"{sample.name}: {errors} but {status}"
    return status == 0


def run(inputs: int, seed: int = 0, *, checked: bool = False, engine: str | None = None) -> int:
    """Compares so many damaged inputs, after the undamaged ones; how many of them were accepted."""
    kernels, every = Kernels(checked), samples(get_engine(engine))
    for sample in every:
        assert compare(kernels, sample, sample.data), f"{sample.name}: refused as it was written"
    rng = np.random.default_rng(seed)
    good, begun = 0, time.monotonic()
    for i in range(inputs):
        sample = every[int(rng.integers(len(every)))]
        good += compare(kernels, sample, damage(sample.data, rng))
        if (i + 1) % 20_000 == 0:
            print(f"{i + 1:,} inputs, {good:,} accepted, {time.monotonic() - begun:.0f} s", flush=True)
    return good


def checked_environment() -> dict[str, str]:
    """The environment in which Python can load a library with sanitisers."""
    command = ["g++", "-print-file-name=libasan.so"]
    library = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return {**os.environ, **shim.CHECKED_ENVIRONMENT, "LD_PRELOAD": library}


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m kernels.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=INPUTS, help=f"how many ({INPUTS:,})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain", action="store_true", help="without sanitisers")
    args = parser.parse_args()
    if not args.plain and not hasattr(ctypes.CDLL(None), "__asan_poison_memory_region"):
        again = [sys.executable, "-m", "kernels.fuzz", *sys.argv[1:]]
        return subprocess.run(again, env=checked_environment(), check=False).returncode
    good = run(args.inputs, args.seed, checked=not args.plain)
    print(f"{args.inputs:,} damaged inputs judged as by the reference, {good:,} of them accepted")
    return 0


if __name__ == "__main__":
    sys.exit(main())
