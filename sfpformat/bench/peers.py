"""The peers: other packages that compress or load tensors, used as documented, if installed.

Rules: a peer packs tensor by tensor, from memory to memory. Tensors that it does not support are counted and
copied as raw bytes. Packages are imported lazily, with their warnings suppressed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ..dtypes import DTYPES, of_numpy
from .subject import Array, bits_of

_ZSTANDARD_LEVEL = 3
# ZipNN does not support very small tensors.
_ZIPNN_LEAST_BYTES = 4096
_ZIPNN_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_PCODEC_KINDS, _PCODEC_LEAST_ITEM = "fiu", 2
_BF16 = DTYPES["BF16"].numpy


class Piece(NamedTuple):
    """A tensor packed by a peer.

    Attributes:
        data: the packed bytes.
        how: the packer's information for decoding; None for raw bytes.
    """

    data: Any
    how: str | None


class Packer(Protocol):
    """A peer that packs sequences of non-empty tensors."""

    def prepare(self, arrays: Sequence[Array]) -> list[Any]:
        """Returns the input of `encode`; called before each call of it, not timed."""

    def encode(self, prepared: list[Any]) -> list[Piece]:
        """Packs all tensors."""

    def decode(self, pieces: list[Piece]) -> list[Any]:
        """Unpacks all tensors to buffers."""


class ZstandardPacker:
    """zstandard, with one frame per tensor; several threads process frames in parallel."""

    def __init__(self, threads: int) -> None:
        self._zstandard = imported("zstandard")
        self._threads = threads

    def prepare(self, arrays: Sequence[Array]) -> list[Any]:
        """Returns the tensors as bytes."""
        return [array.tobytes() for array in arrays]

    def encode(self, prepared: list[Any]) -> list[Piece]:
        """Packs at zstandard's default level."""
        compressor = self._zstandard.ZstdCompressor(level=_ZSTANDARD_LEVEL)
        if self._threads == 1:
            return [Piece(compressor.compress(blob), "zstd") for blob in prepared]
        frames = compressor.multi_compress_to_buffer(prepared, threads=self._threads)
        return [Piece(frame.tobytes(), "zstd") for frame in frames]

    def decode(self, pieces: list[Piece]) -> list[Any]:
        """Unpacks all frames; with several threads, to views of shared buffers."""
        decompressor = self._zstandard.ZstdDecompressor()
        if self._threads == 1:
            return [decompressor.decompress(piece.data) for piece in pieces]
        frames = [piece.data for piece in pieces]
        return list(decompressor.multi_decompress_to_buffer(frames, threads=self._threads))


class ZipnnPacker:
    """ZipNN, with the dtype of each tensor as argument."""

    def __init__(self, threads: int) -> None:
        maker = imported("zipnn").ZipNN
        self._coders = {
            dtype: maker(bytearray_dtype=dtype, input_format="byte", threads=threads)
            for dtype in _ZIPNN_DTYPES.values()
        }

    def prepare(self, arrays: Sequence[Array]) -> list[Any]:
        """Returns copies with their dtypes; copies, because ZipNN modifies its input."""
        out = []
        for array in arrays:
            known = of_numpy(array.dtype)
            dtype = _ZIPNN_DTYPES.get(known.name) if known and array.nbytes > _ZIPNN_LEAST_BYTES else None
            out.append((bytearray(bits_of(array)), dtype))
        return out

    def encode(self, prepared: list[Any]) -> list[Piece]:
        """Packs all tensors; unsupported ones stay raw."""
        return [self._encode_one(blob, dtype) for blob, dtype in prepared]

    def _encode_one(self, blob: bytearray, dtype: str | None) -> Piece:
        if dtype is None:
            return Piece(bytes(blob), None)
        return Piece(self._coders[dtype].compress(blob), dtype)

    def decode(self, pieces: list[Piece]) -> list[Any]:
        """Unpacks all tensors to bytearrays."""
        return [
            bytearray(piece.data) if piece.how is None else self._coders[piece.how].decompress(piece.data)
            for piece in pieces
        ]


