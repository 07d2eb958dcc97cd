"""The simulated machine of `tests.figures.parallel`, on pipelines with known times."""

from __future__ import annotations

import pytest

from ..figures.parallel import BYTES, CHUNK, RATIO, Costs, Machine, simulate

FAST = 1e18  # bytes per second
WORK = Costs(0.0, 0.0, 1e-6)  # only kernels


def test_costs_are_solved_from_the_measured_times() -> None:
    cost = Costs(2e-3, 1e-4, 1e-9)
    times = [
        cost.tensor + chunks * cost.chunk + weights * cost.weight
        for weights, chunks in ((6144, 1), (1 << 20, 4), (1 << 20, 64))
    ]
    found = Costs.of(times)
    assert (found.tensor, found.chunk, found.weight) == pytest.approx((2e-3, 1e-4, 1e-9))


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_the_chunks_of_one_tensor_occupy_all_threads(threads: int) -> None:
    machine = Machine(threads, FAST)
    seconds = simulate(machine, [16 * CHUNK], (WORK,), writes=True)
    assert seconds == pytest.approx(16 * CHUNK * 1e-6 / threads)
    assert machine.bottleneck(seconds) == "threads 100%"


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_small_tensors_occupy_all_threads(threads: int) -> None:
    seconds = simulate(Machine(threads, FAST), [1000] * 16, (WORK,), writes=True)
    assert seconds == pytest.approx(16 * 1e-3 / threads)


def test_work_with_the_gil_does_not_overlap() -> None:
    locked = Costs(1e-3, 0.0, 0.0)
    for gil, expected in ((True, 16e-3), (False, 4e-3)):
        machine = Machine(4, FAST, gil)
        seconds = simulate(machine, [1000] * 16, (locked,), writes=True)
        assert seconds == pytest.approx(expected)
    assert machine.busy["GIL"] == 0


def test_a_slow_disk_is_the_bottleneck() -> None:
    machine = Machine(64, 1e6)
    seconds = simulate(machine, [CHUNK] * 10, (WORK,), writes=True)
    assert machine.busy["disk"] == pytest.approx(10 * CHUNK * BYTES * (1 + RATIO) / 1e6)
    assert seconds == pytest.approx(machine.busy["disk"], rel=0.1)
    assert machine.bottleneck(seconds).startswith("disk")


def test_decoding_reads_the_smaller_file_and_writes_nothing() -> None:
    machine = Machine(8, 1e6)
    simulate(machine, [CHUNK] * 10, (WORK,), writes=False)
    assert machine.busy["disk"] == pytest.approx(10 * CHUNK * BYTES * RATIO / 1e6)


def test_large_tensors_do_not_overlap_because_memory_is_bounded() -> None:
    """Each takes one second to read and to write; nothing else takes time."""
    size = 1 << 26
    machine = Machine(8, size * BYTES)
    seconds = simulate(machine, [size] * 3, (Costs(0, 0, 1e-12),), writes=True)
    assert seconds == pytest.approx(3 * (1 + RATIO), rel=1e-3)
