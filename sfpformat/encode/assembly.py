"""Assembles a file: writes encoded tensors to a sink, and completes the file with its directory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..container.delta_map import FEATURE, DeltaMap
from ..container.delta_parts import PARTS_FEATURE
from ..container.directory import Directory
from ..container.entry import CHUNK_RECORD, TensorEntry
from ..container.keyed_map import KEYED_FEATURE, KeyedMap
from ..container.messagepack import depth_of
from ..container.preamble import SIZE, Preamble
from ..io.checksum import crc32
from ..limits import DEFAULT_LIMITS, Limits
from ..names import quoted
from .arguments import checked_metadata
from .chunks import Chunk
from .resume import ResumableSink
from .sink import Target, open_sink

_DEPTH_OF_ENTRIES = 2  # the directory and its list of tensors


class Encoded(NamedTuple):
    """A tensor that is ready to be written.

    Attributes:
        entry: its entry, without the chunk records.
        vectors: its vector chunk, or None.
        chunks: its chunks; a large tensor encodes them while they are iterated.
    """

    entry: TensorEntry
    vectors: Chunk | None
    chunks: Iterable[Chunk]


class Assembly:
    """A file that is being written.

    Attributes:
        entries: the entries of the tensors written so far, by name, including those of an earlier, resumed
            writer.
        delta: what makes the file a delta, or None.
        keyed: the keyed tables.
        sink: where the file's bytes go.
        is_whole: False while a tensor is partly written.
    """

    def __init__(
        self, target: Target, metadata: dict[str, str] | None, resume_key: str | None, limits: Limits
    ) -> None:
        """Opens the sink. For the arguments and errors, see `Writer`."""
        self._metadata = checked_metadata(metadata or {})
        self._limits = limits
        self._directory_bytes = sum(len(f"{key}{value}".encode()) for key, value in self._metadata.items())
        self._require_room("the metadata")
        self.sink = open_sink(target, resume_key, limits)
        self.entries: dict[str, TensorEntry] = {}
        if isinstance(self.sink, ResumableSink):
            self.entries = {entry.name: entry for entry in self.sink.entries}
        self.delta: DeltaMap | None = None
        self.keyed: tuple[KeyedMap, ...] = ()
        self.is_whole = True

    def write(self, encoded: Encoded) -> TensorEntry:
        """Writes the chunks of a tensor, and adds its entry with the chunk records."""
        self.is_whole, entry = False, encoded.entry
        vector_record = None if encoded.vectors is None else self._append(encoded.vectors)
        records = [self._append(chunk) for chunk in encoded.chunks]
        chunk_records = np.concatenate(records) if records else np.zeros(0, CHUNK_RECORD)
        entry = replace(entry, chunks=chunk_records, vectors=vector_record)
        entry.require_valid()
        what = f"tensor {quoted(entry.name)}"
        self._limits.require_written_tensor(entry.decoded_bytes, entry.stored_bytes, what)
        # Names and chunk records are most of the directory, so that their sum detects excess early.
        self._directory_bytes += len(entry.name.encode()) + chunk_records.nbytes
        self._require_room(what)
        self.entries[entry.name] = entry
        self.sink.tensor_done(entry)
        self.is_whole = True
        return entry

    def require_size(self, name: str, rank: int, decoded: int) -> None:
        """Raises `OptionError` if a tensor's rank, or its size in bytes, exceeds the limits."""
        what = f"tensor {quoted(name)}"
        self._limits.require_written("rank", rank, what)
        self._limits.require_written("tensor_bytes", decoded, what)

    def require_depth(self, entry: TensorEntry) -> None:
        """Raises `OptionError` if an entry is nested deeper than the limits allow."""
        if entry.other or self._limits.depth < DEFAULT_LIMITS.depth:  # other entries never exceed the default
            depth = _DEPTH_OF_ENTRIES + depth_of(entry.to_map())
            self._limits.require_written("depth", depth, f"tensor {quoted(entry.name)}")

    def _require_room(self, what: str) -> None:
        """Raises `OptionError` if the directory is larger than the limits allow."""
        self._limits.require_written("directory_bytes", self._directory_bytes, what)

    def _append(self, chunk: Chunk) -> NDArray[np.void]:
        """Writes a chunk and returns its record, shape [1]."""
        for part in chunk.parts:
            self.sink.append(part.data)
        return chunk.record

    def finish(self) -> None:
        """Writes the directory and completes the file.

        Raises:
            OptionError: the directory exceeds the limits.
            OSError: the file cannot be written or renamed.
        """
        features: tuple[str, ...] = () if self.delta is None else (FEATURE,)
        if self.delta is not None and self.delta.separator is not None:
            features = (FEATURE, PARTS_FEATURE)
        if self.keyed:
            features = (*features, KEYED_FEATURE)
        directory = Directory(self.entries, self._metadata, features, delta=self.delta, keyed=self.keyed)
        offset = SIZE + sum(entry.stored_bytes for entry in self.entries.values())
        data = directory.to_bytes()
        self._limits.require_written("directory_bytes", len(data), "the file")
        preamble = Preamble(offset, len(data), offset + len(data), crc32(data))
        self.sink.append(data)
        self.sink.commit(preamble.to_bytes())

    def abort(self, keep: bool) -> None:
        """Discards the file; with ``keep``, a resumable sink keeps the partial file."""
        self.sink.abort(keep)
