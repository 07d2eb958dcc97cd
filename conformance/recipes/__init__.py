"""The recipes of the golden files: valid files, and copies with one defect each.

    python -m conformance.recipes --write    # writes cases/ and manifest.json again
    python -m conformance.recipes --check    # exit status 1 if they differ from the existing files

The recipes build the files bit by bit from levels, without the package's writer. The slow reader, which was
written from SPEC.md alone, computes their contents. Golden files therefore change only if a recipe changes,
and do not depend on the package.
"""

from __future__ import annotations

from . import (
    canonical,
    chunks,
    combinations,
    crowds,
    deltas,
    directory,
    encode,
    entries,
    gallery,
    keyed,
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
    windows,
)
from .suite import Suite

# In this order: later recipes break files of earlier ones.
AREAS = (
    *(gallery, preamble, directory, entries, tables, planes, masks, quantisers, scales, numbers, chunks),
    *(vectors, shapes, combinations, crowds, limits, canonical, latitude, deltas, encode, windows, keyed),
)


def suite() -> Suite:
    """Returns all cases."""
    out = Suite()
    for area in AREAS:
        out.recipe = area.__name__.removeprefix("conformance.")
        area.add(out)
    return out
