"""The map `delta` of the directory (SPEC.md 28.1): the tensors of base and result, and the pools.

`delta_parts` has the structures of tensors that are listed as parts (SPEC.md 28.4).
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import islice, pairwise
from typing import Protocol, TypeVar

from ..coding.changes import kind_of
from ..dtypes import DTYPES, Dtype
from ..errors import fault, placed
from ..limits import Limits
from .delta_parts import PARTS, Structure, part_name, require_parts
from .entry import MAX_POSITIONS
from .fields import Fields, place_of, require_absent, required, typed

FEATURE = "delta"
MAX_BLOCK = 1 << 24  # R-DLT-005
KINDS = ("unchanged", "changed", "replaced", "added", "removed")
_CHECKSUMS = struct.Struct("<II")
T = TypeVar("T")


class Outlined(Protocol):
    """What the map compares of an entry of the file."""

    @property
    def dtype(self) -> Dtype:
        """The dtype of the tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor."""


@dataclass(frozen=True)
class DeltaTensor:
    """A tensor of the base or the result.

    Attributes:
        name: its name.
        kind: one of `KINDS`.
        dtype, shape: those in the result; those in the base for a removed tensor.
        base: CRC-32 of its elements in the base; 0 if it is added.
        result: CRC-32 of its elements in the result; 0 if it is removed.
        structure: if these are the weights of a tensor in parts, its structure; else None.
    """

    name: str
    kind: str
    dtype: Dtype
    shape: tuple[int, ...]
    base: int
    result: int
    structure: Structure | None = None

    @cached_property
    def nbytes(self) -> int:
        """Size of the tensor, in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @cached_property
    def elements(self) -> int:
        """Number of elements; a complex number is two."""
        return self.nbytes * 8 // kind_of(self.dtype).bits


@dataclass(frozen=True)
class Pool:
    """Changed tensors of one dtype whose differences are coded together.

    Attributes:
        dtype: the name of their dtype.
        tensors: number of its tensors.
        counts, gaps, differences: names of the tensors of the file that code the differences.
    """

    dtype: str
    tensors: int
    counts: str
    gaps: str
    differences: str


@dataclass(frozen=True)
class DeltaMap:
    """The map `delta`.

    Attributes:
        tensors: the tensors of base and result.
        pools: the pools.
        block: B, the number of elements per block of a pool.
        base: a name of the base, or None.
        other: keys that this version does not know, with their values (R-DIR-005).
        separator: what stands between the name of a tensor and that of its part; None if no tensor is listed
            as parts.
    """

    tensors: tuple[DeltaTensor, ...]
    pools: tuple[Pool, ...]
    block: int
    base: str | None
    other: dict[str, object]
    separator: str | None = None

    def members(self) -> list[list[DeltaTensor]]:
        """Returns the tensors of each pool."""
        changed: dict[str, list[DeltaTensor]] = {}
        for tensor in self.tensors:
            if tensor.kind == "changed":
                changed.setdefault(tensor.dtype.name, []).append(tensor)
        rest = {dtype: iter(tensors) for dtype, tensors in changed.items()}
        return [list(islice(rest[pool.dtype], pool.tensors)) for pool in self.pools]

    def more_than_elements(self) -> list[str]:
        """Returns the names of the tensors in parts of which the part `weights` is not all."""
        listed = {tensor.name for tensor in self.tensors}
        return [
            tensor.name
            for tensor in self.tensors
            if tensor.structure is not None
            and self.separator is not None
            and any(part_name(tensor.name, self.separator, part) in listed for part in PARTS)
        ]

    def to_map(self) -> dict[str, object]:
        """Returns the map in the directory."""
        names = [tensor.name for tensor in self.tensors]
        shared = [_shared(*pair) for pair in pairwise(["", *names])]
        out: dict[str, object] = {
            **self.other,
            "block": self.block,
            "names": [name.encode()[size:].decode() for name, size in zip(names, shared, strict=True)],
            "shared": bytes(shared),
            "dtypes": [tensor.dtype.name for tensor in self.tensors],
            "shapes": [list(tensor.shape) for tensor in self.tensors],
            "kinds": bytes(KINDS.index(tensor.kind) for tensor in self.tensors),
            "checksums": b"".join(_CHECKSUMS.pack(tensor.base, tensor.result) for tensor in self.tensors),
            "pools": [asdict(pool) for pool in self.pools],
        }
        if self.separator is not None:
            structures = list(dict.fromkeys(t.structure for t in self.tensors if t.structure is not None))
            number = {structure: i + 1 for i, structure in enumerate(structures)}
            out["separator"] = self.separator
            out["structures"] = [structure.to_map() for structure in structures]
            out["structured"] = [0 if t.structure is None else number[t.structure] for t in self.tensors]
        return out if self.base is None else {**out, "base": self.base}

    @classmethod
    def from_map(
        cls, source: Fields, entries: Mapping[str, Outlined], limits: Limits, *, parts: bool
    ) -> DeltaMap:
        """Reads the map and checks it against the entries of the file.

        Args:
            source: the map.
            entries: dtype and shape of the file's tensors, by name.
            limits: the limits of the reader.
            parts: whether the file has the feature of tensors in parts.

        Raises:
            InvalidFileError, UnsupportedError, LimitError: the map is damaged or refused.
        """
        base = required(source, "base", str) if "base" in source else None
        block = required(source, "block", int)
        if not 1 <= block <= MAX_BLOCK:
            words = f"block is {block}, must be 1 to {MAX_BLOCK}"
            raise fault("R-DLT-005", words, offset=place_of(source, "block"))
        if not parts:
            require_absent(source, _PARTS_KEYS, "needs the feature 'delta-parts'")
        separator = required(source, "separator", str) if parts else None
        structures = _list_of(source, "structures", dict) if parts else []
        structured = _list_of(source, "structured", int) if parts else None
        tensors = _tensors(source, limits)
        if separator is not None and structured is not None:
            made = [Structure.from_map(item) for item in structures]
            tensors = _with_structures(source, tensors, made, structured)
            require_parts(tensors, separator, place_of(source, "structured"))
        pools = tuple(_pool(item) for item in _list_of(source, "pools", dict))
        _require_whole(source, tensors, pools)
        other = {key: value for key, value in source.items() if key not in _KEYS}
        found = cls(tensors, pools, block, base, other, separator)
        for pool, members in zip(pools, found.members(), strict=True):
            _require_pool(source, pool, members, block, entries)
        _require_entries(source, found, entries)
        return found


