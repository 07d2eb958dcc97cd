"""Jobs for writers: arrays, what is to be chosen, and the contents that the file must have.

Every weight of a job has an exact code under its choices, so that its contents are the inputs, bit for bit,
whatever else the writer chooses. Choices are named as in chapter 22; those that a job leaves out are free.
"""

from __future__ import annotations

import json
from itertools import product
from typing import Any

from tests.slow_reader import BYTES, FLOATS, pattern_of

from .contents import array
from .numbers import specials
from .suite import Case, Json, Suite

SHAPES = ([], [0], [33], [4, 24], [3, 1, 5], [2, 0, 3])
DENSITIES = {"dense": 1, "half": 2, "tenth": 10, "none": 10**9}


def elements(dtype: str, count: int) -> bytes:
    """Elements of any dtype, the same ones each time."""
    size, state, out = BYTES[dtype], 7, bytearray()
    for _ in range(count * size):
        state = (state * 1103515245 + 12345) % 2**31
        out.append(state >> 16 & (1 if dtype == "BOOL" else 255))
    return bytes(out)


def weights(dtype: str, count: int, every: int, step: float) -> bytes:
    """Small multiples of a step, one position in ``every``, else zero."""
    out, state = b"", 11
    for _ in range(count):
        state = (state * 1103515245 + 12345) % 2**31
        kept = every <= count and (state >> 8) % every == 0
        number = ((state >> 16) % 15 - 7 or 1) * step if kept else 0.0
        out += pattern_of(number, dtype).to_bytes(BYTES[dtype], "little")
    return out


def add(suite: Suite) -> None:
    """Adds the cases."""
    for dtype, shape in product(BYTES, SHAPES):
        raw = elements(dtype, _count(shape))
        words = f"{dtype} of shape {shape}, raw"
        _job(suite, f"RAW-001-{dtype}-{_slug(shape)}", words, dtype, shape, raw, {"coding": "raw"})
    for dtype in FLOATS:
        found = specials(dtype)
        raw = b"".join(p.to_bytes(BYTES[dtype], "little") for p in found)
        choices: Json = {"coding": "fingerprint", "quantiser": "exact"}
        words = f"{dtype}: NaNs, infinities, zeros of both signs"
        _job(suite, f"REC-001-{dtype}-specials", words, dtype, [len(found)], raw, choices)
        _floats(suite, dtype)


def _floats(suite: Suite, dtype: str) -> None:
    for (density, every), mask in product(DENSITIES.items(), ("none", "runs", "octets")):
        raw = weights(dtype, 96, every, 0.25)
        choices = {"coding": "fingerprint", "quantiser": "exact", "mask": mask, "segment": 32}
        words = f"{dtype}, {density} kept, the mask {mask}"
        _job(suite, f"MSK-001-{dtype}-{density}-{mask}", words, dtype, [4, 24], raw, choices)
    for group in (1, 2):
        raw = weights(dtype, 96, 2, 0.25)
        choices = {
            "coding": "fingerprint",
            "quantiser": "uniform",
            "step": 0.25,
            "group": group,
            "rate_weight": 0,
        }
        words = f"{dtype}, multiples of the step, {group} levels a symbol"
        _job(suite, f"QNT-003-{dtype}-group-{group}", words, dtype, [4, 24], raw, choices)
    for count in (31, 32, 33, 64, 65, 97):
        raw = elements(dtype, count)
        choices = {"coding": "fingerprint", "quantiser": "exact", "segment": 32, "chunk": 64}
        words = f"{dtype}, {count} positions in segments of 32"
        _job(suite, f"PLN-001-{dtype}-{count}", words, dtype, [count], raw, choices)


def _count(shape: list[int]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count


def _slug(shape: list[int]) -> str:
    return "-by-".join(map(str, shape)) or "scalar"


def _job(
    suite: Suite, name: str, why: str, dtype: str, shape: list[int], raw: bytes, choices: dict[str, Any]
) -> None:
    tensor = {
        "name": "w",
        "dtype": dtype,
        "shape": list(map(str, shape)),
        "offset": "0",
        "bytes": str(len(raw)),
    }
    job = {"metadata": {"case": name}, "tensors": [{**tensor, "choices": choices}]}
    data = (json.dumps(job, indent=1) + "\n").encode()
    held = {"metadata": job["metadata"], "tensors": [{"name": "w", **array(dtype, shape, raw)}]}
    features = sorted(
        {f"dtype-{dtype}", choices["coding"], *([choices["quantiser"]] if "quantiser" in choices else [])}
    )
    expected: Json = {"outcome": "accept"}
    case = Case(f"e-{name}", [], why, data, features, expected, suite.recipe, contents=held, arrays=raw)
    suite.add(case, ("R-CAN-001", "R-CNV-001"))
