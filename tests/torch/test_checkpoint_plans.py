"""Plans of checkpoints: every element arrives, every chunk is read once, processes read equal amounts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sfpformat
from sfpformat import OptionError, Options
from sfpformat.decode.reader import SfpFile
from sfpformat.dtypes import DTYPES
from sfpformat.encode.sink import MemorySink
from sfpformat.encode.writer import Writer
from sfpformat.torch.distributed_checkpoint.balance import divided
from sfpformat.torch.distributed_checkpoint.boxes import Box, elements_before, elements_of, positions_of
from sfpformat.torch.distributed_checkpoint.reading_plan import Piece, plan_reading
from sfpformat.torch.distributed_checkpoint.writing_plan import Whole, plan_writing

SHAPES: dict[str, tuple[int, ...]] = {
    "matrix": (37, 64),
    "cube": (6, 5, 40),
    "vector": (1000,),
    "scalar": (),
    "empty": (0, 3),
    "long": (3, 700),
}


@pytest.fixture(scope="module")
def file() -> SfpFile:
    """A file whose tensors have many chunks."""
    sink = MemorySink()
    with Writer(sink) as writer:
        for name, shape in SHAPES.items():
            values = np.random.default_rng(0).normal(size=shape).astype("<f4")
            writer.add(name, np.asarray(values), Options(segment=32, chunk=128))
    return sfpformat.open(bytes(sink.data))


@st.composite
def boxes(draw: st.DrawFn, name: str, count: int) -> list[Box]:
    """The parts of a tensor that processes need: of a grid, as DTensors, and perhaps some alone."""
    shape = SHAPES[name]
    out = []
    columns = draw(st.sampled_from([n for n in range(1, count + 1) if count % n == 0]))
    dims = [draw(st.sampled_from([None, *range(len(shape))])) for _ in range(2)]
    for rank in range(count):
        start, size = [0] * len(shape), list(shape)
        for dim, number, parts in zip(dims, divmod(rank, columns), (count // columns, columns), strict=True):
            if dim is not None:
                step = -(-size[dim] // parts)
                first = min(number * step, size[dim])
                start[dim] += first
                size[dim] = min(step, size[dim] - first)
        if draw(st.booleans()) or rank == 0:
            out.append(Box(rank, list(SHAPES).index(name), tuple(start), tuple(size)))
    return out


@given(st.data(), st.integers(1, 5), st.sampled_from([64, 2000, 1 << 20]))
def test_every_element_arrives_once_and_every_chunk_is_read_once(
    file: SfpFile, data: st.DataObject, count: int, room: int
) -> None:
    wanted = {name: data.draw(boxes(name, count)) for name in SHAPES}
    shares = plan_reading(wanted, count, file.entry, room)
    arrived = {
        (name, box.rank): np.full(box.elements, -1, np.int64) for name, some in wanted.items() for box in some
    }
    read: list[tuple[str, int]] = []

    def take(piece: Piece) -> None:
        entry = file.entry(piece.tensor)
        size = entry.segment * entry.chunk
        read.extend((piece.tensor, k) for k in range(piece.low // size, -(-piece.high // size)))
        for box, first, stop in piece.cuts:
            positions = positions_of(box.selection(entry.shape), first, stop)
            values = np.arange(piece.low, piece.high)
            assert np.array_equal(
                elements_of(values, piece.low, box.selection(entry.shape), first, stop), positions
            )
            assert piece.low <= positions[0]
            assert positions[-1] < piece.high
            place = arrived[piece.tensor, box.rank]
            assert (place[first:stop] == -1).all()
            place[first:stop] = positions

    for rank, share in enumerate(shares):
        assert all(cut.box.rank == rank for piece in share.own for cut in piece.cuts)
        for piece in [*share.own, *(piece for each in share.rounds for piece in each.pieces)]:
            take(piece)
    assert len(read) == len(set(read))
    for name, some in wanted.items():
        for box in some:
            expected = np.arange(math.prod(SHAPES[name])).reshape(SHAPES[name])[box.slices].reshape(-1)
            assert np.array_equal(arrived[name, box.rank], expected)
    for rank, share in enumerate(shares):  # what a process receives is what the others send, in order
        assert len(share.rounds) == len(shares[0].rounds)
        for number, each in enumerate(share.rounds):
            sent = [
                (source, piece.tensor, cut)
                for source, other in enumerate(shares)
                for piece in other.rounds[number].pieces
                for cut in piece.cuts
                if source != rank and cut.box.rank == rank
            ]
            assert [tuple(one) for one in each.arrivals] == sent


@given(st.data())
def test_the_elements_before_an_edge_are_counted(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(list(SHAPES)))
    (box, *_) = data.draw(boxes(name, data.draw(st.integers(1, 4))))
    edges = np.arange(math.prod(SHAPES[name]) + 2)
    inside = np.arange(math.prod(SHAPES[name])).reshape(SHAPES[name])[box.slices].reshape(-1)
    expected = np.searchsorted(inside, edges)
    assert elements_before(box.selection(SHAPES[name]), edges).tolist() == expected.tolist()


@given(
    st.lists(st.integers(0, 1000), min_size=1, max_size=6),
    st.lists(st.integers(1, 100), min_size=1, max_size=40),
)
def test_loads_become_equal_up_to_a_piece(loads: list[int], sizes: list[int]) -> None:
    before, members = list(loads), range(len(loads))
    parts = divided(loads, members, sizes)
    assert [k for _, first, stop in parts for k in range(first, stop)] == list(range(len(sizes)))
    assert sum(loads) == sum(before) + sum(sizes)
    for rank, first, stop in parts:
        assert loads[rank] == before[rank] + sum(sizes[first:stop])
    level = next(  # of the water, if loads were the ground
        (sum(before_of) + sum(sizes)) / len(before_of)
        for before_of in (sorted(before)[:n] for n in range(len(before), 0, -1))
        if (sum(before_of) + sum(sizes)) / len(before_of) >= before_of[-1]
    )
    assert all(loads[rank] <= level + 2 * max(sizes) for rank, _, _ in parts)


def test_processes_read_equal_bytes_of_replicated_tensors_and_their_own_of_sharded_ones(
    file: SfpFile,
) -> None:
    count = 2
    for dim in (None, 0, 1):
        some = []
        for rank in range(count):
            start, size = [0, 0], list(SHAPES["matrix"])
            if dim is not None:
                step = -(-size[dim] // count)
                start[dim] = rank * step
                size[dim] = min(step, size[dim] - start[dim])
            some.append(Box(rank, 0, tuple(start), tuple(size)))
        shares = plan_reading({"matrix": some}, count, file.entry, 1 << 20)
        entry = file.entry("matrix")
        lengths = [length for length, _ in entry.chunks.tolist()]
        size_of_chunk = entry.segment * entry.chunk
        read = []
        for share in shares:
            pieces = [*share.own, *(piece for each in share.rounds for piece in each.pieces)]
            chunks = {k for p in pieces for k in range(p.low // size_of_chunk, -(-p.high // size_of_chunk))}
            read.append(sum(lengths[k] for k in chunks))
        assert sum(read) == sum(lengths)
        assert max(read) <= 1.15 * sum(lengths) / count
        if dim == 0:  # only the chunk at the boundary is shared
            shared = [piece for share in shares for each in share.rounds for piece in each.pieces]
            assert len(shared) <= 1


def whole(name: str, parts: Sequence[tuple[int, int, int]]) -> Whole:
    """A vector, given the process, start and size of its parts."""
    size = max(start + length for _, start, length in parts)
    held = tuple(Box(rank, 0, (start,), (length,)) for rank, start, length in parts)
    return Whole(name, (size,), DTYPES["F32"], held)


def test_tensors_are_written_by_a_process_that_holds_a_part_and_has_written_few_bytes() -> None:
    tensors = [
        whole("large", [(0, 0, 600), (1, 600, 600)]),
        whole("small", [(0, 0, 100), (1, 100, 100)]),
        whole("own", [(1, 0, 50)]),
        whole("other", [(0, 0, 100), (1, 100, 100)]),
    ]
    first, second = plan_writing(tensors, 2, 1 << 20)
    written = [[t.name for each in share.rounds for t in each.tensors] for share in (first, second)]
    assert written == [["large"], ["small", "own", "other"]]
    assert first.rounds[0].sends == {1: [0, 0]}
    assert second.rounds[0].sends == {0: [0]}


def test_rounds_bound_the_bytes_that_a_process_receives() -> None:
    tensors = [whole(f"w{i}", [(0, 0, 100), (1, 100, 100)]) for i in range(12)]
    shares = plan_writing(tensors, 2, 1000)
    assert len({len(share.rounds) for share in shares}) == 1
    for rank, share in enumerate(shares):
        for each in share.rounds:
            received = sum(4 * p.elements for t in each.tensors for p in t.parts if p.rank != rank)
            assert received <= 1000


def test_an_incomplete_tensor_is_refused() -> None:
    with pytest.raises(OptionError, match=r"tensor 'w': the processes save 6 of its 8 elements"):
        plan_writing([Whole("w", (8,), DTYPES["F32"], (Box(0, 0, (0,), (6,)),))], 1)
