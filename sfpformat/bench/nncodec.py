"""NNCodec 2.1.3 (MPEG NNC, ISO/IEC 15938-17) on one float32 matrix, through its C++ extension.

The arguments are those that `nncodec.nnc.compress` passes by default, so the payload is the same byte for
byte; what the package wraps around it (34 to 36 bytes a tensor) is not counted.
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .peers import imported

F32 = NDArray[np.float32]

# Steps an octave = 2^7, the finest the standard's field holds; the error of a step is < 0.4 %.
_QP_DENSITY = 7
_UNARY_LENGTH = 11  # greater-than flags with contexts of their own: the package's default
_SLACK = bytes(16)  # the arithmetic decoder knows no end and may look past it


def parameter_of(step: float) -> int:
    """The quantisation parameter nearest to a step."""
    octave = math.floor(math.log2(step))
    return (octave << _QP_DENSITY) + round((step / 2.0**octave - 1) * (1 << _QP_DENSITY))


def step_of(parameter: int) -> float:
    """The step of a quantisation parameter; float32 holds it exactly."""
    octave, part = divmod(parameter, 1 << _QP_DENSITY)
    return 2.0**octave * (1 + part / (1 << _QP_DENSITY))


def encode(matrix: F32, step: float, *, dependent: bool = False) -> tuple[bytes, int, float]:
    """The payload of a matrix quantised with a step, its quantisation parameter, and the seconds it took."""
    codec = _extension()
    qp = parameter_of(step)
    start = time.perf_counter()
    levels = np.zeros(matrix.shape, np.int32)
    encoder = codec.Encoder()
    encoder.initCtxModels(_UNARY_LENGTH - 1, 0)
    encoder.quantLayer(matrix, levels, int(dependent), _QP_DENSITY, qp, 0.0, _UNARY_LENGTH - 1, 0, 1)
    encoder.initCtxModels(_UNARY_LENGTH, 1)
    zero_rows = np.zeros(matrix.shape[0], np.int32)
    history = (codec.HdspMode.AlwaysOff, np.zeros(1, np.int8))
    encoder.encodeLayer(levels, int(dependent), 0, 1, 0, 0, zero_rows, *history, 0, 0)
    payload: bytes = encoder.finish().tobytes()
    return payload, qp, time.perf_counter() - start


def decode(payload: bytes, shape: tuple[int, ...], qp: int, *, dependent: bool = False) -> tuple[F32, float]:
    """The matrix of a payload, and the seconds it took."""
    codec = _extension()
    stream = np.frombuffer(payload + _SLACK, np.uint8)
    start = time.perf_counter()
    levels, weights = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    decoder = codec.Decoder()
    decoder.setStream(stream)
    decoder.initCtxModels(_UNARY_LENGTH)
    history = (codec.HdspMode.AlwaysOff, np.zeros(1, np.int8))
    decoder.decodeLayer(levels, int(dependent), 0, 1, 0, *history, 0, 0)
    decoder.finish()
    decoder.dequantLayer(weights, levels, _QP_DENSITY, qp, 0)
    return weights, time.perf_counter() - start


def _extension() -> Any:
    return imported("nncodec.extensions.deepCABAC")
