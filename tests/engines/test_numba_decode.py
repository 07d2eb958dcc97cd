"""The numba engine against the reference: the same bits, the same faults, and no access out of bounds."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sfpformat
from conformance.recipes.samples import everything, plain, weights
from sfpformat import Options, Table, Uniform
from sfpformat.coding.codetable import CodeTable, PrefixCode, code_lengths
from sfpformat.coding.planes import StreamSpan, decode_levels, encode_levels
from sfpformat.engines import get_engine
from sfpformat.engines import numba as numba_engine
from sfpformat.engines.numba import lookup
from sfpformat.engines.numba.compiling import compiled_sources
from sfpformat.errors import EngineError, FileFault
from sfpformat.numpy import load, save

from ..support.mutations import with_changed_chunks, with_changes, with_random_planes
from ..support.strategies import Job, indices, jobs, shapes, written


def outcome(data: bytes, engine: str, read: Callable[[sfpformat.SfpFile], Any]) -> Any:
    """Returns the result of reading, or all fields of its fault."""
    try:
        with sfpformat.open(data, threads=1, engine=engine) as file:
            return read(file)
    except FileFault as fault:
        return fault.code, fault.clause, fault.tensor, fault.offset, fault.detail


def all_bits(file: sfpformat.SfpFile) -> list[bytes | None]:
    """Weights, masks and importances of all tensors."""
    out: list[bytes | None] = [array.tobytes() for array in file.get_tensors().values()]
    for name in file:
        importance = file.get_importance(name)
        out += [file.get_mask(name).tobytes(), None if importance is None else importance.tobytes()]
        out += [part.tobytes() for part in file.get_survivors(name)]
    return out


def same_by_both(data: bytes, read: Callable[[sfpformat.SfpFile], Any] = all_bits) -> Any:
    found = outcome(data, "numba", read)
    assert found == outcome(data, "python", read)
    return found


@settings(max_examples=300, deadline=None)
@given(jobs())
def test_both_engines_return_the_same_bits(job: Job) -> None:
    assert isinstance(same_by_both(written(job)), list)


@settings(max_examples=150, deadline=None)
@given(st.data(), st.sampled_from(["lossless", "quantised"]), shapes)
def test_both_engines_return_the_same_slices(data: Any, kind: str, shape: tuple[int, ...]) -> None:
    options = Options(segment=32, chunk=64)
    if kind == "quantised":
        options = options.but(quantiser=Uniform(step=0.1))
    file = save({"tensor": weights(*shape)}, options=options)
    index = data.draw(indices(shape))

    def read(opened: sfpformat.SfpFile) -> Any:
        try:
            return opened.get_slice("tensor")[index].tobytes()
        except IndexError:
            return "IndexError"

    same_by_both(file, read)


@settings(max_examples=400, deadline=None)
@given(st.integers(0, 2**64 - 1))
def test_both_engines_return_the_same_values_or_faults_for_mutated_chunks(seed: int) -> None:
    same_by_both(with_changed_chunks([plain(), everything()], seed))


@settings(max_examples=200, deadline=None)
@given(jobs(), st.integers(0, 2**64 - 1))
def test_both_engines_return_the_same_values_or_faults_for_mutated_files(job: Job, seed: int) -> None:
    same_by_both(with_changes(written(job), seed))


@settings(max_examples=200, deadline=None)
@given(jobs(), st.integers(0, 2**64 - 1))
def test_both_engines_return_the_same_values_or_faults_for_random_planes(job: Job, seed: int) -> None:
    same_by_both(with_random_planes(written(job), seed))


# ------------------------------------------------------------------------------------ the fast paths are used


BF16 = np.dtype(ml_dtypes.bfloat16)
KINDS: dict[str, tuple[Any, Options, Any]] = {
    "BF16": (BF16, Options(), None),
    "BF16, m = 1": (BF16, Options(mantissa_bits=1), None),
    "F32": (np.float32, Options(), None),
    "F16": (np.float16, Options(), None),
    "F64": (np.float64, Options(narrow=False), None),
    "FP8": (ml_dtypes.float8_e4m3fn, Options(), None),
    "uniform": (np.float32, Options(Uniform(error_db=-22)), None),
    "uniform, sparse": (BF16, Options(Uniform(error_db=-10)), None),
    "table": (np.float16, Options(Table(centroids=30)), None),
    "scale by row": (np.float32, Options(Uniform(error_db=-22, scale="row")), None),
    "scale by column": (BF16, Options(Uniform(error_db=-22, scale="column")), None),
    "scale by group": (np.float32, Options(Uniform(error_db=-22, scale=100)), None),
    "one scale": (np.float32, Options(Uniform(error_db=-22, scale="tensor")), None),
    "runs": (np.float32, Options(mask="runs", polarity=1), None),
    "runs of pruned": (np.float32, Options(mask="runs", polarity=0), None),
    "octets": (BF16, Options(mask="octets"), None),
    "no mask": (BF16, Options(mask="none"), None),
    "a multiplier": (
        np.float32,
        Options(Uniform(error_db=-22), importance=sfpformat.ImportanceOptions(role="multiplier")),
        "each",
    ),
    "a multiplier of positions": (
        BF16,
        Options(Uniform(error_db=-22), importance=sfpformat.ImportanceOptions(role="multiplier", over="all")),
        "each",
    ),
    "factors": (
        np.float32,
        Options(Uniform(error_db=-22), importance=sfpformat.ImportanceOptions(role="multiplier")),
        "factors",
    ),
}


@pytest.mark.parametrize("density", [1.0, 0.5, 0.05])
@pytest.mark.parametrize("kind", KINDS)
def test_the_numba_engine_decodes_all_usual_tensors_itself(
    kind: str, density: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype, options, importance = KINDS[kind]
    rng = np.random.default_rng(3)
    array = weights(150, 1000, density=density).astype(dtype)
    given_importance: Any = None
    if importance == "each":
        given_importance = rng.random(array.shape).astype(np.float32)
    elif importance == "factors":
        given_importance = (rng.random(150).astype(np.float32), rng.random(1000).astype(np.float32))
    data = save(
        {"w": array},
        options=options,
        importances={} if given_importance is None else {"w": given_importance},
    )
    expected = load(data, engine="python")["w"].tobytes()

    def refuse(*_: Any) -> None:
        raise AssertionError("left to the reference")

    monkeypatch.setattr("sfpformat.decode.tensor.TensorDecoder.values", refuse)
    assert load(data, engine="numba")["w"].tobytes() == expected


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_thread_count_does_not_change_decoded_values(threads: int) -> None:
    tensors = {str(i): weights(300, 700 + i, seed=i) for i in range(8)}
    data = save(tensors)
    loaded = load(data, engine="numba", threads=threads)
    assert list(loaded) == list(tensors)
    assert all(loaded[name].tobytes() == tensors[name].tobytes() for name in tensors)


# ------------------------------------------------------------------------------------------------- its pieces


@st.composite
def prefix_codes(draw: st.DrawFn, symbols: int) -> PrefixCode:
    counts = draw(
        st.lists(st.sampled_from([0, 1, 2, 9, 100, 5000, 10**6]), min_size=symbols, max_size=symbols)
    )
    counts[draw(st.integers(0, symbols - 1))] += 3
    counts[(counts.index(max(counts)) + 1) % symbols] += 1
    return PrefixCode(code_lengths(np.array(counts)))


@settings(max_examples=200, deadline=None)
@given(st.data(), st.sampled_from([1, 2]), st.integers(2, 15), st.integers(6, lookup.MAX_BITS))
def test_a_table_lookup_returns_the_symbols_that_prefix_its_bits(
    data: Any, group: int, classes: int, bits: int
) -> None:
    code = data.draw(prefix_codes(classes**group))
    table = CodeTable(0, bytes(classes), (code,), group)
    tables = np.empty(lookup.table_bytes(1, bits), np.uint8)
    filled, lengths = np.zeros(2, np.int64), np.frombuffer(lookup.lengths_of(table), np.uint8)
    free = np.empty(classes + 13, np.int64), np.empty(1 << bits, np.uint32), np.empty(1 << bits, np.uint64)
    assert lookup.prepare(np.uint64(0), classes, lengths, 1, group, tables, filled, free[0])
    lookup.code_of(tables, 1, bits, 0, group, filled, *free[1:])
    compiled: Any = lookup.code_at
    found = compiled.py_func(tables, 1, bits, 0, group)
    assert filled.tolist() == [1, 1]
    for symbol, word in zip(code.symbols.tolist(), code.codewords, strict=True):
        assert found.symbol_length[symbol % classes + 64 * (symbol // classes)] == len(word)
    words = dict(zip(code.codewords, code.symbols.tolist(), strict=True))
    for window in range(1 << bits):
        left, taken = format(window, f"0{bits}b")[::-1], 0
        slots: list[int] = []
        while len(slots) + group <= lookup.MAX_SLOTS:
            word = next((left[:n] for n in range(1, len(left) + 1) if left[:n] in words), None)
            if word is None:
                break
            slots += [words[word]] if group == 1 else [words[word] % classes, words[word] // classes]
            taken += len(word)
            left = left[len(word) :]
        entry = int(found.entries[window])
        if not slots:
            assert entry == lookup.LONG
            continue
        assert entry & 255 == taken
        assert entry >> lookup.COUNT_AT == len(slots)
        assert [entry >> (lookup.SLOTS_AT + 8 * n) & 255 for n in range(len(slots))] == slots


@settings(max_examples=200, deadline=None)
@given(st.data(), st.sampled_from([1, 2]), st.integers(1, 12), st.integers(1, 3), st.integers(0, 2**32))
def test_levels_equal_those_of_the_reference(
    data: Any, group: int, classes: int, codes: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    extra = bytes(data.draw(st.lists(st.sampled_from([0, 1, 3, 8, 20]), min_size=classes, max_size=classes)))
    group = group if classes > 1 else 1
    # Codes that use every symbol, so that every level can be encoded.
    code = PrefixCode(code_lengths(rng.integers(1, 1000, classes**group))) if classes > 1 else None
    table = CodeTable(data.draw(st.integers(0, 70)), extra, (code,) * codes if code else (), group)
    # Segments without levels, with few levels, and with enough levels for decoding several at once.
    counts = rng.integers(0, data.draw(st.sampled_from([9, 90, 400])), data.draw(st.integers(1, 15)))
    levels = rng.integers(table.base, table.top, int(counts.sum())).astype(np.uint64)
    numbers = rng.integers(0, max(len(table.codes), 1), len(counts))
    planes = encode_levels(levels, counts, numbers, np.zeros(len(counts), np.int64), table)
    chunk = np.concatenate([planes.prefix, planes.residual, np.zeros(16, np.uint8)])
    span = StreamSpan(
        counts,
        numbers,
        planes.trims,
        0,
        planes.prefix_bits,
        8 * len(planes.prefix),
        planes.residual_bits,
    )
    assert np.array_equal(decode_levels(chunk, span, table), levels)
    assert np.array_equal(numba_engine.decode_levels(chunk, span, table), levels)


# ------------------------------------------------------------------------------------------- choosing engines


def test_an_engine_is_selected_by_name_or_by_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    assert get_engine("numba").name == "numba"
    assert get_engine("python").name == "python"
    monkeypatch.setenv("SFPFORMAT_ENGINE", "python")
    assert get_engine().name == "python"
    monkeypatch.setenv("SFPFORMAT_ENGINE", "numba")
    assert get_engine().name == "numba"
    assert get_engine("python").name == "python"


def test_an_unavailable_engine_raises_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(EngineError, match=r"numba is not installed; pip install 'sfpformat\[fast\]'"):
        sfpformat.open(plain(), engine="numba")
    assert get_engine("auto").name == "python"


def test_auto_does_not_import_numba_for_little_work() -> None:
    program = (
        "import sys, sfpformat.numpy as n; n.load(sys.stdin.buffer.read()); print('numba' in sys.modules)"
    )
    for tensor, imported in ((weights(50, 50), b"False"), (np.ones(9_000_000, np.float32), b"True")):
        done = subprocess.run(
            [sys.executable, "-c", program],
            input=save({"w": tensor}),
            capture_output=True,
            env={key: value for key, value in os.environ.items() if key != "SFPFORMAT_ENGINE"},
            check=True,
        )
        assert done.stdout.strip() == imported


# --------------------------------------------------------------------------------------- caches of kernels


def definition(module: str, name: str) -> Path:
    """Returns the file that defines a name of a module, which may import it from another one."""
    found = importlib.import_module(module)
    assert found.__file__ is not None
    assert found.__spec__ is not None
    for node in ast.parse(Path(found.__file__).read_text("utf-8")).body:
        if isinstance(node, ast.ImportFrom) and name in [some.asname or some.name for some in node.names]:
            return definition(resolved(node, found.__spec__.parent or ""), name)
    return Path(found.__file__)


def resolved(node: ast.ImportFrom, package: str) -> str:
    return importlib.util.resolve_name("." * node.level + (node.module or ""), package)


def test_the_kernels_cache_is_invalid_after_a_change_of_any_constant_that_they_import() -> None:
    package = numba_engine.__name__
    constants = {
        definition(resolved(node, package), some.name)
        for path in Path(numba_engine.__file__).parent.glob("*.py")
        for node in ast.parse(path.read_text("utf-8")).body
        if isinstance(node, ast.ImportFrom) and node.level
        for some in node.names
        if some.name.isupper()
    }
    assert {path.name for path in constants} >= {"uniform.py", "codetable.py", "translation.py", "prefix.py"}
    assert constants <= set(compiled_sources())
