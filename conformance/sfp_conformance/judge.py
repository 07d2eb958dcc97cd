"""Compares a program's answer about a test case with the manifest, and returns a verdict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .suite import Case, Contents, shape_of

Json = dict[str, Any]

PASS, FAIL, WRONG_CODE = "pass", "fail", "wrong code"
UNSUPPORTED, SKIP = "unsupported", "skip"  # outside the program's profile; cannot run on this machine
CRASH, TIMEOUT, MEMORY, NONSENSE = "crash", "timeout", "memory", "nonsense"
# Array of a tensor -> suffix of the file that a decoder writes; the stem is the tensor's number.
SUFFIXES = {"values": ".bin", "mask": ".mask.bin", "importance": ".importance.bin"}
# Outcomes that make a run fail, worst first.
BAD = (CRASH, TIMEOUT, MEMORY, NONSENSE, FAIL, WRONG_CODE)


@dataclass(frozen=True)
class Verdict:
    """The result of a test case.

    Attributes:
        outcome: one of the words above.
        words: the reason, if the outcome is not `pass`.
        notes: imperfections that do not fail the case, such as an error that does not name its clause.
    """

    outcome: str
    words: str = ""
    notes: tuple[str, ...] = ()


def judge_answer(case: Case, answer: Json, *, within: bool = True, refuses: bool = False) -> Verdict:
    """Returns the verdict on acceptance or refusal, for decoders and validators.

    Args:
        within: whether the program claims the features that the case needs. A refusal of a case outside its
            claims is `unsupported`, with any error code.
        refuses: whether the program must refuse all cases outside its claims (R-PRO-001).
    """
    if answer.get("skip"):
        return Verdict(SKIP, str(answer["skip"]))
    if not within and not answer["ok"]:
        return Verdict(UNSUPPORTED, f"refused with {answer.get('error')}" if "error" in answer else "")
    if not within and refuses:
        return Verdict(FAIL, "accepted a file outside its profile, which it must refuse (R-PRO-001)")
    if answer.get("unsupported"):
        return Verdict(FAIL, "answered that it does not support a feature that it claims to support")
    if answer["ok"]:
        if not case.accepted:
            fault = case.faults[0]
            return Verdict(
                FAIL, f"accepted the file; must refuse it with {fault['error']} ({fault['clause']})"
            )
        return Verdict(PASS)
    said = answer.get("error")
    if not case.faults:
        return Verdict(FAIL, f"refused the file with {said} ({answer.get('clause')}); must accept it")
    allowed = [fault for fault in case.faults if fault["error"] == said]
    if not allowed:
        wanted = " or ".join(sorted({fault["error"] for fault in case.faults}))
        return Verdict(WRONG_CODE, f"refused the file with {said}; the right code is {wanted}")
    fewest = min((_notes(fault, answer) for fault in allowed), key=len)
    return Verdict(PASS, notes=tuple(fewest))


def _notes(fault: Json, answer: Json) -> list[str]:
    """Lists the details of a fault that R-STR-002 says an error should name and that the answer does not."""
    notes, offset = [], answer.get("offset")
    if answer.get("clause") != fault["clause"]:
        notes.append(f"names the clause {answer.get('clause')}, not {fault['clause']}")
    if answer.get("tensor") != fault["tensor"]:
        notes.append(f"names the tensor {answer.get('tensor')!r}, not {fault['tensor']!r}")
    if not (isinstance(offset, int) and fault["offset"][0] <= offset <= fault["offset"][1]):
        notes.append(f"names the offset {offset}, not one from {fault['offset'][0]} to {fault['offset'][1]}")
    return notes


def judge_canonical(case: Case, answer: Json, *, within: bool = True, refuses: bool = False) -> Verdict:
    """Extends `judge_answer` for validators: checks also what it says of canonical form (R-CAN-001).

    An answer without `canonical` passes with a note.
    """
    verdict = judge_answer(case, answer, within=within, refuses=refuses)
    if verdict.outcome != PASS or not answer["ok"] or case.canonical is None:
        return verdict
    if "canonical" not in answer:
        return Verdict(PASS, notes=("does not say whether the file is canonical",))
    if answer["canonical"] != case.canonical:
        by = ", ".join(case.not_canonical_by)
        words = f"is not canonical ({by})" if by else "is canonical"
        return Verdict(FAIL, f"answered canonical: {answer['canonical']}; but the file {words}")
    return verdict


def judge_contents(
    case: Case,
    answer: Json,
    written: Callable[[str], bytes | None],
    *,
    within: bool = True,
    refuses: bool = False,
    may_ignore: frozenset[str] = frozenset(),
) -> Verdict:
    """Extends `judge_answer` for decoders: compares also the decoded contents, bit by bit.

    Args:
        written: returns the bytes of the program's output file of that name, or None if there is none.
        may_ignore: arrays that the program's profile does not require.
    """
    verdict = judge_answer(case, answer, within=within, refuses=refuses)
    if verdict.outcome != PASS or not answer["ok"]:
        return verdict
    wrong = _wrong_description(case.contents, answer) or _wrong_arrays(case.contents, written, may_ignore)
    if wrong is not None:
        return Verdict(FAIL, wrong)
    return verdict if "metadata" in answer else Verdict(PASS, notes=("the answer has no metadata",))


def _wrong_description(contents: Contents, answer: Json) -> str | None:
    """Returns the first error in a decoder's description of the file, or None."""
    metadata, tensors = answer.get("metadata"), answer.get("tensors")
    if metadata not in (None, contents.description["metadata"]):
        return f"metadata is {metadata}; must be {contents.description['metadata']}"
    if not isinstance(tensors, list) or len(tensors) != len(contents.tensors):
        return f"the answer's `tensors` does not list the {len(contents.tensors)} tensors"
    for number, (said, expected) in enumerate(zip(tensors, contents.tensors, strict=True)):
        told = {"name": expected["name"], "dtype": expected["dtype"], "shape": shape_of(expected)}
        for key, right in told.items():
            found = said.get(key) if isinstance(said, dict) else None
            if found != right:
                return f"tensor {number}: {key} is {found!r}; must be {right!r}"
    return None


def _wrong_arrays(
    contents: Contents, written: Callable[[str], bytes | None], may_ignore: frozenset[str]
) -> str | None:
    """Returns the first error in the arrays that a decoder wrote, or None."""
    for number, expected in enumerate(contents.tensors):
        for what, wanted in contents.arrays_of(expected).items():
            found = written(f"{number}{SUFFIXES[what]}")
            if found is None and what not in may_ignore:
                return f"tensor {expected['name']!r}: the decoder did not write {number}{SUFFIXES[what]}"
            if found is not None and found != wanted:
                return f"tensor {expected['name']!r}: wrong {what}: {_where(found, wanted)}"
    return None


def _where(found: bytes, wanted: bytes) -> str:
    if len(found) != len(wanted):
        return f"{len(found)} bytes instead of {len(wanted)}"
    at = next(i for i, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b)
    return f"from byte {at}, {found[at : at + 8].hex()} instead of {wanted[at : at + 8].hex()}"
