"""The kernels, compiled for the host, against the reference: the same bits, the same faults."""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sfp_conformance.forge import f32_bytes, hand_file, hand_part, table

import sfpformat
from conformance.recipes.samples import everything, plain, weights
from kernels.tools import inputs, shim
from sfpformat import PRESETS, Exact, Options, Table, Uniform
from sfpformat.engines import translation
from sfpformat.engines.cuda import driver, kernel_source, layout, pinned_loading, work
from sfpformat.engines.cuda.change_checksums import sum_tables
from sfpformat.errors import FileFault
from sfpformat.numpy import load, save

from ..support.conformance_cases import cases, data_of
from ..support.mutations import with_changed_chunks, with_changes, with_random_planes
from ..support.programs import needs
from ..support.strategies import Job, jobs, lossless_jobs, written

pytestmark = needs("g++")

BF16 = np.dtype(ml_dtypes.bfloat16)


class Judged:
    """Records whether the kernels accepted each run."""

    def __init__(self) -> None:
        self.good: list[bool] = []

    def decode_runs(self, runs: Any) -> list[bool]:
        good = work.decode_runs(runs)
        self.good += good
        return good


@pytest.fixture(scope="module", params=["forwards", "backwards"], autouse=True)
def judged(request: pytest.FixtureRequest) -> Iterator[Judged]:
    """Kernels that run on the host, the threads of a block in either order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "why_not", lambda: None)
        patch.setattr(pinned_loading, "open_device", shim.device_of(backwards=request.param == "backwards"))
        patch.setattr(work, "_thread", threading.local())
        said = Judged()
        patch.setattr("sfpformat.engines.cuda.engine.decode_runs", said.decode_runs)
        yield said


def outcome(data: bytes, engine: str) -> Any:
    """Returns the bits of all tensors, or all fields of the fault."""
    try:
        with sfpformat.open(data, threads=1, engine=engine) as file:
            return [array.tobytes() for array in file.get_tensors().values()]
    except FileFault as fault:
        return fault.code, fault.clause, fault.tensor, fault.offset, fault.detail


def same_by_both(data: bytes) -> Any:
    found = outcome(data, "cuda")
    assert found == outcome(data, "python")
    return found


# --------------------------------------------------------------------------------------------- the same bits


def accepted(data: bytes, judged: Judged) -> None:
    judged.good = []
    assert isinstance(same_by_both(data), list)
    assert all(judged.good)


@settings(max_examples=200)
@given(jobs())
def test_kernels_return_the_same_bits_as_the_reference(judged: Judged, job: Job) -> None:
    accepted(written(job), judged)


@settings(max_examples=100)
@given(lossless_jobs())
def test_kernels_restore_lossless_tensors_bit_for_bit(judged: Judged, job: Job) -> None:
    data = written(job)
    accepted(data, judged)
    assert load(data, engine="cuda", threads=1)["tensor"].tobytes() == job.expected


def test_hand_made_files_are_decoded(judged: Judged) -> None:
    for data in (plain(), everything()):
        accepted(data, judged)


Made = tuple[Any, Options, float]
SPEED = PRESETS["speed"]
KERNELS: dict[str, list[Made]] = {
    "any_1": [(ml_dtypes.float8_e5m2, Options(Uniform(bits=3.0, scale="row")), 0.5)],
    "any_2": [(np.float16, Options(Table(centroids=9, scale="column")), 0.5)],
    "any_4": [(np.float32, Options(Uniform(bits=4.0, scale=100)), 1.0)],
    "any_8": [
        (np.float64, Options(Uniform(bits=4.0, scale="row")), 0.2),
        (np.float64, Options(), 1.0),
    ],
    "short_1": [
        (ml_dtypes.float8_e4m3fn, Options(coding="fingerprint"), 0.3),
        (ml_dtypes.float8_e5m2, Options(coding="fingerprint", mask="none", group=2), 1.0),
    ],
    "short_2": [
        (BF16, Options(mask="octets", group=2, mantissa_bits=1), 0.5),
        (BF16, Options(Uniform(step=0.02), mask="runs"), 0.1),
        (BF16, Options(Uniform(step=0.02), mask="runs", polarity=0, codes=1), 0.8),
        (np.float16, Options(Uniform(step=0.05, scale="tensor"), group=2), 0.9),
        (BF16, Options(trim=True, mask="octets", mantissa_bits=1), 0.4),
    ],
    "sparse_2_1_many_short": [
        (BF16, PRESETS["gpu"].but(quantiser=Uniform(step=0.1), codes=5), 0.5),
        (np.float16, PRESETS["gpu"].but(quantiser=Table(centroids=20, scale="tensor"), codes=3), 1.0),
    ],
    "sparse_2_1_one_short": [
        (BF16, PRESETS["gpu"].but(quantiser=Table(centroids=8)), 0.5),
        (np.float16, PRESETS["gpu"].but(quantiser=Table(centroids=20, scale="tensor")), 1.0),
        (BF16, PRESETS["fused"].but(quantiser=Table(centroids=8)), 0.5),
        (np.float16, PRESETS["fused"].but(quantiser=Table(centroids=128)), 0.3),
        (BF16, PRESETS["fused"].but(quantiser=Table(centroids=2)), 1.0),
    ],
    "sparse_2_1_many_long": [
        (np.float16, Options(Table(centroids=20), mask="octets"), 0.5),
        (BF16, Options(Table(centroids=40), group=1, mask="octets"), 0.1),
        (BF16, Options(Table(centroids=40), group=1, codes=4), 1.0),
    ],
    "sparse_2_8_one_short": [(BF16, PRESETS["gpu"].but(mask="octets", quantiser=Exact()), 0.5)],
    "sparse_2_8_many_short": [(BF16, PRESETS["gpu"].but(mask="octets", quantiser=Exact(), codes=4), 0.95)],
    "sparse_2_8_many_long": [
        (BF16, Options(Exact(), mask="octets", mantissa_bits=0, group=1, codes=n), d)
        for n, d in ((1, 0.05), (6, 0.5))
    ],
    "short_4": [(np.float32, Options(Uniform(step=0.05)), 0.5)],
    "plain_2": [(BF16, Options(Uniform(step=0.0005)), 0.9), (np.float16, SPEED.but(window=4), 1.0)],
    "plain_4": [(np.float32, Options(mask="runs", polarity=0), 0.9), (np.float32, Options(narrow=True), 0.5)],
    "plain_8": [(np.float64, Options(narrow=False), 1.0)],
    "dense_2_8_one_short": [(BF16, Options(codes=1, code_limit=8), 1.0)],
    "dense_2_8_one_long": [(BF16, Options(codes=1), 1.0)],
    "dense_2_8_many_short": [(BF16, Options(codes=4, code_limit=8), 1.0)],
    "dense_2_8_many_long": [(BF16, Options(codes=4), 1.0)],
    "dense_4_24_one_short": [(np.float32, Options(codes=1, code_limit=8, trim=False), 1.0)],
    "dense_4_24_one_long": [(np.float32, Options(codes=1, trim=False), 1.0)],
    "dense_4_24_many_short": [(np.float32, Options(codes=3, code_limit=8, trim=False), 1.0)],
    "dense_4_24_many_long": [(np.float32, Options(codes=3, trim=False), 1.0)],
    "dense_2_0": [(np.float16, Options(), 1.0), (BF16, Options(mantissa_bits=1), 1.0)],
    "dense_4_0": [(np.float32, Options(trim=True), 1.0)],
    "windows_2_8": [(BF16, SPEED.but(window=w), 1.0) for w in (3, 4)],
    "windows_4_24": [(np.float32, SPEED.but(window=w, trim=False), 1.0) for w in (3, 4)],
}


def spread_weights(dtype: Any, density: float, rows: int = 60, columns: int = 700) -> Any:
    """Rows of several spreads, the first ones rounded, so that the file has several codes and some trims."""
    spread = 2.0 ** (-np.arange(rows) // 8).astype(np.float32)
    array = weights(rows, columns, density=density, seed=5) * spread[:, None]
    array[:8] = array[:8].astype(BF16).astype(np.float32)
    return array.astype(dtype)


def test_every_kernel_decodes_its_kind_of_stream(judged: Judged) -> None:
    of_products_and_deltas = ("multiply", "place", "count_keys", "sum_keys", "flip_elements")
    others = {kernel for kernel in kernel_source.kernels() if kernel.startswith(of_products_and_deltas)}
    others |= {"masks", "importances"}
    assert set(KERNELS) | {"fill_tables", "index_chunks"} | others == set(kernel_source.kernels())
    for kernel, kinds in KERNELS.items():
        for dtype, options, density in kinds:
            for segment in (96, 512, 3072) if kernel.startswith("windows") else (96, 512):
                data = save({"w": spread_weights(dtype, density)}, options=options.but(segment=segment))
                accepted(data, judged)
                device: Any = work._thread.queue.device
                assert device.launched[-1] == kernel, (kernel, device.launched[-3:])


def test_every_kernel_decodes_chunks_with_an_index_of_several_rounds(judged: Judged) -> None:
    for kernel in ("short_2", "sparse_2_1_one_short", "dense_2_8_many_short", "dense_4_0", "windows_2_8"):
        dtype, options, density = KERNELS[kernel][-1]
        array = spread_weights(dtype, density, 120)
        with sfpformat.open(data := save({"w": array}, options=options.but(segment=32))) as file:
            entry = file.entry("w")
            assert (len(entry.chunks), entry.segments) == (1, 2625)
        accepted(data, judged)


WINDOWS = [case for case in cases("yn") if case["recipe"] == "recipes.windows"]


@pytest.mark.parametrize("case", WINDOWS, ids=lambda case: str(case["id"]))
def test_golden_files_with_windows_have_the_weights_or_the_fault_of_the_reference(case: Any) -> None:
    assert isinstance(same_by_both(data_of(case)), list) == (case["expected"]["outcome"] == "accept")


def test_windows_of_all_256_classes_are_decoded(judged: Judged) -> None:
    rng = np.random.default_rng(3)
    for dtype, item in ((BF16, 2), (np.dtype(np.float32), 4)):
        patterns = rng.integers(0, 1 << 8 * item, 5000, dtype=f"u{item}")
        patterns[40:] |= patterns.dtype.type(0x78 << (8 * item - 8))  # most in the greatest classes
        patterns[0] = 0
        data = save(
            {"w": patterns.view(dtype)}, options=SPEED.but(window=4, coding="fingerprint", trim=False)
        )
        with sfpformat.open(data) as file:
            parts = file.entry("w").fingerprints
            assert parts is not None
            assert (parts.table.window, parts.table.classes) == (4, 256)
        accepted(data, judged)


@settings(max_examples=100)
@given(st.integers(0, 2), st.integers(0, 2**32), st.booleans())
def test_damaged_windows_give_the_values_or_the_fault_of_the_reference(
    number: int, seed: int, planes: bool
) -> None:
    values = np.random.default_rng(5).standard_normal(2700).astype((BF16, np.float32, BF16)[number])
    options = SPEED.but(segment=(64, 160, 1280)[number], chunk=2560)
    file = save({"tensor": values}, options=options)
    same_by_both(with_random_planes(file, seed) if planes else with_changed_chunks([file], seed))


def test_tensors_of_many_kinds_share_a_launch(judged: Judged, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sfpformat.decode.execution.batches", lambda jobs, _: [jobs])
    tensors = {
        f"{kernel} {i}": spread_weights(dtype, density, 20 + i)
        for i, (kernel, cases) in enumerate(KERNELS.items())
        for dtype, _, density in cases[:1]
    }
    options = {name: KERNELS[name.split()[0]][0][1] for name in tensors}
    data = save(tensors, options=options)
    device: Any = work._thread.queue.device
    before = len(device.launched)
    accepted(data, judged)
    assert len(judged.good) == len(tensors)
    assert len(device.launched) - before <= 2 + len(KERNELS)


@pytest.mark.parametrize(("used", "by_kernels"), [(range(20, 276), True), (range(44, 300), False)])
def test_streams_are_decoded_with_up_to_256_classes_in_use(
    used: range, by_kernels: bool, judged: Judged
) -> None:
    codes = [[8 * (c in own) for c in range(300)] for own in (range(20, 276), used)]
    entry = {
        "dtype": "F32",
        "shape": [64],
        "chunk": 2,
        "fingerprints": {"quantiser": "uniform", "step": f32_bytes(0.5), **table([0] * 300, *codes)},
    }
    levels = [*range(20, 52), *reversed(range(used.stop - 32, used.stop))]
    data = hand_file(hand_part(entry, {"fingerprints": levels}, codes={"fingerprints": [0, 1]}))
    accepted(data, judged)
    assert judged.good == ([True] if by_kernels else [])


def test_slices_equal_those_of_the_reference() -> None:
    data = save({"w": spread_weights(BF16, 0.5)}, options=Options(segment=96, chunk=960))
    for index in (..., slice(3, 9), (slice(None), 5), (7, slice(100, 400)), slice(None, None, 7)):
        parts = []
        for engine in ("cuda", "python"):
            with sfpformat.open(data, threads=1, engine=engine) as file:
                parts.append(np.asarray(file.get_slice("w")[index]).tobytes())
        assert parts[0] == parts[1]


def test_each_thread_has_its_own_queue() -> None:
    tensors = {str(i): spread_weights(BF16, 1.0, 400, 700 + i) for i in range(4)}
    loaded = load(save(tensors), engine="cuda", threads=3)
    assert all(loaded[name].tobytes() == tensors[name].tobytes() for name in tensors)


# -------------------------------------------------------------------------------------------- the same faults


@settings(max_examples=200)
@given(st.integers(0, 2**64 - 1))
def test_mutated_chunks_give_the_values_or_the_fault_of_the_reference(seed: int) -> None:
    same_by_both(with_changed_chunks([plain(), everything()], seed))


@settings(max_examples=100)
@given(jobs(), st.integers(0, 2**64 - 1))
def test_mutated_files_give_the_values_or_the_fault_of_the_reference(job: Job, seed: int) -> None:
    same_by_both(with_changes(written(job), seed))


@settings(max_examples=100)
@given(jobs(), st.integers(0, 2**64 - 1))
def test_random_planes_give_the_values_or_the_fault_of_the_reference(job: Job, seed: int) -> None:
    same_by_both(with_random_planes(written(job), seed))


# --------------------------------------------------------------------------------------------- their pieces


def test_records_have_the_sizes_that_the_kernels_expect() -> None:
    sizes = (ctypes.c_uint * 9)()
    shim.load(shim.build()).record_sizes(sizes)
    records = [layout.STREAM, layout.RECIPE, layout.JOB, layout.PART, layout.CODE, layout.MATRIX]
    records += [layout.CHANGE_TILE, layout.KEY_RANGE]
    assert list(sizes) == [*(record.itemsize for record in records), sum_tables(8).nbytes]


def test_constants_equal_those_of_the_kernels() -> None:
    text = (kernel_source.folder() / "recipe.cuh").read_text("utf-8")
    theirs = {
        name: value
        for names in re.findall(r"^enum : u32 \{ ([^=}]+) \};", text, re.MULTILINE)
        for value, name in enumerate(names.split(", "))
    }
    ours = {name: value for name, value in vars(layout).items() if name in theirs}
    ours |= {name: value for name, value in vars(translation).items() if name in theirs}
    ours |= {name: value for value, name in enumerate(layout.FLOATS)}
    ours["STREAMS"] = len(translation.STREAMS)
    assert theirs == ours | {"PREFIX_ROW": 0, "RESIDUAL_ROW": 1, "CODE_ROW": 2}  # of the kernels alone
    shared = {name for name, value in vars(translation).items() if type(value) is int and name[0] != "_"}
    assert shared - {"MAX_POSITIONS"} <= theirs.keys()


NARROW: dict[str, Any] = {
    "F16": np.float16,
    "BF16": BF16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}


def edges(dtype: Any) -> Any:
    """Every finite number of a dtype, midpoints between two of them, and their neighbours."""
    width = np.dtype(dtype).itemsize
    every = np.arange(1 << (8 * width), dtype=f"u{width}").view(dtype).astype(np.float32)
    every = np.sort(every[np.isfinite(every)])
    between = ((every[1:].astype(np.float64) + every[:-1]) / 2).astype(np.float32)
    far = np.array([np.inf, -np.inf, 1e38, -1e38, 1e-45, -1e-45, 0.0], np.float32)
    points = np.concatenate([every, between, far])
    with np.errstate(over="ignore"):
        return np.concatenate([points, np.nextafter(points, np.inf), np.nextafter(points, -np.inf)])


@pytest.mark.parametrize("name", NARROW)
def test_numbers_are_rounded_like_in_the_reference(name: str) -> None:
    numbers = np.unique(edges(NARROW[name]))[:: 7 if NARROW[name] in (np.float16, BF16) else 1]
    round_number: Callable[..., int] = shim.load(shim.build()).round_number
    dtype = layout.FLOATS.index(name)
    with np.errstate(over="ignore"):
        expected = numbers.astype(NARROW[name])
    found = np.array([round_number(x, dtype) for x in numbers.tolist()])
    assert found.tolist() == expected.view(f"u{expected.itemsize}").tolist()


@pytest.mark.parametrize("name", NARROW)
def test_patterns_are_widened_without_loss(name: str) -> None:
    width = np.dtype(NARROW[name]).itemsize
    patterns = np.arange(1 << (8 * width), dtype=f"u{width}")
    numbers = patterns.view(NARROW[name]).astype(np.float32)
    kept = np.isfinite(numbers)
    widen: Callable[..., float] = shim.load(shim.build()).widen_pattern
    dtype = layout.FLOATS.index(name)
    found = np.array([widen(pattern, dtype) for pattern in patterns[kept].tolist()], np.float32)
    assert found.tobytes() == numbers[kept].tobytes()


def test_damaged_chunks_have_valid_checksums_and_containers() -> None:
    rng = np.random.default_rng(0)
    for _, data in inputs.files(every=20):
        damaged = inputs.damaged_file(data, rng)
        assert damaged != data
        found = outcome(damaged, "python")
        assert isinstance(found, list) or found[0] not in ("E_CRC", "E_ENCODING", "E_TRUNCATED")
