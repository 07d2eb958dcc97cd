"""Jobs for writers: arrays, choices, and the contents that the file must have.

The choices of a job represent every weight exactly. The contents of the file are therefore the inputs, bit
for bit, whatever else the writer chooses. Choices have the names of chapter 22; the writer is free in those
that a job omits. A raw tensor leaves no choice: the manifest has the digest of the one canonical file.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from itertools import product
from typing import Any

from sfp_conformance.contents import Json, array
from sfp_conformance.forge import hand_file, raw_part
from sfp_conformance.slow_reader import BYTES, FLOATS, pattern_of

from .numbers import specials
from .suite import Case, Suite

SHAPES: tuple[list[int], ...] = ([], [0], [33], [4, 24], [3, 1, 5], [2, 0, 3])
EXACT = {"coding": "fingerprint", "quantiser": "exact"}
DENSITIES = {"dense": 1, "half": 2, "tenth": 10, "none": 10**9}


def elements(dtype: str, count: int) -> bytes:
    """Returns deterministic elements of any dtype."""
    size, state, out = BYTES[dtype], 7, bytearray()
    for _ in range(count * size):
        state = (state * 1103515245 + 12345) % 2**31
        out.append(state >> 16 & (1 if dtype == "BOOL" else 255))
    return bytes(out)


def weights(dtype: str, count: int, every: int, step: float) -> bytes:
    """Returns small multiples of a step at one position in ``every``, and zeros elsewhere."""
    out, state = b"", 11
    for _ in range(count):
        state = (state * 1103515245 + 12345) % 2**31
        kept = every <= count and (state >> 8) % every == 0
        number = ((state >> 16) % 15 - 7 or 1) * step if kept else 0.0
        out += pattern_of(number, dtype).to_bytes(BYTES[dtype], "little")
    return out


def add(suite: Suite) -> None:
    """Adds the cases of this module to the suite."""
    for dtype, shape in product(BYTES, SHAPES):
        raw = elements(dtype, math.prod(shape))
        choices: Json = {"coding": "raw", "segment": 32, "chunk": 1}
        slug = f"RAW-001-{dtype}-{'-by-'.join(map(str, shape)) or 'scalar'}"
        case = _job(suite, slug, f"{dtype} of shape {shape}, raw", dtype, shape, raw, choices)
        written = hand_file(raw_part("w", dtype, shape, raw), metadata={"case": slug})
        digest = hashlib.sha256(written).hexdigest()
        case.expected["written"] = {"bytes": len(written), "sha256": digest}
    for dtype in FLOATS:
        found = specials(dtype)
        raw = b"".join(p.to_bytes(BYTES[dtype], "little") for p in found)
        words = f"{dtype}: NaNs, infinities, zeros of both signs"
        _job(suite, f"REC-001-{dtype}-specials", words, dtype, [len(found)], raw, EXACT)
        _floats(suite, dtype)
    _importances(suite)


def _floats(suite: Suite, dtype: str) -> None:
    for (density, every), mask in product(DENSITIES.items(), ("none", "runs", "octets")):
        raw = weights(dtype, 96, every, 0.25)
        choices = {**EXACT, "mask": mask, "segment": 32}
        words = f"{dtype}, {density} kept, the mask {mask}"
        _job(suite, f"MSK-001-{dtype}-{density}-{mask}", words, dtype, [4, 24], raw, choices)
    for group in (1, 2):
        raw = weights(dtype, 96, 2, 0.25)
        uniform = {"coding": "fingerprint", "quantiser": "uniform", "step": "0x3e800000", "group": group}
        words = f"{dtype}, multiples of the step, {group} levels per symbol"
        _job(suite, f"QNT-003-{dtype}-group-{group}", words, dtype, [4, 24], raw, uniform)
    for count in (8, 7):  # magnitudes 0 to 7 quarters; without a centroid of 0 where all zeros are pruned
        raw = weights(dtype, 96, 1 if count == 7 else 2, 0.25)
        table = {"coding": "fingerprint", "quantiser": "table", "count": count}
        words = f"{dtype}, a table of {count} magnitudes"
        _job(suite, f"QNT-004-{dtype}-{count}-centroids", words, dtype, [4, 24], raw, table)
    for count in (31, 32, 33, 64, 65, 97):
        raw = elements(dtype, count)
        words = f"{dtype}, {count} positions in segments of 32, two per chunk"
        choices = {**EXACT, "segment": 32, "chunk": 2}
        _job(suite, f"PLN-001-{dtype}-{count}", words, dtype, [count], raw, choices)


def _importances(suite: Suite) -> None:
    for dtype, over, mask in product(("F32", "BF16"), ("survivors", "all"), ("none", "runs", "octets")):
        raw = weights(dtype, 96, 2, 0.25)
        size = BYTES[dtype]
        alive = [any(raw[p * size : (p + 1) * size]) for p in range(96)]
        kept = [(p * p % 11 + 1) / 8 if alive[p] or over == "all" else 0.0 for p in range(96)]
        words = f"{dtype}, the mask {mask}, an importance over {over}"
        importance = struct.pack("<96f", *kept)
        choices = {**EXACT, "mask": mask}
        slug = f"IMP-001-{dtype}-{over}-{mask}"
        _job(suite, slug, words, dtype, [4, 24], raw, choices, (over, importance))


def _job(
    suite: Suite,
    name: str,
    why: str,
    dtype: str,
    shape: list[int],
    raw: bytes,
    choices: dict[str, Any],
    importance: tuple[str, bytes] | None = None,
) -> Case:
    """Adds a job with one tensor. An importance is given by its `over` and its bytes, F32."""
    places: Json = {"offset": "0", "bytes": str(len(raw))}
    tensor = {"name": "w", "dtype": dtype, "shape": list(map(str, shape)), **places, "choices": choices}
    held: Json = {"name": "w", "offset": "0", **array(dtype, shape, raw)}
    features = {f"dtype-{dtype}", choices["coding"], choices.get("quantiser", choices["coding"])}
    if importance is not None:
        over, data = importance
        kept = {"role": "metadata", "over": over}
        tensor["importance"] = {**kept, "offset": str(len(raw)), "bytes": str(len(data))}
        held["importance"] = {**kept, "offset": str(len(raw)), **array("F32", shape, data)}
        features |= {"importance", f"importance-{over}", "metadata"}
        raw += data
    job = {"metadata": {"case": name}, "tensors": [tensor]}
    text = (json.dumps(job, indent=1) + "\n").encode()
    contents = {"metadata": job["metadata"], "tensors": [held]}
    case = Case(f"e-{name}", [], why, text, sorted(features), {"outcome": "accept"}, suite.recipe)
    case.contents, case.arrays = contents, raw
    suite.add(case, ("R-CAN-001", "R-CNV-001"))
    return case
