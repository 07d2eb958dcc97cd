"""SPEC.md 28.4: deltas of pruned and quantised tensors, listed as parts."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sfp_conformance import slow_reader
from sfp_conformance.forge import Forge, f32_bytes, hand_file, hand_part, table
from sfp_conformance.slow_reader.delta import result_of

import sfpformat
from conformance.recipes.deltas.models import between, split, structures_of
from sfpformat import (
    BaseMismatchError,
    ImportanceOptions,
    InvalidFileError,
    Lossless,
    OptionError,
    Options,
    Table,
    Uniform,
    Writer,
)
from sfpformat.container.delta_map import DeltaMap
from sfpformat.decode.parts import Parts, parts_of
from sfpformat.decode.reader import SfpFile
from sfpformat.deltas.chains import open_chain
from sfpformat.deltas.parts import separator_for
from sfpformat.encode.sink import MemorySink
from sfpformat.engines import available

from ..support.clauses import clauses
from ..support.forge import accepted, refused

ENGINES = [name for name in ("python", "numba") if available()[name] is None]
QUANTISERS: list[Any] = [Lossless(), Uniform(step=0.1), Uniform(bits=4, scale="row")]
QUANTISERS += [Table(bits=3, scale=64), Table(bits=4, scale="column")]
IMPORTANCES = [
    None,
    ImportanceOptions(),
    ImportanceOptions(role="multiplier", over="all"),
    ImportanceOptions(quantiser="exact", dtype="BF16"),
    ImportanceOptions(role="multiplier", quantiser="exact", dtype="F16"),
]


class Kept(NamedTuple):
    """A tensor to write."""

    array: NDArray[Any]
    options: Options = Options()
    mask: NDArray[np.bool_] | None = None
    importance: Any = None


def file_of(tensors: dict[str, Kept], **root: Any) -> bytes:
    """Returns an `.sfp` file."""
    sink = MemorySink()
    with Writer(sink, engine="python", threads=1, **root) as writer:
        for name, (array, options, mask, importance) in tensors.items():
            writer.add(name, array, options, mask=mask, importance=importance)
    return bytes(sink.data)


def written(base: bytes, new: bytes, **options: Any) -> tuple[bytes, DeltaMap]:
    """Returns a delta between two files, and what it says."""
    sink = MemorySink()
    with SfpFile(base) as old, SfpFile(new) as now:
        described = sfpformat.write_delta(sink, old, now, threads=1, **options)
    return bytes(sink.data), described


def same_parts(found: Parts | None, expected: Parts | None) -> None:
    """Asserts that two tensors have equal structures and parts."""
    assert (found is None) == (expected is None)
    if found is None or expected is None:
        return
    assert (found.structure, found.shape) == (expected.structure, expected.shape)
    arrays = found.arrays()
    assert arrays.keys() == expected.arrays().keys()
    for part, array in expected.arrays().items():
        assert arrays[part].tobytes() == array.tobytes(), part


def check_result(delta: bytes, base: bytes, new: bytes, engine: str = "python") -> None:
    """Asserts that fast and slow reader make the new file from a base and a delta: all of its tensors."""
    with (
        SfpFile(base) as old,
        SfpFile(new) as now,
        sfpformat.open(delta, base=old, engine=engine) as file,
    ):
        file.check_base()
        assert list(file) == list(now)
        for name in now:
            assert file.get_tensor(name).tobytes() == now.get_tensor(name).tobytes(), name
            same_parts(file.parts(name), parts_of(now, name))
            assert (file.get_mask(name) == now.get_mask(name)).all()
            found, expected = file.get_importance(name), now.get_importance(name)
            assert (found is None) == (expected is None)
            assert found is None or expected is None or found.tobytes() == expected.tobytes()
            for a, b in zip(file.get_survivors(name), now.get_survivors(name), strict=True):
                assert a.tobytes() == b.tobytes()
    slow, under, whole = slow_reader.read(delta), slow_reader.read(base), slow_reader.read(new)
    entries = {entry["name"]: entry for entry in under.root["tensors"]}
    results = result_of(slow.root, slow.tensors, entries, under.tensors)
    assert list(results) == list(whole.tensors)
    for name, (_, tensor) in results.items():
        expected_tensor = whole.tensors[name]
        assert (tensor.dtype, tensor.shape) == (expected_tensor.dtype, expected_tensor.shape)
        assert tensor.data == expected_tensor.data
        if tensor.mask:
            assert tensor.mask == expected_tensor.mask
            assert tensor.importance == expected_tensor.importance


def model(seed: int, shift: float = 0.0) -> dict[str, Kept]:
    """Returns tensors of each quantiser and importance, all drawn from one distribution."""
    rng, noise, out = np.random.default_rng(5), np.random.default_rng(seed), {}
    for number, quantiser in enumerate(QUANTISERS):
        array = rng.standard_normal((12, 20)) + shift * noise.standard_normal((12, 20))
        mask = np.abs(array) > 0.5
        given = ImportanceOptions(role="multiplier") if number == 1 else IMPORTANCES[number]
        importance: Any = rng.random((12, 20)) + 0.5 + shift * noise.random((12, 20))
        if number == 1:
            importance = rng.random(12) + 0.5, rng.random(20) + 0.5
        options = Options(quantiser=quantiser, importance=given)
        out[f"layer.{number}"] = Kept(np.where(mask, array, 0).astype(np.float16), options, mask, importance)
    out["plain"] = Kept((rng.standard_normal(40) + shift * noise.standard_normal(40)).astype(np.float32))
    return out


# ------------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("quantiser", range(len(QUANTISERS)))
def test_a_tensor_made_from_its_parts_is_canonical_and_has_the_same_parts(dtype: Any, quantiser: int) -> None:
    rng, kind = np.random.default_rng(quantiser), QUANTISERS[quantiser]
    for number, kept in enumerate([*IMPORTANCES, "factors"]):
        for pruned in (None, 0.5, 0.9):
            array, mask = rng.standard_normal((24, 32)).astype(np.float32).astype(dtype), None
            importance: Any = None if kept is None else rng.random(array.shape) + 0.5
            if kept == "factors":
                importance = rng.random(24) + 0.5, rng.random(32) + 0.5
            if pruned is not None:
                mask = rng.random(array.shape) > pruned
                array = np.where(mask, array, 0).astype(dtype)
                array[0, :4], mask[0, :4] = 0, number % 2 == 0  # survivors that are zero
            role = ImportanceOptions(role="multiplier")
            options = Options(quantiser=kind, importance=role if isinstance(kept, str) else kept)
            with SfpFile(file_of({"w": Kept(array, options, mask, importance)})) as file:
                parts = parts_of(file, "w")
                if parts is None:
                    assert (kind, mask, kept) == (Lossless(), None, None)
                    continue
                parts.require_valid()
                assert parts.values().tobytes() == file.get_tensor("w").tobytes()
                sink = MemorySink()
                with Writer(sink, engine="python", threads=1) as writer:
                    writer.add_parts("w", parts)
                with SfpFile(bytes(sink.data)) as again:
                    same_parts(parts_of(again, "w"), parts)
                    assert again.get_tensor("w").tobytes() == file.get_tensor("w").tobytes()
                assert sfpformat.validate(bytes(sink.data)).canonical


def test_numbers_of_more_than_31_bits_have_no_parts() -> None:
    for level, has_parts in ((2**32 - 3, True), (2**32 - 2, False)):
        source = {"quantiser": "uniform", "step": f32_bytes(0.5), **table([0], base=level)}
        entry = {"name": "w", "dtype": "F32", "shape": [3], "fingerprints": source}
        part = hand_part(entry, {"fingerprints": [level] * 3})
        with SfpFile(hand_file(part)) as file:
            assert (parts_of(file, "w") is not None) == has_parts


# ------------------------------------------------------------------------------------------ writing, reading


@clauses("R-DLT-017", "R-DLT-018", "R-DLT-021")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("shift", [0.0, 0.02, 3.0])
def test_masks_levels_and_importances_of_the_new_file_come_through(engine: str, shift: float) -> None:
    base, new = file_of(model(1)), file_of(model(2, shift), metadata={"step": "2"})
    data, described = written(base, new, engine=engine)
    assert sfpformat.validate(data).canonical
    check_result(data, base, new, engine)
    kinds = {tensor.name: tensor.kind for tensor in described.tensors}
    if shift == 0.0:
        assert set(kinds.values()) == {"unchanged"}
    if shift == 3.0:  # too many levels change
        assert kinds["layer.1"] == "replaced"
    accepted(data)


def test_equal_masks_cost_nothing_and_levels_less_than_elements() -> None:
    rng = np.random.default_rng(0)
    array = rng.standard_normal((128, 256)).astype(np.float32)
    mask = np.abs(array) > 0.7
    moved = array + np.float32(1e-3) * rng.standard_normal(array.shape).astype(np.float32)
    options = Options(quantiser=Table(bits=4))
    base, new = (file_of({"w": Kept(np.where(mask, x, 0), options, mask)}) for x in (array, moved))
    data, described = written(base, new)
    elements, _ = written(base, new, parts=False)
    assert [tensor.name for tensor in described.tensors] == ["w", "w/vectors"]
    assert len(data) < len(elements) / 4
    assert len(data) < len(new) / 4


def test_the_bytes_do_not_depend_on_engine_and_threads() -> None:
    base, new = file_of(model(1)), file_of(model(2, 0.02))
    first, _ = written(base, new, engine="python")
    for engine in ENGINES:
        sink = MemorySink()
        with SfpFile(base) as old, SfpFile(new) as now:
            sfpformat.write_delta(sink, old, now, engine=engine, threads=3)
        assert bytes(sink.data) == first


def test_slices_and_changes_are_those_of_the_tensor() -> None:
    base, new = file_of(model(1)), file_of(model(2, 0.02))
    data, _ = written(base, new)
    with SfpFile(base) as old, SfpFile(new) as now, sfpformat.open(data, base=old) as file:
        for name in now:
            whole, before = now.get_tensor(name), old.get_tensor(name)
            lazy = file.get_slice(name)
            assert (lazy.get_shape(), lazy.get_dtype()) == (list(whole.shape), now.info(name).dtype)
            assert lazy[3:9:2].tobytes() == whole[3:9:2].tobytes()
            bits = f"u{whole.itemsize}"
            differ = whole.view(bits) != before.view(bits)
            assert (lazy.get_changed(slice(1, 5)) == differ[1:5]).all()
            positions, values = file.get_changes(name)
            assert (positions == np.flatnonzero(differ)).all()
            assert values.tobytes() == whole.reshape(-1)[positions].tobytes()


def test_a_chain_and_models_that_are_quantised_for_the_first_time_come_through() -> None:
    dense = {name: Kept(kept.array.astype(np.float32)) for name, kept in model(1).items()}
    files = [file_of(dense), *(file_of(model(seed, 0.01 * seed)) for seed in (1, 2, 3)), file_of(dense)]
    deltas = [written(*pair)[0] for pair in pairwise(files)]
    for data, base, new in zip(deltas, files, files[1:], strict=False):
        check_result(data, base, new)
    for count in range(1, len(deltas) + 1):
        with (
            SfpFile(files[0]) as base_file,
            SfpFile(files[count]) as now,
            open_chain(base_file, deltas[:count]) as chain,
        ):
            for name in now:
                same_parts(chain.parts(name), parts_of(now, name))
                assert chain.get_tensor(name).tobytes() == now.get_tensor(name).tobytes()
            chain.check_base()
    with SfpFile(files[1]) as base_file, pytest.raises(BaseMismatchError):
        open_chain(base_file, [deltas[1], deltas[3]])


def test_names_of_parts_avoid_those_of_tensors() -> None:
    assert separator_for(["w", "w/mask", "x//vectors"]) == "///"
    base, new = ({**model(seed, 0.02), "layer.1/vectors": Kept(np.arange(float(seed)))} for seed in (1, 2))
    data, described = written(file_of(base), file_of(new))
    assert described.separator == "//"
    check_result(data, file_of(base), file_of(new))


# --------------------------------------------------------------------------------------- refused, in place


@clauses("R-DLT-009")
def test_a_base_with_other_levels_is_refused() -> None:
    base, new = file_of(model(1)), file_of(model(2, 0.02))
    data, _ = written(base, new)
    for wrong in (new, file_of(model(3, 0.02))):
        with SfpFile(wrong) as file, sfpformat.open(data, base=file) as opened:
            with pytest.raises(BaseMismatchError):
                opened.get_tensor("layer.1")
            with pytest.raises(BaseMismatchError):
                opened.check_base()
    with SfpFile(base) as file:
        arrays = file.get_tensors()
    with pytest.raises(BaseMismatchError, match=r"must be the \.sfp file"):
        sfpformat.open(data, base=arrays)


def test_arrays_take_a_delta_of_elements_and_refuse_one_of_levels() -> None:
    base, new = file_of(model(1)), file_of(model(2, 0.02))
    with SfpFile(base) as old, SfpFile(new) as now:
        target, expected = old.get_tensors(), now.get_tensors()
    before = {name: array.tobytes() for name, array in target.items()}
    with pytest.raises(OptionError, match="parts=False"):
        sfpformat.apply_delta(target, written(base, new)[0])
    assert {name: array.tobytes() for name, array in target.items()} == before
    sfpformat.apply_delta(target, written(base, new, parts=False)[0])
    assert {name: a.tobytes() for name, a in target.items()} == {n: a.tobytes() for n, a in expected.items()}


def test_arrays_take_a_delta_of_lossless_pruned_tensors() -> None:
    alive, rng = np.arange(4000) % 3 == 0, np.random.default_rng(0)
    arrays: list[NDArray[Any]] = [
        np.where(alive, rng.standard_normal(4000), 0).astype("f2") for _ in range(2)
    ]
    base, new = (file_of({"w": Kept(array)}) for array in arrays)
    data, described = written(base, new)
    assert described.tensors[0].structure is not None
    target = {"w": arrays[0].copy()}
    sfpformat.apply_delta(target, data)
    assert target["w"].tobytes() == arrays[1].tobytes()


def _whole() -> bytes:
    base = file_of(model(1))
    parts = split(base)
    return between(parts, parts, structures_of(base))


@clauses("R-DLT-017", "R-DLT-018", "R-DLT-019")
def test_lists_and_structures_that_do_not_fit_are_refused() -> None:
    whole = _whole()
    accepted(whole)

    def edit(key: str, value: Any) -> Any:
        return lambda file: file.root["delta"].update({key: value})

    found = Forge.of(whole).root["delta"]
    refused("R-DLT-017", edit("structured", found["structured"][1:]), whole)
    refused("R-DLT-017", edit("structured", [99, *found["structured"][1:]]), whole, tensor="layer.0")
    refused("R-DLT-018", edit("separator", "//"), whole, tensor="layer.1//vectors")
    refused("R-DLT-019", edit("structures", [{**found["structures"][0], "mask": 2}]), whole)


@clauses("R-DLT-020")
def test_parts_that_no_tensor_can_have_are_refused() -> None:
    base = file_of(model(1))
    parts, structures = split(base), structures_of(base)
    for name, value in (
        ("layer.1", 1 << 31),
        ("layer.3", 900),
        ("layer.1/vectors", 0),
        ("layer.4/vectors", 1 << 31),
    ):
        new = dict(parts)
        patterns = parts[name].patterns()
        at = next(i for i, pattern in enumerate(patterns) if pattern)
        new[name] = type(parts[name]).of(
            "F32", parts[name].shape, [*patterns[:at], value, *patterns[at + 1 :]]
        )
        data = between(parts, new, structures)
        with SfpFile(base) as file, sfpformat.open(data, base=file) as opened:
            with pytest.raises(InvalidFileError) as raised:
                opened.get_tensor(name.split("/")[0])
            assert (raised.value.clause, raised.value.tensor) == ("R-DLT-020", name.split("/")[0])


# ------------------------------------------------------------------------------------------------- at random


@st.composite
def pairs(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """Draws a base and a result: tensors of any dtype and structure, changed in any way."""
    made: tuple[dict[str, Kept], dict[str, Kept]] = {}, {}
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    for number in range(draw(st.integers(1, 4))):
        name = draw(st.sampled_from(["w", "w/mask", "layer.0.weight", "é"])) + str(number)
        shape = draw(st.sampled_from([(3, 11), (40,), (2, 0), (), (5, 4, 3)]))
        fate = draw(st.sampled_from(["same", "step", "step", "mask", "other", "added", "removed", "shape"]))
        kept = _tensor(draw, rng, shape)
        new = kept
        if fate in ("step", "mask"):
            new = _changed(rng, kept, mask=fate == "mask")
        elif fate in ("other", "shape"):
            new = _tensor(draw, rng, (4, 3) if fate == "shape" else shape)
        if fate != "added":
            made[0][name] = kept
        if fate != "removed":
            made[1][name] = new
    return file_of(made[0]), file_of(made[1])


def _tensor(draw: st.DrawFn, rng: np.random.Generator, shape: tuple[int, ...]) -> Kept:
    kinds: list[Any] = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]
    others: list[Any] = [np.int32, np.uint8, np.bool_, np.complex64]
    dtype = draw(st.sampled_from(kinds + others))
    array = np.asarray(rng.standard_normal(shape) * 3).astype(dtype)
    if dtype in others:
        return Kept(array)
    mask = None
    if draw(st.booleans()):
        mask = np.asarray(rng.random(shape) > draw(st.sampled_from([0.1, 0.5, 1.0])))
        array = np.where(mask, array, 0).astype(dtype)
        if draw(st.booleans()):
            array = np.asarray(array.astype(np.float32) // 2).astype(dtype)  # survivors that are zero
    quantisers: list[Any] = [Lossless(), Lossless(), Uniform(step=0.5), Table(bits=2)]
    quantiser = draw(st.sampled_from([*quantisers, Uniform(step=0.5, scale=7)]))
    given = draw(st.sampled_from(IMPORTANCES))
    importance: Any = None if given is None else np.asarray(rng.random(shape) + 0.5)
    return Kept(array, Options(quantiser=quantiser, importance=given), mask, importance)


def _changed(rng: np.random.Generator, kept: Kept, *, mask: bool) -> Kept:
    """Changes a few elements and importances, and with ``mask`` the mask."""
    chosen = rng.random(kept.array.shape) < 0.2
    array = np.where(chosen, np.roll(kept.array, 1), kept.array).astype(kept.array.dtype)
    new_mask, importance = kept.mask, kept.importance
    if importance is not None:
        importance = np.asarray(np.where(chosen, importance * 1.25, importance))
    if new_mask is not None:
        new_mask = np.asarray(new_mask ^ (rng.random(kept.array.shape) < (0.1 if mask else 0)))
        array = np.where(new_mask, array, 0).astype(kept.array.dtype)
    return Kept(array, kept.options, new_mask, importance)


@settings(max_examples=30, deadline=None)
@given(pairs(), st.sampled_from([1, 7, 1 << 22]))
def test_any_pair_of_files_comes_through_both_readers(pair: tuple[bytes, bytes], block: int) -> None:
    base, new = pair
    data, _ = written(base, new, block=block, engine="python")
    assert sfpformat.validate(data, engine="python").canonical
    check_result(data, base, new)
