"""How fast chunks come from a file into the memory from which a device copies them, and what that allows.

``python -m tests.figures.pinned`` writes chunks to a file, and reads them from the page cache with one thread
in two ways: a batch into new memory, then its checksums, then a copy of it (until 1 December 2026); and each
straight into place, then its checksum. It prints the rates, and the time to load BF16 weights computed from
them: the slowest of reading by some threads, of the bus and of decoding, plus the time of one batch in stages
that overlap with nothing. Rates of bus and decoding are arguments, not measurements. No device is needed;
ordinary memory stands for pinned memory.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from sfpformat.decode.device_batches import BATCH_BYTES
from sfpformat.io.checksum import crc32
from sfpformat.io.source import Source, open_source

CHUNK = 348_000  # bytes, of 2^18 weights in BF16
SHARE = 0.665  # of the weights' bytes


Places = list[memoryview]


def by_copy(source: Source, places: Places, first: int) -> list[int]:
    """Reads a batch of chunks into new memory, then copies all of them. Returns their checksums."""
    data = [source.read((first + i) * CHUNK, CHUNK) for i in range(len(places))]
    found = [crc32(chunk) for chunk in data]
    for place, chunk in zip(places, data, strict=True):
        place[:] = chunk
    return found


def in_place(source: Source, places: Places, first: int) -> list[int]:
    """Reads each chunk of a batch into its place. Returns their checksums."""
    found = []
    for i, place in enumerate(places):
        source.read_into(place, (first + i) * CHUNK)
        found.append(crc32(place))
    return found


WAYS = {"new memory, then copied": by_copy, "in place": in_place}


def rates(chunks: int, rounds: int) -> dict[str, list[float]]:
    """Returns GB a second of processor time for each way and round."""
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chunks"
        path.write_bytes(np.random.default_rng(0).bytes(chunks * CHUNK))
        source = open_source(path)
        memory = np.zeros(BATCH_BYTES, np.uint8).data  # written before, as pinned memory is
        places = [memory[at : at + CHUNK] for at in range(0, len(memory) - CHUNK, CHUNK)]
        for _ in range(rounds):
            checksums = []
            for name, way in WAYS.items():
                begun = time.process_time()
                starts = range(0, chunks, len(places))
                checksums.append([way(source, places[: chunks - first], first) for first in starts])
                found[name].append(chunks * CHUNK / (time.process_time() - begun) / 1e9)
            assert checksums[0] == checksums[1]
        source.close()
    return found


def seconds(rate: float, threads: int, weights: float, bus: float, decoding: float) -> tuple[float, str]:
    """Returns the time to load weights of some GB, and the stage that limits it. Rates in GB/s."""
    stored, batch = weights * SHARE, BATCH_BYTES / 1e9
    stages = {"reading": stored / (rate * threads), "bus": stored / bus, "decoding": weights / decoding}
    limit = max(stages, key=lambda name: stages[name])
    first = batch / (rate * threads) + batch / bus
    return stages[limit] + (first if limit == "decoding" else batch / bus), limit


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser("python -m tests.figures.pinned", description=__doc__)
    parser.add_argument("--chunks", type=int, default=1500, help="of 348 kB")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--weights", type=float, default=2.0, help="GB of BF16 weights")
    parser.add_argument("--bus", type=float, default=50.0, help="GB/s, assumed")
    parser.add_argument("--decoding", type=float, default=1000.0, help="GB/s of weights, assumed")
    args = parser.parse_args()
    print("| way | GB/s of chunks, one thread: median (least to greatest) |\n|---|---|")
    found = rates(args.chunks, args.rounds)
    for name, some in found.items():
        print(f"| {name} | {statistics.median(some):.2f} ({min(some):.2f} to {max(some):.2f}) |")
    print("\n| threads | " + " | ".join(f"ms, {name}: limit" for name in found) + " |\n|---|---|---|")
    for threads in (1, 4, 8, 16):
        cells = []
        for some in found.values():
            rate = statistics.median(some)
            time_, limit = seconds(rate, threads, args.weights, args.bus, args.decoding)
            cells.append(f"{1e3 * time_:.0f}: {limit}")
        print(f"| {threads} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
