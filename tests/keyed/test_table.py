"""Keyed tables: what is built is found, in memory and in files, with both engines."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import sfpformat
from sfpformat import KeyedTable
from sfpformat.coding.keyed.hashing import Keys
from sfpformat.coding.quantisers import F32
from sfpformat.encode.writer import Writer
from sfpformat.errors import InvalidFileError, MissingTensorError, OptionError
from sfpformat.options import Table, Uniform

from ..support.clauses import clauses
from ..support.untyped import untyped

RNG = np.random.default_rng(7)
WORDS = [f"word {i}" for i in range(3000)]
STRANGERS = [f"stranger {i}" for i in range(20000)]


def weights_of(keys: int, outputs: int, share: float = 1.0, seed: int = 3) -> F32:
    rng = np.random.default_rng(seed)
    found = rng.laplace(size=(keys, outputs)) * (rng.random((keys, outputs)) < share)
    return np.asarray(found, np.float32)


def both(keys: list[str], weights: F32, **options: object) -> KeyedTable:
    """Builds a table with both engines, and checks that they give the same bytes and answers."""
    fast, slow = (
        untyped(KeyedTable.build)(keys, weights, engine=name, **options) for name in ("numba", "python")
    )
    assert fast.map.to_map() == slow.map.to_map()
    assert np.array_equal(fast._bits, slow._bits)
    for asked in (keys, STRANGERS[:500], []):
        one, other = fast.find(asked), slow.find(asked)
        assert one.weights.tobytes() == other.weights.tobytes()
        assert one.known.tobytes() == other.known.tobytes()
        assert (one.importance is None) == (other.importance is None)
        if one.importance is not None and other.importance is not None:
            assert one.importance.tobytes() == other.importance.tobytes()
    found: KeyedTable = fast
    return found


@pytest.mark.parametrize(
    ("outputs", "share"), [(1, 1.0), (1, 0.5), (2, 1.0), (9, 0.3), (40, 0.02), (300, 0.01)]
)
@pytest.mark.parametrize(
    "quantiser", [Uniform(step=0.125, rate_weight=0), Table(centroids=8), Uniform(bits=3)]
)
def test_every_key_gets_its_quantised_weights(outputs: int, share: float, quantiser: Uniform | Table) -> None:
    keys = WORDS[: max(60, 1500 // outputs)]
    weights = weights_of(len(keys), outputs, share)
    table = both(keys, weights, quantiser=quantiser)
    found = table.find(keys)
    stored = found.known
    if quantiser == Uniform(step=0.125, rate_weight=0):
        nearest = np.sign(weights) * np.floor(np.abs(weights) / np.float32(0.125) + 0.5) * 0.125
        alive = nearest.any(axis=1)
        assert stored[alive].all()
        assert np.array_equal(found.weights[alive], nearest[alive])
        assert len(table) == alive.sum()
    assert stored[np.abs(weights).max(axis=1) > 2].all()
    assert not found.weights[~stored].any()


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(st.binary(max_size=40), st.floats(-100, 100, width=32), min_size=1, max_size=60),
    st.integers(0, 9),
)
def test_any_keys_are_found_and_engines_agree(content: dict[bytes, float], check_bits: int) -> None:
    keys, weights = list(content), np.array(list(content.values()), np.float32)
    tables = [
        KeyedTable.build(keys, weights, quantiser=Table(centroids=64), check_bits=check_bits, engine=name)
        for name in ("python", "numba")
    ]
    assert np.array_equal(tables[0]._bits, tables[1]._bits)
    found = tables[0].find(keys)
    assert found.known[weights != 0].all()
    assert np.array_equal(found.weights[weights != 0, 0], weights[weights != 0])


@clauses("R-KEY-016")
def test_an_unknown_key_has_zero_weights_and_is_told_apart() -> None:
    table = KeyedTable.build(["good", "bad"], np.array([1.5, -2.0]), check_bits=32)
    assert table["good"].shape == (1,)
    assert "good" in table
    assert "other" not in table
    assert 7 not in table
    assert table[["good", "bad", "other"]][:, 0].tolist() == pytest.approx([1.5, -2.0, 0], abs=0.3)
    assert table.find(["good", "other"]).known.tolist() == [True, False]


@clauses("R-KEY-014")
def test_strings_are_looked_up_by_their_utf8_without_normalisation() -> None:
    composed, decomposed = "na\u00efve", "nai\u0308ve"
    table = KeyedTable.build([composed], np.ones(1), check_bits=32)
    assert composed in table
    assert composed.encode() in table
    assert decomposed not in table


@pytest.mark.parametrize("check_bits", [0, 3, 6])
def test_unknown_keys_match_as_often_as_predicted(check_bits: int) -> None:
    table = KeyedTable.build(
        WORDS, weights_of(3000, 3, 0.5), quantiser=Uniform(step=0.5), check_bits=check_bits
    )
    predicted = float(table.false_matches().sum())
    measured = float(table.find(STRANGERS).known.mean())
    assert measured == pytest.approx(predicted, abs=4 * np.sqrt(predicted / len(STRANGERS)) + 1e-3)


def test_keys_of_all_kinds_of_containers_are_the_same() -> None:
    keys = ["a", "bb", "ünï", "", "word"]
    table = KeyedTable.build(keys, np.arange(1.0, 6.0), quantiser=Table(centroids=5))
    wanted = table.find(keys).weights
    encoded = [key.encode() for key in keys]
    sizes = np.cumsum([0, *map(len, encoded)])
    forms = (
        encoded,
        tuple(keys),
        iter(keys),
        np.array(keys),
        np.array(encoded),
        np.array(keys, object),
        Keys(np.frombuffer(b"".join(encoded), np.uint8), sizes),
    )
    for form in forms:
        assert np.array_equal(table.find(form).weights, wanted)


@pytest.mark.parametrize("importance_bits", [0, 5])
def test_a_written_table_is_opened_from_path_bytes_and_stream(tmp_path: Path, importance_bits: int) -> None:
    importance = RNG.random(3000)
    table = KeyedTable.build(
        WORDS, weights_of(3000, 4), importance=importance, importance_bits=importance_bits, keep=2000
    )
    path = tmp_path / "table.sfp"
    table.write(path, metadata={"language": "en"})
    assert sfpformat.validate(path).ok
    wanted = table.find(WORDS)
    with path.open("rb") as stream:
        opened = [
            KeyedTable.open(path),
            KeyedTable.open(path.read_bytes(), "weights"),
            KeyedTable.open(stream),
        ]
    for one in opened:
        found = one.find(WORDS)
        assert np.array_equal(found.weights, wanted.weights)
        assert np.array_equal(found.known, wanted.known)
        assert 1980 <= len(one) <= 2000
        assert one.outputs == 4
        assert np.array_equal(one[WORDS[5]], wanted.weights[5])
    if importance_bits:
        assert wanted.importance is not None
        kept = np.argsort(-importance)[:2000]
        kept = kept[wanted.known[kept]]
        assert wanted.importance[kept] == pytest.approx(importance[kept], abs=1 / 60)


def test_a_file_can_have_several_tables_and_tensors(tmp_path: Path) -> None:
    path = tmp_path / "model.sfp"
    with Writer(path) as writer:
        writer.add("intercept", np.ones(3, np.float32))
        for name in ("words", "pairs"):
            KeyedTable.build(WORDS[:100], weights_of(100, 3), name=name).add_to(writer)
        with pytest.raises(OptionError, match="already"):
            KeyedTable.build(WORDS[:9], weights_of(9, 1), name="words").add_to(writer)
    with sfpformat.open(path) as file:
        assert file.keys() == ["intercept", "words.bits", "pairs.bits"]
    assert len(KeyedTable.open(path, "pairs")) > 90
    with pytest.raises(OptionError, match="several"):
        KeyedTable.open(path)
    with pytest.raises(MissingTensorError, match="'words', 'pairs'"):
        KeyedTable.open(path, "others")
    with Writer(tmp_path / "plain.sfp") as writer:
        writer.add("w", np.ones(3, np.float32))
    with pytest.raises(OptionError, match="no keyed table"):
        KeyedTable.open(tmp_path / "plain.sfp")


def test_a_damaged_chunk_is_found_by_look_ups_that_need_it_and_only_by_them(tmp_path: Path) -> None:
    path = tmp_path / "table.sfp"
    keys = [f"key {i}" for i in range(40000)]
    KeyedTable.build(keys, weights_of(40000, 1), check_bits=8).write(path)
    with sfpformat.open(path) as file:
        entry = file.entry("weights.bits")
        assert len(entry.chunks) >= 4
        at = file.chunk_offset(entry, 1)
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    table = KeyedTable.open(path)
    found: set[object] = set()
    for key in keys[:60]:
        try:
            found.add(bool(table.find(key).known[0]))
        except InvalidFileError as error:
            found.add((error.clause, error.tensor))
    assert found >= {True, ("R-LAY-004", "weights.bits")}
    with pytest.raises(InvalidFileError, match="R-LAY-004"):
        table.find(keys)


def test_the_bytes_do_not_depend_on_the_engine_or_the_time(tmp_path: Path) -> None:
    written = []
    for name in ("python", "numba"):
        path = tmp_path / name
        KeyedTable.build(WORDS, weights_of(3000, 2), engine=name).write(path)
        written.append(path.read_bytes())
    assert written[0] == written[1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"keys": ["a", "b", "a"]}, "'a' occurs twice, as number 0 and 2"),
        ({"keys": ["a", "b", "b"], "weights": np.array([1.0, 0, 2])}, "'b' occurs twice, as number 1 and 2"),
        ({"keys": ["a", "b", "b"], "keep": 1}, "'b' occurs twice, as number 1 and 2"),
        ({"keys": ["a", "b"]}, "do not fit 2 keys"),
        ({"keys": ["a", "b", 3]}, "not a string"),
        ({"keys": ["a", "b", "\ud800"]}, "not a string"),
        ({"weights": np.array([1, 2, np.nan])}, "infinite or NaN"),
        ({"weights": np.array([1, 2, 1e39])}, "too great"),
        ({"weights": np.array(["1", "2", "3"])}, "must be numbers"),
        ({"weights": np.zeros((3, 0))}, "1 to 4096"),
        ({"quantiser": sfpformat.Exact()}, "takes Uniform"),
        ({"quantiser": Uniform(bits=3, scale="row")}, "no scale"),
        ({"check_bits": 33}, "check_bits"),
        ({"check_bits": 3, "bits_per_key": 12}, "at most one"),
        ({"expected_error": -1.0}, "expected_error"),
        ({"bits_per_key": 0.5}, "weights alone take"),
        ({"keep": 4}, "only 3 keys"),
        ({"keep": -1}, "keep"),
        ({"keep": math.nan}, "keep"),
        ({"keep": 2.5}, "as an integer"),
        ({"importance": np.ones(2)}, "importance must be 3"),
        ({"importance": -np.ones(3)}, "importance must be 3"),
        ({"importance_bits": 4}, "needs the importance"),
        ({"importance_bits": 17}, "importance_bits"),
        ({"name": ""}, "name"),
    ],
)
def test_a_wrong_argument_is_refused_with_its_reason(change: dict[str, object], words: str) -> None:
    given: dict[str, object] = {"keys": ["a", "b", "c"], "weights": np.array([1.0, -2.0, 3.0]), **change}
    with pytest.raises(OptionError, match=words):
        untyped(KeyedTable.build)(**given)


@pytest.mark.parametrize("weights", [np.zeros((0, 2)), np.zeros((5, 2))])
def test_a_table_without_weights_knows_no_key(weights: NDArray[np.float64]) -> None:
    table = KeyedTable.build(WORDS[: len(weights)], weights, check_bits=20)
    assert len(table) == 0
    assert not table.find(WORDS).weights.any()
    assert not table.find([]).known.any()
