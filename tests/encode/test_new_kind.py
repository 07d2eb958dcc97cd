"""A quantiser kind is added by its classes and three entries in tables. Everything else asks the kind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

import sfpformat
from sfpformat import Options, validate
from sfpformat.cli import main
from sfpformat.coding import quantisers
from sfpformat.coding.mask import Mask
from sfpformat.coding.planes import AnyLevels, Levels
from sfpformat.coding.quantisers import F32, NumberQuantiser, StreamMap
from sfpformat.dtypes import Dtype
from sfpformat.encode import level_sources
from sfpformat.encode.level_sources import Kind, LossyTensor, NumberSource
from sfpformat.numpy import load_file, save_file
from sfpformat.options import LossyQuantiser


@dataclass(frozen=True)
class Squares(NumberQuantiser):
    """The magnitude is the square of its number, in units of 2^-12."""

    NAME: ClassVar[str] = "x-squares"
    KEYS: ClassVar[tuple[str, ...]] = ()

    def __str__(self) -> str:
        return "squares"

    def to_map(self) -> dict[str, object]:
        return {}

    @classmethod
    def from_map(cls, source: StreamMap) -> Squares:
        return cls()

    def fingerprint_bound(self, dtype: Dtype) -> int:
        return 1 << 16

    def importance_bound(self) -> int:
        return 1 << 15

    def greatest_magnitude(self, greatest_number: int, centroids: F32 | None) -> np.float32:
        return np.float32(self.magnitudes(np.array([greatest_number], np.uint64), None)[0])

    def magnitudes(self, numbers: Levels, centroids: F32 | None) -> F32:
        return np.square(numbers.astype(np.float32)) * np.float32(2**-12)


@dataclass(frozen=True)
class AskedSquares(LossyQuantiser):
    """The option for `Squares`."""

    NAME: ClassVar[str] = "x-squares"

    def describe(self) -> str:
        return "squares"


@dataclass(frozen=True)
class SquaresSource(NumberSource):
    """Numbers of `Squares`: the nearest square root."""

    @property
    def quantiser(self) -> Squares:
        return Squares()

    def survives(self, block: slice) -> Mask:
        return np.asarray(self.levels(block, None) >> np.uint64(1) != 0)

    def levels(self, block: slice, mask: Mask | None) -> AnyLevels:
        weights = self.tensor.flat[block].astype(np.float32)
        numbers = np.rint(np.sqrt(np.abs(weights) * np.float32(2**12))).astype(np.uint64)
        levels = numbers * np.uint64(2) + (np.signbit(weights) & (numbers > 0))
        return levels if mask is None else self.tensor.engine.chosen(levels, mask)


def _source(tensor: LossyTensor, asked: AskedSquares, *, fixed_width: bool) -> SquaresSource:
    return SquaresSource(tensor)


def _greatest_errors(
    quantiser: Squares, magnitudes: NDArray[np.float64], *_: Any, weighted: bool
) -> NDArray[np.float64]:
    return np.sqrt(magnitudes) * 2**-6 + 2**-12


@pytest.mark.parametrize("engine", ["python", "numba"])
def test_a_kind_that_is_registered_is_written_read_validated_and_shown(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(quantisers.KINDS, Squares.NAME, Squares)
    monkeypatch.setitem(level_sources.KINDS, Squares.NAME, Kind(_source, _greatest_errors))
    weights = np.random.default_rng(4).normal(0, 0.1, (120, 96)).astype(np.float32)
    weights[::3] = 0
    path = tmp_path / "m.sfp"
    save_file({"w": weights}, path, options=Options(AskedSquares(), coding="fingerprint"), engine=engine)
    numbers = np.rint(np.sqrt(np.abs(weights) * np.float32(2**12)))
    expected = np.square(numbers) * np.float32(2**-12) * np.sign(weights)
    np.testing.assert_array_equal(load_file(path, engine=engine)["w"], expected)
    assert validate(path).ok
    with sfpformat.open(path) as file:
        assert file.info("w").quantiser == "x-squares"
    assert main(["info", str(path)]) == 0
    assert "squares" in capsys.readouterr().out
