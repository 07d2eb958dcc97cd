"""Compares two models, and writes how the second differs from the first."""

from __future__ import annotations

from collections.abc import Mapping

from ..container.delta_map import DeltaMap
from ..encode.sink import Target
from ..limits import DEFAULT_LIMITS, Limits
from .parts import base_parts, parts_from, separator_for
from .tensors import OpenTensors, Source, Tensors
from .writing import BLOCK, DeltaWriter


def write_delta(
    path: Target,
    base: Source,
    new: Source,
    *,
    base_name: str | None = None,
    metadata: dict[str, str] | None = None,
    parts: bool = True,
    block: int = BLOCK,
    engine: str | None = None,
    threads: int | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> DeltaMap:
    """Writes how the tensors of a model differ from those of a base. Replaces an old file only at the end.

    ``write_delta("step-18.sfp", "step-17.safetensors", state_dict)``

    Args:
        path: the file to write.
        base, new: the base and the result: arrays by name; an open `.sfp` file; or the path of an `.sfp` or
            safetensors file, of the index of a model in shards, or of a folder with one `.sfp` model.
        base_name: a name of the base, for people. None uses the file name of ``base``.
        metadata: the strings of the result. None uses those of ``new``.
        parts: whether the result keeps masks, levels, quantisers and importances of the tensors of an `.sfp`
            file. The base must then have their levels, too. If false, the delta compares elements, and fits
            any base with the same elements, such as the arrays of `apply_delta`.
        block, engine, threads, limits: same as for `DeltaWriter`.

    Returns:
        What the file says about the tensors.

    Raises:
        OptionError: an argument is invalid, or a tensor exceeds the limits.
        InvalidFileError, UnsupportedError, LimitError, SafetensorsError: ``base`` or ``new`` is damaged.
        OSError: a file cannot be read or written.
    """
    with OpenTensors(base, limits) as old, OpenTensors(new, limits) as now:
        writer = DeltaWriter(
            path,
            base_name=old.name if base_name is None else base_name,
            metadata=now.tensors.metadata() if metadata is None else metadata,
            block=block,
            separator=separator_for([*old.tensors.specs, *now.tensors.specs]),
            engine=engine,
            threads=threads,
            limits=limits,
        )
        with writer:
            for name in now.tensors.specs:
                add_from(writer, name, old.tensors, now.tensors, parts=parts)
            for name in old.tensors.specs:
                if name not in now.tensors.specs:
                    writer.add(name, old.tensors.read(name), None)
            writer.close()
            return writer.described


def add_from(
    writer: DeltaWriter,
    name: str,
    base: Tensors,
    new: Tensors,
    *,
    parts: bool = True,
    other: Mapping[str, object] | None = None,
) -> None:
    """Adds a tensor of a result, in parts if it has more than elements.

    Args:
        writer: the writer of the delta.
        name: the tensor's name in both models.
        base, new: the tensors of base and result.
        parts: same as for `write_delta`.
        other: same as for `DeltaWriter.add`.

    Raises:
        OptionError, InvalidFileError, LimitError, OSError: as in `write_delta`.
    """
    now = parts_from(new, name) if parts else None
    old = None if now is None else base_parts(now, base, name)
    if now is not None and old is not None and other is None:
        writer.add_parts(name, old, now)
        return
    before = base.read(name) if name in base.specs else None
    writer.add(name, before, new.read(name), whole=now, other=other)
