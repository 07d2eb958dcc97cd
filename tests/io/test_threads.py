"""Work in threads: results are in order, and failures do not depend on timing."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sfpformat
from sfpformat import OptionError, Options, Uniform
from sfpformat.io.threads import Workers, default_threads
from sfpformat.numpy import load_file, save


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 40])
def test_workers_return_results_in_the_order_of_the_items(threads: int, count: int) -> None:
    workers = Workers(threads)

    def work(item: int) -> int:
        time.sleep(0.001 * (item % 3 == 0))
        return item * item

    assert list(workers.map(work, iter(range(count)))) == [item * item for item in range(count)]
    assert list(workers.map(work, range(3))) == [0, 1, 4]  # reading them again works
    workers.stop()


def test_the_first_failure_in_the_order_of_the_items_is_raised_after_the_results_before() -> None:
    workers = Workers(4)

    def work(item: int) -> int:
        time.sleep(0.01 * (item == 3))
        if item in (3, 4):
            raise ValueError(item)
        return item

    results = workers.map(work, range(100))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="3"):
        next(results)
    workers.stop()


def test_one_item_runs_in_the_calling_thread_and_several_in_workers() -> None:
    workers = Workers(2)
    own = threading.get_ident()
    assert list(workers.map(lambda _: threading.get_ident(), range(1))) == [own]
    assert own not in set(workers.map(lambda _: threading.get_ident(), range(4)))
    workers.stop()


def test_the_default_is_the_number_of_processors_that_the_process_may_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {1, 5, 7}, raising=False)
    assert default_threads() == 3
    monkeypatch.delattr("os.sched_getaffinity")
    assert default_threads() == 8


@pytest.mark.parametrize("kind", ["dense", "few", "pruned", "quantised", "weighed"])
@pytest.mark.parametrize("engine", ["python", "numba"])
def test_the_bytes_do_not_depend_on_the_planning_threads(kind: str, engine: str) -> None:
    weights = np.random.default_rng(0).standard_normal((120, 500)).astype(np.float32)
    if kind == "few":
        weights = weights.round()
    if kind == "pruned":
        weights[abs(weights) < 1] = 0
    options = Options(chunk=1 << 13)
    if kind in ("quantised", "weighed"):
        options = options.but(quantiser=Uniform(bits=3))
    importances = {"w": np.abs(weights)} if kind == "weighed" else {}
    files = [
        save({"w": weights}, options=options, importances=importances, engine=engine, threads=threads)
        for threads in (1, 4)
    ]
    assert files[0] == files[1]


@pytest.mark.parametrize("threads", [0, -1, "2", 1.5, True])
def test_an_invalid_number_of_threads_is_refused(threads: Any, tmp_path: Path) -> None:
    tensors = {"w": np.ones((4, 8), np.float32)}
    data = save(tensors)
    (tmp_path / "m.sfp").write_bytes(data)
    for call in (
        lambda: save(tensors, threads=threads),
        lambda: load_file(tmp_path / "m.sfp", threads=threads),
        lambda: sfpformat.open(data, threads=threads),
        lambda: sfpformat.write_delta(tmp_path / "d.sfp", tensors, tensors, threads=threads),
    ):
        with pytest.raises(OptionError, match=r"threads is .* must be a whole number of at least 1"):
            call()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.sfp"]
