"""The maps `delta` of a delta in one file or in shards (SPEC.md 28.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..container.delta_map import DeltaMap
from ..container.delta_parts import require_parts
from ..errors import OptionError, fault
from ..names import listed, quoted
from .reader import SfpFile

if TYPE_CHECKING:
    from .shards import ShardedFile


def maps_of(file: SfpFile | ShardedFile) -> list[tuple[SfpFile, DeltaMap]]:
    """Returns the file of a delta and its map; of a delta in shards, each shard with its map.

    Raises:
        OptionError: it is a model.
        InvalidFileError: only some of the shards are deltas.
    """
    files = [file] if isinstance(file, SfpFile) else list(file.files.values())
    names = [] if isinstance(file, SfpFile) else list(file.files)
    maps = [one.directory.delta for one in files]
    if all(map_ is None for map_ in maps):
        raise OptionError("the file is a model, not a delta; give the delta")
    return list(zip(files, require_one_kind(names, maps), strict=True))


def require_one_kind(names: Sequence[str], maps: Sequence[DeltaMap | None]) -> list[DeltaMap]:
    """Checks that the shards of an index are a delta together, or all of them a model.

    Args:
        names: the names of the shards.
        maps: the map of each; None of a shard that is not a delta.

    Returns:
        The maps; none of a model.

    Raises:
        InvalidFileError: only some of the shards are deltas, or `joined_map` refuses them.
    """
    found = [map_ for map_ in maps if map_ is not None]
    if found and len(found) < len(maps):
        model = names[list(maps).index(None)]
        raise fault("R-DLT-008", f"the shard {quoted(model)} is a model, but other shards are deltas")
    if found:
        joined_map(found)
    return found


def joined_map(maps: Sequence[DeltaMap]) -> DeltaMap:
    """Returns what the shards of a delta say about the tensors of base and result, in their order.

    Raises:
        InvalidFileError: two shards list a tensor, or they separate the names of parts differently.
    """
    if len(maps) == 1:
        return maps[0]
    tensors = tuple(tensor for map_ in maps for tensor in map_.tensors)
    known: set[str] = set()
    for tensor in tensors:
        if tensor.name in known:
            raise fault("R-DLT-002", "two shards of the delta list it", tensor=tensor.name)
        known.add(tensor.name)
    separators = {map_.separator for map_ in maps if map_.separator is not None}
    if len(separators) > 1:
        raise fault("R-DLT-018", f"the shards have different separators: {listed(sorted(separators))}")
    separator = separators.pop() if separators else None
    if separator is not None:
        require_parts(tensors, separator, None)
    base = next((map_.base for map_ in maps if map_.base is not None), None)
    pools = tuple(pool for map_ in maps for pool in map_.pools)
    return DeltaMap(tensors, pools, max(map_.block for map_ in maps), base, {}, separator)
