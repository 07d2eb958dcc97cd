"""Products with matrices that stay compressed: the kernels on the host against sums in double precision."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sfp_conformance.forge import Forge, f32_bytes, hand_file, hand_part, table

import sfpformat
from kernels.tools import shim
from kernels.tools.ondevice import NUMPY, SUMMING, Multiplication, OnDevice, excess
from sfpformat import PRESETS, ImportanceOptions, Options, Table, Uniform
from sfpformat.engines.cuda import layout, product
from sfpformat.engines.cuda.product import make_product
from sfpformat.numpy import save

from ..support.programs import needs

pytestmark = needs("g++")

FUSED = PRESETS["fused"].but(quantiser=Table(centroids=8))


def fused(scale: str | int | None) -> Options:
    """The same options with a scale."""
    return FUSED.but(quantiser=Table(centroids=8, scale=scale))


def matrix(rows: int, columns: int, density: float = 0.5, seed: int = 0) -> NDArray[np.float32]:
    """Normal weights, pruned at random, rows of several spreads."""
    rng = np.random.default_rng(seed)
    spread = 2.0 ** rng.integers(-3, 3, (rows, 1))
    kept = rng.random((rows, columns)) < density
    return np.where(kept, rng.normal(size=(rows, columns)) * spread, 0).astype(np.float32)


def activations(batch: int, columns: int, dtype: str, seed: int = 1) -> NDArray[Any]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(batch, columns)).astype(NUMPY[dtype])


class Made:
    """A matrix in a file, and on a device."""

    def __init__(self, data: bytes, device: shim.HostDevice | None = None) -> None:
        with sfpformat.open(data, engine="python") as file:
            self.weight = file.get_tensor("w")
            self.device = device or shim.HostDevice()
            self.there = OnDevice(file, file.entry("w"), self.device)

    def multiply(self, x: NDArray[Any], bias: NDArray[Any] | None = None) -> NDArray[Any]:
        name = next(name for name, dtype in NUMPY.items() if x.dtype == np.dtype(dtype))
        placed = self.there.place(name)
        assert placed is not None
        return Multiplication(self.device, placed, x, bias).result()


def made(array: NDArray[Any], options: Options = FUSED, **device: Any) -> Made:
    return Made(save({"w": array}, options=options), shim.HostDevice(**device))


# ------------------------------------------------------------------------------------------------ numbers

SCALES: dict[str, Any] = {"none": None, "tensor": "tensor", "row": "row", "groups": 128, "rows": 768}


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", NUMPY)
def test_products_with_unit_vectors_are_the_decoded_weights(dtype: str, scale: str, backwards: bool) -> None:
    array = matrix(20, 384).astype(NUMPY[dtype])
    own = made(array, fused(SCALES[scale]), backwards=backwards)
    for first in (0, 8, 120, 376):
        x = np.eye(8, 384, first).astype(NUMPY[dtype])
        found = own.multiply(x)
        assert found.tobytes() == (own.weight.T[first : first + 8] + 0).tobytes()


@settings(max_examples=60)
@given(
    rows=st.integers(1, 150),
    runs=st.integers(1, 21),
    density=st.sampled_from([0.0, 0.05, 0.5, 0.9, 1.0]),
    scale=st.sampled_from(list(SCALES.values())),
    dtype=st.sampled_from(list(NUMPY)),
    batch=st.integers(1, 8),
    biased=st.booleans(),
    backwards=st.booleans(),
    chunk=st.sampled_from([1, 5000, 1 << 18]),
    segment=st.sampled_from([None, 32, 64, 128]),
)
def test_products_equal_those_of_the_decoded_weights(
    rows: int,
    runs: int,
    density: float,
    scale: Any,
    dtype: str,
    batch: int,
    biased: bool,
    backwards: bool,
    chunk: int,
    segment: int | None,
) -> None:
    columns = 128 * runs
    if isinstance(scale, int) and columns % scale:
        scale = 128
    array = matrix(rows, columns, density, seed=rows).astype(NUMPY[dtype])
    array[0, :8] = [-1, 0.5, -2, 2.5, -3, 4, -5, 6]  # eight magnitudes at least, whatever the density
    options = fused(scale).but(chunk=chunk, segment=segment, coding="fingerprint")
    own = made(array, options, backwards=backwards)
    fingerprints = own.there.entry.fingerprints
    assert fingerprints is not None
    assume(fingerprints.table.extra == bytes([layout.LEVEL_BITS]))
    x, bias = activations(batch, columns, dtype), activations(1, rows, dtype)[0] if biased else None
    found = own.multiply(x, bias)
    assert excess(found, x, own.weight, bias) <= SUMMING
    assert found.tobytes() == own.multiply(x, bias).tobytes()


def test_partial_sums_are_added_in_a_fixed_order() -> None:
    array = matrix(150, 3200).astype(ml_dtypes.bfloat16)
    results = []
    for backwards in (False, True):
        own = made(array, backwards=backwards)
        x = activations(3, 3200, "BF16")
        results.append(own.multiply(x).tobytes())
        placed = own.there.place("BF16")
        assert placed is not None
        assert (placed.product.slices, placed.product.blocks) == (4, 3)
    assert results[0] == results[1]


@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_products_of_several_slices_and_many_tiles_are_right(
    dtype: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(product, "_MULTIPROCESSORS", 1)
    monkeypatch.setattr(product, "_BLOCKS_EACH", 2)
    array = matrix(70, 5248).astype(NUMPY[dtype])
    for backwards in (False, True):
        own = made(array, backwards=backwards)
        x = activations(batch, 5248, dtype)
        assert excess(own.multiply(x), x, own.weight, None) <= SUMMING
        placed = own.there.place(dtype)
        assert placed is not None
        assert (placed.product.slices, placed.product.units_of_slice) == (1, 6)


def test_a_matrix_without_a_mask_is_multiplied() -> None:
    array = matrix(33, 640, 1.0).astype(np.float16)
    own = made(array)
    assert own.there.entry.mask is None
    x = activations(2, 640, "F16")
    assert excess(own.multiply(x), x, own.weight, None) <= SUMMING


def test_uniform_levels_are_multiplied_like_centroids() -> None:
    array = np.clip(np.round(matrix(40, 512) * 3), -8, 8).astype(np.float32)
    own = made(array, PRESETS["fused"].but(quantiser=Uniform(step=1.0, rate_weight=0.0)))
    assert (own.weight == array).all()
    x = activations(5, 512, "F32")
    assert excess(own.multiply(x), x, own.weight, None) <= SUMMING


def test_infinite_activations_affect_only_their_own_rows() -> None:
    own = made(matrix(20, 256).astype(ml_dtypes.bfloat16))
    x = activations(3, 256, "BF16")
    clean = own.multiply(x)
    x[1, 7] = np.inf
    found = own.multiply(x)
    assert not np.isfinite(found[1].astype(np.float32)).any()
    assert found[[0, 2]].tobytes() == clean[[0, 2]].tobytes()


# ---------------------------------------------------------------------------------------- which matrices


def product_of(data: bytes, dtype: str = "BF16", compute: str | None = None) -> Any:
    with sfpformat.open(data, engine="python") as file:
        entry = file.entry("w")
        return make_product(entry, file.decoder(entry).vectors, dtype, compute or dtype)


def file_of(options: Options, array: NDArray[Any] | None = None, **more: Any) -> bytes:
    return save({"w": matrix(64, 512) if array is None else array}, options=options, **more)


@pytest.mark.parametrize(
    "options",
    [
        PRESETS["gpu"].but(quantiser=Table(centroids=8)),
        FUSED.but(quantiser=Table(centroids=16)),
        fused("column"),
        fused(96),
        FUSED.but(segment=1024),
        FUSED.but(mask="runs", fixed_width=False),
        PRESETS["fused"],
    ],
)
def test_matrices_that_the_product_does_not_support_are_decoded(options: Options) -> None:
    assert product_of(file_of(options)) is None
    assert product_of(file_of(FUSED)) is not None


def test_rows_that_are_not_multiples_of_a_segment_are_decoded() -> None:
    assert product_of(file_of(FUSED, matrix(64, 480))) is None
    assert product_of(file_of(FUSED.but(segment=96), matrix(64, 384))) is not None


def test_chunks_of_a_product_matrix_hold_whole_rows() -> None:
    data = file_of(FUSED.but(chunk=5000), matrix(64, 1920))
    with sfpformat.open(data) as file:
        entry = file.entry("w")
        assert (entry.segment, entry.chunk * entry.segment) == (480, 2 * 1920)
    assert product_of(data) is not None


def test_weights_with_multipliers_are_decoded_and_those_with_importances_are_multiplied() -> None:
    importance = {"w": np.abs(matrix(64, 512, 1.0))}
    for role, possible in (("multiplier", False), ("metadata", True)):
        data = file_of(FUSED.but(importance=ImportanceOptions(role=role)), importances=importance)
        assert (product_of(data) is not None) == possible
    own = Made(data)
    x = activations(1, 512, "BF16")
    assert excess(own.multiply(x), x, own.weight.astype(ml_dtypes.bfloat16), None) <= SUMMING


@pytest.mark.parametrize(
    ("stored", "dtype", "compute", "scaled"),
    [
        ("F32", "F32", "BF16", True),
        ("F32", "BF16", "BF16", True),
        ("BF16", "BF16", "BF16", True),
        ("BF16", "F32", "F32", False),
        ("F16", "BF16", "BF16", False),
        ("BF16", "BF16", "F16", False),
    ],
)
def test_weights_are_converted_like_decoded_ones(stored: str, dtype: str, compute: str, scaled: bool) -> None:
    array = matrix(32, 256).astype(NUMPY[stored])
    for scale, possible in ((None, True), ("row", scaled)):
        data = save({"w": array}, options=fused(scale))
        product = product_of(data, dtype, compute)
        assert (product is not None) == possible
        if product is None:
            continue
        own = Made(data)
        placed = own.there.place_for(product)
        assert placed is not None
        weight = own.weight.astype(NUMPY[dtype]).astype(NUMPY[compute])
        found = Multiplication(own.device, placed, np.eye(8, 256, 3).astype(NUMPY[compute]), None).result()
        assert found.tobytes() == (weight.T[3:11] + 0).tobytes()


def test_dtypes_without_tensor_core_support_are_decoded() -> None:
    assert product_of(file_of(FUSED), "F64", "F64") is None


def test_weights_that_a_cast_makes_infinite_are_multiplied_unless_they_are_split() -> None:
    data = save({"w": matrix(32, 256) * np.float32(1e5)}, options=FUSED)
    assert product_of(data, "F16", "F32") is None
    own = Made(data)
    with np.errstate(over="ignore"):
        weight = own.weight.astype(np.float16)
    assert np.isinf(weight).any()
    found = own.multiply(np.ones((1, 256), np.float16))[0].astype(np.float32)
    spoilt = np.isinf(weight).any(1)
    assert (np.isfinite(found) <= ~spoilt).all()
    assert np.isinf(found[(weight == np.inf).any(1) & ~(weight == -np.inf).any(1)]).all()


def test_an_odd_base_is_decoded() -> None:
    for base, possible in ((2, True), (3, False)):
        entry = {
            "name": "w",
            "dtype": "F32",
            "shape": [1, 128],
            "segment": 32,
            "chunk": 4,
            "fingerprints": {"quantiser": "uniform", "step": f32_bytes(0.5), **table([4], base=base)},
        }
        data = hand_file(hand_part(entry, {"fingerprints": [base + p * 5 % 16 for p in range(128)]}))
        assert (product_of(data, "F32") is not None) == possible


@pytest.mark.parametrize(
    ("rows", "columns", "units", "slices"),
    [(64, 9088, 1, 9), (8192, 8192, 2, 4), (4096, 4096, 1, 4), (14336, 4096, 1, 4), (4096, 14336, 1, 14)],
)
def test_slices_depend_on_the_shape_alone(rows: int, columns: int, units: int, slices: int) -> None:
    own = product.Product("", 1, 8, np.zeros((), layout.MATRIX), None, rows, columns, 1)
    assert (own.units_of_slice, own.slices) == (units, slices)


# ------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("where", ["mask", "survivors"])
def test_a_mask_that_contradicts_the_index_is_refused(where: str) -> None:
    forge = Forge.of(file_of(FUSED.but(chunk=4096), matrix(40, 512)))
    taken = forge.part("w").take(1)
    if where == "mask":
        bits = taken.planes["mask residual"][2]
        taken.planes["mask residual"][2] = ("1" if bits[0] == "0" else "0") + bits[1:]
    else:
        taken.quantities["survivors"][2] -= 1
    forge.part("w").put(taken, 1)
    data = forge.build()
    with sfpformat.open(data, engine="python") as file:
        there = OnDevice(file, file.entry("w"), shim.HostDevice())
        assert there.weights() is None
        assert there.place("BF16") is None
