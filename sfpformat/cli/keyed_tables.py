"""Describes keyed tables for commands."""

from __future__ import annotations

import numpy as np

from ..container.keyed_map import KeyedMap
from ..keyed.design import class_probabilities, expected_parts
from .console import bytes_words, counted, number
from .model_files import Model


def keyed_of(model: Model) -> list[KeyedMap]:
    """Returns the keyed tables of all files of a model."""
    return [table for file in model.files.values() for table in file.directory.keyed]


def _bits_per_key(table: KeyedMap) -> dict[str, float]:
    """Returns the expected bits per key of each part of a row, and those of the rest of the bit array."""
    parts = expected_parts(table.code)
    rest = 8 * table.array_bytes / max(table.keys, 1) - sum(parts.values())
    return {**parts, "equations": rest}


def _false_matches(table: KeyedMap) -> float:
    """Returns the probability that an unknown key is taken for a known one."""
    checks = np.frombuffer(table.code.checks, np.uint8).astype(np.float64)
    return float(np.cumsum(class_probabilities(table.code) * 0.5**checks)[-1])


def table_words(table: KeyedMap) -> str:
    """Returns the description of a table, on one line."""
    parts = ", ".join(f"{part} {number(bits, 2)}" for part, bits in _bits_per_key(table).items() if bits)
    each = 8 * table.array_bytes / max(table.keys, 1)
    return (
        f"{counted(table.keys, 'key')}, {counted(table.code.outputs, 'output')}, {table.quantiser}, "
        f"{bytes_words(table.array_bytes)}: {number(each, 2)} bits per key "
        f"({parts}); false matches {_false_matches(table):.3g}"
    )


def table_json(table: KeyedMap) -> dict[str, object]:
    """Returns the description of a table as JSON values."""
    return {
        "name": table.name,
        "keys": table.keys,
        "outputs": table.code.outputs,
        "quantiser": str(table.quantiser),
        "bytes": table.array_bytes,
        "bits_per_key": _bits_per_key(table),
        "checks": list(table.code.checks),
        "false_matches": _false_matches(table),
    }
