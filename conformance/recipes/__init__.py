"""The recipes of the golden files: a valid base, and one named defect at a time.

    python -m conformance.recipes            # writes cases/ and manifest.json again, byte for byte the same
    python -m conformance.recipes --check    # exit status 1 where they differ from what is there

Files are made by hand, bit by bit from levels, without the package's writer; what they hold is computed by
the plain reader of the tests, which was written from SPEC.md alone. So golden files change only when a recipe
does.
"""

from __future__ import annotations

from . import directory, entries, gallery, preamble, recorded
from .suite import Suite

# In this order: later recipes break files of earlier ones.
AREAS = (gallery, preamble, directory, entries, recorded)


def suite() -> Suite:
    """All cases."""
    out = Suite()
    for area in AREAS:
        area.add(out)
    return out
