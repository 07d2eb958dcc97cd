"""The structures and lists of a delta with tensors in parts (28.4), without a base."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sfp_conformance import slow_reader
from sfp_conformance.forge import Forge

from ..suite import Edit, Suite
from .building import edit_of, map_of
from .models import put

_WHOLE = "y-DLT-018-parts"


def add(suite: Suite) -> None:
    """Adds the cases of this module to the suite."""
    _lists(suite)
    _structures(suite)


def _longer(at: int) -> Callable[[Any], Any]:
    """Returns a change of shapes that adds a dimension to one."""

    def change(old: list[Any]) -> list[Any]:
        return [*old[:at], [*old[at], 1], *old[at + 1 :]]

    return change


def _without(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda structure: structure.pop(key)


def _with(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda structure: structure.update(values)


def _of_importance(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda structure: structure["importance"].update({key: "new"})


def _lists(suite: Suite) -> None:
    file = Forge.of(suite.cases[_WHOLE].data)
    names = slow_reader.delta.names_of(map_of(file))
    at = {name: names.index(name) for name in names}
    for key in ("separator", "structures", "structured"):

        def without(file: Forge, key: str = key) -> None:
            del map_of(file)[key]

        suite.invalid(f"DIR-002-parts-{key}", f"a delta in parts without `{key}`", _WHOLE, without)
        words = f"`{key}` of the wrong type"
        suite.invalid(f"DIR-003-parts-{key}", words, _WHOLE, edit_of(key, lambda old: b"text"))
    wrong = edit_of("structures", lambda old: [*old, 5])
    suite.invalid("DIR-003-parts-structure", "a structure that is a number", _WHOLE, wrong)
    wrong = edit_of("structured", lambda old: ["1", *old[1:]])
    suite.invalid("DIR-003-parts-number", "a number of a structure that is a string", _WHOLE, wrong)
    words = "structures without the feature"
    suite.invalid("DIR-007-parts", words, _WHOLE, lambda file: file.root.update(features=["delta"]))
    suite.invalid(
        "DLT-017-fewer", "fewer numbers than names", _WHOLE, edit_of("structured", lambda old: old[:-1])
    )
    wrong = edit_of("structured", lambda old: put(old, 0, 100))
    suite.invalid("DLT-017-number", "a structure that does not exist", _WHOLE, wrong, tensor=names[0])
    wrong = edit_of("structured", lambda old: [2**64 - 1 if n == old[0] else n for n in old])
    suite.invalid("DLT-017-greatest", "the greatest number of a structure", _WHOLE, wrong, tensor=names[0])
    for name, part in (("uniform", "importance"), ("uniform", "vectors"), ("table", "vectors")):
        own = f"{name}/{part}"

        def renamed(file: Forge, own: str = own) -> None:
            pairs = zip(map_of(file)["names"], names, strict=True)
            map_of(file)["names"] = [rest + "x" if name == own else rest for rest, name in pairs]

        words = f"the part `{part}` of {name!r} is missing"
        suite.invalid(f"DLT-018-no-{name}-{part}", words, _WHOLE, renamed, tensor=own)
        wrong = edit_of("shapes", _longer(at[own]))
        words = f"the part `{part}` of {name!r} has another shape"
        suite.invalid(f"DLT-018-shape-{name}-{part}", words, _WHOLE, wrong, tensor=own)
    wrong = edit_of("structured", lambda old: put(old, at["uniform/vectors"], old[at["runs"]]))
    words = "a part with a structure"
    suite.invalid("DLT-018-structured-part", words, _WHOLE, wrong, tensor="uniform/vectors")
    wrong = edit_of("structured", lambda old: put(old, at["octets"], old[at["runs"]]))
    words = "weights of another dtype than the structure's"
    suite.invalid("DLT-018-dtype", words, _WHOLE, wrong, tensor="octets")


def _structures(suite: Suite) -> None:
    found = map_of(Forge.of(suite.cases[_WHOLE].data))["structures"]
    place = {
        "exact": next(i for i, s in enumerate(found) if s["quantiser"] == "exact"),
        "uniform": next(
            i for i, s in enumerate(found) if s["quantiser"] == "uniform" and s.get("importance")
        ),
        "table": next(i for i, s in enumerate(found) if s["quantiser"] == "table"),
        "group": next(i for i, s in enumerate(found) if s.get("scale", {}).get("per") == "group"),
    }

    def at(kind: str, change: Callable[[dict[str, Any]], object]) -> Edit:
        def edit(file: Forge) -> None:
            change(map_of(file)["structures"][place[kind]])

        return edit

    def invalid(name: str, words: str, kind: str, change: Callable[[dict[str, Any]], object]) -> None:
        suite.invalid(name, words, _WHOLE, at(kind, change))

    for key in ("dtype", "mask", "quantiser"):
        invalid(f"DIR-002-structure-{key}", f"a structure without `{key}`", "exact", _without(key))
        words = f"`{key}` of a structure of the wrong type"
        invalid(f"DIR-003-structure-{key}", words, "exact", _with(**{key: b"x"}))
    invalid("DIR-002-structure-count", "a table without `count`", "table", lambda s: s.pop("count"))
    for key in ("scale", "importance"):
        words = f"`{key}` of a structure of the wrong type"
        invalid(f"DIR-003-structure-{key}", words, "uniform", _with(**{key: "x"}))
    invalid("DIR-007-structure-count", "`count` with `uniform`", "uniform", lambda s: s.update(count=2))
    scale = {"per": "tensor", "dtype": "F32"}
    invalid("DIR-007-structure-scale", "a scale with `exact`", "exact", lambda s: s.update(scale=scale))
    words = "a size without groups"
    invalid("DIR-007-structure-size", words, "uniform", lambda s: s["scale"].update(size=3))
    words = "a size of 0"
    invalid("SCL-002-structure", words, "group", lambda s: s["scale"].update(size=0))
    words = "a dtype in an importance with `uniform`"
    invalid("DIR-007-structure-dtype", words, "uniform", lambda s: s["importance"].update(dtype="F32"))
    words = "a quantiser of factors"
    invalid("DIR-007-structure-factors", words, "table", lambda s: s["importance"].update(quantiser="exact"))
    for value in (2, 2**64 - 1):
        invalid(f"DLT-019-{value}", f"a `mask` of {value}", "exact", _with(mask=value))
    words = "an unknown dtype of a structure"
    suite.invalid(
        "TEN-003-structure", words, _WHOLE, at("exact", lambda s: s.update(dtype="F31")), tags=["future"]
    )
    invalid("TEN-010-structure", "a structure of integers", "exact", lambda s: s.update(dtype="I32"))
    words = "an unknown quantiser of a structure"
    invalid("QNT-001-structure", words, "exact", lambda s: s.update(quantiser="trellis"))
    for count in (0, 65537):
        words = f"a table of {count} centroids"
        invalid(f"QNT-004-structure-{count}", words, "table", _with(count=count))
    words = "an unknown word in a scale"
    invalid("SCL-001-structure", words, "uniform", lambda s: s["scale"].update(per="plane"))
    words = "factors of F64"
    invalid("SCL-003-structure", words, "uniform", lambda s: s["scale"].update(dtype="F64"))
    for key, clause in (("over", "IMP-001"), ("role", "IMP-002")):
        words = f"an unknown `{key}` of an importance"
        invalid(f"{clause}-structure", words, "uniform", _of_importance(key))
    words = "an exact importance of F64"
    invalid("IMP-003-structure-exact", words, "group", lambda s: s["importance"].update(dtype="F64"))
    words = "an exact importance of an unknown dtype"
    later = at("group", lambda s: s["importance"].update(dtype="F31"))
    suite.invalid("TEN-003-structure-importance", words, _WHOLE, later, tags=["future"])
    words = "factors of an importance of F64"
    invalid("IMP-003-structure", words, "table", lambda s: s["importance"].update(dtype="F64"))
    more = {"x-mine": 1}
    file = Forge.of(suite.cases[_WHOLE].data)
    for structure in map_of(file)["structures"]:
        structure.update(more)
    suite.valid("DIR-005-structure", "unknown keys in structures", file.build())
