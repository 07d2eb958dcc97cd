"""Asserts that all readers accept a hand-made file, or refuse it by a clause and with its place."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from sfp_conformance import slow_reader
from sfp_conformance.forge import Forge

import sfpformat
from sfpformat.decode.validate import validate
from sfpformat.errors import CODE_OF_CLAUSE, FileFault, InvalidFileError, LimitError, UnsupportedError
from sfpformat.limits import DEFAULT_LIMITS, Limits

from .clauses import IN_CHUNKS


def read_all(data: bytes, limits: Limits = DEFAULT_LIMITS) -> dict[str, np.ndarray]:
    """Decodes everything in a file."""
    out = {}
    with sfpformat.SfpFile(data, limits=limits, threads=1) as file:
        for name in file:
            out[name] = file.get_tensor(name)
            file.get_mask(name)
            file.get_importance(name)
            positions, weights = file.get_survivors(name)
            assert out[name].reshape(-1)[positions].tobytes() == weights.tobytes()
    return out


def accepted(data: bytes, limits: Limits = DEFAULT_LIMITS) -> dict[str, np.ndarray]:
    """Asserts that reader, validator and slow reader accept a file. Returns its tensors."""
    tensors = read_all(data, limits)
    report = validate(data, limits=limits)
    assert report.ok, report.faults
    slow = slow_reader.read(data)
    assert {name: array.tobytes() for name, array in tensors.items()} == {
        name: tensor.data for name, tensor in slow.tensors.items()
    }
    return tensors


_CLASSES = {"E_FEATURE": UnsupportedError, "E_VERSION": UnsupportedError, "E_LIMIT": LimitError}


def fault_of(data: bytes, limits: Limits = DEFAULT_LIMITS) -> FileFault:
    """Returns the fault with which the reader refuses a file."""
    try:
        read_all(data, limits)
    except FileFault as error:
        return error
    raise AssertionError("the file was accepted")


def refused_bytes(
    data: bytes,
    clause: str,
    *,
    tensor: str | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> FileFault:
    """Asserts that reader, validator and (but for limits) slow reader refuse a file by that clause."""
    error = fault_of(data, limits)
    assert error.clause == clause, f"{clause} expected: {error}"
    assert error.code == CODE_OF_CLAUSE[clause]
    assert type(error) is _CLASSES.get(error.code, InvalidFileError)
    assert error.code in str(error)
    assert clause in str(error)
    assert error.tensor == tensor
    report = validate(data, limits=limits)
    assert not report.ok
    assert not report.canonical
    assert (clause, tensor) in {(fault.clause, fault.tensor) for fault in report.faults}
    if limits is DEFAULT_LIMITS:
        with pytest.raises(slow_reader.Bad, match=clause):
            slow_reader.read(data)
    return error


def refused(
    clause: str,
    edit: Callable[[Forge], object],
    base: bytes,
    *,
    tensor: str | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> FileFault:
    """Asserts that a file is accepted, and after one edit refused by that clause, with a possible place.

    Also asserts that parsing and rebuilding the file without the edit gives the same bytes.
    """
    accepted(base)
    forge = Forge.of(base)
    assert forge.build() == base
    edit(forge)
    data = forge.build()
    assert data != base or limits is not DEFAULT_LIMITS
    error = refused_bytes(data, clause, tensor=tensor, limits=limits)
    assert error.offset is not None
    directory_at = 64 + sum(len(part.data) for part in forge.parts)
    if clause.startswith(IN_CHUNKS) and tensor is not None:
        start = forge.start_of(tensor)
        assert start <= error.offset < start + len(forge.part(tensor).data)
    elif tensor is not None:
        assert directory_at <= error.offset < len(data)
    else:
        assert 0 <= error.offset <= len(data)
    return error
