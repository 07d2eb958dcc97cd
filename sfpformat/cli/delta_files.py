"""Opens deltas for commands, and describes them."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..container.delta_map import DeltaMap
from ..decode.reader import SfpFile
from ..deltas.result import DeltaFile, open_chain
from ..deltas.tensors import Spec
from ..errors import FileFault
from ..io.safetensors import SubByte, TensorSpec
from ..limits import Limits
from .errors import CommandError, path_in_errors, require_file
from .model_files import Model, sub_byte_of

FILE_HELP = "an .sfp or safetensors file, an index of shards, or a folder"


class ModelTensors:
    """The tensors of an open model, as `deltas` reads them."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.specs = {name: Spec(spec.dtype, spec.shape) for name, spec in model.specs.items()}

    def read(self, name: str) -> NDArray[np.generic]:
        return self._model.read(name)

    def metadata(self) -> dict[str, str]:
        return self._model.metadata()


def add_deltas(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments for a base and its deltas."""
    parser.add_argument("base", metavar="BASE", help=FILE_HELP)
    parser.add_argument("deltas", metavar="DELTA", nargs="+", help="the deltas, in order")


def open_result(base: Model, paths: Sequence[str], limits: Limits) -> DeltaFile:
    """Opens the result of a model and deltas.

    Raises:
        CommandError: a file is not a delta, is damaged, or does not fit the result of those before.
        OSError: a file cannot be read.
    """
    for path in paths:
        require_file(path)
    for path in paths:
        with path_in_errors(path), SfpFile(path, limits=limits) as file:
            if file.directory.delta is None:
                raise CommandError(f"{path}: is a model, not a delta; name the base first, then the deltas")
    with chain_in_errors(base, paths):
        return open_chain(ModelTensors(base), [Path(path) for path in paths], limits=limits)


@contextmanager
def chain_in_errors(base: Model, paths: Sequence[str]) -> Iterator[None]:
    """Adds the paths of the base and the deltas to faults raised inside.

    Raises:
        CommandError: in place of a `FileFault`.
    """
    try:
        yield
    except FileFault as error:
        deltas = " ".join(map(str, paths))
        what = f"{deltas} on {base.path}" if error.code == "E_BASE" else deltas
        raise CommandError(f"{what}: {error}") from error


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
    """Returns kind -> number of tensors of that kind."""
    return dict(Counter(tensor.kind for tensor in found.tensors))


def words_of(found: DeltaMap) -> str:
    """Describes the kinds of the tensors, such as ``210 changed, 62 unchanged``."""
    return ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds_of(found).items())) or "no tensors"


def is_delta(model: Model) -> bool:
    """Returns whether an open model is a delta."""
    file = next(iter(model.files.values()), None)
    return isinstance(file, SfpFile) and file.directory.delta is not None


class Result:
    """The result of a delta and its base, with the methods of `Model` that `sfp diff` needs."""

    def __init__(self, base: Model, result: DeltaFile) -> None:
        self._result = result
        self.specs = {spec.name: spec for spec in result_specs(base, result)}

    def read(self, name: str) -> NDArray[np.generic]:
        """Returns a tensor."""
        return self._result.get_tensor(name)
