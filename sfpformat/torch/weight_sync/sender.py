"""Writes the weights of each step of a training into a folder, as what changed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch

from ...deltas.tensors import FileTensors, OpenTensors, spec_of
from ...deltas.writing import DeltaWriter
from ...encode.writer import Writer
from ...errors import OptionError
from ...names import quoted, unmatched
from ..delta_models import Source, arrays_of, state_of
from ..tensors import Array, array_of
from ..ties import TiedNames, aliases_in

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


@dataclass(frozen=True)
class Base:
    """A copy of the weights of a model.

    Attributes:
        name: its name, if it is in files.
        arrays: name -> weights; of tied weights, only the first name in alphabetical order.
        aliases: each other name of tied weights -> that name.
    """

    name: str | None
    arrays: dict[str, Array]
    aliases: dict[str, str]


def copied_base(base: Source) -> Base:
    """Returns a copy of a model.

    Raises:
        OptionError, InvalidFileError, SafetensorsError, OSError: it cannot be read.
    """
    if isinstance(base, (str, os.PathLike)) and Path(base).is_dir():
        indices = sorted(Path(base).glob("*.safetensors.index.json"))
        found = indices or sorted(Path(base).glob("*.safetensors"))
        if len(found) == 1:
            base = found[0]
    aliases: dict[str, str] = {}
    if isinstance(base, torch.nn.Module):
        base = state_of(base)
    if isinstance(base, Mapping):
        aliases = _aliases_of(base)
        base = {name: tensor for name, tensor in base.items() if name not in aliases}
    with OpenTensors(arrays_of(base)) as opened:
        arrays = {name: opened.tensors.read(name).copy() for name in opened.tensors.specs}
        if isinstance(opened.tensors, FileTensors):
            aliases = aliases_in(opened.tensors.metadata(), arrays)
        return Base(opened.name, arrays, aliases)


def _aliases_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Returns each other name of tied weights -> the first one in alphabetical order."""
    tied = TiedNames(tensors)
    return {name: tied.kept(name) for name in tensors if tied.kept(name) != name}


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
        self._aliases: dict[str, str] = {}
        if base is not None:
            found = copied_base(base)
            self._name, self._last, self._aliases = found.name, found.arrays, found.aliases
        self._number = max(numbered(self.folder), default=0)

    def send(
        self,
        tensors: torch.nn.Module | Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
        *,
        add: bool = False,
    ) -> Sent:
        """Writes the next file.

        Args:
            tensors: a module, the weights by name, or pairs as of `named_parameters`; read one at a time.
                Weights that are not among them stay as they were. Any name of tied weights is valid.
            add: whether names that the weights before do not have are new weights. If false, they raise.

        Returns:
            The file.

        Raises:
            OptionError: a tensor has no memory of its own; a name is unknown or occurs twice; tied weights
                differ; or an iterator is at its end, as if it was used before. Nothing was sent.
            OSError: the file cannot be written. Nothing was sent.
        """
        if isinstance(tensors, torch.nn.Module):
            tensors = state_of(tensors)
        if isinstance(tensors, Mapping):
            pairs = iter(tensors.items())
            if self._last is None:
                self._aliases = _aliases_of(tensors)
        else:
            pairs = iter(tensors)
            first = next(pairs, None)
            if first is None:
                raise OptionError("there are no tensors; was the iterator used before?")
            pairs = chain([first], pairs)
        number = self._number + 1
        path = self.folder / f"weights-{number:08d}.sfp"
        if self._last is None:
            new = self._write_whole(path, pairs)
        else:
            new = self._write_delta(path, pairs, self._last, add)
        sent = Sent(path, number, self._last is None, path.stat().st_size)
        self._last, self._number, self._name = new, number, path.name
        return sent

    def reset(self) -> None:
        """Makes the next file have all weights. For receivers that lost theirs."""
        self._last = None

    def _write_whole(self, path: Path, pairs: Iterator[tuple[str, torch.Tensor]]) -> dict[str, Array]:
        new: dict[str, Array] = {}
        with Writer(path, metadata=self._aliases, engine=self._engine, threads=self._threads) as writer:
            for name, array in self._copies(pairs, new):
                writer.add(name, array)
        return new

    def _write_delta(
        self, path: Path, pairs: Iterator[tuple[str, torch.Tensor]], last: dict[str, Array], add: bool
    ) -> dict[str, Array]:
        new: dict[str, Array] = {}
        writer = DeltaWriter(
            path,
            base_name=self._name,
            metadata=self._aliases,
            engine=self._engine,
            threads=self._threads,
        )
        with writer:
            for name, array in self._copies(pairs, new):
                if name not in last and not add:
                    raise OptionError(f"{unmatched(name, last)}; pass add=True to add it")
                writer.add(name, last.get(name), array)
            for name, array in last.items():
                if name not in new:
                    new[name] = array
                    writer.add(name, array, array)
        return new

    def _copies(
        self, pairs: Iterator[tuple[str, torch.Tensor]], new: dict[str, Array]
    ) -> Iterator[tuple[str, Array]]:
        """Yields the kept name and a copy of each tensor, tied ones once. Adds them to ``new``.

        Raises:
            OptionError: a name occurs twice, or tied weights differ.
        """
        given: set[str] = set()
        for name, tensor in pairs:
            if name in given:
                raise OptionError(f"tensor {quoted(name)} was already sent")
            given.add(name)
            kept = self._aliases.get(name, name)
            array = array_of(tensor, name)
            spec = spec_of(name, array)
            if kept not in new:
                new[kept] = array.copy() if tensor.device.type == "cpu" else array
                yield kept, new[kept]
            elif spec != spec_of(kept, new[kept]) or array.tobytes() != new[kept].tobytes():
                raise OptionError(f"{quoted(name)} is tied to {quoted(kept)}, but has other values")
