"""Shapes of every rank, and files of many tensors."""

from __future__ import annotations

from sfp_conformance.forge import exact, hand_file, raw_part, table

from .edits import one
from .suite import Suite

RANKS: tuple[list[int], ...] = (
    [],
    [6],
    [2, 3],
    [1, 2, 3],
    [2, 1, 3, 1],
    [1, 1, 2, 3, 1],
    [1, 2, 1, 3, 1, 1],
    [1] * 6 + [6],
    [1] * 7 + [5],
)


def add(suite: Suite) -> None:
    """Adds the cases of this module to the suite."""
    for rank, shape in enumerate(RANKS):
        count = 1
        for length in shape:
            count *= length
        data = hand_file(raw_part("one", "U16", shape, bytes(range(2 * count))))
        suite.valid(f"TEN-005-raw-rank-{rank}", f"the shape {shape}, raw", data)
        part = one(exact("BF16", **table([16])), [257 * i for i in range(count)], "BF16", shape=shape)
        suite.valid(f"TEN-005-rank-{rank}", f"the shape {shape}", hand_file(part), "R-REC-001")
    for rank in range(1, 9):
        part = one(exact("F32", **table([0])), [], shape=[3] * (rank - 1) + [0])
        suite.valid(f"TEN-008-empty-of-rank-{rank}", f"an empty tensor of rank {rank}", hand_file(part))
    for count in (2, 15, 16, 17, 300):
        many = [raw_part(f"t{i:05d}", "U8", [1], bytes([i % 256])) for i in range(count)]
        suite.valid(f"LAY-001-{count}-tensors", f"{count} tensors", hand_file(*many), "R-TEN-001")
    part = one(exact("F16", **table([1])), [p % 2 for p in range(400)], "F16", shape=[4, 100], chunk=2)
    suite.valid("TEN-006-rows-of-several-segments", "rows of more than three segments", hand_file(part))
    for segment in (32, 64, 96, 1024, 65536):
        for count in (segment - 1, segment, segment + 1):
            levels = [i % 2 for i in range(count)]
            part = one(exact("F16", **table([1])), levels, "F16", segment=segment, chunk=1)
            words = f"{count} positions in segments of {segment}, one per chunk"
            if segment <= 1024:
                suite.valid(f"TEN-006-{count}-in-{segment}", words, hand_file(part), "R-TEN-008")
