"""Arguments that match nothing, or are of the wrong kind, are refused by name before a file is written."""

from __future__ import annotations

import builtins
import importlib
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sfpformat
import sfpformat.numpy
from sfpformat import (
    PRESETS,
    ImportanceOptions,
    OptionError,
    Options,
    Table,
    Uniform,
    Writer,
    steps_for_budget,
)

WEIGHTS = np.ones((4, 8), np.float32)
MASK = np.ones((4, 8), np.bool_)
Save = Callable[..., object]


def save_arrays(tmp_path: Path, **given: Any) -> None:
    sfpformat.numpy.save_file({"w": WEIGHTS}, tmp_path / "m.sfp", **given)


def arrays_as_bytes(tmp_path: Path, **given: Any) -> None:
    sfpformat.numpy.save({"w": WEIGHTS}, **given)


DOORS = pytest.mark.parametrize("save", [save_arrays, arrays_as_bytes])


# ---------------------------------------------------------------------------------------- names of tensors


@DOORS
@pytest.mark.parametrize(
    ("argument", "value"), [("masks", MASK), ("importances", WEIGHTS), ("options", Options())]
)
def test_an_unknown_tensor_name_is_refused_with_the_nearest_name(
    save: Save, argument: str, value: object, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=f"^{argument}: no tensor is named 'W'; the nearest is 'w'$"):
        save(tmp_path, **{argument: {"w": value, "W": value}})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("argument", ["masks", "importances"])
def test_a_shared_budget_refuses_unknown_tensor_names(argument: str) -> None:
    wrong: dict[str, Any] = {argument: {"v": WEIGHTS}}
    with pytest.raises(OptionError, match=f"^{argument}: no tensor is named 'v'"):
        steps_for_budget({"w": WEIGHTS}, 3.0, **wrong)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (MASK.astype(np.int64), "the mask must be bool of shape"),
        (MASK[:1], "the mask must be bool of shape"),
        (MASK.tolist(), "the mask is a list, not an array"),
    ],
)
def test_a_shared_budget_refuses_masks_of_another_type_or_shape(mask: Any, words: str) -> None:
    with pytest.raises(OptionError, match=f"^tensor 'w': {words}"):
        steps_for_budget({"w": WEIGHTS}, 3.0, masks={"w": mask})


def test_a_shared_budget_refuses_tensors_that_are_no_mapping() -> None:
    tensors: Any = [WEIGHTS]
    with pytest.raises(OptionError, match="tensors is a list, must be a mapping"):
        steps_for_budget(tensors, 3.0)


# -------------------------------------------------------------------------------------- kinds of arguments


@DOORS
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"options": "speed"}, r"options: a str, 'speed', is not Options; pass PRESETS\['speed'\]"),
        ({"options": {"w": "sped"}}, "the options of 'w': a str, 'sped', is not Options$"),
        ({"options": 4}, "options: a int, 4, is not Options"),
        ({"masks": [MASK]}, "masks is a list, must be a mapping"),
        ({"masks": {"w": [True]}}, "the mask of 'w' is a list, not an array"),
        ({"importances": {"w": 0.5}}, "the importance of 'w' is a float, not an array"),
        (
            {"importances": {"w": (WEIGHTS[0],)}},
            "the importance of 'w' is a tuple of 1, not of rows and columns",
        ),
        ({"importances": {"w": (None, WEIGHTS[0])}}, "the importance of 'w' is a NoneType, not an array"),
        ({"metadata": "pt"}, "metadata is a str, must be a mapping"),
    ],
)
def test_an_argument_of_another_type_is_refused(
    save: Save, given: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=words):
        save(tmp_path, **given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [np.complex64, "U1", object])
def test_importances_that_are_not_real_numbers_are_refused(dtype: Any) -> None:
    numbers = np.ones(WEIGHTS.shape, dtype)
    with pytest.raises(OptionError, match="tensor 'w': importances must be real numbers, not"):
        sfpformat.numpy.save({"w": WEIGHTS}, importances={"w": numbers})
    with pytest.raises(OptionError, match="tensor 'w': importance rows must be real numbers, not"):
        sfpformat.numpy.save({"w": WEIGHTS}, importances={"w": (numbers[:, 0], numbers[0])})
    with pytest.raises(OptionError, match="tensor 'w': importances must be real numbers, not"):
        steps_for_budget({"w": WEIGHTS}, 3.0, importances={"w": numbers}, weighted="full")


def test_tensors_that_are_no_mapping_are_refused() -> None:
    tensors: Any = [WEIGHTS]
    with pytest.raises(OptionError, match="tensors is a list, must be a mapping"):
        sfpformat.numpy.save(tensors)


