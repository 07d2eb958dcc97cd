"""Checks the file that an encoder wrote for a job: the reference must read the right contents from it.

Also checks canonical form.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from sfpformat.decode.reader import SfpFile
from sfpformat.decode.validate import validate
from sfpformat.errors import FileFault

from .judge import FAIL, PASS, Verdict
from .suite import Case, shape_of


def judge_written(case: Case, path: Path, *, claims_canonical: bool) -> Verdict:
    """Returns the verdict on a file that was written for a job.

    Args:
        claims_canonical: whether the encoder says that it writes canonical files (R-CAN-001). If true, a file
            that is not canonical fails, and so does one whose bytes differ from those that the job
            determines. If false, both give only notes.
    """
    try:
        with SfpFile(path, engine="python", threads=1) as file:
            wrong = _difference(case, file)
        report = validate(path, engine="python")
    except (OSError, FileFault) as error:
        return Verdict(FAIL, f"the written file cannot be read: {error}")
    if wrong is None and report.faults:
        wrong = f"the validator finds a fault in the written file: {report.faults[0]}"
    if wrong is not None:
        return Verdict(FAIL, wrong)
    is_other = case.written is not None and hashlib.sha256(path.read_bytes()).hexdigest() != case.written
    notes = [*report.notes, *(["its bytes differ from the canonical file"] if is_other else [])]
    if notes and claims_canonical:
        return Verdict(FAIL, f"the written file is not canonical: {'; '.join(notes)}")
    return Verdict(PASS, notes=tuple(f"not canonical: {note}" for note in notes))


def _difference(case: Case, file: SfpFile) -> str | None:
    """Returns the first difference between a file and the contents that the job asks for, or None."""
    contents, tensors = case.contents, case.contents.tensors
    if list(file) != [tensor["name"] for tensor in tensors]:
        return "the written file has other tensors, or another order of tensors"
    if file.metadata() != contents.description["metadata"]:
        return "the written file has other metadata"
    for tensor in tensors:
        name, info = tensor["name"], file.info(tensor["name"])
        if (info.dtype, list(info.shape)) != (tensor["dtype"], shape_of(tensor)):
            return f"tensor {name!r}: written as {info.dtype} {list(info.shape)}"
        if file.get_tensor(name).tobytes() != contents.array(tensor):
            return f"tensor {name!r}: the written file has other values"
        if "importance" in tensor:
            found = file.get_importance(name)
            if found is None or found.tobytes() != contents.array(tensor["importance"]):
                return f"tensor {name!r}: the written file has another importance"
    return None
