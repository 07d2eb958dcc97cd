"""Reads the weights that a `DeltaSender` writes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ...decode.opening import open_any
from ...decode.reader import SfpFile
from ...decode.shards import ShardedFile
from ...deltas import applying
from ...deltas.reading import Delta
from ...deltas.result import DeltaFile
from ...errors import OptionError
from ...io.paths import is_index
from ..delta_models import Source
from ..tensors import Array, tensor_of
from ..ties import aliases_in
from .sender import copied_base, numbered


@dataclass(frozen=True)
class Patch:
    """The changed elements of a tensor.

    Attributes:
        shape: the shape of the tensor.
        positions: positions in the flattened tensor, ascending, int64 [n]. None: all elements change.
        values: the new values of these elements, [n].
    """

    shape: tuple[int, ...]
    positions: torch.Tensor | None
    values: torch.Tensor


class DeltaReceiver:
    """Weights in CPU memory that follow those of a `DeltaSender`.

    ``receiver = DeltaReceiver(base); receiver.catch_up("sync"); model.load_state_dict(receiver.tensors)``

    Attributes:
        number: the number of the file that was applied last; 0 before the first.
    """

    def __init__(
        self,
        base: Source | None = None,
        *,
        number: int = 0,
        engine: str | None = None,
        threads: int | None = None,
    ) -> None:
        """Copies the base.

        Args:
            base: the weights from which the sender starts, as for `DeltaSender`; None if its first file has
                all weights.
            number: the number of the last file that the base includes. `catch_up` applies those after it.
            engine, threads: same as for `sfpformat.open`.

        Raises:
            OptionError, InvalidFileError, SafetensorsError, OSError: the base cannot be read.
        """
        self._engine, self._threads = engine, threads
        self._arrays: dict[str, Array] | None = None
        self._aliases: dict[str, str] = {}  # other names of tied weights -> the names in `_arrays`
        self.number = number
        if base is not None:
            found = copied_base(base)
            self._arrays, self._aliases = found.arrays, found.aliases

    @property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """Name -> tensor, tied ones under each name. Shares the receiver's memory: `apply` changes it.

        Raises:
            OptionError: there are no weights yet.
        """
        out = {name: tensor_of(array) for name, array in self._held().items()}
        return out | {name: out[kept] for name, kept in self._aliases.items()}

    def read(self, path: str | os.PathLike[str]) -> dict[str, Patch]:
        """Returns what a file changes, without changing the weights. All of it is checked.

        Raises:
            BaseMismatchError: the file is a delta of other weights.
            OptionError: it is a delta, and there are no weights yet; or it removes a tensor.
            InvalidFileError, LimitError, OSError: the file cannot be read.
        """
        if not is_delta(path):
            with open_any(path, engine=self._engine, threads=self._threads) as file:
                whole = file.get_tensors()
            return {n: Patch(a.shape, None, tensor_of(a.reshape(-1))) for n, a in whole.items()}
        out = {}
        with DeltaFile(path, self._held(), engine=self._engine, threads=self._threads) as result:
            for tensor in result.delta.map.tensors:
                if tensor.kind == "removed":
                    raise OptionError(f"{path} removes the tensor {tensor.name!r}")
                if tensor.kind in ("replaced", "added"):
                    values = result.get_tensor(tensor.name).reshape(-1)
                    out[tensor.name] = Patch(tensor.shape, None, tensor_of(values))
                elif tensor.kind == "changed":
                    positions, new = result.get_changes(tensor.name)
                    if tensor.dtype.numpy.kind == "c":  # positions of whole complex numbers
                        positions = np.unique(positions // 2)
                        new = result.get_tensor(tensor.name).reshape(-1)[positions]
                    out[tensor.name] = Patch(tensor.shape, torch.from_numpy(positions), tensor_of(new))
        return out

    def apply(self, path: str | os.PathLike[str]) -> list[str]:
        """Applies a file. Changes all weights or none.

        Returns:
            The names of the tensors that changed.

        Raises:
            BaseMismatchError: the file is a delta of other weights.
            OptionError: it is a delta, and there are no weights yet.
            InvalidFileError, LimitError, OSError: the file cannot be read.
        """
        if not is_delta(path):
            with open_any(path, engine=self._engine, threads=self._threads) as file:
                self._arrays = file.get_tensors()
                self._aliases = aliases_in(file.metadata(), self._arrays)
            return self._all_names(self._arrays)
        with Delta(path, engine=self._engine, threads=self._threads) as delta:
            found = applying.apply_delta(self._held(), delta, threads=self._threads)
            self._aliases |= aliases_in(delta.metadata(), self._held())
        return self._all_names(tensor.name for tensor in found.tensors if tensor.kind != "unchanged")

    def catch_up(self, folder: str | os.PathLike[str]) -> list[str]:
        """Applies the files of a folder that were not applied yet, in order.

        Returns:
            The names of the tensors that changed, each once.

        Raises:
            OptionError: a file between is missing.
            BaseMismatchError, InvalidFileError, LimitError, OSError: as in `apply`. The files before are
                applied.
        """
        changed: dict[str, None] = {}
        for number, path in numbered(folder).items():
            if number <= self.number:
                continue
            if number != self.number + 1 and is_delta(path):
                raise OptionError(
                    f"{Path(folder)} has {path.name}, but not the file before it, number {number - 1}"
                )
            changed |= dict.fromkeys(self.apply(path))
            self.number = number
        return list(changed)

    def _all_names(self, changed: Iterable[str]) -> list[str]:
        """Returns names with the other names of tied weights."""
        names = list(changed)
        return names + [other for other, kept in self._aliases.items() if kept in names]

    def _held(self) -> dict[str, Array]:
        if self._arrays is None:
            raise OptionError("there are no weights yet: give a base, or first apply a file with all weights")
        return self._arrays


def is_delta(path: str | os.PathLike[str]) -> bool:
    """Returns whether a file, or that of an index, is a delta, not all weights."""
    if is_index(path):
        with ShardedFile(path) as shards:
            return any(shard.directory.delta is not None for shard in shards.files.values())
    with SfpFile(path) as file:
        return file.directory.delta is not None
