"""SPEC.md chapter 19: limits."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from sfp_conformance.forge import Forge, Raw, exact, hand_file, hand_part, table

import sfpformat
from conformance.recipes.samples import everything, weights
from sfpformat import DEFAULT_LIMITS, LimitError, Limits, OptionError, Options
from sfpformat.decode.validate import validate
from sfpformat.numpy import save

from ..support.clauses import clauses
from ..support.forge import accepted, refused, refused_bytes


def limits_but(**changes: int) -> Limits:
    """The default limits with these changes."""
    return replace(DEFAULT_LIMITS, **changes)


def arrays(depth: int) -> Raw:
    """Nested arrays, of which the innermost is empty."""
    return Raw(b"\x91" * (depth - 1) + b"\x90")


@clauses("R-LIM-001")
def test_a_file_at_the_defaults_is_accepted() -> None:
    file = Forge.of(everything())
    file.root["x-deep"] = arrays(15)  # the root is the sixteenth
    file.part("raw").entry["name"] = "é" * 512
    file.part("flags").entry["shape"] = [9] + [1] * 31
    assert accepted(file.build())["flags"].ndim == 32


@clauses("R-LIM-001")
def test_the_writer_keeps_to_the_defaults() -> None:
    with pytest.raises(sfpformat.OptionError):
        save({"é" * 513: np.zeros(1)})
    accepted(save({"é" * 512: np.zeros(1)}))


@clauses("R-LIM-002", "R-LIM-003")
def test_a_directory_above_its_limit_is_refused_before_it_is_read() -> None:
    size = len(Forge.of(everything()).directory_bytes())
    accepted(everything(), limits_but(directory_bytes=size))
    limits = limits_but(directory_bytes=size - 1)
    error = refused_bytes(everything(), "R-LIM-002", limits=limits)
    assert "Limits(directory_bytes=" in error.detail
    broken = everything()[:-1] + b"\xc1"
    with pytest.raises(LimitError):
        sfpformat.open(broken, limits=limits)


Change = Callable[[Forge], object]


def name_of(size: int) -> Change:
    """Returns an edit that gives a tensor a name of this many bytes."""
    return lambda file: file.part("raw").entry.update(name="x" * size)


EXCEEDING: dict[str, tuple[str, Change, str | None]] = {
    "depth, arrays": ("depth", lambda file: file.root.update({"x-deep": arrays(16)}), None),
    "depth, maps": ("depth", lambda file: file.root.update({"x": Raw(b"\x81\xa1x" * 15 + b"\x80")}), None),
    "depth, far": ("depth", lambda file: file.root.update({"x-deep": arrays(100_000)}), None),
    "name bytes": ("name_bytes", name_of(1025), "x" * 1025),
    "rank": ("rank", lambda file: file.part("raw").entry.update(shape=[1] * 33), "raw"),
}


@clauses("R-LIM-002", "R-LIM-003")
@pytest.mark.parametrize("case", EXCEEDING)
def test_a_file_above_a_default_is_refused(case: str) -> None:
    limit, edit, tensor = EXCEEDING[case]
    error = refused_limit(edit, tensor, DEFAULT_LIMITS)
    assert limit in error.detail


def refused_limit(edit: Change, tensor: str | None, limits: Limits) -> sfpformat.FileFault:
    """Asserts that reader and validator refuse the edited sample because of a limit."""
    file = Forge.of(everything())
    edit(file)
    data = file.build()
    with pytest.raises(LimitError) as caught:
        sfpformat.open(data, limits=limits)
    assert caught.value.clause == "R-LIM-002"
    assert caught.value.tensor == tensor
    report = validate(data, limits=limits)
    assert [fault.clause for fault in report.faults] == ["R-LIM-002"]
    return caught.value


@clauses("R-LIM-002")
@pytest.mark.parametrize(
    ("limit", "just", "tensor"),
    [("depth", 5, None), ("name_bytes", 7, "uniform"), ("tensors", 10, None), ("rank", 2, "raw")],
)
def test_limits_of_the_user_apply_exactly(limit: str, just: int, tensor: str | None) -> None:
    accepted(everything(), limits_but(**{limit: just}))
    error = refused(
        "R-LIM-002", lambda file: None, everything(), tensor=tensor, limits=limits_but(**{limit: just - 1})
    )
    assert limit in error.detail


@clauses("R-LIM-002", "R-LIM-003")
def test_a_tensor_above_tensor_bytes_is_refused_and_the_others_are_returned() -> None:
    limits = limits_but(tensor_bytes=96 * 2)
    with sfpformat.open(everything(), limits=limits) as file:
        assert file.get_tensor("octets").nbytes == 192
        for ask in ("get_tensor", "get_importance", "get_survivors", "get_mask"):
            if ask != "get_importance":
                with pytest.raises(LimitError, match="tensor_bytes"):
                    getattr(file, ask)("runs")
        with pytest.raises(LimitError, match="tensor_bytes"):
            file.get_slice("runs")[0, :3]
    report = validate(everything(), limits=limits)
    assert {fault.tensor for fault in report.faults} == {"runs", "uniform", "group", "coded"}
    assert {fault.clause for fault in report.faults} == {"R-LIM-002"}


def great(positions: int) -> bytes:
    """A file with a chunk of 64 bytes for each 2^24 positions of a bit pattern."""
    source = exact("F32", **table([0], base=2))
    entry = {"dtype": "F32", "shape": [2**24], "segment": 65536, "chunk": 256, "fingerprints": source}
    part = hand_part({**entry, "shape": [65536]}, {"fingerprints": [2] * 65536})
    part.entry |= entry | {"shape": [positions]}
    part.chunks = part.chunks * (positions // 2**24)
    return hand_file(part)


@clauses("R-LIM-002", "R-LIM-003", "R-STR-003")
def test_a_tensor_that_expands_too_far_is_refused_before_memory_is_given_to_it() -> None:
    data = great(2**27)
    assert len(data) < 2000
    tracemalloc.start()
    with sfpformat.open(data) as file:
        assert file.info("hand").decoded_bytes == 2**29
        for ask in ("get_tensor", "get_mask", "get_survivors"):
            with pytest.raises(LimitError, match="expansion"):
                getattr(file, ask)("hand")
        with pytest.raises(LimitError, match="expansion"):
            file.get_slice("hand")[:10]
    assert [fault.clause for fault in validate(data).faults] == ["R-LIM-002"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
    with sfpformat.open(data, limits=limits_but(expansion=2**20)) as file:
        assert file.get_slice("hand")[-3:].tobytes() == np.ones(3, np.uint32).tobytes()


@clauses("R-LIM-002")
def test_a_tensor_below_the_expansion_floor_is_accepted_at_any_expansion() -> None:
    data = great(2**24)
    with sfpformat.open(data, limits=limits_but(expansion=1)) as file:
        assert file.get_slice("hand")[-1].tobytes() == b"\1\0\0\0"


@clauses("R-LIM-003")
def test_counts_are_refused_while_the_directory_is_parsed() -> None:
    entry = Forge.of(everything()).part("empty").full_entry()
    file = Forge({"tensors": [{**entry, "name": str(i)} for i in range(2000)]})
    with pytest.raises(LimitError, match="tensors"):
        sfpformat.open(file.build(), limits=limits_but(tensors=1999))
    with sfpformat.open(file.build(), limits=limits_but(tensors=2000)) as opened:
        assert len(opened) == 2000


@clauses("R-LIM-003", "R-MSG-008")
@pytest.mark.parametrize("raw", [b"\x80", b"\x90", b"\x01", b"\xa0", b"\xc4\x00"])
def test_the_memory_of_a_directory_is_in_proportion_to_its_bytes(raw: bytes) -> None:
    count = 20_000
    data = Forge({"x-a": Raw(b"\xdc" + count.to_bytes(2, "big") + raw * count)}).build()
    tracemalloc.start()
    with sfpformat.open(data):
        held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert held < 300 * len(data)


@clauses("R-LIM-001", "R-LIM-002")
def test_an_ordinary_file_stays_far_within_the_limits() -> None:
    data = save({"w": weights(300, 300)}, options=Options(coding="fingerprint"))
    accepted(
        data, Limits(directory_bytes=4096, depth=6, name_bytes=16, tensors=1, rank=2, tensor_bytes=2**20)
    )


@pytest.mark.parametrize("limits", [{"depth": 201}, {"rank": 65}])
def test_limits_that_the_reader_could_not_keep_are_refused(limits: dict[str, int]) -> None:
    with pytest.raises(OptionError, match="at most"):
        Limits(**limits)
