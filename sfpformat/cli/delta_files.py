"""Opens deltas for commands, and describes them."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..container.delta_map import DeltaMap
from ..container.delta_parts import PARTS, part_name
from ..decode.delta_maps import joined_map, require_one_kind
from ..decode.parts import Parts
from ..decode.selection import Selection
from ..decode.shard_index import ShardIndex
from ..decode.validate import validate
from ..deltas.chains import open_chain
from ..deltas.comparing import add_from
from ..deltas.parts import separator_for
from ..deltas.result import DeltaFile
from ..deltas.tensors import Spec, Tensors
from ..deltas.writing import DeltaWriter
from ..errors import FileFault
from ..io.paths import file_path, is_index, model_path
from ..io.safetensors import SubByte, TensorSpec
from ..limits import Limits
from .console import Progress, progress
from .errors import CommandError, checked_target, path_in_errors
from .limit_option import add_limits, limits_of
from .model_files import Model, open_model, sub_byte_keys, sub_byte_of

FILE_HELP = "an .sfp or safetensors file, an index of shards, or a folder"


class ModelTensors:
    """The tensors of an open model, as `deltas` reads them."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.specs = {name: Spec(spec.dtype, spec.shape) for name, spec in model.specs.items()}

    def read(self, name: str) -> NDArray[np.generic]:
        return self._model.read(name)

    def read_part(self, name: str, selection: Selection) -> NDArray[np.generic]:
        return self._model.read_part(name, selection)

    def parts(self, name: str) -> Parts | None:
        return self._model.parts(name)

    def metadata(self) -> dict[str, str]:
        return self._model.metadata()


