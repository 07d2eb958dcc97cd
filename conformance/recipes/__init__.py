"""The recipes of the golden files: a valid base, and one named defect at a time.

    python -m conformance.recipes --write    # writes cases/ and manifest.json again
    python -m conformance.recipes --check    # exit status 1 where they differ from what is there

Files are made by hand, bit by bit from levels, without the package's writer; what they hold is computed by
the plain reader of the tests, which was written from SPEC.md alone. So golden files change only when a recipe
does, and what the package does has no part in them.
"""

from __future__ import annotations

from . import (
    canonical,
    chunks,
    combinations,
    crowds,
    directory,
    encode,
    entries,
    gallery,
    latitude,
    limits,
    masks,
    numbers,
    planes,
    preamble,
    quantisers,
    scales,
    shapes,
    tables,
    vectors,
)
from .suite import Suite

# In this order: later recipes break files of earlier ones.
AREAS = (gallery, preamble, directory, entries, tables, planes, masks, quantisers, scales, numbers, chunks)
AREAS += (vectors, shapes, combinations, crowds, limits, canonical, latitude, encode)


def suite() -> Suite:
    """All cases."""
    out = Suite()
    for area in AREAS:
        out.recipe = area.__name__.removeprefix("conformance.")
        area.add(out)
    return out