def test_a_writer_refuses_options_of_another_type_and_stays_usable(tmp_path: Path) -> None:
    options: Any = "fast"
    with Writer(tmp_path / "m.sfp") as writer:
        with pytest.raises(OptionError, match=r"the options of 'w': a str, 'fast', is not Options$"):
            writer.add("w", WEIGHTS, options)
        writer.add("w", WEIGHTS)
    assert sfpformat.numpy.load_file(tmp_path / "m.sfp")["w"].tobytes() == WEIGHTS.tobytes()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((Uniform, {"bits": "4"}), "bits is '4', must be from 0.05 to 32"),
        ((Uniform, {"step": "1"}), "step is '1', must be above 0"),
        ((Uniform, {"error_db": "-20"}), "error_db is '-20', must be a number of dB"),
        ((Table, {"centroids": 8.0}), "centroids is 8.0, must be a whole number"),
        ((Options, {"segment": "64"}), "segment is '64', must be a whole number"),
        ((Options, {"chunk": None}), "chunk is None, must be a whole number"),
        ((Options, {"codes": 2.5}), "codes is 2.5, must be a whole number from 1 to 16"),
        ((Options, {"trim": "no"}), "trim is 'no', must be one of True, False"),
        ((Options, {"importance": 6}), "importance is 6, must be ImportanceOptions or None"),
    ],
)
def test_options_refuse_values_of_another_type(given: tuple[Any, dict[str, Any]], words: str) -> None:
    kind, fields = given
    with pytest.raises(OptionError, match=words):
        kind(**fields)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("uniform", "quantiser is 'uniform'; write Uniform(bits=...)"),
        ("exact", "quantiser is 'exact'; write Exact()"),
        (Table, "quantiser is Table; write Table(centroids=...)"),
        (4, "quantiser is 4; write Lossless() or Exact() or Uniform(bits=...) or Table(centroids=...)"),
    ],
)
def test_a_quantiser_of_another_type_is_refused_with_how_to_write_one(given: Any, words: str) -> None:
    with pytest.raises(OptionError, match=f"^{re.escape(words)}$"):
        Options(given)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("step", "Options(Uniform(step=...))"),
        ("bits", "Options(Uniform(bits=...)) or Options(Table(bits=...))"),
        ("centroids", "Options(Table(centroids=...))"),
        ("rate_weight", "Options(Uniform(..., rate_weight=...))"),
        ("scale", "Options(Uniform(..., scale=...)) or Options(Table(..., scale=...))"),
    ],
)
def test_a_field_of_a_quantiser_given_to_options_is_refused_with_where_to_write_it(
    name: str, words: str
) -> None:
    expected = f"Options takes no {name!r}: it belongs to the quantiser; write {words}"
    makers: tuple[Callable[..., object], ...] = (Options, Options().but)
    for make in makers:
        with pytest.raises(OptionError, match=f"^{re.escape(expected)}$"):
            make(**{name: 4})


def test_a_quantiser_refuses_a_field_of_another() -> None:
    of_table: dict[str, Any] = {"centroids": 4}
    of_uniform: dict[str, Any] = {"rate_weight": 0}
    with pytest.raises(TypeError, match="centroids"):
        Uniform(**of_table)
    with pytest.raises(TypeError, match="rate_weight"):
        Table(4, **of_uniform)


@pytest.mark.parametrize(("bits", "count"), [(1, 1), (4, 8), (4.5, 11), (16, 1 << 15)])
def test_the_bits_of_a_table_count_a_sign(bits: float, count: int) -> None:
    assert Table(bits=bits).count == Table(count).count == count


def test_options_accept_numpy_scalars() -> None:
    bits: Any = np.float32(3)
    chunk: Any = np.int64(4096)
    importance_bits: Any = np.int8(5)
    options = Options(Uniform(bits=bits), chunk=chunk, importance=ImportanceOptions(bits=importance_bits))
    plain = Options(Uniform(bits=3.0), chunk=4096, importance=ImportanceOptions(bits=5))
    assert options == plain
    given: dict[str, Any] = {"importances": {"w": WEIGHTS}}
    assert sfpformat.numpy.save({"w": WEIGHTS}, options=options, **given) == sfpformat.numpy.save(
        {"w": WEIGHTS}, options=plain, **given
    )


# ------------------------------------------------------------------------------------------------- presets


def test_an_unknown_preset_is_refused_with_the_list_of_presets() -> None:
    with pytest.raises(
        OptionError, match=r"^no preset is named 'fast'; choose from default, speed, size, gpu"
    ):
        PRESETS["fast"]
    with pytest.raises(KeyError, match="the nearest is 'speed'"):
        PRESETS["sped"]


def test_presets_are_a_read_only_mapping() -> None:
    assert PRESETS.get("fast") is None
    assert "fast" not in PRESETS
    assert dict(PRESETS)["speed"] == PRESETS["speed"]
    assert len(PRESETS) == len(list(PRESETS)) == 5
    assert dict(pickle.loads(pickle.dumps(PRESETS))) == dict(PRESETS)
    presets: Any = PRESETS
    with pytest.raises(TypeError, match="does not support item assignment"):
        presets["fast"] = Options()


# ------------------------------------------------------------------------------------------- names of Python


@pytest.mark.parametrize("module", ["sfpformat", "sfpformat.torch", "sfpformat.numpy", "sfpformat.pruning"])
def test_import_star_hides_no_builtin(module: str) -> None:
    there: dict[str, object] = {}
    exec(f"from {module} import *", there)
    assert not (set(there) - {"__builtins__"}) & set(dir(builtins))
    found = importlib.import_module(module)
    assert module not in ("sfpformat", "sfpformat.torch") or callable(found.open)


@pytest.mark.parametrize(
    "call",
    [
        lambda: Uniform(bits=True),
        lambda: Uniform(budget=True),
        lambda: Uniform(step=True),
        lambda: Uniform(error_db=True),
        lambda: Uniform(bits=3, rate_weight=False),
        lambda: Uniform(bits=3, scale=True),
        lambda: Table(centroids=True),
        lambda: Table(bits=True),
        lambda: ImportanceOptions(bits=True),
        lambda: Options(codes=True),
    ],
)
def test_a_bool_in_place_of_a_number_is_refused(call: Callable[[], object]) -> None:
    with pytest.raises(OptionError, match=r"is (True|False), must be"):
        call()
