"""The files that the sections ``load``, ``memory`` and ``startup`` read, each written on first use."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from ..dtypes import of_numpy
from ..io.atomic import replacing
from ..io.safetensors import TensorSpec, in_aligned_order, write_tensors
from ..numpy import save_file
from ..options import PRESETS
from .subject import Tensors, heads


class Files:
    """Files of a model, and small files with the first positions of its tensors."""

    def __init__(self, tensors: Tensors, folder: Path) -> None:
        self.tensors = tensors
        self._folder = folder

    @cached_property
    def _heads(self) -> Tensors:
        return heads(self.tensors)

    def packed(self, preset: str) -> Path:
        """Returns the path of the lossless `.sfp` file."""
        return self._packed(f"{preset}.sfp", lambda: self.tensors, preset)

    def packed_heads(self, preset: str) -> Path:
        """Returns the path of a small `.sfp` file with the same dtypes, for compiling and warming up."""
        return self._packed(f"{preset}.heads.sfp", lambda: self._heads, preset)

    def _packed(self, name: str, tensors: Callable[[], Tensors], preset: str) -> Path:
        path = self._folder / name
        if not path.exists():
            save_file(tensors(), path, options=PRESETS[preset])
        return path

    def raw(self) -> Path:
        """Returns the path of the uncompressed safetensors file."""
        return self._raw("raw.safetensors", lambda: self.tensors)

    def raw_heads(self) -> Path:
        """Returns the path of a small safetensors file with the tensors of `packed_heads`."""
        return self._raw("raw.heads.safetensors", lambda: self._heads)

    def _raw(self, name: str, tensors: Callable[[], Tensors]) -> Path:
        path = self._folder / name
        if not path.exists():
            arrays = tensors()
            specs = [
                TensorSpec(name, dtype, array.shape)
                for name, array in arrays.items()
                if (dtype := of_numpy(array.dtype)) is not None
            ]
            ordered = in_aligned_order(specs)
            with replacing(path) as file:
                write_tensors(file, ordered, {}, (arrays[spec.name] for spec in ordered))
        return path