_PARTS_KEYS = ("separator", "structured", "structures")
_KEYS = frozenset(
    ("base", "block", "checksums", "dtypes", "kinds", "names", "pools", "shapes", "shared", *_PARTS_KEYS)
)


def _shared(before: str, name: str) -> int:
    """Returns the number of bytes of the longest common prefix of two names, at most 255."""
    size = 0
    for one, other in zip(before, name, strict=False):
        size += len(one.encode())
        if one != other or size > 255:
            return size - len(one.encode())
    return size


def _list_of(source: Fields, key: str, kind: type[T]) -> list[T]:
    at = place_of(source, key) if key in source else place_of(source)
    return [typed(item, kind, f"an element of {key}", at) for item in required(source, key, list)]


def _tensors(source: Fields, limits: Limits) -> tuple[DeltaTensor, ...]:
    names, dtypes = _names(source, limits), _list_of(source, "dtypes", str)
    shapes = _list_of(source, "shapes", list)
    kinds, checksums = required(source, "kinds", bytes), required(source, "checksums", bytes)
    sizes = {"dtypes": len(dtypes), "shapes": len(shapes), "kinds": len(kinds)}
    sizes["checksums"] = len(checksums) // 8 if len(checksums) % 8 == 0 else -1
    for key, size in sizes.items():
        if size != len(names):
            words = f"the list {key!r} of the delta does not fit its {len(names)} names"
            raise fault("R-DLT-001", words, offset=place_of(source, key))
    seen: set[str] = set()
    out = []
    for i, name in enumerate(names):
        with placed(tensor=name):
            if not name:
                words = "the name of a tensor is empty"
                raise fault("R-TEN-002", words, offset=place_of(source, "names"))
            if name in seen:
                words = "the delta lists this name twice"
                raise fault("R-DLT-002", words, offset=place_of(source, "names"))
            seen.add(name)
            limits.require("name_bytes", len(name.encode()), place_of(source, "names"))
            dtype = DTYPES.get(dtypes[i])
            if dtype is None:
                words = f"unknown dtype {dtypes[i]!r}"
                raise fault("R-TEN-003", words, offset=place_of(source, "dtypes"))
            shape = _shape(source, shapes[i], limits)
            if kinds[i] >= len(KINDS):
                words = f"the kind is {kinds[i]}, must be 0 to {len(KINDS) - 1}"
                raise fault("R-DLT-003", words, offset=place_of(source, "kinds"))
            found = DeltaTensor(
                name, KINDS[kinds[i]], dtype, shape, *_CHECKSUMS.unpack_from(checksums, 8 * i)
            )
            if not _has_possible_checksums(found):
                words = f"the checksums {found.base:08x} and {found.result:08x} do not fit {found.kind}"
                raise fault("R-DLT-004", words, offset=place_of(source, "checksums"))
        out.append(found)
    return tuple(out)


def _with_structures(
    source: Fields, tensors: tuple[DeltaTensor, ...], structures: list[Structure], numbers: list[int]
) -> tuple[DeltaTensor, ...]:
    """Returns the tensors with their structures (R-DLT-017)."""
    at = place_of(source, "structured")
    if len(numbers) != len(tensors):
        words = f"the list 'structured' of the delta does not fit its {len(tensors)} names"
        raise fault("R-DLT-017", words, offset=at)
    out = []
    for tensor, number in zip(tensors, numbers, strict=True):
        if number > len(structures):
            words = f"the number of its structure is {number}, but the delta has {len(structures)} structures"
            raise fault("R-DLT-017", words, tensor=tensor.name, offset=at)
        out.append(replace(tensor, structure=structures[number - 1] if number else None))
    return tuple(out)


