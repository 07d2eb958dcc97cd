"""Reports the size of each part of `.sfp` files, and the number of zero weights.

Rules: sizes come from directories and segment indices alone. Weights that are zero, of either sign, count as
pruned. The segment index has the number of weights that a mask removes, but not the number of stored zeros.
To count these, tensors whose code table shows that more than about 1 % of the stored weights can be zeros are
decoded.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..coding.quantisers import Exact, Table, Uniform
from ..container.entry import TensorEntry
from ..decode.reader import SfpFile
from ..encode.zeros import zeros_of
from ..errors import FileFault

# The parts of a tensor. "other" is the segment index and padding.
PARTS = ("mask", "fingerprints", "importance", "vectors", "raw", "other")


@dataclass(frozen=True)
class TensorReport:
    """The figures of one tensor.

    Attributes:
        entry: its directory entry.
        survivors: number of stored positions; None for a tensor without a mask, which stores all.
        stored_zeros: number of stored zeros, if the code table shows that they can be many; else 0. None if
            the chunks are damaged.
        bits: part -> bits in the file, for each of `PARTS`; their sum is the size of the tensor's chunks.
    """

    entry: TensorEntry
    survivors: int | None
    stored_zeros: int | None
    bits: dict[str, int]

    @property
    def zeros(self) -> int:
        """The number of weights known to be zero: those that the mask removes, and the stored zeros."""
        pruned = 0 if self.survivors is None else self.entry.positions - self.survivors
        return pruned + (self.stored_zeros or 0)

    @property
    def sparsity(self) -> float | None:
        """The share of weights that are zero; None if there is neither a mask nor a stored zero."""
        if not self.entry.positions or (self.survivors is None and not self.stored_zeros):
            return None
        return self.zeros / self.entry.positions

    @property
    def coding(self) -> str:
        """A description of coding, quantiser, scale and windows."""
        fingerprints, scale = self.entry.fingerprints, self.entry.scale
        if fingerprints is None:
            return "raw"
        quantiser = fingerprints.quantiser
        words = str(quantiser)
        if scale is not None:
            words += f" per {scale.size or scale.per}"
        window = fingerprints.table.window
        return words if window is None else f"{words}, windows of {window} bits"

    def to_json(self) -> dict[str, object]:
        """Returns the figures as JSON values, with sizes in bytes, and parts in bits."""
        entry = self.entry
        quantiser = entry.fingerprints.quantiser if entry.fingerprints else None
        return {
            "name": entry.name,
            "dtype": entry.dtype.name,
            "shape": list(entry.shape),
            "coding": entry.coding,
            "quantiser": quantiser.NAME if quantiser else None,
            "step": float(quantiser.step) if isinstance(quantiser, Uniform) else None,
            "coded_dtype": quantiser.dtype.name if isinstance(quantiser, Exact) else None,
            "window": entry.fingerprints.table.window if entry.fingerprints else None,
            "scale": (entry.scale.size or entry.scale.per) if entry.scale else None,
            "mask": entry.mask.kind if entry.mask else None,
            "importance": entry.importance.over if entry.importance else None,
            "role": entry.importance.role if entry.importance else None,
            "segment": entry.segment,
            "chunk": entry.chunk,
            "positions": entry.positions,
            "survivors": self.survivors,
            "stored_zeros": self.stored_zeros,
            "sparsity": self.sparsity,
            "bits": self.bits,
            "stored_bytes": entry.stored_bytes,
            "decoded_bytes": entry.decoded_bytes,
        }


@dataclass(frozen=True)
class Totals:
    """The figures of all tensors of a file or a model.

    Attributes:
        tensors, positions: number of tensors and of positions.
        zeros: number of weights known to be zero.
        stored_zeros: number of those that no mask removes.
        bits: part -> bits, same as in `TensorReport`.
        stored_bytes: size of all chunks.
        decoded_bytes: size of all decoded tensors.
        file_bytes: size of the files, with preambles and directories.
    """

    tensors: int
    positions: int
    zeros: int
    stored_zeros: int
    bits: dict[str, int]
    stored_bytes: int
    decoded_bytes: int
    file_bytes: int

    @property
    def sparsity(self) -> float | None:
        """The share of all weights that are zero."""
        return self.zeros / self.positions if self.positions else None

    @property
    def bits_per_weight(self) -> float | None:
        """Bits of the files per position; None without positions."""
        return 8 * self.file_bytes / self.positions if self.positions else None

    @property
    def ratio(self) -> float:
        """Decoded bytes over bytes of the files."""
        return self.decoded_bytes / self.file_bytes

    def to_json(self) -> dict[str, object]:
        """Returns the figures as JSON values."""
        return {
            "tensors": self.tensors,
            "positions": self.positions,
            "sparsity": self.sparsity,
            "stored_zeros": self.stored_zeros,
            "bits": self.bits,
            "bits_per_weight": self.bits_per_weight,
            "stored_bytes": self.stored_bytes,
            "directory_bytes": self.file_bytes - self.stored_bytes,
            "file_bytes": self.file_bytes,
            "decoded_bytes": self.decoded_bytes,
            "ratio": self.ratio,
        }


def report_tensor(file: SfpFile, name: str, decoded: NDArray[np.generic] | None = None) -> TensorReport:
    """Returns the report of a tensor. Reads its segment indices, and its chunks if these can have many zeros.

    Args:
        file: the open file.
        name: the tensor's name.
        decoded: the tensor, if the caller has decoded it; else None.

    Raises:
        InvalidFileError: a segment index is damaged.
        OSError: the file cannot be read.
    """
    entry = file.entry(name)
    bits = dict.fromkeys(PARTS, 0)
    survivors = None if entry.mask is None else 0
    if entry.coding == "raw":
        bits["raw"] = entry.decoded_bytes * 8
    else:
        for k in range(len(entry.chunks)):
            index = file.read_head(entry, k)
            for (stream, _), plane in index.bits.items():
                bits[stream] += int(plane.sum())
            if survivors is not None:
                survivors += int(index.survivors.sum())
        bits["vectors"] = 8 * sum(vector.size * vector.dtype.itemsize for vector in entry.vector_list())
    bits["other"] = 8 * entry.stored_bytes - sum(bits.values())
    return TensorReport(entry, survivors, _stored_zeros(file, entry, survivors, decoded), bits)


def _stored_zeros(
    file: SfpFile, entry: TensorEntry, survivors: int | None, decoded: NDArray[np.generic] | None
) -> int | None:
    """Returns `TensorReport.stored_zeros` of a tensor."""
    fingerprints = entry.fingerprints
    if fingerprints is None or not fingerprints.table.may_have_many_zeros:
        return 0
    quantiser = fingerprints.quantiser
    try:
        least = file.decoder(entry).vectors.get("fingerprint centroids") if entry.has_vectors() else None
        if isinstance(quantiser, Table) and least is not None and least[0]:
            return 0  # no magnitude is zero
        zeros = sum(zeros_of(file.get_tensor(entry.name) if decoded is None else decoded))
    except FileFault:
        return None
    pruned = 0 if survivors is None else entry.positions - survivors
    return zeros - pruned


def total(reports: Iterable[TensorReport], file_bytes: int) -> Totals:
    """Returns the sums of the figures of tensors.

    Args:
        reports: the reports of the tensors.
        file_bytes: total size of their files.
    """
    reports = list(reports)
    return Totals(
        len(reports),
        sum(report.entry.positions for report in reports),
        sum(report.zeros for report in reports),
        sum(report.stored_zeros or 0 for report in reports),
        {part: sum(report.bits[part] for report in reports) for part in PARTS},
        sum(report.entry.stored_bytes for report in reports),
        sum(report.entry.decoded_bytes for report in reports),
        file_bytes,
    )