class PcodecPacker:
    """pcodec at its default level. It lacks BF16, which it gets as integers in the order of the values."""

    def __init__(self, threads: int) -> None:
        pcodec = imported("pcodec")
        self._standalone, self._config = pcodec.standalone, pcodec.ChunkConfig()

    def prepare(self, arrays: Sequence[Array]) -> list[Any]:
        """Returns flat arrays."""
        return [np.ascontiguousarray(array).reshape(-1) for array in arrays]

    def encode(self, prepared: list[Any]) -> list[Piece]:
        """Packs all tensors; the time includes the conversion of BF16 to integers."""
        return [self._encode_one(array) for array in prepared]

    def _encode_one(self, array: Array) -> Piece:
        if array.dtype == _BF16:
            values = ordered_of_bf16(array.view(np.uint16))
            return Piece(self._standalone.simple_compress(values, self._config), "ordered")
        if array.dtype.kind in _PCODEC_KINDS and array.dtype.itemsize >= _PCODEC_LEAST_ITEM:
            return Piece(self._standalone.simple_compress(array, self._config), "plain")
        return Piece(array.tobytes(), None)

    def decode(self, pieces: list[Piece]) -> list[Any]:
        """Unpacks all tensors to arrays; raw ones to bytearrays."""
        return [self._decode_one(piece) for piece in pieces]

    def _decode_one(self, piece: Piece) -> Any:
        if piece.how is None:
            return bytearray(piece.data)
        values = self._standalone.simple_decompress(piece.data)
        return bf16_of_ordered(values) if piece.how == "ordered" else values


def ordered_of_bf16(patterns: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """Maps BF16 patterns to integers in value order: flips all bits of negatives, else the sign bit."""
    flips = (patterns.view(np.int16) >> 15).view(np.uint16)
    flips |= 0x8000
    flips ^= patterns
    return flips


def bf16_of_ordered(values: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """Returns the BF16 patterns of such integers; the inverse of `ordered_of_bf16`."""
    flips = (~values.view(np.int16) >> 15).view(np.uint16)
    flips |= 0x8000
    flips ^= values
    return flips


@dataclass(frozen=True)
class Peer:
    """A package to compare with.

    Attributes:
        section: the section in which it runs.
        modules: the modules that must be importable.
        threaded: whether it supports several threads.
        packer: threads -> packer; only for the section ``lossless``.
        install: the arguments of ``pip install``.
    """

    section: str
    modules: tuple[str, ...]
    threaded: bool = False
    packer: Callable[[int], Packer] | None = None
    install: str = "'sfpformat[bench]'"


PEERS: dict[str, Peer] = {
    "zipnn": Peer(
        "lossless",
        ("zipnn", "torch", "safetensors"),
        threaded=True,
        packer=ZipnnPacker,
        install="--no-deps zipnn==0.5.4, and torch and safetensors, which it imports",
    ),
    "pcodec": Peer("lossless", ("pcodec",), packer=PcodecPacker),
    "zstandard": Peer("lossless", ("zstandard",), threaded=True, packer=ZstandardPacker),
    "nncodec": Peer("sparse", ("nncodec",), install="--no-deps nncodec==2.1.3"),
    "safetensors": Peer("load", ("safetensors",)),
}


def why_not(name: str) -> str | None:
    """Returns why a peer cannot be used here, or None."""
    missing = [module for module in PEERS[name].modules if importlib.util.find_spec(module) is None]
    if not missing:
        return None
    return f"{', '.join(missing)} not installed; pip install {PEERS[name].install}"


def version_of(name: str) -> str | None:
    """Returns the version of an installed package, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def imported(module: str) -> Any:
    """Imports a peer's module without its warnings, which our users cannot fix."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(module)
