"""Hypothesis strategies for tensors of every kind, with all options of writing them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from hypothesis import reject
from hypothesis import strategies as st
from numpy.typing import NDArray

from sfpformat import Exact, ImportanceOptions, Lossless, OptionError, Options, Table, Uniform
from sfpformat.dtypes import DTYPES
from sfpformat.numpy import save

_KEEPING: tuple[Lossless | Exact, ...] = (Lossless(), Exact())
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
Array = NDArray[np.generic]

_SHAPES = [(), (1,), (31,), (32,), (33,), (97,), (300,), (640,), (0,), (0, 3), (2, 3, 0), (7, 9), (16, 40)]
_SHAPES += [(3, 5, 7), (2, 3, 4, 5), (2, 1, 3, 2, 4), (33, 33), (1, 200), (200, 1), (5, 1, 60)]
shapes = st.sampled_from(_SHAPES) | st.lists(st.integers(0, 9), max_size=5).map(tuple)
seeds = st.integers(0, 2**32 - 1)


@dataclass(frozen=True)
class Job:
    """A tensor and the options for writing it."""

    array: Array
    options: Options
    mask: NDArray[np.bool_] | None = None
    importance: Any = None
    metadata: dict[str, str] = field(default_factory=dict)

    @cached_property
    def data(self) -> bytes:
        """The file."""
        return save(
            {"tensor": self.array},
            self.metadata,
            options=self.options,
            masks={} if self.mask is None else {"tensor": self.mask},
            importances={} if self.importance is None else {"tensor": self.importance},
        )

    @property
    def expected(self) -> bytes:
        """The bytes to which a lossless job must decode: those of the array, zeros where it is pruned."""
        if self.mask is None:
            return self.array.tobytes()
        size = self.array.dtype.itemsize
        raw = np.frombuffer(self.array.tobytes(), np.uint8).reshape(-1, size).copy()
        raw[~self.mask.reshape(-1)] = 0
        return raw.tobytes()


@st.composite
def arrays(draw: st.DrawFn, dtypes: tuple[str, ...] = FLOATS, *, finite: bool = False) -> Array:
    """Arrays of arbitrary bits, of pruned normal weights, of few values, of one value, of narrower floats, of
    weights beside zeros of both signs."""
    dtype = DTYPES[draw(st.sampled_from(dtypes))]
    shape = draw(shapes)
    rng = np.random.default_rng(draw(seeds))
    kinds = (
        ["weights", "few", "constant", "rows", "signed"]
        if finite
        else ["bits", "weights", "few", "constant", "narrow", "signed"]
    )
    kind = draw(st.sampled_from(kinds))
    count = math.prod(shape)
    if kind == "bits" or not dtype.is_float:
        raw = rng.integers(0, 256, count * dtype.itemsize, np.uint8)
        if dtype.name == "BOOL":
            raw &= 1
        return np.frombuffer(raw.tobytes(), dtype.numpy).reshape(shape)
    numbers = rng.normal(size=count) * 2.0 ** draw(st.integers(-6, 2))
    if kind == "few":
        numbers = rng.choice([0.0, -0.0, 0.5, -1.0, 1.5, 448.0], count)
    if kind == "constant":
        numbers = np.full(count, draw(st.sampled_from([0.0, -0.0, 1.0, -3.0])))
    if kind == "rows":
        numbers *= 2.0 ** (np.arange(count) * 8 // max(count, 1))
    if kind == "narrow":
        numbers = numbers.astype(np.float16).astype(np.float64)
    density = draw(st.sampled_from([0.0, 0.01, 0.1, 0.4, 0.9, 1.0]))
    zeros = (
        np.copysign(0.0, rng.random(count) - draw(st.sampled_from([0.02, 0.5, 1.0])))
        if kind == "signed"
        else 0.0
    )
    numbers = np.where(rng.random(count) < density, np.clip(numbers, -448, 448), zeros)
    return numbers.astype(np.float32).astype(dtype.numpy).reshape(shape)


@st.composite
def cuttings(draw: st.DrawFn) -> dict[str, Any]:
    """Options that change no values: segments, chunks, masks, codes."""
    return {
        "coding": draw(st.sampled_from(["fingerprint", "fingerprint", "fingerprint", "auto"])),
        "mask": draw(st.sampled_from(["auto", "runs", "octets"])),
        "polarity": draw(st.sampled_from([None, 0, 1])),
        "group": draw(st.sampled_from([None, 1, 2])),
        "codes": draw(st.sampled_from([None, 1, 2, 16])),
        "window": draw(st.sampled_from([None, None, 1, 2, 3, 4])),
        "code_limit": draw(st.sampled_from([12, 12, 11, 9, 8, 5, 1])),
        "segment": draw(st.sampled_from([None, 32, 64, 96, 512])),
        "chunk": draw(st.sampled_from([1, 64, 300, 1 << 18])),
    }


@st.composite
def importances(draw: st.DrawFn, array: Array) -> tuple[Any, ImportanceOptions]:
    """An importance of every form and role, or none."""
    rng = np.random.default_rng(draw(seeds))
    options = ImportanceOptions(
        role=draw(st.sampled_from(["metadata", "multiplier"])),
        over=draw(st.sampled_from(["survivors", "all"])),
        quantiser=draw(st.sampled_from(["uniform", "exact"])),
        bits=draw(st.sampled_from([1, 6, 12, 16])),
        dtype=draw(st.sampled_from(["F32", "F16", "BF16"])),
    )
    form = draw(st.sampled_from(["none", "each", "zeros", "factors"]))
    if form == "none":
        return None, options
    if form == "factors":
        rows = array.shape[0] if array.ndim >= 2 and array.size else 1
        columns = array.size // rows
        return (rng.random(rows).astype(np.float32), rng.normal(size=columns).astype(np.float32)), options
    given = np.abs(rng.normal(size=array.shape)) * (form == "each")
    return np.asarray(given, np.float32), options


@st.composite
def lossless_jobs(draw: st.DrawFn) -> Job:
    """Any array, to be written without loss."""
    array = draw(arrays() if draw(st.integers(0, 3)) else arrays(tuple(DTYPES)))
    if array.dtype not in [DTYPES[name].numpy for name in FLOATS]:
        return Job(
            array, Options(segment=draw(st.sampled_from([32, 96])), chunk=draw(st.sampled_from([1, 200])))
        )
    options = Options(
        draw(st.sampled_from(_KEEPING)),
        mantissa_bits=draw(st.sampled_from([None, None, 0, 2, -2])),
        narrow=draw(st.booleans()),
        **draw(cuttings()),
    )
    mask = None
    if draw(st.integers(0, 3)) == 0:
        rng = np.random.default_rng(draw(seeds))
        mask = np.asarray(rng.random(array.shape) < draw(st.sampled_from([0.0, 0.3, 0.9, 1.0])))
    return Job(array, options, mask)


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    """Any array with any options that fit it."""
    if draw(st.integers(0, 2)) == 0:
        return draw(lossless_jobs())
    is_lossy = draw(st.booleans())
    array = draw(arrays(finite=is_lossy))
    importance, importance_options = draw(importances(array))
    fields = draw(cuttings()) | {"importance": importance_options}
    if is_lossy:
        scale = draw(st.sampled_from([None, "tensor", "row", "column", 1, 7, 1000]))
        scale_dtype = draw(st.sampled_from(["F32", "F16", "BF16"])) if scale else None
        lossy: dict[str, Any] = {"scale": scale, "scale_dtype": scale_dtype}
        if draw(st.booleans()):
            targets: list[dict[str, Any]] = [
                {"step": 0.05},
                {"step": 3.0},
                {"bits": 2.0},
                {"budget": 2.0},
                {"error_db": -20.0},
            ]
            lossy["rate_weight"] = draw(st.sampled_from([0.0, 0.12]))
            fields["quantiser"] = Uniform(**draw(st.sampled_from(targets)), **lossy)
        else:
            counts: list[dict[str, Any]] = [{"centroids": 1}, {"centroids": 7}, {"bits": 5.0}]
            fields["quantiser"] = Table(**draw(st.sampled_from(counts)), **lossy)
    if importance is not None and fields["coding"] == "auto":
        fields["coding"] = "fingerprint"
    return Job(array, Options(**fields), importance=importance)


def written(job: Job) -> bytes:
    """Returns the file of a job.

    Rejects the example if short codes cannot represent the stream, or if a step or a multiplier makes a
    weight too great for its dtype.
    """
    try:
        return job.data
    except OptionError as error:
        if job.options.code_limit < 8 or "too great for" in str(error):
            reject()
        raise


@st.composite
def indices(draw: st.DrawFn, shape: tuple[int, ...]) -> Any:
    """Basic indices of an array of that shape."""
    items: list[Any] = []
    for size in shape[: draw(st.integers(0, len(shape)))]:
        bound = st.none() | st.integers(-size - 2, size + 2)
        step = st.none() | st.integers(-4, 4).filter(bool)
        choices: list[st.SearchStrategy[Any]] = [st.builds(slice, bound, bound, step), st.just(slice(None))]
        if size:
            choices.append(st.integers(-size, size - 1))
        items.append(draw(st.one_of(choices)))
    if draw(st.booleans()):
        given = draw(st.integers(0, len(items)))
        if len(items) == len(shape) or given == len(items):
            items.insert(given, Ellipsis)
    if len(items) == 1 and draw(st.booleans()):
        return items[0]
    return tuple(items)
