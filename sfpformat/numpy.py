"""The door to numpy: the functions that users of safetensors know, for `.sfp`.

What writes is imported when something is written: who only reads need not wait for the encoder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .coding.mask import Mask
from .decode.opening import open_any
from .decode.reader import SfpFile
from .dtypes import of_numpy
from .io.source import Buffer
from .limits import DEFAULT_LIMITS, Limits
from .names import checked_by_name, require_mapping
from .options import Options, options_by_name

if TYPE_CHECKING:
    from .encode.plan import Importance
    from .encode.weights import Outline
    from .encode.writer import Writer

Arrays = Mapping[str, NDArray[np.generic]]


def save_file(
    tensors: Arrays,
    path: str | os.PathLike[str],
    metadata: dict[str, str] | None = None,
    *,
    options: Options | Mapping[str, Options] | None = None,
    masks: Mapping[str, Mask] | None = None,
    importances: Mapping[str, Importance] | None = None,
    limits: Limits = DEFAULT_LIMITS,
    threads: int | None = None,
    engine: str | None = None,
) -> None:
    """Writes tensors to a file; the file at ``path`` is replaced only when all went well.

    Args:
        tensors: name -> array, any shape, any dtype of the format (`ml_dtypes` for BF16 and FP8).
        path: of the file.
        metadata: strings of the caller's own.
        options: for all tensors, or for each by name; lossless where nothing is said. One `Options` that is
            lossy reaches every float tensor; `options_for_weights` gives options for the weights alone.
        masks: name -> bool array of the tensor's shape, True for survivors.
        importances: name -> float array of the tensor's shape, or two vectors (rows, columns).
        limits: what readers allow; they need the same ones where these are not the default.
        threads: how many may work; the bytes do not depend on it.
        engine: as in `sfpformat.open`; the bytes do not depend on it.

    Raises:
        OptionError: what is asked does not fit a tensor, readers would refuse one by their limits, or a name
            in an argument is no tensor's.
        OSError: the file cannot be written.
    """
    from .encode.writer import Writer

    with Writer(path, metadata=metadata, limits=limits, engine=engine, threads=threads) as writer:
        _add_all(writer, tensors, options, masks, importances)


def save(
    tensors: Arrays,
    metadata: dict[str, str] | None = None,
    *,
    options: Options | Mapping[str, Options] | None = None,
    masks: Mapping[str, Mask] | None = None,
    importances: Mapping[str, Importance] | None = None,
    limits: Limits = DEFAULT_LIMITS,
    threads: int | None = None,
    engine: str | None = None,
) -> bytes:
    """The bytes of a file; as `save_file`."""
    from .encode.sink import MemorySink
    from .encode.writer import Writer

    out = MemorySink()
    with Writer(out, metadata=metadata, limits=limits, engine=engine, threads=threads) as writer:
        _add_all(writer, tensors, options, masks, importances)
    return out.data


def load_file(
    path: str | os.PathLike[str],
    *,
    limits: Limits = DEFAULT_LIMITS,
    threads: int | None = None,
    engine: str | None = None,
) -> dict[str, NDArray[np.generic]]:
    """All tensors of a file, by name, in the file's order.

    Args:
        path: of the file, of the ``.sfp.index.json`` of a model in shards, or of a folder that has one of
            these.
        limits, threads, engine: as in `sfpformat.open`.

    Raises:
        InvalidFileError, UnsupportedError, LimitError, OSError.
        OptionError: a folder has no model or several.
        SafetensorsError: an index is not the JSON that it should be.
    """
    with open_any(path, limits=limits, threads=threads, engine=engine) as file:
        return file.get_tensors()


def load(
    data: Buffer,
    *,
    limits: Limits = DEFAULT_LIMITS,
    threads: int | None = None,
    engine: str | None = None,
) -> dict[str, NDArray[np.generic]]:
    """All tensors of the bytes of a file; as `load_file`."""
    with SfpFile(data, limits=limits, threads=threads, engine=engine) as file:
        return file.get_tensors()


def options_for_weights(tensors: Arrays, options: Options) -> dict[str, Options]:
    """Options by name, for the weights alone: what `sfp pack` changes by default.

    These stay lossless: tensors of rank under 2 or of fewer than 4,096 elements; scales, zero points and
    storage of weights that are quantised already; buffers, biases, gains of normalisations; tensors with
    infinities, NaNs or values beyond float32.

    ``save_file(t, "m.sfp", options=options_for_weights(t, Options(quantiser="uniform", bits=4)))``

    Args:
        tensors: all of a model: what a tensor is may depend on others.
        options: for its weights.
    """
    from .encode.weights import has_values_beyond, options_for

    require_mapping(tensors, "tensors")
    chosen = options_for(_outlines(tensors), options)
    return {name: o for name, o in chosen.items() if not has_values_beyond(tensors[name], float32=True)}


def _outlines(tensors: Arrays) -> Iterator[Outline]:
    """The arrays whose dtypes the format knows, without their data."""
    from .encode.weights import Outline

    for name, array in tensors.items():
        dtype = of_numpy(array.dtype) if isinstance(array, np.ndarray) else None
        if dtype is not None and isinstance(name, str):
            yield Outline(name, dtype, array.shape)


def _add_all(
    writer: Writer,
    tensors: Arrays,
    options: Options | Mapping[str, Options] | None,
    masks: Mapping[str, Mask] | None,
    importances: Mapping[str, Importance] | None,
) -> None:
    from .encode.weights import warn_of_quantised

    require_mapping(tensors, "tensors")
    chosen = options_by_name(options, tensors)
    masks = checked_by_name(masks, tensors, "masks")
    importances = checked_by_name(importances, tensors, "importances")
    warn_of_quantised(_outlines(tensors), options)
    for name, array in tensors.items():
        writer.add(name, array, chosen[name], mask=masks.get(name), importance=importances.get(name))
