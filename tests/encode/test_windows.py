"""The encoder's choice of windows instead of prefix codes."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import sfpformat
from sfpformat import PRESETS, OptionError, Options, Table, Uniform
from sfpformat.encode import codes
from sfpformat.numpy import load, save

RNG = np.random.default_rng(5)
NORMAL = (RNG.standard_normal((128, 384)) * 0.02).astype(np.float32)
SPEED = PRESETS["speed"]


def window_of(data: bytes, name: str = "w") -> int | None:
    """Returns the bits of a symbol in a window of a tensor's fingerprints; None for prefix codes."""
    with sfpformat.open(data, engine="python") as file:
        fingerprints = file.entry(name).fingerprints
    assert fingerprints is not None
    return fingerprints.table.window


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_the_preset_speed_writes_windows_and_keeps_every_bit(dtype: Any) -> None:
    array = NORMAL.astype(dtype)
    array.reshape(-1)[:4] = [np.inf, -np.inf, 0, -0.0]
    data = save({"w": array}, options=SPEED, engine="python")
    assert window_of(data) == 3
    assert load(data, engine="python")["w"].tobytes() == array.tobytes()


def test_a_model_in_bf16_takes_about_0_7_of_its_size() -> None:
    array = NORMAL.astype(ml_dtypes.bfloat16)
    assert len(save({"w": array}, options=SPEED, engine="python")) / array.nbytes == pytest.approx(
        0.7, abs=0.01
    )


@pytest.mark.parametrize("quantiser", [Uniform(bits=3), Uniform(step=0.5, scale="row"), Table(centroids=8)])
def test_quantised_levels_in_windows_decode_to_the_weights_of_prefix_codes(quantiser: Any) -> None:
    options = Options(quantiser)
    data = save({"w": NORMAL}, options=options.but(window=3), engine="python")
    assert window_of(data) == 3
    plain = load(save({"w": NORMAL}, options=options, engine="python"), engine="python")["w"]
    assert load(data, engine="python")["w"].tobytes() == plain.tobytes()


def test_a_stream_with_many_levels_outside_has_prefix_codes() -> None:
    spread = (NORMAL * 2.0 ** RNG.integers(-40, 40, NORMAL.shape)).astype(np.float32)
    assert window_of(save({"w": spread}, options=SPEED, engine="python")) is None


def test_a_stream_of_few_classes_has_narrower_symbols() -> None:
    few = np.where(RNG.random(NORMAL.shape) < 0.97, 1 + RNG.random(NORMAL.shape), 4).astype(np.float32)
    few.reshape(-1)[5] = 2.5
    assert window_of(save({"w": few}, options=SPEED.but(trim=False), engine="python")) == 2


def test_windows_are_the_same_if_counts_of_all_segments_do_not_fit_in_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = SPEED.but(segment=96, chunk=960)
    kept = save({"w": NORMAL}, options=options, engine="python")
    monkeypatch.setattr(codes, "KEPT_BYTES", 1)
    assert save({"w": NORMAL}, options=options, engine="python") == kept


@pytest.mark.parametrize("window", [0, 5, 2.5])
def test_an_impossible_window_is_refused(window: Any) -> None:
    with pytest.raises(OptionError, match="window is"):
        Options(window=window)
