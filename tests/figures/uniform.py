"""Bits against error of the quantiser `uniform`, compared with NNCodec without dependent quantisation.

``python -m tests.figures.uniform`` encodes six matrices of all-MiniLM-L6-v2 with both, with the same steps
relative to their standard deviation, and compares bits at equal error by interpolation of NNCodec's curve.
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

import sfpformat
from sfpformat import numpy as sfp

from . import nncodec_peer
from .model import load_f32

MATRICES = (
    "embeddings.word_embeddings.weight",
    "encoder.layer.0.attention.self.query.weight",
    "encoder.layer.1.attention.output.dense.weight",
    "encoder.layer.2.intermediate.dense.weight",
    "encoder.layer.3.output.dense.weight",
    "encoder.layer.5.attention.self.value.weight",
)
Curve = list[list[tuple[float, float, int]]]  # for each step: bits, error, size of each matrix

_NO_STEP = sfpformat.Options(sfpformat.Uniform(step=1.0))  # the step is inserted for each point
VARIANTS = {
    "default": _NO_STEP,
    "one code a stream": _NO_STEP.but(codes=1),
    "segments of 384": _NO_STEP.but(segment=384),
    "rounded to nearest": _NO_STEP.but(quantiser=sfpformat.Uniform(step=1.0, rate_weight=0.0)),
}
_ROWS = 4096  # of the embedding, so that it does not outweigh the others
_STEPS = (
    0.2,
    0.26,
    0.33,
    0.42,
    0.54,
    0.69,
    0.88,
    1.12,
    1.43,
    1.83,
    2.3,
)  # relative to the standard deviation
_RATES = (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0)  # bits per weight of NNCodec


def decibels(original: NDArray[np.float32], decoded: NDArray[np.float32]) -> float:
    """10 log10 of the mean squared error over the variance."""
    error = np.mean((original.astype(np.float64) - decoded) ** 2)
    return float(10 * np.log10(error / original.astype(np.float64).var()))


def peer_point(matrix: NDArray[np.float32], step: float) -> tuple[float, float]:
    """Returns NNCodec's bits per weight and error."""
    payload, qp, _ = nncodec_peer.encode(matrix, step)
    decoded, _ = nncodec_peer.decode(payload, matrix.shape, qp)
    return 8 * len(payload) / matrix.size, decibels(matrix, decoded)


def our_point(matrix: NDArray[np.float32], step: float, options: sfpformat.Options) -> tuple[float, float]:
    """Returns the bits per weight of a whole file with one tensor, and its error."""
    assert isinstance(options.quantiser, sfpformat.Uniform)
    options = options.but(quantiser=replace(options.quantiser, step=step))
    data = sfp.save({"w": matrix}, options=options)
    decoded = sfp.load(data)["w"].astype(np.float32)
    return 8 * len(data) / matrix.size, decibels(matrix, decoded)


def excess(ours: list[tuple[float, float]], peers: list[tuple[float, float]]) -> dict[str, float]:
    """Returns how many per cent more bits than the peer are needed, at the peer's errors for some rates."""
    peer_bits, peer_error = np.array(peers)[::-1].T
    our_bits, our_error = np.array(ours)[::-1].T
    out = {}
    for rate in _RATES:
        if not peer_bits[0] <= rate <= peer_bits[-1]:
            continue
        error = np.interp(rate, peer_bits, peer_error)
        needed = np.interp(-error, -our_error, our_bits)
        out[f"{rate:g}"] = round(100 * (float(needed) / rate - 1), 2)
    return out


def main() -> None:
    tensors = load_f32()
    sums: dict[str, Curve] = {curve: [[] for _ in _STEPS] for curve in (*VARIANTS, "NNCodec")}
    for name in MATRICES:
        matrix = np.ascontiguousarray(tensors[name][:_ROWS], np.float32)
        steps = [s * float(matrix.std()) for s in _STEPS]
        peers = [peer_point(matrix, step) for step in steps]
        _add(sums["NNCodec"], peers, matrix.size)
        for variant, options in VARIANTS.items():
            ours = [our_point(matrix, step, options) for step in steps]
            _add(sums[variant], ours, matrix.size)
            print(f"{name}, {variant}: {json.dumps(excess(ours, peers))}", flush=True)
    pooled = {curve: [_pooled(point) for point in points] for curve, points in sums.items()}
    for variant in VARIANTS:
        print(f"pooled, {variant}: {json.dumps(excess(pooled[variant], pooled['NNCodec']))}")
    print("bits a weight and error in dB, pooled:", json.dumps(pooled))


def _add(curve: Curve, points: list[tuple[float, float]], size: int) -> None:
    for i, (bits, error) in enumerate(points):
        curve[i].append((bits, error, size))


def _pooled(points: list[tuple[float, float, int]]) -> tuple[float, float]:
    """Returns mean bits and mean error of several matrices; all weights have the same weight."""
    bits, error, size = np.array(points).T
    mean = float((10 ** (error / 10) * size).sum() / size.sum())
    return float((bits * size).sum() / size.sum()), float(10 * np.log10(mean))


if __name__ == "__main__":
    main()
