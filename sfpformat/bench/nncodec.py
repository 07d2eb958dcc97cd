"""NNCodec 2.1.3 (MPEG NNC, ISO/IEC 15938-17) on one float32 matrix, through its C++ extension.

The arguments are the defaults of `nncodec.nnc.compress`, so the payload is the same byte for byte. The
package's header (34 to 36 bytes per tensor) is not counted.
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .peers import imported

F32 = NDArray[np.float32]

# 2^7 steps per octave, the maximum of the standard's field. The nearest step differs by less than 0.4 %.
_QP_DENSITY = 7
_UNARY_LENGTH = 11  # number of greater-than flags with their own contexts: the package's default
_SLACK = bytes(16)  # the arithmetic decoder may read past the end


def parameter_of(step: float) -> int:
    """Returns the quantisation parameter nearest to a step."""
    octave = math.floor(math.log2(step))
    return (octave << _QP_DENSITY) + round((step / 2.0**octave - 1) * (1 << _QP_DENSITY))


def step_of(parameter: int) -> float:
    """Returns the step of a quantisation parameter, which float32 represents exactly."""
    octave, part = divmod(parameter, 1 << _QP_DENSITY)
    return 2.0**octave * (1 + part / (1 << _QP_DENSITY))


def encode(matrix: F32, step: float, *, dependent: bool = False) -> tuple[bytes, int, float]:
    """Encodes a matrix quantised with a step; returns payload, quantisation parameter and seconds."""
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
    """Decodes a payload; returns the matrix and the seconds."""
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
