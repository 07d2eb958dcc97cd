"""Edits that several chapters share, and small tensors to edit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sfp_conformance import slow_reader
from sfp_conformance.forge import Forge, Part, Taken, exact, hand_file, hand_part, table

from .suite import Edit


def of_map(tensor: str, where: str, **changes: object) -> Edit:
    """Returns an edit that changes keys of a map in a tensor's entry."""
    return lambda file: file.part(tensor).entry[where].update(changes)


def of_chunk(tensor: str, change: Callable[[Taken], object], k: int = 0) -> Edit:
    """Returns an edit that parses chunk k of a tensor, changes it, and builds it again."""

    def edit(file: Forge) -> None:
        part = file.part(tensor)
        taken = part.take(k)
        change(taken)
        part.put(taken, k)

    return edit


def bit_flip(tensor: str, bit: int, *, vectors: bool = False, k: int = 0) -> Edit:
    """Returns an edit that flips one bit of a chunk."""

    def edit(file: Forge) -> None:
        part = file.part(tensor)
        chunk = part.vectors if vectors else part.chunks[k]
        assert chunk is not None
        chunk[bit // 8] ^= 1 << bit % 8

    return edit


def put_bytes(tensor: str, at: int, raw: bytes, *, vectors: bool = False) -> Edit:
    """Returns an edit that overwrites bytes of a chunk."""

    def edit(file: Forge) -> None:
        part = file.part(tensor)
        chunk = part.vectors if vectors else part.chunks[0]
        assert chunk is not None
        chunk[at : at + len(raw)] = raw

    return edit


def opened(data: bytes, tensor: str, k: int = 0) -> slow_reader.Chunk:
    """Parses a chunk of a tensor with the slow reader."""
    part = Forge.of(data).part(tensor)
    return slow_reader.open_chunk(bytes(part.chunks[k]), part.full_entry(), k)


def vector_places(data: bytes, tensor: str) -> dict[str, tuple[int, int, str]]:
    """Returns vector -> byte offset in the vector chunk, number of elements, dtype."""
    out, pos = {}, 0
    for name, count, dtype in slow_reader.vectors(Forge.of(data).part(tensor).entry):
        out[name] = pos, count, dtype
        pos = slow_reader.align(pos + count * slow_reader.BYTES[dtype], 16)
    return out


def one(fingerprints: dict[str, Any], levels: list[int], dtype: str = "F32", **more: Any) -> Part:
    """Returns a tensor `one` of rank 1 with a position for each level.

    Args:
        fingerprints: the complete map of that name, with `base`, `extra`, `codes` and `group`.
        levels: the levels of the survivors.
        dtype: the dtype of the tensor.
        more: arguments of `hand_part`; the mask's bits as ``mask`` and its map as ``mask_map``; the levels of
            the importance as ``importance_levels``. All others are keys of the entry.
    """
    ours = ("mask", "codes", "trims", "vectors", "importance_levels")
    given = {key: more.pop(key) for key in ours if key in more}
    mask = given.pop("mask", None)
    own = {"fingerprints": levels}
    if "importance_levels" in given:
        own["importance"] = given.pop("importance_levels")
    if "mask_map" in more:
        more["mask"] = more.pop("mask_map")
    count = len(levels) if mask is None else len(mask)
    entry = {
        "name": "one",
        "dtype": dtype,
        "shape": [count],
        "chunk": 4,
        "fingerprints": fingerprints,
        **more,
    }
    return hand_part(entry, own, mask=mask, **given)


def one_file(fingerprints: dict[str, Any], levels: list[int], dtype: str = "F32", **more: Any) -> bytes:
    """Returns a file with the tensor of `one`."""
    return hand_file(one(fingerprints, levels, dtype, **more))


def masked(bits: list[int], mask: dict[str, Any], **more: Any) -> bytes:
    """Returns a file with a tensor `one` of F16 with a given mask; each weight is a level of 16 bits."""
    levels = [(7 * i * i + 3) % 30000 for i in range(sum(bits))]
    return one_file(exact("F16", **table([16])), levels, "F16", mask=bits, mask_map=mask, **more)
