"""Section ``sparse``: pruned and quantised matrices, compared with NNCodec, in one thread.

Both encode the same float32 matrices, pruned by magnitude, and round to the nearest multiple of the same
steps, so that errors are equal, and bits and speeds are comparable. The step of a matrix gives the levels of
its survivors an entropy of 4 bits. NNCodec is slow, so only a sample is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..options import PRESETS, Options, Uniform
from . import nncodec
from .codecs import CodecRunner
from .device_runners import sfp_runner
from .measure import Contender, Runner, WrongBitsError
from .settings import Settings
from .subject import F32, Array, Subject, Tensors, matrices, pruned, sample, step_of_bits

NAME = "sparse"
SAMPLE_WEIGHTS = 2_000_000
LEVEL_BITS = 4.0
SHARES = {"50 % pruned": 0.5, "90 % pruned": 0.9}
# The maximum error is half a step plus float32 rounding.
_MOST_STEPS = 0.5 + 1e-3


def runners(subject: Subject, settings: Settings) -> list[Runner]:
    """Returns runners of this package for every engine and preset, and of NNCodec, for each share.

    Empty if the model has no matrix.
    """
    dense = sample(matrices(subject.tensors), SAMPLE_WEIGHTS)
    if not dense:
        return []
    out: list[Runner] = []
    files: dict[tuple[str | None, str | None], bytes] = {}
    for case, share in SHARES.items():
        tensors = {name: pruned(matrix, share) for name, matrix in dense.items()}
        steps = {name: snapped(step_of_bits(matrix, LEVEL_BITS)) for name, matrix in tensors.items()}
        generic: Tensors = {**tensors}
        judge = _judge(tensors, steps)
        for contender in settings.sfp_contenders(threads=(1,), case=case):
            preset = PRESETS[contender.preset or "default"]
            out.append(sfp_runner(settings, contender, generic, options_of(preset, steps), files, judge))
        for name in settings.peers(NAME):
            out.append(NncodecRunner(Contender(name, case=case), generic, steps, judge))
    return out


def snapped(step: float) -> float:
    """Returns the nearest step that NNCodec supports."""
    return nncodec.step_of(nncodec.parameter_of(step))


def options_of(preset: Options, steps: Mapping[str, float]) -> dict[str, Options]:
    """Returns a preset's options with the quantiser ``uniform`` and rounding to nearest, by name."""
    return {
        name: preset.but(quantiser=Uniform(step=step, rate_weight=0.0), mantissa_bits=None)
        for name, step in steps.items()
    }


def _judge(tensors: Mapping[str, F32], steps: Mapping[str, float]) -> Callable[[Any], dict[str, float]]:
    return lambda decoded: require_near(tensors, decoded, steps)


def require_near(
    tensors: Mapping[str, F32], decoded: Mapping[str, Array], steps: Mapping[str, float]
) -> dict[str, float]:
    """Compares decoded matrices with the originals and returns the error in dB.

    Raises:
        WrongBitsError: a weight differs by more than half a step, or a pruned one is not zero.
    """
    squares, errors = 0.0, 0.0
    for name, matrix in tensors.items():
        got = decoded[name].astype(np.float32)
        if got.shape != matrix.shape or got[matrix == 0].any():
            raise WrongBitsError(f"tensor {name!r}: the shape differs, or a pruned weight is not zero")
        difference = np.abs(matrix.astype(np.float64) - got)
        if difference.max(initial=0.0) > _MOST_STEPS * steps[name]:
            raise WrongBitsError(f"tensor {name!r}: a weight differs by more than half a step")
        squares += float(np.square(matrix.astype(np.float64)).sum())
        errors += float(np.square(difference).sum())
    return {"error_db": float(10 * np.log10(errors / squares))} if errors and squares else {}


class NncodecRunner(CodecRunner):
    """Runs NNCodec matrix by matrix."""

    def __init__(
        self,
        contender: Contender,
        tensors: Tensors,
        steps: Mapping[str, float],
        judge: Callable[[Any], dict[str, float]],
    ) -> None:
        super().__init__(contender, tensors)
        self._steps = steps
        self._judge = judge
        self._payloads: dict[str, tuple[bytes, int]] = {}

    def _encode(self) -> dict[str, tuple[bytes, int]]:
        return {
            name: nncodec.encode(np.asarray(array, np.float32), self._steps[name])[:2]
            for name, array in self.tensors.items()
        }

    def encoder(self) -> Callable[[], Any]:
        """Returns the work of encoding; there is no preparation."""
        return self._encode

    def decode(self) -> dict[str, F32]:
        """Decodes all matrices."""
        return {
            name: nncodec.decode(payload, self.tensors[name].shape, qp)[0]
            for name, (payload, qp) in self._payloads.items()
        }

    def measure_size(self) -> int:
        """Encodes once and returns the bytes of the payloads, without names, shapes and headers."""
        self._payloads = self._encode()
        return sum(len(payload) for payload, _ in self._payloads.values())

    def judge(self, decoded: Any) -> dict[str, float]:
        """Calls the judge, which is the same as for this package."""
        return self._judge(decoded)
