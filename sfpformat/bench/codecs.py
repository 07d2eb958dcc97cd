"""Runners that encode and decode in memory: this package a whole file, peers tensor by tensor."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..numpy import load, save
from ..options import Options
from .measure import Contender, Runner, WrongBitsError, seconds_of
from .peers import Packer
from .subject import Array, Tensors, bits_of, same_bits

# Compares decoded tensors with the originals, and returns facts such as the error.
Judge = Callable[[Mapping[str, Array]], dict[str, float]]


class CodecRunner(Runner):
    """Encodes and decodes the same tensors in each round."""

    def __init__(self, contender: Contender, tensors: Tensors) -> None:
        super().__init__(contender)
        self.tensors = tensors
        self._facts: dict[str, float] = {}

    @abstractmethod
    def encoder(self) -> Callable[[], Any]:
        """Returns the work of encoding. Preparation in this method is not timed."""

    @abstractmethod
    def decode(self) -> Any:
        """Decodes the data that `measure_size` kept."""

    @abstractmethod
    def measure_size(self) -> int:
        """Encodes once, keeps the result for decoding, and returns its size in bytes."""

    @abstractmethod
    def judge(self, decoded: Any) -> dict[str, float]:
        """Returns facts of the decoded tensors; raises WrongBitsError if they are wrong."""

    def check(self) -> None:
        """Encodes and decodes once, and judges the result."""
        size = self.measure_size()
        facts = self.judge(self.decode())
        self._facts = {
            "raw_bytes": sum(array.nbytes for array in self.tensors.values()),
            "weights": sum(array.size for array in self.tensors.values()),
            "size_bytes": size,
            **facts,
        }

    def facts(self) -> dict[str, float]:
        """Returns sizes and the facts of `judge`."""
        return self._facts

    def once(self) -> dict[str, float]:
        """Returns the seconds of encoding and of decoding."""
        return {"encode_s": seconds_of(self.encoder), "decode_s": seconds_of(lambda: self.decode)}


class SfpRunner(CodecRunner):
    """This package: encodes arrays to the bytes of a file and decodes them, with opening and all checksums.

    The bytes must not depend on engine and threads, so runners with the same options share them.
    """

    def __init__(
        self,
        contender: Contender,
        tensors: Tensors,
        options: Options | Mapping[str, Options],
        files: dict[tuple[str | None, str | None], bytes],
        judge: Judge | None = None,
    ) -> None:
        """Args:
        files: (case, preset) -> the bytes of the file; the first runner adds them.
        judge: compares the decoded tensors; None requires every bit.
        """
        super().__init__(contender, tensors)
        self._options = options
        self._files = files
        self._key = (contender.case, contender.preset)
        self._judge = judge or (lambda decoded: require_same_bits(tensors, decoded))

    def _save(self) -> bytes:
        who = self.contender
        return save(self.tensors, options=self._options, engine=who.engine, threads=who.threads)

    def encoder(self) -> Callable[[], bytes]:
        """Returns the work of encoding; there is no preparation."""
        return self._save

    @property
    def data(self) -> bytes:
        """The bytes of the file, after `measure_size`."""
        return self._files[self._key]

    def decode(self) -> Any:
        """Decodes all tensors."""
        return load(self.data, engine=self.contender.engine, threads=self.contender.threads)

    def measure_size(self) -> int:
        """Encodes once and returns the size of the whole file.

        Raises:
            WrongBitsError: the bytes differ from those of another engine or number of threads.
        """
        data = self._save()
        if self._files.setdefault(self._key, data) != data:
            raise WrongBitsError("the file differs from that of another engine or thread count")
        return len(data)

    def judge(self, decoded: Any) -> dict[str, float]:
        """Calls the given judge."""
        return self._judge(decoded)


class PackerRunner(CodecRunner):
    """A peer that packs tensor by tensor."""

    def __init__(self, contender: Contender, tensors: Tensors, packer: Callable[[int], Packer]) -> None:
        super().__init__(contender, tensors)
        self._make = packer
        self._packer: Packer | None = None
        self._arrays = [array for array in tensors.values() if array.nbytes]
        self._pieces: list[Any] = []

    @property
    def packer(self) -> Packer:
        """The packer, created on first use: importing a peer can take seconds or fail."""
        if self._packer is None:
            self._packer = self._make(self.contender.threads)
        return self._packer

    def encoder(self) -> Callable[[], Any]:
        """Prepares copies, because a peer may change its input."""
        prepared = self.packer.prepare(self._arrays)
        return lambda: self.packer.encode(prepared)

    def decode(self) -> list[Any]:
        """Decodes all buffers."""
        return self.packer.decode(self._pieces)

    def measure_size(self) -> int:
        """Encodes once and returns the bytes, without names, dtypes and shapes, which peers do not store."""
        self._pieces = self.encoder()()
        return sum(len(piece.data) for piece in self._pieces)

    def judge(self, decoded: Any) -> dict[str, float]:
        """Compares every bit; returns no facts.

        Raises:
            WrongBitsError: a bit differs.
        """
        if len(decoded) != len(self._arrays) or not all(
            np.array_equal(_buffer_bits(buffer), bits_of(array))
            for buffer, array in zip(decoded, self._arrays, strict=True)
        ):
            raise WrongBitsError("the decoded tensors differ from the packed ones")
        return {}


def _buffer_bits(buffer: Any) -> Array:
    return bits_of(buffer) if isinstance(buffer, np.ndarray) else np.frombuffer(buffer, np.uint8)


def require_same_bits(tensors: Mapping[str, Array], decoded: Mapping[str, Array]) -> dict[str, float]:
    """Compares every bit; returns no facts.

    Raises:
        WrongBitsError: a bit differs.
    """
    if not same_bits(tensors, decoded):
        raise WrongBitsError("the decoded tensors differ from the packed ones")
    return {}
