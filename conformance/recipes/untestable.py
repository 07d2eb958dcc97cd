"""Clauses that no single file can hold a program to, each with the reason."""

from __future__ import annotations

_SHARDS = "about several files and an index beside them; tests/test_shards.py has such sets"
_WRITING = "about what a writer leaves on its disk, which its files do not show"

UNTESTABLE = {
    "R-SHD-001": _SHARDS,
    "R-SHD-002": _SHARDS,
    "R-SHD-003": _SHARDS,
    "R-STR-004": "that nothing is run cannot be seen in an answer",
    "R-STR-005": _WRITING,
    "R-STR-006": "validators are compared on every case of this suite; it is no property of one file",
    "R-FEA-003": "a private name is one that a reader does not know, which R-FEA-001 and others are about",
    "R-DIR-006": "a writer's promise about keys that no reader here knows",
    "R-PRO-001": "about readers of a partial profile: what they refuse is listed by profile and features",
}
