"""Benchmarks of other GPU decoders for BF16 weights, if they are installed: nvCOMP, DFloat11, DietGPU.

Each function checks the decoded bytes, and returns the time and the sizes. It raises `Missing` if the decoder
is not installed.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .speed import BF16, Clock, matrix_of, milliseconds

Array = NDArray[Any]


class Missing(RuntimeError):
    """The decoder is not installed."""


class Timed(NamedTuple):
    """Milliseconds of decoding, number of decoded bytes, and number of compressed bytes."""

    ms: float
    made: int
    stored: int


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Missing(f"not installed: {error}") from None


def _nvcomp(values: Array, algorithm: str, clock: Clock) -> Timed:
    """Times decoding of bytes with an algorithm of nvCOMP, without synchronisation between calls."""
    nvcomp, torch = _module("nvidia.nvcomp"), _module("torch")
    source = torch.from_numpy(values).cuda()
    stream = torch.cuda.current_stream().cuda_stream
    codec = nvcomp.Codec(algorithm=algorithm, data_type="|u1", cuda_stream=stream)
    coded = codec.encode(nvcomp.as_array(source, cuda_stream=stream))
    config = codec.decompression_config(coded)
    target = torch.empty_like(source)
    out = nvcomp.as_array(target, cuda_stream=stream)

    def decode() -> None:
        codec.decode(coded, out=out, decompression_config=config)

    decode()
    torch.cuda.synchronize()
    assert torch.equal(target, source), "other bytes"
    return Timed(clock([decode]), source.nbytes, int(coded.buffer_size))


def nvcomp_exponents(side: int, clock: Clock = milliseconds) -> Timed:
    """Times ANS on the exponents alone, one byte each; does not count joining them with the other bits."""
    return _nvcomp(
        (matrix_of(BF16, 1.0, side).view(np.uint16) >> 7).astype(np.uint8).reshape(-1), "ANS", clock
    )


def nvcomp_bytes(side: int, clock: Clock = milliseconds) -> Timed:
    """Times ANS on all bytes of the weights."""
    return _nvcomp(matrix_of(BF16, 1.0, side).view(np.uint8).reshape(-1), "ANS", clock)


def _big_endian(symbols: Array, codes: dict[int, tuple[int, int]]) -> tuple[Array, Array]:
    """Returns the concatenated codewords, most significant bit first, and the bit offset of each."""
    lengths, words = np.zeros(256, np.int64), np.zeros(256, np.int64)
    for symbol, (length, word) in codes.items():
        lengths[symbol], words[symbol] = length, word
    each = lengths[symbols]
    ends: Array = np.cumsum(each)
    starts = ends - each
    bits = np.zeros(int(ends[-1]), np.uint8)
    for i in range(int(lengths.max())):
        has = np.flatnonzero(each > i)
        of_these = symbols[has]
        bits[starts[has] + i] = words[of_these] >> (lengths[of_these] - 1 - i) & 1
    return np.packbits(bits), starts


def dfloat11(side: int, clock: Clock = milliseconds) -> Timed:
    """Times the kernel of dfloat11 0.5, with the codes and tables of that package."""
    utils, package, torch = _module("dfloat11.dfloat11_utils"), _module("dfloat11.dfloat11"), _module("torch")
    threads, thread_bytes = package.threads_per_block[0], package.bytes_per_thread
    patterns = matrix_of(BF16, 1.0, side).view(np.uint16).reshape(-1)
    exponents = (patterns >> 7 & 255).astype(np.uint8)
    symbols, counts = np.unique(exponents, return_counts=True)
    counter = dict(zip(symbols.tolist(), counts.tolist(), strict=True))
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its tables
        _, _, table = utils.get_32bit_codec(counter)
        luts = utils.get_luts(table)
    codes = {symbol: code for symbol, code in table.items() if isinstance(symbol, int)}
    encoded, starts = _big_endian(exponents, codes)
    # For each thread, the number of bits before its first codeword, 5 bits each; for each block, its first
    # weight.
    blocks = -(-len(encoded) // (threads * thread_bytes))
    edges = np.arange(blocks * threads) * 8 * thread_bytes
    first = np.searchsorted(starts, edges)
    gaps = np.where(first < len(starts), starts[np.minimum(first, len(starts) - 1)] - edges, 0).clip(0, 31)
    gap_bits = (gaps[:, None] >> np.arange(4, -1, -1) & 1).astype(np.uint8)
    positions = np.append(first[::threads], len(patterns)).astype(np.uint32)
    shared = threads * 4 + 4 + int(np.diff(positions).max()) * 2
    there = [
        luts.cuda(),
        torch.from_numpy(encoded).cuda(),
        torch.from_numpy((patterns >> 8 & 0x80 | patterns & 0x7F).astype(np.uint8)).cuda(),
        torch.from_numpy(positions.view(np.int32)).cuda(),
        torch.from_numpy(np.packbits(gap_bits)).cuda(),
        torch.empty(len(patterns), dtype=torch.bfloat16, device="cuda"),
    ]
    sizes = [luts.shape[0], len(encoded), len(patterns)]
    stream: Any = _module("cupy").cuda.ExternalStream(torch.cuda.current_stream().cuda_stream)

    def decode() -> None:
        with stream:
            package._decode(
                (blocks,), (threads,), (*[t.data_ptr() for t in there], *sizes), shared_mem=shared
            )

    decode()
    torch.cuda.synchronize()
    assert there[-1].view(torch.int16).cpu().numpy().tobytes() == patterns.tobytes(), "other weights"
    return Timed(clock([decode]), 2 * len(patterns), sum(int(t.nbytes) for t in there[:-1]))


def dietgpu(side: int, clock: Clock = milliseconds) -> Timed:
    """Times the float codec of DietGPU, a library of torch operators."""
    _module("dietgpu")
    torch = _module("torch")
    source = torch.from_numpy(matrix_of(BF16, 1.0, side).view(np.int16)).view(torch.bfloat16).cuda()
    target, scratch = torch.empty_like(source), torch.empty(384 << 20, dtype=torch.uint8, device="cuda")
    ops = torch.ops.dietgpu
    rows, columns = ops.max_float_compressed_output_size([source])
    coded = torch.empty([rows, columns], dtype=torch.uint8, device="cuda")
    sizes = torch.zeros([1], dtype=torch.int, device="cuda")
    coded, sizes, _ = ops.compress_data(True, [source], False, scratch, coded, sizes)
    status = torch.empty([1], dtype=torch.uint8, device="cuda")
    lengths, parts = torch.empty([1], dtype=torch.int32, device="cuda"), [*coded]

    def decode() -> None:
        ops.decompress_data(True, parts, [target], False, scratch, status, lengths)

    decode()
    assert torch.equal(target.view(torch.int16), source.view(torch.int16)), "other weights"
    return Timed(clock([decode]), source.nbytes, int(sizes[0]))


PEERS: dict[str, Callable[[int], Timed]] = {
    "nvCOMP ANS, exponents alone": nvcomp_exponents,
    "nvCOMP ANS, all bytes": nvcomp_bytes,
    "DFloat11": dfloat11,
    "DietGPU": dietgpu,
}
