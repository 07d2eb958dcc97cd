"""Plans of requests: every byte once, within a bound on memory, in any order of reads."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfpformat import RemoteError
from sfpformat.io.remote import ahead
from sfpformat.io.remote.ahead import Progress, Range, ReadAhead

DATA = bytes(i * 7 % 251 for i in range(4000))


class Server:
    """A remote file. Requests end when the test says so, or in threads."""

    def __init__(self, pool: ThreadPoolExecutor | None = None) -> None:
        self.requests: list[tuple[int, int]] = []
        self.waiting: list[tuple[Future[bytes], int, int]] = []
        self.plans: list[ReadAhead] = []
        self._pool = pool

    def submit(self, start: int, stop: int) -> Future[bytes]:
        self.requests.append((start, stop))
        if self._pool is not None:
            return self._pool.submit(lambda: DATA[start:stop])
        future: Future[bytes] = Future()
        self.waiting.append((future, start, stop))
        return future

    def answer(self) -> None:
        """Ends all requests that wait, and those that begin because of this."""
        while self.waiting:
            future, start, stop = self.waiting.pop(0)
            if future.set_running_or_notify_cancel():
                future.set_result(DATA[start:stop])

    def add_plan(self, plan: ReadAhead) -> None:
        self.plans.append(plan)

    def remove_plan(self, plan: ReadAhead) -> None:
        if plan in self.plans:
            self.plans.remove(plan)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 100 bytes, gaps of 8."""
    monkeypatch.setattr(ahead, "MOST_BLOCK", 100)
    monkeypatch.setattr(ahead, "FIRST_BLOCK", 100)
    monkeypatch.setattr(ahead, "MOST_GAP", 8)


def test_close_ranges_are_merged_and_long_ones_are_cut() -> None:
    server = Server()
    with ReadAhead(
        [Range(server, 0, 10), Range(server, 15, 30), Range(server, 60, 70), Range(server, 100, 330)]
    ):
        assert server.requests == [(0, 30), (60, 70), (100, 200), (200, 300), (300, 330)]
    assert not server.plans


def test_the_first_blocks_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "FIRST_BLOCK", 25)
    server = Server()
    with ReadAhead([Range(server, 0, 400)]):
        sizes = [stop - start for start, stop in server.requests]
    assert sizes == [25, 25, 50, 50, 100, 100, 50]


def test_ranges_that_follow_each_other_are_one_block() -> None:
    server = Server()
    with ReadAhead([Range(server, 10 * i, 10 * i + 10) for i in range(8)]):
        assert server.requests == [(0, 80)]


def test_no_more_is_requested_than_the_memory_holds_until_bytes_are_read() -> None:
    server = Server()
    with ReadAhead([Range(server, 0, 1000)], memory=250) as plan:
        server.answer()
        assert server.requests == [(0, 100), (100, 200)]
        assert plan.read(server, 0, 60) == DATA[:60]
        assert len(server.requests) == 2
        assert plan.read(server, 60, 120) == DATA[60:120]
        assert server.requests == [(0, 100), (100, 200), (200, 300)]


def test_a_read_beyond_the_memory_starts_its_request() -> None:
    with ThreadPoolExecutor(1) as pool:
        server = Server(pool)
        with ReadAhead([Range(server, 0, 1000)], memory=100) as plan:
            assert plan.read(server, 900, 1000) == DATA[900:1000]
            assert server.requests == [(0, 100), (900, 1000)]


def test_released_bytes_are_not_served_again() -> None:
    server = Server()
    with ReadAhead([Range(server, 0, 50), Range(server, 200, 300)]) as plan:
        server.answer()
        assert plan.has(server, 0, 50)
        assert not plan.has(server, 0, 51)
        assert plan.read(server, 0, 50) == DATA[:50]
        assert plan.read(server, 0, 50) is None
        plan.forget(server, 150, 400)
        assert plan.read(server, 200, 300) is None


def test_ranges_that_overlap_are_fetched_once_and_kept_for_each_read() -> None:
    server = Server()
    with ReadAhead([Range(server, 0, 60), Range(server, 20, 80), Range(server, 20, 80)]) as plan:
        server.answer()
        for start, stop in ((0, 60), (20, 80), (20, 80)):
            assert plan.read(server, start, stop) == DATA[start:stop]
        assert sum(stop - start for start, stop in server.requests) == 80
        assert plan.read(server, 20, 80) is None


def test_a_failed_request_raises_in_the_read_that_needs_it() -> None:
    server = Server()
    with ReadAhead([Range(server, 0, 100), Range(server, 300, 400)]) as plan:
        server.waiting[0][0].set_exception(RemoteError("broken"))
        server.waiting[1][0].set_result(DATA[300:400])
        assert plan.read(server, 300, 400) == DATA[300:400]
        with pytest.raises(RemoteError, match="broken"):
            plan.read(server, 0, 10)


def test_closing_cancels_requests_and_ends_reads_that_wait() -> None:
    server = Server()
    plan = ReadAhead([Range(server, 0, 1000)], memory=300)
    found: list[Any] = []
    reader = threading.Thread(target=lambda: found.append(plan.read(server, 0, 10)))
    reader.start()
    plan.close()
    reader.join(10)
    assert found == [None]
    assert all(future.cancelled() for future, _, _ in server.waiting)
    assert len(server.requests) == 3


def test_progress_is_reported_up_to_the_whole() -> None:
    server, seen = Server(), list[Progress]()
    with ReadAhead([Range(server, 0, 250)], report=seen.append) as plan:
        server.answer()
        for start in range(0, 250, 50):
            plan.read(server, start, start + 50)
    assert [one.done for one in seen] == sorted(one.done for one in seen)
    assert seen[-1].done == seen[-1].total == 250
    assert seen[-1].gigabytes_per_second > 0


@given(
    st.lists(st.tuples(st.integers(0, 900), st.integers(1, 300)), min_size=1, max_size=12),
    st.integers(1, 1200),
    st.randoms(use_true_random=False),
)
def test_any_ranges_in_any_order_are_read_and_no_byte_twice(
    pairs: list[tuple[int, int]], memory: int, random: Any
) -> None:
    with ThreadPoolExecutor(4) as pool:
        server = Server(pool)
        ranges = [Range(server, start, start + size) for start, size in pairs]
        with ReadAhead(ranges, memory) as plan:
            for _, start, stop in random.sample(ranges, len(ranges)):
                assert plan.read(server, start, stop) == DATA[start:stop]
        fetched = [at for start, stop in server.requests for at in range(start, stop)]
        assert len(fetched) == len(set(fetched))
        assert set(fetched) >= {at for _, start, stop in ranges for at in range(start, stop)}
