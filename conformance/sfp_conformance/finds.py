"""Saves finds of the fuzzer as test cases: the file, its undamaged twin, their contents and manifest entries.

The saved files can be copied to `conformance/regress/` unchanged.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sfpformat.errors import FileFault
from sfpformat.io.atomic import replacing

from .contents import NOT_CORE, contents, features_of, looked_up_contents
from .examples import Example
from .fuzz import IN_FORCE, Find, look_ups, reference
from .generate_keyed import ASKED
from .slow_reader import Bad, keyed, read

Json = dict[str, Any]
_CLAUSE = re.compile(r"R-[A-Z]{3}-\d{3}")
SECONDS = 10  # time limit for a file; enough on a slow machine
UNKNOWN = ("E_FEATURE", "E_VERSION")  # errors about features that a later version may define


def entries_of(find: Find) -> list[tuple[Json, bytes]]:
    """Returns the manifest entry and the file of a find and, if the reference refuses it, of its twin."""
    made, ours = find.example, reference(find.example.data)
    why = f"{find.parting.words}; {made.words or 'a valid file'}"
    if find.parting.kind == "look-up" or find.parting.about == "look-up":
        return [(_valid(made.data, "R-KEY-015", why, ASKED), made.data)]
    if not isinstance(ours, FileFault):
        clause = find.parting.about if _CLAUSE.fullmatch(find.parting.about) else "R-REC-001"
        return [(_valid(made.data, clause, why), made.data)]
    twin = _valid(made.twin, ours.clause, f"before the damage: {made.words}")
    entry = _entry(made.data, "f" if ours.code in UNKNOWN else "n", ours.clause, why)
    error = {"code": ours.code, "clause": ours.clause, "tensor": ours.tensor, "offset": [0, len(made.data)]}
    outcome = "unsupported" if ours.code in UNKNOWN else "reject"
    entry |= {"twin": twin["id"], "expected": {"outcome": outcome, "errors": [error]}}
    entry |= {"features": twin["features"], "profile": twin["profile"]}
    return [(entry, made.data), (twin, made.twin)]


def _valid(data: bytes, clause: str, why: str, keys: Sequence[bytes] | None = None) -> Json:
    features = features_of(data)
    profile = "full" if set(features) & NOT_CORE else "core"
    entry = _entry(data, "y", clause, why) | {"features": features, "profile": profile}
    stem = f"regress/{entry['id']}"
    if keys is not None:
        entry["keys"] = [key.hex() for key in keys]
    return entry | {"contents": f"{stem}.json", "arrays": f"{stem}.bin", "expected": {"outcome": "accept"}}


def _entry(data: bytes, kind: str, clause: str, why: str) -> Json:
    digest = hashlib.sha256(data).hexdigest()
    name = f"{kind}-{clause.removeprefix('R-')}-find-{digest[:8]}"
    return {
        "id": name,
        "class": kind,
        "roles": ["reader", "validator"],
        "since": "1.0",
        "clauses": [clause],
        "file": f"regress/{name}.sfp",
        "bytes": len(data),
        "sha256": digest,
        "recipe": "regress",
        "limits": {"seconds": SECONDS, "in_force": IN_FORCE},
        "why": why,
        "flags": ["find"],
    }


def doubt(example: Example) -> str | None:
    """Returns why the reference may be wrong about a file: the slow reader disagrees. None if it agrees."""
    ours = reference(example.data)
    try:
        file = read(example.data)
    except Bad as error:
        return None if isinstance(ours, FileFault) else f"the slow reader refuses it by {error}"
    if not isinstance(ours, FileFault) and "keyed" in file.root:
        slow = keyed.look_ups(file.root, file.tensors, list(ASKED))
        if [tensor.data for tensor in slow.values()] != [own["values"] for _, own in look_ups(example.data)]:
            return "the slow reader finds other weights of keys"
    if isinstance(ours, FileFault) and ours.code != "E_LIMIT":  # the slow reader has no limits
        return "the slow reader accepts it"
    return None


def save(find: Find, folder: Path) -> list[str]:
    """Writes a find in the suite's layout. Returns the names of the files.

    Writes for each case ``ID.sfp`` and its manifest entry, ``ID.entry.json``; for a valid one also its
    contents, ``ID.json`` and ``ID.bin``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for entry, data in entries_of(find):
        files[f"{entry['id']}.sfp"] = data
        files[f"{entry['id']}.entry.json"] = written(entry)
        if "contents" in entry:
            keys = [bytes.fromhex(key) for key in entry.get("keys", ())]
            description, arrays = looked_up_contents(data, keys) if keys else contents(data)
            files[f"{entry['id']}.json"], files[f"{entry['id']}.bin"] = written(description), arrays
    for name, data in files.items():
        with replacing(folder / name) as file:
            file.write(data)
    return sorted(files)


def written(value: object) -> bytes:
    """Serialises a value as JSON in the suite's style."""
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()
