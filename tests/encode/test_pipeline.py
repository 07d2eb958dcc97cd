"""Several tensors are encoded at a time: the same bytes and errors as one by one, in bounded memory."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from sfpformat import ImportanceOptions, OptionError, Options, SfpError, Table, Uniform
from sfpformat.encode.arguments import Given
from sfpformat.encode.pipeline import ROOM, Pipeline
from sfpformat.encode.writer import Writer
from sfpformat.io.threads import Workers
from sfpformat.numpy import save, save_file

Array = NDArray[np.generic]
RNG = np.random.default_rng(5)
COUNTS = (1, 2, 3, 8)
BF16 = ml_dtypes.bfloat16


def weights(*shape: int) -> NDArray[np.float32]:
    return RNG.standard_normal(shape).astype(np.float32)


TENSORS: dict[str, Array] = {
    "large": weights(300, 512).astype(BF16),
    "tiny": weights(3),
    "pruned": np.where(np.abs(big := weights(100, 400)) < 1, np.float32(0), big),
    "whole numbers": RNG.integers(0, 1000, (64, 300)),
    "few": weights(120, 200).round(),
    "empty": weights(0, 4),
    **{f"layer {i}": weights(48 + i, 200).astype(BF16 if i % 2 else np.float16) for i in range(9)},
}
SMALL_CHUNKS = Options(chunk=1 << 13)
OPTIONS = {
    "lossless": SMALL_CHUNKS,
    "quantised": SMALL_CHUNKS.but(quantiser=Uniform(bits=3)),
    "table": SMALL_CHUNKS.but(quantiser=Table(centroids=12, scale="row")),
}


def finished_in_order(threads: int, sizes: list[int], work: Callable[[int], int]) -> list[int]:
    """Returns the results of work on items of some sizes, in the order in which they are finished."""
    workers, found = Workers(threads), list[int]()
    try:
        pipeline = Pipeline(workers)
        for number, size in enumerate(sizes):
            pipeline.put(partial(work, number), size, found.append)
        pipeline.drain()
        assert not len(pipeline)
    finally:
        workers.stop()
    return found


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("engine", ["python", "numba"])
def test_the_bytes_do_not_depend_on_the_number_of_threads(kind: str, engine: str) -> None:
    options = {name: OPTIONS[kind] for name, array in TENSORS.items() if array.dtype.kind != "i"}
    files = [save(TENSORS, options=options, engine=engine, threads=threads) for threads in COUNTS]
    assert len(set(files)) == 1
    one_by_one = io.BytesIO()
    with Writer(one_by_one, engine=engine) as writer:
        for name, array in TENSORS.items():
            writer.add(name, array, options.get(name))
    assert one_by_one.getvalue() == files[0]


def test_masks_and_importances_give_the_same_bytes_with_any_number_of_threads() -> None:
    tensors = {f"w{i}": weights(60, 200) for i in range(6)}
    masks = {name: np.abs(array) > 0.5 for name, array in tensors.items() if name != "w3"}
    importances = {name: np.abs(array) for name, array in tensors.items()}
    options = Options(importance=ImportanceOptions())
    files = {
        save(tensors, options=options, masks=masks, importances=importances, threads=threads)
        for threads in COUNTS
    }
    assert len(files) == 1


@pytest.mark.parametrize("threads", COUNTS)
def test_results_are_finished_in_order(threads: int) -> None:
    def work(number: int) -> int:
        time.sleep(0.004 * (number % 3 == 0))
        return number

    sizes = [(1 << 20) * (number % 2) for number in range(30)]
    assert finished_in_order(threads, sizes, work) == list(range(30))


@pytest.mark.parametrize("threads", COUNTS)
def test_the_first_error_in_the_order_of_tensors_is_raised_and_leaves_the_old_file(
    threads: int, tmp_path: Path
) -> None:
    """The second failing tensor fails first, by the clock."""
    path = tmp_path / "m.sfp"
    path.write_bytes(b"old")
    bad = np.where(weights(200, 3000) < 4, weights(200, 3000), np.inf).astype(np.float32)
    bad[-1, -1] = np.inf
    tensors = {
        "good": weights(60, 200),
        "slow": bad,
        "fast": bad[-1:, -200:].repeat(60, 0),
        "last": weights(9),
    }
    with pytest.raises(OptionError, match=r"^tensor 'slow': a lossy quantiser takes finite"):
        save_file(tensors, path, options=Options(Uniform(bits=4)), threads=threads)
    assert path.read_bytes() == b"old"
    assert [found.name for found in tmp_path.iterdir()] == ["m.sfp"]


def _add_bad(writer: Writer, *names: str) -> None:
    """Adds tensors that cannot be quantised, under names of which the later ones may be refused."""
    for name in names:
        writer.add_later(name, np.full((200, 200), np.nan, np.float32), Options(Uniform(bits=4)))
    writer.flush()


@pytest.mark.parametrize("threads", COUNTS)
def test_an_earlier_error_comes_before_a_refused_name(threads: int) -> None:
    with pytest.raises(OptionError, match="tensor 'bad'"):
        _add_bad(Writer(io.BytesIO(), threads=threads), "bad", "")


@pytest.mark.parametrize("threads", COUNTS)
def test_a_name_that_is_waiting_to_be_written_is_taken(threads: int) -> None:
    with Writer(io.BytesIO(), threads=threads) as writer:
        writer.add_later("w", weights(100, 100))
        with pytest.raises(OptionError, match="'w' was already written"):
            writer.add_later("w", weights(100, 100))


@pytest.mark.parametrize("threads", COUNTS)
def test_a_writer_whose_tensor_failed_cannot_complete_the_file(threads: int, tmp_path: Path) -> None:
    writer = Writer(tmp_path / "m.sfp", threads=threads)
    with pytest.raises(OptionError, match="tensor 'bad'"):
        _add_bad(writer, "bad")
    with pytest.raises(SfpError, match="only partly written"):
        writer.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("threads", COUNTS)
def test_an_error_of_the_file_is_raised_and_leaves_nothing(
    threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Writer(tmp_path / "m.sfp", threads=threads)
    appended = writer._file.sink.append
    calls = []

    def fail(data: memoryview) -> None:
        calls.append(len(data))
        if len(calls) > 3:
            raise OSError(28, "No space left on device")
        appended(data)

    monkeypatch.setattr(writer._file.sink, "append", fail)

    def add_all() -> None:
        with writer:
            for number in range(40):
                writer.add_later(str(number), weights(64, 200))

    with pytest.raises(OSError, match="No space"):
        add_all()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("threads", COUNTS)
def test_a_read_that_fails_names_its_error_after_the_tensors_before_it(threads: int) -> None:
    written = []

    def read(number: int) -> Given:
        if number >= 5:
            raise OSError(5, f"cannot read {number}")
        time.sleep(0.01 * (number == 2))
        return Given(weights(100, 100))

    def add_all() -> None:
        with Writer(io.BytesIO(), threads=threads) as writer:
            for number in range(9):
                name, work = str(number), partial(read, number)
                writer.add_read(name, work, 40_000, 10_000, Options(), done=lambda e: written.append(e.name))

    with pytest.raises(OSError, match="cannot read 5"):
        add_all()
    assert written == ["0", "1", "2", "3", "4"]


def test_threads_that_share_the_chunks_of_their_tensors_do_not_wait_for_each_other() -> None:
    """All threads of the pool map at the same time, so that none is free for the items."""
    workers = Workers(3)
    together = threading.Barrier(3, timeout=20)

    def work(number: int) -> list[int]:
        if number < 3:
            together.wait()
        return list(workers.map(lambda item: number * item, range(10)))

    futures = [workers.submit(partial(work, number)) for number in range(6)]
    assert [future.result(20) for future in futures] == [[n * item for item in range(10)] for n in range(6)]
    workers.stop()


def test_the_unfinished_tensors_except_the_largest_stay_below_the_room() -> None:
    sizes = [int(size) for size in RNG.integers(0, ROOM, 60)]
    sizes[20] = 40 * ROOM
    lock, unfinished, greatest = threading.Lock(), set[int](), 0

    def work(number: int) -> int:
        nonlocal greatest
        with lock:
            unfinished.add(number)
            now = [sizes[each] for each in unfinished]
            greatest = max(greatest, sum(now) - max(now))
        time.sleep(0.001)
        return number

    workers = Workers(8)
    pipeline = Pipeline(workers)
    for number, size in enumerate(sizes):
        pipeline.put(partial(work, number), size, unfinished.discard)
    pipeline.drain()
    workers.stop()
    assert 0 < greatest <= ROOM
    assert not unfinished


PEAK = """
import resource
import ml_dtypes
import numpy as np
from sfpformat import Options
from sfpformat.encode.arguments import Given
from sfpformat.encode.writer import Writer

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def read():
    rng = np.random.default_rng(0)
    return Given(rng.standard_normal((3000, 1000), np.float32).astype(ml_dtypes.bfloat16))

with Writer("PATH", threads=8, weights=1 << 25) as writer:
    writer.add("first", read().array)  # loads the engine
    before = peak()
    for number in range(40):
        writer.add_read(str(number), read, 6_000_000, 3_000_000, Options())
print(peak() - before)
"""


def test_memory_stays_below_the_largest_tensor_and_300_mb(tmp_path: Path) -> None:
    """The tensors have 240 MB, and 1.3 GB with their levels and encoded bytes and as float32."""
    pytest.importorskip("resource")
    code = PEAK.replace("PATH", str(tmp_path / "m.sfp"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 6_000_000 + 300_000_000
