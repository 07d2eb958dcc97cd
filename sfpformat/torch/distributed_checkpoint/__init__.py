"""Checkpoints of ``torch.distributed.checkpoint`` in `.sfp` files.

``dcp.save(state, storage_writer=SfpStorageWriter("step-100/"))`` and
``dcp.load(state, storage_reader=SfpStorageReader("step-100/"))``.
"""

from __future__ import annotations

from .reader import SfpStorageReader
from .writer import SfpStorageWriter

__all__ = ["SfpStorageReader", "SfpStorageWriter"]
