"""The report of packing one shard of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PackedShard:
    """What `pack_shard` did.

    Attributes:
        path: the final path of the shard.
        tensors: the number of its tensors.
        resumed: how many of them earlier calls had written.
        index_written: whether this call found all shards finished, gave them their final names, and wrote the
            index.
    """

    path: str
    tensors: int
    resumed: int
    index_written: bool
