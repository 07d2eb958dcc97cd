"""Tensors to chunks and back: what reader, writer and validator share, without any I/O."""
