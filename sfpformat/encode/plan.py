"""Plans the encoding of a tensor from an array and options, before any byte is written.

`plan_tensor` chooses between coding raw, the quantiser of the options, and lossless. It ensures that readers
accept the plan. `planner` makes the choices for coding fingerprint.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ..coding.mask import Mask
from ..container.entry import CHUNK_ALIGNMENT, CHUNK_RECORD, TensorEntry
from ..decode.tensor import require_valid_vectors
from ..dtypes import Dtype, of_numpy
from ..engines import Engine, get_engine
from ..errors import FileFault, OptionError
from ..io.threads import Workers
from ..limits import DEFAULT_LIMITS, Limits
from ..options import Options
from .blocks import Blocks
from .dense_path import plan_dense
from .level_sources import KINDS
from .planner import Importance, Plan, Planner
from .segments import SEGMENT
from .zeros import with_positive_zeros

_NO_CHUNKS = np.zeros(0, CHUNK_RECORD)
# coding="auto" stores smaller tensors (in bytes) raw: their tables and index take most of the saving, and
# reading takes longer.
_MIN_BYTES = 2048


def plan_tensor(
    name: str,
    array: NDArray[np.generic],
    options: Options,
    engine: Engine,
    mask: Mask | None = None,
    importance: Importance | None = None,
    limits: Limits = DEFAULT_LIMITS,
    workers: Workers | None = None,
) -> Plan:
    """Chooses how a tensor is encoded.

    Args:
        name: the tensor's name.
        array: the tensor, any shape, any registered dtype.
        options: the caller's choices.
        engine: the engine that counts.
        mask: bool, of the tensor's shape: True for survivors. None: all non-zero weights survive.
        importance: float, of the tensor's shape, finite and not negative; or two factors, one number per row
            and one number per column.
        limits: limits of readers. If the tensor would exceed ``limits.expansion``, chunks are smaller than
            requested.
        workers: threads that make and count levels; None uses the calling thread.

    Raises:
        OptionError: the options do not fit the tensor.
    """
    dtype = of_numpy(array.dtype)
    if dtype is None:
        raise OptionError(f"tensor {name!r}: dtype {array.dtype} has no name in the format; cast it")
    flat = np.ascontiguousarray(array, dtype.numpy).reshape(-1)
    if dtype.name == "BOOL":
        flat = flat.view(np.uint8) != 0  # in memory, true may be a byte other than 1 (R-RAW-004)
    if dtype.is_float and options.zeros == "positive":
        flat = with_positive_zeros(flat)
    entry = raw_entry(name, dtype, array.shape, options)
    raw = Plan(entry, flat, Blocks(len(flat), entry.segment, entry.chunk), bits=flat.nbytes * 8)
    extras = mask is not None or importance is not None
    if options.coding == "raw" or not dtype.is_float:
        if options.coding == "fingerprint" or extras:
            why = "coding raw" if dtype.is_float else f"dtype {dtype.name} is stored raw, which"
            raise OptionError(f"tensor {name!r}: {why} has no fingerprints, mask or importance")
        return raw
    may_be_raw = options.coding == "auto" and not extras
    if may_be_raw and options.lossless and flat.nbytes < _MIN_BYTES:
        return raw
    try:
        dense = plan_dense(raw, options, engine, workers or Workers()) if may_be_raw else None
        if dense is not None:
            return raw if dense.bits >= raw.bits else within_expansion(dense, limits)
        planner = Planner(raw, options, engine, flat_mask(mask, array.shape), workers or Workers())
        found = planner.plan(importance)
        is_lossless = options.lossless
        if options.may_be_lossless and len(flat):
            at_most = planner.allowance() or None if found is None else max(found[1], planner.allowance())
            exact = _lossless_plan(planner, importance, at_most)
            if exact is None and may_be_raw and (at_most is None or raw.bits <= at_most):
                return raw  # raw has no streams, so that the checks below do not apply
            if exact is not None:
                found, is_lossless = exact, True
        if found is None:
            assert options.lossy is not None
            raise OptionError(KINDS[options.lossy.NAME].why_none(options.lossy))
        plan, bits = found
        require_readable(plan)
    except OptionError as error:
        raise OptionError(f"tensor {name!r}: {error}") from None
    plan = replace(plan, bits=bits)
    if may_be_raw and is_lossless and bits >= raw.bits:
        return raw
    return within_expansion(plan, limits)


def _lossless_plan(
    planner: Planner, importance: Importance | None, at_most: int | None
) -> tuple[Plan, int] | None:
    """Returns the lossless plan of a tensor with lossy options. None if it takes more than ``at_most`` bits.

    Raises:
        OptionError: ``at_most`` is None, and a lossless plan is not possible.
    """
    try:
        return planner.without_loss().plan(importance, at_most)
    except OptionError:
        if at_most is None:
            raise
        # For example, a multiplier makes an exact weight infinite. Numbers of lossy weights can be lowered.
        return None


def exact_bits(flat: NDArray[np.generic], mask: Mask | None) -> int:
    """Returns an estimate of the bits of weights in lossless coding.

    Args:
        flat: floats of a registered dtype, shape [n].
        mask: True for survivors, shape [n]; None: all non-zero weights.
    """
    dtype = of_numpy(flat.dtype)
    assert dtype is not None
    options = Options()
    entry = raw_entry("", dtype, flat.shape, options)
    raw = Plan(entry, flat, Blocks(len(flat), entry.segment, entry.chunk))
    found = Planner(raw, options, get_engine(None, flat.size), mask, Workers()).plan(None)
    assert found is not None
    return found[1]


def within_expansion(plan: Plan, limits: Limits) -> Plan:
    """Returns the plan, with smaller chunks if the tensor would exceed ``limits.expansion``.

    A chunk has at least 64 bytes (SPEC.md 15.1), so that enough chunks keep any tensor within the limit.

    Args:
        plan: the plan of the tensor, with an estimate of its bits.
        limits: limits of readers.
    """
    entry = plan.entry
    least = -(-entry.decoded_bytes // max(limits.expansion, 1))
    stored = max(plan.bits // 8, CHUNK_ALIGNMENT * -(-entry.segments // entry.chunk))
    # The factor 2 is a margin for the error of the estimate.
    if entry.decoded_bytes <= limits.expansion_floor or stored >= 2 * least:
        return plan
    chunk = max(entry.segments // -(-least // CHUNK_ALIGNMENT), 1)
    if chunk >= entry.chunk:
        return plan
    assert plan.coded is not None
    return replace(
        plan,
        entry=replace(entry, chunk=chunk),
        blocks=Blocks(entry.positions, entry.segment, chunk),
        coded=plan.coded.in_other_chunks(),
    )


def require_readable(plan: Plan) -> None:
    """Raises `OptionError` if a reader would refuse the plan.

    The reasons are numbers beyond float32, and factors beyond their dtype.
    """
    with np.errstate(over="ignore"):
        stored = {
            vector.name: plan.vectors[vector.name].astype(vector.dtype.numpy).astype(np.float32)
            for vector in plan.entry.vector_list()
        }
    try:
        plan.entry.require_valid_streams()
        require_valid_vectors(plan.entry, stored)
    except FileFault as error:
        remedy = "" if error.clause.startswith("R-IMP") else "; use lossless"
        raise OptionError(f"{error.detail}{remedy}") from None


def flat_mask(mask: Mask | None, shape: tuple[int, ...]) -> Mask | None:
    """Checks the mask of a tensor of the given shape. Returns it one-dimensional, C order.

    Raises:
        OptionError: the mask is not an array of bool, or has another shape.
    """
    if mask is None:
        return None
    if not isinstance(mask, np.ndarray):
        raise OptionError(f"the mask is a {type(mask).__name__}, not an array")
    if mask.shape != shape or mask.dtype != np.bool_:
        raise OptionError(f"the mask must be bool of shape {shape}, it is {mask.dtype} {mask.shape}")
    return np.ascontiguousarray(mask).reshape(-1)


def raw_entry(name: str, dtype: Dtype, shape: tuple[int, ...], options: Options) -> TensorEntry:
    segment = options.segment or SEGMENT
    return TensorEntry(
        name, dtype, tuple(shape), "raw", segment, max(options.chunk // segment, 1), _NO_CHUNKS
    )
