"""NumPy API: the functions of `safetensors.numpy`, for `.sfp`.

Functions that write import the encoder, so that readers do not load it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .coding.mask import Mask
from .decode.opening import open_any
from .dtypes import of_numpy
from .io.paths import AnyPath
from .io.source import Buffer
from .limits import DEFAULT_LIMITS, Limits
from .names import checked_by_name, require_mapping
from .options import Options, options_by_name

if TYPE_CHECKING:
    from .encode.planner import Importance
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
    """Writes tensors to a file. Replaces an old file at ``path`` only after a complete write.

    ``save_file({"w": array}, "model.sfp", options=Options(Uniform(bits=4)))``

    Args:
        tensors: name -> array, any shape, any dtype of the format (`ml_dtypes` for BF16 and FP8).
        path: the path of the file.
        metadata: the caller's strings.
        options: one `Options` for all tensors, or name -> `Options`. None, and tensors that are not named,
            mean lossless. A single lossy `Options` applies to every float tensor; `options_for_weights`
            returns options for the weights alone.
        masks: name -> bool array of the tensor's shape, True for survivors.
        importances: name -> float array of the tensor's shape, or two vectors (rows, columns).
        limits: limits of the readers. If these are not the default, readers need the same limits.
        threads: the greatest number of threads; None uses the available cores. The bytes do not depend on it.
        engine: same as for `sfpformat.open`. The bytes do not depend on it.

    Raises:
        OptionError: an option does not fit its tensor, a tensor exceeds the limits, or a name in an argument
            is not the name of a tensor.
        EngineError: the engine is unknown or not available.
        OSError: the file cannot be written.
    """
    from .encode.writer import Writer

    weights = _weights_of(tensors)
    with Writer(
        path, metadata=metadata, limits=limits, engine=engine, threads=threads, weights=weights
    ) as writer:
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
    """Returns the bytes of a file. Has the arguments and errors of `save_file`, except for its path."""
    from .encode.sink import MemorySink
    from .encode.writer import Writer

    out, weights = MemorySink(), _weights_of(tensors)
    with Writer(
        out, metadata=metadata, limits=limits, engine=engine, threads=threads, weights=weights
    ) as writer:
        _add_all(writer, tensors, options, masks, importances)
    return out.data


def load_file(
    path: AnyPath,
    *,
    limits: Limits = DEFAULT_LIMITS,
    threads: int | None = None,
    engine: str | None = None,
) -> dict[str, NDArray[np.generic]]:
    """Reads all tensors of a file. Returns name -> array, in file order.

    ``tensors = load_file("model.sfp")``

    Args:
        path: the path or URL of the file, of the ``.sfp.index.json`` of a model in shards, or of a folder
            that has exactly one of these; or what ``fsspec.open`` returns.
        limits, threads, engine: same as for `sfpformat.open`.

    Raises:
        InvalidFileError: the file is damaged.
        UnsupportedError: the file needs a version or feature that this reader does not support.
        LimitError: the file exceeds a limit.
        OSError: the file cannot be read.
        OptionError: the folder has no model or several.
        EngineError: the engine is unknown or not available.
        SafetensorsError: the index is not valid JSON of the expected form, or is one of safetensors files.
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
    """Reads all tensors of a file in memory. Returns name -> array, in file order.

    Args:
        data: the bytes of the file.
        limits, threads, engine: same as for `sfpformat.open`.

    Raises:
        InvalidFileError, UnsupportedError, LimitError, EngineError: same as for `load_file`.
    """
    with open_any(data, limits=limits, threads=threads, engine=engine) as file:
        return file.get_tensors()


def options_for_weights(tensors: Arrays, options: Options) -> dict[str, Options]:
    """Returns name -> options for the weights of a model, the tensors that `sfp pack` changes by default.

    Other tensors stay lossless: those of rank below 2 or of fewer than 4,096 elements; scales, zero points
    and storage of weights that are already quantised; buffers, biases, gains of normalisation layers; tensors
    with infinities, NaNs or values beyond float32.

    ``save_file(t, "m.sfp", options=options_for_weights(t, Options(Uniform(bits=4))))``

    Args:
        tensors: all tensors of the model, because the role of a tensor may depend on others.
        options: the options for the weights.

    Raises:
        OptionError: ``tensors`` is not a mapping.
    """
    from .encode.weights import has_values_beyond, options_for

    require_mapping(tensors, "tensors")
    chosen = options_for(_outlines(tensors), options)
    return {name: o for name, o in chosen.items() if not has_values_beyond(tensors[name], float32=True)}


def _outlines(tensors: Arrays) -> Iterator[Outline]:
    """Yields the outline (name, dtype, shape) of each array whose dtype the format has."""
    from .encode.weights import Outline

    for name, array in tensors.items():
        dtype = of_numpy(array.dtype) if isinstance(array, np.ndarray) else None
        if dtype is not None and isinstance(name, str):
            yield Outline(name, dtype, array.shape)


def _weights_of(tensors: Arrays) -> int:
    """Returns the number of weights of all arrays; 0 if ``tensors`` is not a mapping, which raises later."""
    arrays = tensors.values() if isinstance(tensors, Mapping) else ()
    return sum(array.size for array in arrays if isinstance(array, np.ndarray))


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
        writer.add_later(name, array, chosen[name], mask=masks.get(name), importance=importances.get(name))
