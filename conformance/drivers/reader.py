"""A driver for a reader. Copy it for your own reader and replace `read`, which calls this package's reader.

sfp conformance run --decoder 'python conformance/drivers/reader.py'
"""

import json
import pathlib
import sys

import sfpformat

*limits, how = sys.argv[1:]
LIMITS = sfpformat.Limits(**{name: int(n) for name, n in (word.split("=") for word in limits)})


def read(path: str, folder: pathlib.Path) -> list[dict[str, object]]:
    """Decodes a file and writes its arrays into a folder. Returns descriptions of its tensors, in order."""
    tensors: list[dict[str, object]] = []
    with sfpformat.SfpFile(path, limits=LIMITS) as file:
        for number, name in enumerate(file):
            values, info = file.get_tensor(name), file.info(name)
            (folder / f"{number}.bin").write_bytes(values.tobytes())
            if info.mask:
                (folder / f"{number}.mask.bin").write_bytes(file.get_mask(name).tobytes())
            importance = file.get_importance(name)
            if importance is not None:
                (folder / f"{number}.importance.bin").write_bytes(importance.tobytes())
            tensors.append({"name": name, "dtype": info.dtype, "shape": list(info.shape)})
    return tensors


def answer(question: str, *words: str) -> dict[str, object]:
    """Returns the answer to a question."""
    if question != "decode":
        return {"ok": False, "detail": f"unknown question {question!r}"}
    try:
        return {"ok": True, "tensors": read(words[0], pathlib.Path(words[1]))}
    except sfpformat.FileFault as e:
        return {"ok": False, "error": e.code, "clause": e.clause, "tensor": e.tensor, "offset": e.offset}


for line in sys.stdin if how == "serve" else ():
    print(json.dumps(answer(*line.rstrip("\n").split("\t"))), flush=True)
