"""The engine for CUDA devices: decodes weights on the device; the best CPU engine does everything else.

Chunks are copied to the device unchanged. A kernel only reports that a run has a problem; the caller then
falls back to the reference, which decodes the run or raises the fault.
"""

from __future__ import annotations

from ...container.plain_entries import PlainTensors
from .. import get_engine, why_not
from .work import decode_runs, make_recipe

name = "cuda"

_processor = get_engine("numba" if why_not("numba") is None else "python")
assign = _processor.assign
best_layout = _processor.best_layout
chosen = _processor.chosen
cluster = _processor.cluster
compare = _processor.compare
count_classes = _processor.count_classes
count_exact = _processor.count_exact
count_symbols = _processor.count_symbols
crc32_with = _processor.crc32_with
decode_levels = _processor.decode_levels
decode_rows = _processor.decode_rows
encode_exact = _processor.encode_exact
encode_levels = _processor.encode_levels
encode_mask = _processor.encode_mask
exact_zeros = _processor.exact_zeros
few_magnitudes = _processor.few_magnitudes
find_changes = _processor.find_changes
hash_keys = _processor.hash_keys
lengths_of_codes = _processor.lengths_of_codes
place_changes = _processor.place_changes
solve_rows = _processor.solve_rows
survey_dense = _processor.survey_dense
survivors = _processor.survivors
translate = _processor.translate
uniform_levels = _processor.uniform_levels
write_changes = _processor.write_changes

__all__ = [
    "assign",
    "best_layout",
    "chosen",
    "cluster",
    "compare",
    "count_classes",
    "count_exact",
    "count_symbols",
    "crc32_with",
    "decode_levels",
    "decode_rows",
    "decode_runs",
    "encode_exact",
    "encode_levels",
    "encode_mask",
    "exact_zeros",
    "few_magnitudes",
    "find_changes",
    "hash_keys",
    "lengths_of_codes",
    "make_recipe",
    "name",
    "place_changes",
    "plan_plain",
    "solve_rows",
    "survey_dense",
    "survivors",
    "translate",
    "uniform_levels",
    "write_changes",
]


def plan_plain(tensors: PlainTensors) -> None:
    """Returns None: `decode_runs` already decodes many tensors at once."""
