"""A driver for a reader. Copy it for your own reader, and replace `decode`, `apply` and `look_up`.

sfp conformance run --decoder 'python conformance/drivers/reader.py'
"""

import json
import pathlib
import sys
from typing import Any

import sfpformat
from sfpformat.deltas.result import DeltaFile

*limits, how = sys.argv[1:]
LIMITS = sfpformat.Limits(**{name: int(n) for name, n in (word.split("=") for word in limits)})


def decode(path: str, folder: str) -> dict[str, object]:
    """Decodes a file, and writes its arrays into a folder."""
    with sfpformat.SfpFile(path, limits=LIMITS) as file:
        return written(file, lambda name: bool(file.info(name).mask), folder)


def apply(path: str, base: str, folder: str) -> dict[str, object]:
    """Computes the result of a delta and its base, and writes its arrays into a folder."""
    with DeltaFile(path, base, limits=LIMITS) as file:
        file.check_base()
        parts = [(name, file.parts(name)) for name in file]
        pruned = {name for name, part in parts if part is not None and part.structure.masked}
        return written(file, lambda name: name in pruned, folder)


def look_up(path: str, keys: str, folder: str) -> dict[str, object]:
    """Looks keys up in all keyed tables, and writes the answers into a folder."""
    listed = [bytes.fromhex(line) for line in pathlib.Path(keys).read_text("ascii").splitlines()]
    with sfpformat.SfpFile(path, limits=LIMITS) as file:
        names, metadata = [table.name for table in file.directory.keyed], file.metadata()
    tensors: list[dict[str, object]] = []
    for name in names:
        found = sfpformat.KeyedTable.open(path, name, limits=LIMITS).find(listed)
        answers = {"": ("F32", found.weights), ".known": ("BOOL", found.known)}
        if found.importance is not None:
            answers[".importance"] = ("F32", found.importance)
        for suffix, (dtype, array) in answers.items():
            pathlib.Path(folder, f"{len(tensors)}.bin").write_bytes(array.tobytes())
            tensors.append({"name": name + suffix, "dtype": dtype, "shape": list(array.shape)})
    return {"ok": True, "metadata": metadata, "tensors": tensors}


def written(file: Any, masked: Any, folder: str) -> dict[str, object]:
    """Writes the arrays of all tensors into a folder. Returns their descriptions, in order."""
    tensors = []
    for number, name in enumerate(file):
        arrays = {"": file.get_tensor(name), ".importance": file.get_importance(name)}
        if masked(name):
            arrays[".mask"] = file.get_mask(name)
        for what, array in arrays.items():
            if array is not None:
                pathlib.Path(folder, f"{number}{what}.bin").write_bytes(array.tobytes())
        part = file.get_slice(name)
        tensors.append({"name": name, "dtype": part.get_dtype(), "shape": part.get_shape()})
    return {"ok": True, "metadata": file.metadata(), "tensors": tensors}


def answer(question: str, *words: str) -> dict[str, object]:
    """Returns the answer to a question."""
    questions: dict[str, Any] = {"decode": decode, "apply": apply, "look-up": look_up}
    if question not in questions:
        return {"ok": False, "unsupported": True, "detail": f"unknown question {question!r}"}
    try:
        answered: dict[str, object] = questions[question](*words)
        return answered
    except sfpformat.FileFault as e:
        return {"ok": False, "error": e.code, "clause": e.clause, "tensor": e.tensor, "offset": e.offset}


for line in sys.stdin if how == "serve" else ():
    print(json.dumps(answer(*line.rstrip("\n").split("\t"))), flush=True)
