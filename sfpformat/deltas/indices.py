"""Writes the index of a delta in shards (SPEC.md chapters 18 and 28)."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..container.delta_map import DeltaMap
from ..decode.delta_maps import joined_map, maps_of
from ..decode.reader import SfpFile
from ..decode.shard_index import ShardIndex, index_name
from ..decode.shards import in_shard
from ..errors import OptionError
from ..io.atomic import AtomicFile, real_target, rename_all, replacing
from ..limits import DEFAULT_LIMITS, Limits
from ..names import quoted


def index_of(files: Mapping[str, Path], limits: Limits = DEFAULT_LIMITS) -> tuple[bytes, DeltaMap]:
    """Returns the bytes of the index of a delta in shards, and what the shards say together.

    Args:
        files: name of each shard in the index -> path of the file.
        limits: limits of the reader.

    Raises:
        OptionError: there are no files, one is not a delta, or two files have a tensor of the same name.
        InvalidFileError, UnsupportedError, LimitError: a file is damaged, or two list the same tensor.
        OSError: a file cannot be read.
    """
    if not files:
        raise OptionError("a delta in shards needs at least one file")
    weight_map: dict[str, str] = {}
    size, maps = 0, []
    for name in sorted(files):
        with in_shard(name), SfpFile(files[name], limits=limits, threads=1) as file:
            maps += [map_ for _, map_ in maps_of(file)]
            for tensor in file:
                if tensor in weight_map:
                    raise OptionError(
                        f"{weight_map[tensor]} and {name} both have a tensor {quoted(tensor)}; "
                        "give each DeltaWriter another number as shard"
                    )
                weight_map[tensor] = name
                entry = file.entry(tensor)
                size += math.prod(entry.shape) * entry.dtype.itemsize
    names: dict[str, list[str]] = {name: [] for name in files}  # some have none: nothing changes there
    for tensor, name in weight_map.items():
        names[name].append(tensor)
    return ShardIndex.of_files(names, size).to_bytes(), joined_map(maps)


def rename_with_index(
    files: Sequence[tuple[Path, Path]], index: Path, limits: Limits = DEFAULT_LIMITS
) -> DeltaMap:
    """Renames the synced files of a delta in shards to their final names, the index last (R-SHD-003).

    Args:
        files: temporary and final path of each.
        index: path of the index.
        limits: limits of the reader.

    Returns:
        What the files say about the tensors together.

    Raises:
        OptionError, InvalidFileError, OSError: as in `write_delta_index`.
    """
    data, found = index_of({target.name: path for path, target in files}, limits)
    new = AtomicFile(real_target(index))
    try:
        new.file.write(data)
        new.finish()
        rename_all(files, (new.path, new.target))
    finally:
        new.abort()
    return found


def write_delta_index(
    path: str | os.PathLike[str],
    shards: Iterable[str | os.PathLike[str]],
    *,
    limits: Limits = DEFAULT_LIMITS,
) -> DeltaMap:
    """Joins deltas of different tensors of a model to one delta, by an index of these files.

    ``write_delta_index("step-18.sfp.index.json", paths)``

    Everything that takes a delta takes the path of its index. Each file lists other tensors of base and
    result, and all files list all of them. `DeltaWriter` with ``shard`` writes one. Write the index last.

    Args:
        path: the index to write, ``STEM.sfp.index.json``.
        shards: the paths of the files, in the folder of the index.
        limits: same as for `sfpformat.open`.

    Returns:
        What the files say about the tensors together.

    Raises:
        OptionError: a path is wrong, there are no files, one is not a delta, or two files have a tensor of
            the same name.
        InvalidFileError, UnsupportedError, LimitError: a file is damaged, or two list the same tensor.
        OSError: a file cannot be read or written.
    """
    target, paths = Path(path), list(map(Path, shards))
    if not target.name.endswith(index_name("")):
        raise OptionError(f"the index {quoted(str(path))} must be named {index_name('STEM')}")
    if any(shard.parent.resolve() != target.parent.resolve() for shard in paths):
        raise OptionError("the shards of a delta must be in the folder of its index")
    data, found = index_of({shard.name: shard for shard in paths}, limits)
    with replacing(target) as file:
        file.write(data)
    return found
