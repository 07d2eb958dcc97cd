"""The golden files for tests: the manifest, and comparisons of results with the expected ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from sfp_conformance.contents import array
from sfp_conformance.own import OwnDriver, answers_of

import sfpformat
from sfpformat.deltas.applying import apply_delta
from sfpformat.deltas.result import DeltaFile
from sfpformat.errors import FileFault
from sfpformat.keyed.table import KeyedTable
from sfpformat.limits import Limits

from .clauses import ROOT

FOLDER = ROOT / "conformance"
Case = dict[str, Any]


@cache
def manifest() -> dict[str, Any]:
    """The manifest."""
    out: dict[str, Any] = json.loads((FOLDER / "manifest.json").read_bytes())
    return out


def cases(classes: str) -> list[Case]:
    """Returns the cases of the classes with these letters."""
    return [case for case in manifest()["cases"] if case["class"] in classes]


def data_of(case: Case) -> bytes:
    """Returns the bytes of a case's file."""
    return path_of(case).read_bytes()


def path_of(case: Case) -> Path:
    """Returns the path of a case's file."""
    return FOLDER / str(case["file"])


def limits_of(case: Case) -> Limits:
    """Returns the limits in force for a case."""
    return Limits(**case["limits"].get("in_force", {}))


def expected_contents(case: Case) -> Any:
    """Returns the expected contents of a file, without the offsets of its arrays."""
    out = json.loads((FOLDER / case["contents"]).read_bytes())
    for tensor in out["tensors"]:
        for place in (tensor, tensor.get("mask", {}), tensor.get("importance", {})):
            place.pop("offset", None)
    return out


def read_contents(data: bytes, limits: Limits) -> Any:
    """Returns the contents of a file as the package decodes it; raises `FileFault`."""
    with sfpformat.SfpFile(data, limits=limits, threads=1, engine="python") as file:
        tensors = [_tensor(file, name) for name in file]
        return {"metadata": file.metadata(), "tensors": tensors}


def _tensor(file: sfpformat.SfpFile, name: str) -> dict[str, Any]:
    info = file.info(name)
    out = {"name": name, **array(info.dtype, info.shape, file.get_tensor(name).tobytes())}
    if info.mask is not None:
        out["mask"] = array("U8", info.shape, file.get_mask(name).tobytes())
    found = file.get_importance(name)
    if found is not None:
        own = array("F32", info.shape, found.tobytes())
        out["importance"] = {"role": info.role, "over": info.importance, **own}
    return out


def read_result(data: bytes, base: bytes) -> Any:
    """Returns the contents of the result of a delta and its base; raises `FileFault`."""
    with sfpformat.SfpFile(base, engine="python") as own, DeltaFile(data, own, engine="python") as file:
        file.check_base()
        tensors = []
        for name, spec in file.specs.items():
            out = {"name": name, **array(spec.dtype.name, spec.shape, file.get_tensor(name).tobytes())}
            parts, importance = file.parts(name), file.get_importance(name)
            if parts is not None and parts.structure.masked:
                out["mask"] = array("U8", spec.shape, file.get_mask(name).tobytes())
            if parts is not None and importance is not None:
                structure = parts.structure.importance
                assert structure is not None
                own_importance = array("F32", spec.shape, importance.tobytes())
                out["importance"] = {"role": structure.role, "over": structure.over, **own_importance}
            tensors.append(out)
        return {"metadata": file.metadata(), "tensors": tensors}


def applied(case: Case) -> Any:
    """Returns the result of a case that has a base; raises `FileFault`.

    Checks that `apply_delta` gives the same result, and changes nothing if it refuses the base. It has no
    result for tensors in parts.
    """
    data, base = data_of(case), (FOLDER / case["base"]).read_bytes()
    if "delta-parts" in case["features"]:
        return read_result(data, base)
    with sfpformat.SfpFile(base, engine="python") as file:
        target = {name: array_.copy() for name, array_ in file.get_tensors().items()}
    before = {name: array_.tobytes() for name, array_ in target.items()}
    refused: FileFault | None = None
    try:
        apply_delta(target, data, engine="python")
    except FileFault as error:
        refused = error
    if refused is not None:
        assert {name: array_.tobytes() for name, array_ in target.items()} == before, case["id"]
        assert _code_of(lambda: read_result(data, base)) == refused.code, case["id"]
        raise refused
    found = read_result(data, base)
    for tensor in found["tensors"]:
        own = target.pop(tensor["name"])
        assert tensor["sha256"] == array(tensor["dtype"], own.shape, own.tobytes())["sha256"], case["id"]
    assert not target, case["id"]
    return found


def looked_up(case: Case, engine: str = "python") -> Any:
    """Returns what look-ups of the keys of a case give, in the form of `expected_contents`."""
    keys = [bytes.fromhex(key) for key in case["keys"]]
    data, tensors = data_of(case), []
    with sfpformat.SfpFile(data, engine=engine) as file:
        names, metadata = [table.name for table in file.directory.keyed], file.metadata()
    for name in names:
        for what, found in answers_of(KeyedTable.open(data, name, engine=engine), keys).items():
            dtype = "BOOL" if found.dtype == "bool" else "F32"
            tensors.append({"name": what, **array(dtype, found.shape, found.tobytes())})
    return {"metadata": metadata, "tensors": tensors}


def _code_of(read: Callable[[], object]) -> str | None:
    """Returns the code of the `FileFault` that a function raises, or None."""
    try:
        read()
    except FileFault as error:
        return error.code
    return None


def refusal(data: bytes, limits: Limits) -> FileFault | None:
    """Returns the fault by which the package refuses a file, or None."""
    try:
        read_contents(data, limits)
    except FileFault as error:
        return error
    return None


def refusal_of_result(case: Case) -> FileFault | None:
    """Returns the fault by which the package refuses the result of a case that has a base, or None."""
    try:
        applied(case)
    except FileFault as error:
        return error
    return None


def wrong_refusal(case: Case, code: str, clause: str, tensor: object, offset: int | None) -> str | None:
    """Returns why an error is wrong for a file that must be refused; None if it is right."""
    for error in case["expected"]["errors"]:
        low, high = error["offset"]
        here = offset is None or low <= offset <= high
        if (error["code"], error["clause"]) == (code, clause) and error["tensor"] == tensor and here:
            return None
    return f"{case['id']}: {code} {clause} {tensor!r} at {offset}, expected {case['expected']['errors']}"


def encoded(case: Case, folder: Path) -> bytes:
    """Returns the file that the package's writer writes for a job."""
    path = folder / "written.sfp"
    answer = OwnDriver("python").encode(str(path_of(case)), str(FOLDER / case["arrays"]), str(path))
    assert answer["ok"], (case["id"], answer)
    return path.read_bytes()