def _names(source: Fields, limits: Limits) -> list[str]:
    """Returns the names, joined with the bytes that they share with the names before."""
    rests, shared = _list_of(source, "names", str), required(source, "shared", bytes)
    limits.require("tensors", len(rests), place_of(source, "names"))
    if len(shared) != len(rests):
        words = f"the list 'shared' of the delta does not fit its {len(rests)} names"
        raise fault("R-DLT-001", words, offset=place_of(source, "shared"))
    out: list[str] = []
    before = b""
    for rest, size in zip(rests, shared, strict=True):
        joined = before[:size] + rest.encode()
        if size > len(before) or not _is_utf8(joined):
            words = f"a name shares {size} bytes with the name before, which it cannot"
            raise fault("R-DLT-016", words, offset=place_of(source, "shared"))
        before = joined
        out.append(joined.decode())
    return out


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _shape(source: Fields, sizes: list[object], limits: Limits) -> tuple[int, ...]:
    at = place_of(source, "shapes")
    shape = tuple(typed(size, int, "a size in shapes", at) for size in sizes)
    limits.require("rank", len(shape), at)
    if math.prod([size for size in shape if size]) > MAX_POSITIONS:
        raise fault("R-TEN-005", f"shape {list(shape)} has more than 2^48 positions", offset=at)
    return shape


def _has_possible_checksums(tensor: DeltaTensor) -> bool:
    if tensor.kind == "added":
        return tensor.base == 0
    if tensor.kind == "removed":
        return tensor.result == 0
    return tensor.kind != "unchanged" or tensor.base == tensor.result


def _pool(source: Fields) -> Pool:
    texts = (required(source, key, str) for key in ("counts", "gaps", "differences"))
    return Pool(required(source, "dtype", str), required(source, "tensors", int), *texts)


def _require_whole(source: Fields, tensors: tuple[DeltaTensor, ...], pools: tuple[Pool, ...]) -> None:
    """Checks that the pools divide the changed tensors (R-DLT-006)."""
    changed = Counter(tensor.dtype.name for tensor in tensors if tensor.kind == "changed")
    pooled: Counter[str] = Counter()
    for pool in pools:
        pooled[pool.dtype] += pool.tensors
    if pooled != changed or any(pool.tensors == 0 for pool in pools):
        words = (
            f"the pools have {dict(pooled)} tensors by dtype, or one has none; changed are {dict(changed)}"
        )
        raise fault("R-DLT-006", words, offset=place_of(source, "pools"))


def _require_pool(
    source: Fields, pool: Pool, members: list[DeltaTensor], block: int, entries: Mapping[str, Outlined]
) -> None:
    """Checks the three tensors of a pool (R-DLT-007)."""
    at = place_of(source, "pools")
    kind = kind_of(members[0].dtype)
    blocks = -(-sum(member.elements for member in members) // block)
    for name, dtype, shape in (
        (pool.counts, DTYPES["F32"], (blocks, kind.keys)),
        (pool.gaps, DTYPES["F32"], None),
        (pool.differences, kind.stored, None),
    ):
        entry = entries.get(name)
        if entry is None:
            raise fault("R-DLT-007", "a tensor of a pool is missing", tensor=name, offset=at)
        if entry.dtype != dtype or (entry.shape != shape if shape else len(entry.shape) != 1):
            words = f"the tensor of a pool is {entry.dtype.name} {list(entry.shape)}, must be {dtype.name} "
            words += "of rank 1" if shape is None else str(list(shape))
            raise fault("R-DLT-007", words, tensor=name, offset=at)


def _require_entries(source: Fields, found: DeltaMap, entries: Mapping[str, Outlined]) -> None:
    """Checks that the file has the tensors of the pools, the replaced and the added ones (R-DLT-008)."""
    at = place_of(source, "names")
    of_pools = [name for pool in found.pools for name in (pool.counts, pool.gaps, pool.differences)]
    whole = [tensor for tensor in found.tensors if tensor.kind in ("replaced", "added")]
    for tensor in whole:
        entry = entries.get(tensor.name)
        if entry is None or (entry.dtype, entry.shape) != (tensor.dtype, tensor.shape):
            words = f"the file does not have this {tensor.kind} tensor with its dtype and shape"
            raise fault("R-DLT-008", words, tensor=tensor.name, offset=at)
    named = [*of_pools, *(tensor.name for tensor in whole)]
    if len(named) != len(entries) or len(set(named)) != len(named):
        words = (
            f"the delta uses {len(set(named))} tensors in {len(named)} places, the file has {len(entries)}"
        )
        raise fault("R-DLT-008", words, offset=at)
