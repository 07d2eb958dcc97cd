"""NNCodec 2.1.3 (MPEG NNC, ISO/IEC 15938-17) on one float32 matrix, through its C++ extension.

The arguments are those that `nncodec.nnc.compress` passes by default, so the payload is the same byte for
byte; what the package wraps around it (34 to 36 bytes a tensor) is not counted.
"""

from __future__ import annotations

import math
import time

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]

_QP_DENSITY = (
    7  # steps an octave = 2^7, the finest the standard's field holds; the error of a step is < 0.4 %
)
_UNARY_LENGTH = 11  # greater-than flags with contexts of their own: the package's default
_SLACK = bytes(16)  # the arithmetic decoder knows no end and may look past it


def encode(matrix: F32, step: float, *, dependent: bool = False) -> tuple[bytes, int, float]:
    """The payload of a matrix quantised with a step, its quantisation parameter, and the seconds it took."""
    from nncodec.extensions import deepCABAC
    from nncodec.extensions.deepCABAC import HdspMode

    octave = math.floor(math.log2(step))
    qp = (octave << _QP_DENSITY) + round((step / 2.0**octave - 1) * (1 << _QP_DENSITY))
    start = time.perf_counter()
    levels = np.zeros(matrix.shape, np.int32)
    encoder = deepCABAC.Encoder()
    encoder.initCtxModels(_UNARY_LENGTH - 1, 0)
    encoder.quantLayer(matrix, levels, int(dependent), _QP_DENSITY, qp, 0.0, _UNARY_LENGTH - 1, 0, 1)
    encoder.initCtxModels(_UNARY_LENGTH, 1)
    zero_rows = np.zeros(matrix.shape[0], np.int32)
    history = (HdspMode.AlwaysOff, np.zeros(1, np.int8))
    encoder.encodeLayer(levels, int(dependent), 0, 1, 0, 0, zero_rows, *history, 0, 0)
    payload = encoder.finish().tobytes()
    return payload, qp, time.perf_counter() - start


def decode(payload: bytes, shape: tuple[int, ...], qp: int, *, dependent: bool = False) -> tuple[F32, float]:
    """The matrix of a payload, and the seconds it took."""
    from nncodec.extensions import deepCABAC
    from nncodec.extensions.deepCABAC import HdspMode

    stream = np.frombuffer(payload + _SLACK, np.uint8)
    start = time.perf_counter()
    levels, weights = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    decoder = deepCABAC.Decoder()
    decoder.setStream(stream)
    decoder.initCtxModels(_UNARY_LENGTH)
    history = (HdspMode.AlwaysOff, np.zeros(1, np.int8))
    decoder.decodeLayer(levels, int(dependent), 0, 1, 0, *history, 0, 0)
    decoder.finish()
    decoder.dequantLayer(weights, levels, _QP_DENSITY, qp, 0)
    return weights, time.perf_counter() - start
