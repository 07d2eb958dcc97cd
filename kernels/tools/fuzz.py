"""Runs the kernels on damaged chunks, on the host, and compares the results with the reference.

``python -m kernels.tools.fuzz`` decodes the chunks of the golden files; then it decodes or multiplies 200,000
damaged chunks, or finds the changes of damaged deltas. Masks and importances are decoded, too. Address and
undefined-behaviour sanitisers check all accesses: every chunk, output and table has its own memory between
poisoned guards. Checksums are not compared, as if they had been recomputed.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

import sfpformat
from sfpformat import PRESETS, Table
from sfpformat.coding.bits import Bytes
from sfpformat.decode.tensor import TensorDecoder
from sfpformat.engines import Engine, Run, get_engine
from sfpformat.engines.cuda import layout
from sfpformat.engines.cuda.batch import Task, plan_batch
from sfpformat.engines.cuda.loaded import Recipes
from sfpformat.engines.cuda.recipe import Recipe, make_recipe
from sfpformat.engines.device_interface import Content
from sfpformat.errors import FileFault, SfpError
from sfpformat.numpy import save

from . import shim
from .changes import KINDS, Comparison, random_comparison
from .identity import golden_files
from .inputs import damage, files, normal_weights
from .ondevice import NUMPY, SUMMING, Multiplication, OnDevice, excess

INPUTS = 200_000
# One input in this many is multiplied: on the host a product takes as long as this many decodings.
_PRODUCTS_EVERY = 50
# The same for the changes of deltas.
_CHANGES_EVERY = 20
_SHOWN = 5_000
# Larger golden files are skipped: they are tests of limits, a few bytes that claim many positions.
_MOST_POSITIONS = 1 << 20


@dataclass(frozen=True, eq=False)
class Sample:
    """A chunk of a tensor, and the decoders that the kernels are compared with."""

    name: str
    decoder: TensorDecoder
    reference: TensorDecoder
    data: Bytes
    k: int


def samples(engine: Engine) -> list[Sample]:
    """Returns the first and the last chunk of every kind of tensor."""
    found = []
    reference = get_engine("python")
    # Larger files occupy all warps of a block; the largest have an index of several rounds.
    larger = files(30, 160, chunk=1 << 13, every=7), files(120, 320, chunk=1 << 16, every=23)
    for name, data in chain(files(), *larger):
        with sfpformat.open(data) as file:
            entry = file.entry("w")
            vectors = None if entry.vectors is None else file.read_checked(entry, -1)
            for k in sorted({0, len(entry.chunks) - 1}):
                own, plain = TensorDecoder(entry, vectors, engine), TensorDecoder(entry, vectors, reference)
                own.expect(entry.positions)
                found.append(Sample(f"{name}, chunk {k}", own, plain, file.read_checked(entry, k), k))
    return [sample for sample in found if sample.decoder.entry.coding == "fingerprint"]


def golden_samples(engine: Engine, every: int) -> Iterator[Sample]:
    """Yields the chunks of every ``every``-th golden file that can be read and that the kernels support."""
    reference = get_engine("python")
    for number, data in enumerate(golden_files(every)):
        with suppress(SfpError), sfpformat.open(data, engine="python") as file:
            for name in file:
                entry = file.entry(name)
                if entry.fingerprints is not None and entry.positions <= _MOST_POSITIONS:
                    vectors = None if entry.vectors is None else file.read_checked(entry, -1)
                    own, plain = (TensorDecoder(entry, vectors, by) for by in (engine, reference))
                    own.expect(entry.positions)
                    if make_recipe(entry, own.vectors) is not None:
                        for k in range(len(entry.chunks)):
                            words = f"golden file {number}, {name!r}, chunk {k}"
                            yield Sample(words, own, plain, file.read_checked(entry, k), k)


# ---------------------------------------------------------------------------------- kernels and reference


class Kernels:
    """The kernels compiled for the host. Each array has its own block of memory."""

    def __init__(self, checked: bool) -> None:
        """Compiles the kernels; if ``checked``, with sanitisers."""
        library = shim.build(shim.CHECKED if checked else shim.PLAIN)
        self.device = shim.HostDevice(library, poison=checked)
        self._recipes = Recipes(self.device)
        self._made: dict[tuple[Sample, Content], Recipe] = {}

    def decoded(self, sample: Sample, data: Bytes, content: Content) -> tuple[int, NDArray[np.uint32], bytes]:
        """Decodes the weights, mask or importances of a chunk. Returns status word, error words and bytes."""
        entry, key = sample.decoder.entry, (sample, content)
        if key not in self._made:
            made = make_recipe(entry, sample.decoder.vectors, content)
            assert made is not None
            self._made[key] = made
            self._recipes.load([made])
        recipe = self._made[key]
        first, stop = entry.segments_of_chunk(sample.k)
        start, total = entry.positions_of_chunk(sample.k)
        device = self.device
        chunk, out = device.allocate(len(data)), device.allocate(total * recipe.item)
        chunk.bytes[:] = data
        at = self._recipes.address(recipe)
        plan = plan_batch([Task(recipe, at, data, total, start, 0, stop - first, out.address)])
        plan.jobs["data"] = chunk.address
        jobs, parts = device.allocate(plan.jobs.nbytes), plan.parts[recipe.kernel]
        warps, status = device.allocate(parts.nbytes), device.allocate(4)
        index, errors = device.allocate(4 * plan.index_words), device.allocate(4 * plan.error_words)
        jobs.bytes[:], warps.bytes[:] = plan.jobs.view(np.uint8), parts.view(np.uint8)
        status.bytes[:], errors.bytes[:], out.bytes[:] = 0, 0, 0
        places = [memory.address for memory in (jobs, warps, index, status, errors)]
        device.launch("index_chunks", 1, [places[0], places[2], places[3]])
        device.launch(recipe.kernel, len(parts) // layout.WARPS, [*places, 0])
        device.finish()
        word = int(status.bytes.view(np.uint32)[0])
        return word, errors.bytes.view(np.uint32).copy(), out.bytes.tobytes()


def reference_weights(sample: Sample, data: Bytes) -> bytes | None:
    """Returns the weights of a chunk decoded by the CPU engines; None if they refuse it."""
    entry = sample.decoder.entry
    first, stop = entry.segments_of_chunk(sample.k)
    out = np.empty(entry.positions_of_chunk(sample.k)[1], entry.dtype.numpy)
    run: Run[NDArray[Any]] | None = sample.decoder.run(data, sample.k, 0, stop - first, out)
    if run is not None and sample.decoder.engine.decode_runs([run])[0]:
        return out.tobytes()
    try:
        sample.reference.weights_into(data, sample.k, 0, stop - first, out)
    except FileFault:
        return None
    return out.tobytes()


def reference_content(sample: Sample, data: Bytes, content: Content) -> bytes | None:
    """Returns the weights, mask or importances of a chunk decoded by the CPU; None if it refuses it."""
    if content is Content.WEIGHTS:
        return reference_weights(sample, data)
    entry, reference = sample.decoder.entry, sample.reference
    first, stop = entry.segments_of_chunk(sample.k)
    positions = entry.positions_of_chunk(sample.k)[1]
    try:
        if content is Content.MASK:
            mask = np.empty(positions, np.bool_)
            reference.mask_into(data, sample.k, 0, stop - first, mask)
            return mask.tobytes()
        importances = np.empty(positions, np.float32)
        reference.importance_into(data, sample.k, 0, stop - first, importances)
        return importances.tobytes()
    except FileFault:
        return None


def contents_of(sample: Sample) -> list[Content]:
    """Returns what can be decoded of a sample."""
    entry = sample.decoder.entry
    there = {Content.MASK: entry.mask, Content.IMPORTANCE: entry.importance}
    return [Content.WEIGHTS, *(content for content, part in there.items() if part is not None)]


def compare(kernels: Kernels, sample: Sample, data: Bytes) -> bool:
    """Compares weights, mask and importances. Returns whether all are accepted.

    Raises:
        AssertionError: kernels and reference disagree.
    """
    is_good = True
    for content in contents_of(sample):
        name = f"{sample.name}, {content.name.lower()}"
        status, errors, found = kernels.decoded(sample, data, content)
        expected = reference_content(sample, data, content)
        assert (status == 0) == (expected is not None), f"{name}: status {status}, {expected is not None}"
        assert expected is None or found == expected, f"{name}: other bits"
        assert np.bitwise_or.reduce(errors) & ~np.uint32(status) == 0, f"{name}: {errors} but {status}"
        is_good &= status == 0
    return is_good


# ------------------------------------------------------------------------------------------------ products


class ProductSample:
    """A matrix of one chunk for products on the host, and its undamaged bytes."""

    def __init__(self, name: str, data: bytes, device: shim.HostDevice) -> None:
        """Prepares the matrix of the file ``data`` for multiplication."""
        self.name, self._device, self._file = name, device, sfpformat.open(data, engine="python")
        self._entry = self._file.entry("w")
        self.data = self._file.read_checked(self._entry, 0)
        self._compute = self._entry.dtype.name
        self._there = self._on_device(self.data)
        placed = self._there.place(self._compute)
        assert placed is not None, f"{name}: not multiplied"
        rng = np.random.default_rng(0)
        self._x = rng.normal(size=(3, self._entry.columns)).astype(self._entry.dtype.numpy)
        self._product = Multiplication(device, placed, self._x, None)
        self._reference = TensorDecoder(self._entry, self._vectors(), get_engine("python"))

    def _vectors(self) -> Bytes | None:
        return None if self._entry.vectors is None else self._file.read_checked(self._entry, -1)

    def _on_device(self, data: Bytes) -> OnDevice:
        return OnDevice(self._file, self._entry, self._device, data.tobytes())

    def weights(self, data: Bytes) -> NDArray[Any] | None:
        """Returns the weights decoded by the reference; None if it refuses the chunk."""
        out = np.empty(self._entry.positions, self._entry.dtype.numpy)
        try:
            self._reference.weights_into(data, 0, 0, self._entry.segments, out)
        except FileFault:
            return None
        return out.reshape(self._entry.shape)

    def compare(self, data: Bytes) -> bool:
        """Returns whether the chunk is accepted.

        Also replaces the undamaged chunk after preparation, and multiplies: the result is then undefined, but
        the kernel must not access memory out of bounds.

        Raises:
            AssertionError: kernels and reference disagree.
        """
        self._there.overwrite(data)
        self._product.result()
        self._there.overwrite(self.data)
        weights, there = self.weights(data), self._on_device(data)
        placed = there.place(self._compute)
        assert (placed is None) == (weights is None), f"{self.name}: {placed}"
        if placed is not None and weights is not None:
            found = Multiplication(self._device, placed, self._x, None).result()
            assert excess(found, self._x, weights, None) <= SUMMING, f"{self.name}: another product"
        return weights is not None


def product_samples(device: shim.HostDevice) -> list[ProductSample]:
    """Returns a matrix of every kind that the product kernels distinguish."""
    found = []
    for dtype in NUMPY.values():
        for columns, density, scale in ((128, 0.5, None), (384, 0.6, "row"), (640, 1.0, 128)):
            array = normal_weights(5, columns, density)
            array[0, :9] = np.arange(1, 10) / 4  # enough distinct magnitudes
            options = PRESETS["fused"].but(
                quantiser=Table(centroids=8, scale=scale), segment=64, coding="fingerprint"
            )
            data = save({"w": array.astype(dtype)}, options=options, engine="python")
            found.append(ProductSample(f"{np.dtype(dtype).name} {columns} {scale}", data, device))
    return found


def run_golden(kernels: Kernels, engine: Engine, every: int) -> int:
    """Compares the chunks of every ``every``-th golden file. Returns their number."""
    count = 0
    for sample in golden_samples(engine, every):
        compare(kernels, sample, sample.data)
        count += 1
    return count


def run(kernels: Kernels, engine: Engine, inputs: int, seed: int = 0) -> int:
    """Compares all undamaged samples, then ``inputs`` damaged ones.

    Returns how many of these were accepted.
    """
    every = samples(engine)
    products = product_samples(kernels.device)
    for sample in every:
        assert compare(kernels, sample, sample.data), f"{sample.name}: the undamaged chunk is refused"
    for product in products:
        assert product.compare(product.data), f"{product.name}: the undamaged matrix is refused"
    rng, changes = np.random.default_rng(seed), Comparison(kernels.device)
    for _ in KINDS:
        random_comparison(changes, rng, damaged=False)
    good, begun = 0, time.monotonic()
    for i in range(inputs):
        if i % _PRODUCTS_EVERY == 0:
            product = products[int(rng.integers(len(products)))]
            good += product.compare(damage(product.data, rng))
        elif i % _CHANGES_EVERY == 1:
            good += random_comparison(changes, rng, damaged=True)
        else:
            sample = every[int(rng.integers(len(every)))]
            good += compare(kernels, sample, damage(sample.data, rng))
        if (i + 1) % _SHOWN == 0:
            print(f"{i + 1:,} inputs, {good:,} accepted, {time.monotonic() - begun:.0f} s", flush=True)
    return good


def checked_environment() -> dict[str, str]:
    """Returns the environment that Python needs to load a library with sanitisers."""
    command = ["g++", "-print-file-name=libasan.so"]
    library = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return {**os.environ, **shim.CHECKED_ENVIRONMENT, "LD_PRELOAD": library}


def main() -> int:
    """Runs the command. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m kernels.tools.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=INPUTS, help=f"number of damaged chunks ({INPUTS:,})")
    parser.add_argument("--seed", type=int, default=0, help="seed of the damage (0)")
    parser.add_argument(
        "--golden", type=int, default=1, metavar="N", help="decode every Nth golden file (1); 0: none"
    )
    parser.add_argument("--plain", action="store_true", help="run without sanitisers")
    args = parser.parse_args()
    if not args.plain and not hasattr(ctypes.CDLL(None), "__asan_poison_memory_region"):
        again = [sys.executable, "-m", "kernels.tools.fuzz", *sys.argv[1:]]
        return subprocess.run(again, env=checked_environment(), check=False).returncode
    kernels, engine = Kernels(checked=not args.plain), get_engine(None)
    if args.golden:
        print(f"{run_golden(kernels, engine, args.golden):,} chunks of golden files", flush=True)
    good = run(kernels, engine, args.inputs, args.seed)
    print(f"{args.inputs:,} damaged inputs gave the result of the reference, {good:,} of them valid")
    return 0


if __name__ == "__main__":
    sys.exit(main())