def add_deltas(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments for a base and its deltas."""
    parser.add_argument("base", metavar="BASE", help=FILE_HELP)
    parser.add_argument("deltas", metavar="DELTA", nargs="+", help="the deltas, in order")


def add_output(parser: argparse.ArgumentParser, metavar: str, text: str) -> None:
    """Adds the arguments for the written file, the form of the result, and the limits."""
    parser.add_argument("-o", "--output", metavar=metavar, required=True, help=text)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    add_limits(parser)


@dataclass(frozen=True)
class Chain:
    """An open base and the result of its deltas, while a command writes a file.

    Attributes:
        base, result: the base, and the result of the last delta.
        specs: name, dtype and shape of each tensor of the result.
        nbytes: size of these tensors.
        target: the file to write.
        limits: the limits on files.
        shown: the progress.
    """

    base: Model
    result: DeltaFile
    specs: list[TensorSpec]
    nbytes: int
    target: Path
    limits: Limits
    shown: Progress


@contextmanager
def opened_chain(args: argparse.Namespace) -> Iterator[Chain]:
    """Opens the files of `add_deltas` and `add_output`, shows progress, and adds paths to errors.

    Raises:
        CommandError: as in `open_result`, or a fault was found inside.
        OSError: a file cannot be read or written.
    """
    limits = limits_of(args.limit)
    with (
        open_model(args.base, limits=limits) as base,
        open_result(base, args.deltas, limits) as result,
    ):
        target = checked_target(args.output, [*base.paths(), *paths_of(args.deltas)])
        specs = result_specs(base, result)
        nbytes = sum(spec.nbytes for spec in specs)
        within = chain_in_errors(base, args.deltas, limits)
        with progress(nbytes, target.name) as shown, path_in_errors(target), within:
            yield Chain(base, result, specs, nbytes, target, limits, shown)


def paths_of(deltas: Iterable[str | Path]) -> list[Path]:
    """Returns the paths of the local files of deltas: with an index, also those of its shards."""
    out: list[Path] = []
    for path in map(model_path, deltas):
        if isinstance(path, Path):
            out.append(path)
            if is_index(path):
                out += [path.parent / name for name in ShardIndex.read(path).files()]
    return out


def add_tensors(
    writer: DeltaWriter,
    base: Model,
    specs: Iterable[TensorSpec],
    result: Tensors,
    shown: Progress,
    *,
    parts: bool = True,
    removed: Iterable[str] | None = None,
) -> None:
    """Adds the tensors of a base and a result to a delta.

    Stores a tensor whole if its dtype or shape in safetensors changes, for elements smaller than a byte.

    Args:
        writer: the writer of the delta.
        base: the base.
        specs: name, dtype and shape of each tensor of the result.
        result: the tensors of the result.
        shown: the progress.
        parts: same as for `write_delta`.
        removed: the names of the tensors of the base that the result does not have. None: all that are not
            among ``specs``.
    """
    kept, old = set(), ModelTensors(base)
    for spec in specs:
        shown.at(spec.name)
        kept.add(spec.name)
        before, keys = base.specs.get(spec.name), sub_byte_keys(spec)
        other: dict[str, object] | None = keys or None
        if before is not None:
            other = None if before.sub_byte == spec.sub_byte else keys
        add_from(writer, spec.name, old, result, parts=parts, other=other)
        shown.advance(spec.nbytes)
    for name in [name for name in base.specs if name not in kept] if removed is None else removed:
        writer.add(name, base.read(name), None)


def separator_of(base: Model, specs: Iterable[TensorSpec]) -> str:
    """Returns the separator of a delta between a base and a result."""
    return separator_for([*base.specs, *(spec.name for spec in specs)])


def open_result(base: Model, paths: Sequence[str], limits: Limits) -> DeltaFile:
    """Opens the result of a model and deltas.

    Raises:
        CommandError: a file is not a delta, is damaged, or does not fit the result of those before.
        OSError: a file cannot be read.
    """
    for path in paths:
        with open_model(path, kind="sfp", deltas=True, limits=limits) as model:
            if not is_delta(model):
                raise CommandError(f"{path}: is a model, not a delta; name the base first, then the deltas")
    with chain_in_errors(base, paths, limits):
        return open_chain(ModelTensors(base), [file_path(path) for path in paths], limits=limits)


@contextmanager
def chain_in_errors(base: Model, paths: Sequence[str], limits: Limits) -> Iterator[None]:
    """Adds the path of the delta that has a fault to a fault raised inside, and that of its base if needed.

    Args:
        base: the base of the first delta.
        paths: the paths of the deltas, in order.
        limits: the limits on files.

    Raises:
        CommandError: in place of a `FileFault`.
    """
    try:
        yield
    except FileFault as error:
        number = _faulty(base, paths, limits, error.tensor)
        what = " ".join(map(str, paths)) if number is None else paths[number]
        if error.code == "E_BASE":
            what = f"{what} on {paths[number - 1] if number else base.path}"
        raise CommandError(f"{what}: {error}") from error


def _faulty(base: Model, paths: Sequence[str], limits: Limits, tensor: str | None) -> int | None:
    """Returns the index of the first delta of a chain with which the chain has a fault.

    Reads one tensor of each delta again, or all of a delta if the fault is in numbers of several tensors.

    Args:
        base, paths, limits: same as for `chain_in_errors`.
        tensor: the name of the tensor with the fault, or None.

    Returns:
        None if no fault is found again.
    """
    for number, path in enumerate(paths):
        try:
            with open_chain(
                ModelTensors(base), [Path(each) for each in paths[: number + 1]], limits=limits
            ) as result:
                if tensor in result.specs:
                    result.get_tensor(tensor)
            if tensor not in result.specs and validate(path, limits=limits).faults:
                return number
        except FileFault:
            return number
    return None


def sub_bytes(base: Model, result: DeltaFile) -> dict[str, SubByte]:
    """Returns name -> dtype and shape in safetensors, for tensors whose elements are smaller than a byte."""
    below = result.base
    known = sub_bytes(base, below) if isinstance(below, DeltaFile) else {}
    if not isinstance(below, DeltaFile):
        known = {name: spec.sub_byte for name, spec in base.specs.items() if spec.sub_byte is not None}
    for tensor in result.delta.map.tensors:
        if tensor.kind in ("replaced", "added", "removed"):
            known.pop(tensor.name, None)
        if tensor.kind in ("replaced", "added"):
            found = sub_byte_of(result.delta.file.entry(tensor.name))
            if found is not None:
                known[tensor.name] = found
    return known


def result_specs(base: Model, result: DeltaFile) -> list[TensorSpec]:
    """Returns name, dtype and shape of each tensor of a result."""
    known = sub_bytes(base, result)
    return [TensorSpec(name, spec.dtype, spec.shape, known.get(name)) for name, spec in result.specs.items()]


def kinds_of(found: DeltaMap) -> dict[str, int]:
    """Returns kind -> number of tensors of that kind. A tensor is changed if one of its parts is."""
    kinds = {tensor.name: tensor.kind for tensor in found.tensors}
    for tensor in found.tensors:
        if tensor.structure is None or found.separator is None:
            continue
        names = [part_name(tensor.name, found.separator, part) for part in PARTS]
        own = [kinds.pop(name) for name in names if name in kinds]
        if any(kind != "unchanged" for kind in own):
            kinds[tensor.name] = "changed"
    return dict(Counter(kinds.values()))


def words_of(found: DeltaMap) -> str:
    """Describes the kinds of the tensors, such as ``210 changed, 62 unchanged``."""
    in_parts = sum(tensor.structure is not None for tensor in found.tensors)
    more = f" ({in_parts:,} with mask, levels or importance)" if in_parts else ""
    words = ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds_of(found).items()))
    return f"{words}{more}" if words else "no tensors"


def is_delta(model: Model) -> bool:
    """Returns whether an open model is a delta."""
    return delta_of(model) is not None


def delta_of(model: Model) -> DeltaMap | None:
    """Returns what a delta says about base and result, all shards together; None for a model.

    Raises:
        CommandError: only some of the shards are deltas, or the shards do not fit together.
    """
    if model.kind != "sfp":
        return None
    with path_in_errors(model.path):
        maps = require_one_kind(list(model.files), [file.directory.delta for file in model.files.values()])
    return joined_map(maps) if maps else None


class Result:
    """The result of a delta and its base, with the methods of `Model` that `sfp diff` needs.

    Faults name the delta.
    """

    def __init__(self, base: Model, result: DeltaFile, path: str, limits: Limits) -> None:
        self._result = result
        self._base, self._path, self._limits = base, path, limits
        self.specs = {spec.name: spec for spec in result_specs(base, result)}

    def read(self, name: str) -> NDArray[np.generic]:
        """Returns a tensor."""
        with chain_in_errors(self._base, [self._path], self._limits):
            return self._result.get_tensor(name)
