"""NNCodec on one float32 matrix: the wrapper that ``sfp bench`` uses."""

from sfpformat.bench.nncodec import decode, encode

__all__ = ["decode", "encode"]
