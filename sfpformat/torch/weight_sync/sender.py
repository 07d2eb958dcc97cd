"""Writes the weights of each step of a training into a folder, as what changed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ...deltas.tensors import OpenTensors, spec_of
from ...deltas.writing import DeltaWriter
from ...encode.writer import Writer
from ...errors import OptionError
from ...names import quoted
from ..deltas import Source, arrays_of
from ..tensors import Array, array_of

_FILE = re.compile(r"weights-(\d{8})\.sfp(\.index\.json)?")


@dataclass(frozen=True)
class Sent:
    """A file that a `DeltaSender` wrote.

    Attributes:
        path: the file.
        number: the number in its name; the first file of a folder has 1.
        whole: whether it has all weights. If false, it is a delta of the file before, or of the base.
        nbytes: its size.
    """

    path: Path
    number: int
    whole: bool
    nbytes: int


def numbered(folder: str | os.PathLike[str]) -> dict[int, Path]:
    """Returns number -> path of the files that senders wrote into a folder, or of indices, ascending."""
    found = {}
    for path in sorted(Path(folder).iterdir()):
        name = _FILE.fullmatch(path.name)
        if name is not None:
            found[int(name[1])] = path
    return dict(sorted(found.items()))


def copied_base(base: Source) -> tuple[str | None, dict[str, Array]]:
    """Returns the name of a model, if it is in files, and copies of its tensors.

    Raises:
        OptionError, InvalidFileError, SafetensorsError, OSError: it cannot be read.
    """
    if isinstance(base, (str, os.PathLike)) and Path(base).is_dir():
        indices = sorted(Path(base).glob("*.safetensors.index.json"))
        found = indices or sorted(Path(base).glob("*.safetensors"))
        if len(found) == 1:
            base = found[0]
    with OpenTensors(arrays_of(base)) as opened:
        return opened.name, {name: opened.tensors.read(name).copy() for name in opened.tensors.specs}


class DeltaSender:
    """Writes the weights of each step into a folder, as the changes since the step before.

    ``sender = DeltaSender("sync", base=model); ...; sender.send(model.named_parameters())``

    Files appear complete or not at all, and are numbered, so that a `DeltaReceiver` can apply them in order.
    Keeps a copy of the weights in CPU memory; two copies during `send`. A model in DTensors needs no sender:
    `sfpformat.torch.write_delta` writes ``weights-00000001.sfp.index.json`` and its shards, and so on.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        base: Source | None = None,
        engine: str | None = None,
        threads: int | None = None,
    ) -> None:
        """Starts a sequence of files, after those that the folder already has.

        Args:
            folder: the folder, which is created if it does not exist.
            base: the weights that the receivers have, as for `sfpformat.torch.write_delta`, or a folder with
                one model in safetensors. None: the first file has all weights.
            engine, threads: same as for `sfpformat.DeltaWriter`.

        Raises:
            OptionError, InvalidFileError, SafetensorsError: the base cannot be read.
            OSError: the folder cannot be created.
        """
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._engine, self._threads = engine, threads
        self._last: dict[str, Array] | None = None
        self._name: str | None = None
        if base is not None:
            self._name, self._last = copied_base(base)
        self._number = max(numbered(self.folder), default=0)

    def send(self, tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]) -> Sent:
        """Writes the next file.

        Args:
            tensors: the weights by name, or pairs as of `named_parameters`; read one at a time. Weights that
                are not among them stay as they were.

        Returns:
            The file.

        Raises:
            OptionError: a tensor has no memory of its own, or a name occurs twice. Nothing was sent.
            OSError: the file cannot be written. Nothing was sent.
        """
        pairs = iter(tensors.items() if isinstance(tensors, Mapping) else tensors)
        number = self._number + 1
        path = self.folder / f"weights-{number:08d}.sfp"
        new = self._write_whole(path, pairs) if self._last is None else self._write_delta(path, pairs)
        sent = Sent(path, number, self._last is None, path.stat().st_size)
        self._last, self._number, self._name = new, number, path.name
        return sent

    def reset(self) -> None:
        """Makes the next file have all weights. For receivers that lost theirs."""
        self._last = None

    def _write_whole(self, path: Path, pairs: Iterator[tuple[str, torch.Tensor]]) -> dict[str, Array]:
        new: dict[str, Array] = {}
        with Writer(path, engine=self._engine, threads=self._threads) as writer:
            for name, tensor in pairs:
                writer.add(name, _copied(name, tensor, new))
        return new

    def _write_delta(self, path: Path, pairs: Iterator[tuple[str, torch.Tensor]]) -> dict[str, Array]:
        assert self._last is not None
        new: dict[str, Array] = {}
        writer = DeltaWriter(path, base_name=self._name, engine=self._engine, threads=self._threads)
        with writer:
            for name, tensor in pairs:
                writer.add(name, self._last.get(name), _copied(name, tensor, new))
            for name, array in self._last.items():
                if name not in new:
                    new[name] = array
                    writer.add(name, array, array)
        return new


def _copied(name: str, tensor: torch.Tensor, new: dict[str, Array]) -> Array:
    """Adds a copy of a tensor to ``new``, in CPU memory, and returns it."""
    if name in new:
        raise OptionError(f"tensor {quoted(name)} was already sent")
    array = array_of(tensor, name)
    new[name] = array.copy() if tensor.device.type == "cpu" else array
    spec_of(name, new[name])
    return new[name]
