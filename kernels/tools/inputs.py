"""Generates files of every kind that the kernels distinguish, and damages them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

import sfpformat
from sfpformat import Exact, ImportanceOptions, Options, Table, Uniform
from sfpformat.coding.bits import Bytes
from sfpformat.container.preamble import SIZE, Preamble
from sfpformat.io.checksum import crc32
from sfpformat.numpy import save

_EXTREMES = (0, 1, 2, 31, 32, 33, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1)


def normal_weights(rows: int, columns: int, density: float) -> NDArray[np.float32]:
    """Returns normal weights of several spreads, pruned at random; the first two rows are rounded to F16."""
    rng = np.random.default_rng(rows * columns)
    spread = 2.0 ** (-np.arange(rows) // 2)
    values = rng.normal(size=(rows, columns)) * spread[:, None] * (rng.random((rows, columns)) < density)
    values[:2] = values[:2].astype(np.float16)
    return values.astype(np.float32)


def _kinds(chunk: int) -> Iterator[tuple[str, Any, Options, float, str]]:
    """Yields name, dtype, options, density and form of the importance, for every code path of the kernels."""
    small = Options(segment=32, chunk=chunk)
    for dtype in (ml_dtypes.bfloat16, np.float32, np.float16, np.float64, ml_dtypes.float8_e4m3fn):
        name = np.dtype(dtype).name
        for codes, limit in ((1, 8), (16, 8), (1, 12), (16, 12)):
            options = small.but(codes=codes, code_limit=limit, coding="fingerprint", mask="none", trim=False)
            yield f"{name} dense {codes} {limit}", dtype, options, 1.0, "none"
        yield f"{name} trims", dtype, small.but(coding="fingerprint", mask="none", narrow=False), 1.0, "none"
        for width in (3, 4):
            options = small.but(window=width, coding="fingerprint", mask="none", trim=False, group=1)
            yield f"{name} windows {width}", dtype, options.but(mantissa_bits=0), 1.0, "none"
        for mask, polarity in (("octets", None), ("runs", 0), ("runs", 1)):
            options = small.but(mask=mask, polarity=polarity, coding="fingerprint")
            yield f"{name} {mask} {polarity}", dtype, options, 0.4, "none"
        for scale in ("row", "column", 7):
            options = small.but(quantiser=Uniform(bits=3.0, scale=scale), group=2)
            yield f"{name} scale {scale}", dtype, options, 0.6, "none"
        for limit, plain in ((8, False), (12, False), (8, True)):
            options = small.but(quantiser=Table(centroids=16), group=1, code_limit=limit, fixed_width=plain)
            kind = "plain" if plain else f"table {limit}"
            yield f"{name} {kind}", dtype, options.but(mask="octets", codes=4), 0.5, "none"
            yield f"{name} {kind} dense", dtype, options, 1.0, "none"
        for form, over in (("each", "survivors"), ("each", "all"), ("factors", "survivors")):
            kept = ImportanceOptions(role="multiplier", over=over)
            options = small.but(quantiser=Table(centroids=9), importance=kept)
            yield f"{name} {form} {over}", dtype, options, 0.5, form
            options = small.but(quantiser=Exact(), narrow=True, coding="fingerprint", importance=kept)
            yield f"{name} exact {form} {over}", dtype, options, 0.5, form


def _skewed(turned: bool) -> NDArray[np.float32]:
    """Returns weights whose exponents are each about half as frequent as the next greater exponent.

    If ``turned``, the order is reversed in the lower half of the rows. This gives long codewords, and several
    codes are smaller than one.
    """
    rng = np.random.default_rng(5)
    ranks = np.minimum(rng.geometric(0.45, (24, 96)), 12)
    if turned:
        ranks[12:] = 13 - ranks[12:]
    signs = rng.choice([-1, 1], ranks.shape)
    return (signs * np.exp2(-ranks) * (1 + rng.integers(128, size=ranks.shape) / 128)).astype(np.float32)


def skewed_files(chunk: int = 1 << 11) -> Iterator[tuple[str, bytes]]:
    """Yields files with long codewords and several codes, and files with many levels."""
    small = Options(segment=32, chunk=chunk, coding="fingerprint", trim=False, narrow=False, group=1)
    for dtype in (ml_dtypes.bfloat16, np.float32):
        name = np.dtype(dtype).name
        for codes, limit in ((1, 8), (16, 8), (1, 12), (16, 12)):
            array, own = _skewed(codes > 1), small.but(codes=codes, code_limit=limit)
            options = own.but(quantiser=Exact(), mantissa_bits=0)
            yield f"{name} skewed {codes} {limit}", save({"w": array.astype(dtype)}, options=options)
            masked = np.where(np.random.default_rng(7).random(array.shape) < 0.3, 0, array).astype(dtype)
            yield f"{name} masked {codes} {limit}", save({"w": masked}, options=options.but(mask="octets"))
            few = np.sign(array) * np.exp2(np.floor(np.log2(np.abs(array))))
            options = own.but(quantiser=Table(centroids=16))
            yield f"{name} few {codes} {limit}", save({"w": few.astype(dtype)}, options=options)
            pruned = np.where(np.arange(96) % 3 == 0, 0, few).astype(dtype)
            yield f"{name} pruned {codes} {limit}", save({"w": pruned}, options=options.but(mask="octets"))
        fine = small.but(quantiser=Uniform(step=0.0005))
        yield f"{name} fine", save({"w": _skewed(False).astype(dtype)}, options=fine)


def files(
    rows: int = 6, columns: int = 51, *, chunk: int = 128, every: int = 1
) -> Iterator[tuple[str, bytes]]:
    """Yields for every ``every``-th kind of tensor its name and a file with a tensor ``w`` of that shape.

    The skewed files follow, with their own shape.

    Args:
        chunk: positions per chunk; a segment has 32.
    """
    for name, dtype, options, density, form in islice(_kinds(chunk), 0, None, every):
        array = normal_weights(rows, columns, density).astype(dtype)
        importance: Any = np.abs(normal_weights(rows, columns, 1.0)) if form == "each" else None
        if form == "factors":
            each = np.arange(max(rows, columns), dtype=np.float32)
            importance = each[:rows] + 1, each[:columns] / 7
        given = {} if importance is None else {"w": importance}
        yield name, save({"w": array}, options=options, importances=given, engine="python")
    yield from islice(skewed_files(), 0, None, every)


def damage(data: Bytes, rng: np.random.Generator) -> Bytes:
    """Returns a copy with one to three changes; half of them in the first 96 bytes: header and index."""
    out = data.copy()
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(len(out) if rng.random() < 0.5 else min(len(out), 96)))
        what = rng.integers(5)
        if what < 2:
            out[at] ^= 1 << rng.integers(8)
        elif what == 2:
            out[at] = rng.choice([0, 1, 32, 33, 127, 128, 255])
        elif what == 3:
            value = np.array([rng.choice(_EXTREMES)], "<u4").view(np.uint8)
            out[at // 4 * 4 : at // 4 * 4 + 4] = value
        else:
            stop = min(at + int(rng.integers(1, 40)), len(out))
            out[at:stop] = rng.integers(0, 256, stop - at)
    return out


def damaged_file(data: bytes, rng: np.random.Generator) -> bytes:
    """Damages a chunk of a file with one tensor. Recomputes all checksums."""
    with sfpformat.open(data) as file:
        entry, directory = file.entry("w"), file.directory
        chunks = [file.read_checked(entry, k) for k in range(len(entry.chunks))]
        vectors = [] if entry.vectors is None else [file.read_checked(entry, -1)]
    k = int(rng.integers(len(chunks)))
    chunks[k] = damage(chunks[k], rng)
    records = entry.chunks.copy()
    records["crc"][k] = crc32(chunks[k].data)
    mended = replace(directory, tensors={"w": replace(entry, chunks=records)}).to_bytes()
    body = b"".join(chunk.tobytes() for chunk in (*vectors, *chunks))
    end = SIZE + len(body)
    preamble = Preamble(end, len(mended), end + len(mended), crc32(mended))
    return preamble.to_bytes() + body + mended
