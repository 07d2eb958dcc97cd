"""The engine for CUDA devices: weights are decoded there, the rest is done by the processor's best engine.

Chunks travel as they lie in the file. What a kernel finds wrong it does not name: that run goes to the
reference, which gives the weights or the fault.
"""

from __future__ import annotations

from ...container.plain import PlainTensors
from .. import get_engine, why_not
from .work import decode_runs, make_recipe

name = "cuda"

_processor = get_engine("numba" if why_not("numba") is None else "python")
assign = _processor.assign
chosen = _processor.chosen
cluster = _processor.cluster
count_classes = _processor.count_classes
count_symbols = _processor.count_symbols
decode_levels = _processor.decode_levels
encode_levels = _processor.encode_levels
encode_mask = _processor.encode_mask
lengths_of_codes = _processor.lengths_of_codes
patterns_to_levels = _processor.patterns_to_levels
shared_zeros = _processor.shared_zeros
survivors = _processor.survivors
uniform_levels = _processor.uniform_levels

__all__ = [
    "assign",
    "chosen",
    "cluster",
    "count_classes",
    "count_symbols",
    "decode_levels",
    "decode_runs",
    "encode_levels",
    "encode_mask",
    "lengths_of_codes",
    "make_recipe",
    "name",
    "patterns_to_levels",
    "plan_plain",
    "shared_zeros",
    "survivors",
    "uniform_levels",
]


def plan_plain(tensors: PlainTensors) -> None:
    """None: `decode_runs` takes many tensors at once."""
