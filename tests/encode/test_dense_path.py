"""Dense lossless tensors are planned by a fast path, with the choices of the planner."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import sfpformat
from sfpformat import PRESETS, Options
from sfpformat.coding.quantisers import float_patterns, may_be_narrower, narrowest_exact
from sfpformat.dtypes import DTYPES
from sfpformat.encode import plan
from sfpformat.numpy import save

pytest.importorskip("numba")

FLOATS = {"BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}
ROW = 96
SIZES = (1, 1025, 1536, 3073, 24_000, 300_001)


def normal(size: int, dtype: str) -> NDArray[Any]:
    """Normal weights; for some sizes a matrix."""
    values = np.random.default_rng(size).standard_normal(size) * 0.02
    return values.astype(FLOATS[dtype]).reshape((-1, ROW) if size % ROW == 0 else -1)


def variants(dtype: str) -> dict[str, NDArray[Any]]:
    """Weights with zeros of both signs, few values, infinities, or values of narrower dtypes."""
    rng, plain = np.random.default_rng(3), normal(24_000, dtype)
    out = {f"{size} weights": normal(size, dtype) for size in SIZES}
    for share in (0.004, 0.006, 0.3):
        out[f"{share} zeros"] = np.where(rng.random(plain.shape) < share, plain.dtype.type(0), plain)
    out["-0"] = np.where(rng.random(plain.shape) < 0.2, plain.dtype.type(-0.0), plain)
    out["powers of two"] = np.exp2(rng.integers(-12, 3, 9000)).astype(plain.dtype)
    out["few"] = np.round(plain.astype(np.float64), 2).astype(plain.dtype)
    out["narrower"] = plain.astype(ml_dtypes.float8_e5m2).astype(plain.dtype)
    out["first values narrower"] = np.concatenate([out["narrower"].reshape(-1)[:5000], plain.reshape(-1)])
    out["of one sign"] = np.abs(plain)
    out["infinite"] = np.where(rng.random(plain.shape) < 0.01, plain.dtype.type(np.inf), plain)
    out["any bits"] = rng.integers(0, 256, 20_000 * plain.itemsize, np.uint8).view(plain.dtype)
    return out


@pytest.fixture(params=[*PRESETS, "no trims", "narrow codes"])
def options(request: pytest.FixtureRequest) -> Options:
    """Options that are lossless."""
    more = {"no trims": Options(trim=False, narrow=False), "narrow codes": Options(code_limit=7)}
    found = more.get(request.param) or PRESETS[request.param]
    return found.without_loss()


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_fast_path_writes_the_bytes_of_the_planner(
    dtype: str, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = variants(dtype)
    fast = save(tensors, options=options, engine="numba", threads=1)
    monkeypatch.setattr(plan, "plan_dense", lambda *_: None)
    assert save(tensors, options=options, engine="numba", threads=1) == fast


@pytest.mark.parametrize("dtype", FLOATS)
def test_dense_tensors_are_planned_without_the_planner(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "Planner", lambda *_: pytest.fail("the planner was used"))
    tensors = {name: array for name, array in variants(dtype).items() if name.endswith(" weights")}
    save(tensors, engine="numba", threads=2)


def test_a_value_of_a_narrower_dtype_is_never_excluded() -> None:
    for narrow in ("F8_E4M3", "F8_E5M2", "BF16", "F16"):
        patterns = np.arange(1 << min(DTYPES[narrow].bits, 16)).astype(DTYPES[narrow].pattern)
        every = patterns.view(DTYPES[narrow].numpy)
        finite = every[np.isfinite(every.astype(np.float32))]
        for name in ("BF16", "F16", "F32"):
            if name not in DTYPES[narrow].widens_to:
                continue
            wide = finite.astype(DTYPES[name].numpy)
            for values in (wide[:100], wide[-100:], wide[len(wide) // 2 :]):
                assert may_be_narrower(float_patterns(values, DTYPES[name]), DTYPES[name])


@pytest.mark.parametrize("name", FLOATS)
def test_normal_weights_are_excluded_from_narrower_dtypes(name: str) -> None:
    values = normal(1000, name).reshape(-1)
    assert narrowest_exact(values, DTYPES[name]) is DTYPES[name]
    assert not may_be_narrower(float_patterns(values, DTYPES[name]), DTYPES[name])


def residual_bits(array: NDArray[Any], engine: str) -> int | None:
    """The residual bits of all classes of a tensor that is written with the default options."""
    with sfpformat.open(save({"w": array}, engine=engine)) as file:
        entry = file.entry("w")
    assert entry.fingerprints is not None
    return entry.fingerprints.table.constant_width


@pytest.mark.parametrize("engine", ["python", "numba"])
def test_classes_of_normal_weights_have_no_mantissa_bits(engine: str) -> None:
    assert residual_bits(normal(200_000, "BF16"), engine) == 8  # one bit would save 0.6 %, three 0.9 %


@pytest.mark.parametrize("engine", ["python", "numba"])
def test_a_mantissa_bit_that_saves_a_bit_is_in_the_class(engine: str) -> None:
    rng = np.random.default_rng(0)
    low = (
        rng.uniform(1.0, 1.5, 50_000) * np.exp2(rng.integers(-9, 1, 50_000)) * rng.choice([-1.0, 1.0], 50_000)
    )
    assert residual_bits(low.astype(ml_dtypes.bfloat16), engine) == 7
