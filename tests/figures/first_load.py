"""Processor time of the first load of a model in a new process, relative to safetensors, on one thread.

``python -m tests.figures.first_load [FILE.safetensors]``: by default all-MiniLM-L6-v2, in BF16. Files are in
the page cache. A process that loads again and again reuses its memory; this measures what most programs do,
where the system provides all memory. Each round starts a process for each preset, which compiles and loads
some small tensors first. Prints medians, and the second least and greatest of all rounds; and the speed of a
disk below which the compressed file is there first, if reading and decoding do not overlap.
"""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes

import sfpformat
from sfpformat import PRESETS
from sfpformat.numpy import load_file, save_file

from .model import model_path
from .processor_time import floats

_ROUNDS = 11
_PRESETS = ("default", "speed")
_FEW, _SMALL = 8, 600_000  # tensors that are loaded first, and the most positions of each


def load_once(packed: str, raw: str) -> None:
    """Prints the seconds of the first load of each file, the packed one first."""
    import safetensors
    import safetensors.numpy

    with sfpformat.open(packed, engine="numba", threads=1) as file:
        small = [name for name in file if 0 < math.prod(file.info(name).shape) < _SMALL][:_FEW]
        file.get_tensors(small)
    with safetensors.safe_open(raw, "np") as peer:
        peer.get_tensor(small[0])
    start = time.process_time()
    ours = load_file(packed, engine="numba", threads=1)
    middle = time.process_time()
    theirs = safetensors.numpy.load_file(raw)
    end = time.process_time()
    assert len(ours) == len(theirs)
    print(middle - start, end - middle)


def main() -> None:
    from safetensors.numpy import save_file as save_raw

    tensors = floats(Path(sys.argv[1]) if len(sys.argv) > 1 else model_path(), ml_dtypes.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "model.safetensors"
        save_raw(tensors, raw)
        paths = {preset: Path(folder) / f"{preset}.sfp" for preset in _PRESETS}
        for preset, path in paths.items():
            save_file(tensors, path, options=PRESETS[preset])
        spent: dict[str, list[tuple[float, float]]] = {preset: [] for preset in paths}
        for _ in range(_ROUNDS):
            for preset, path in paths.items():
                command = [sys.executable, "-m", __spec__.name, "--child", str(path), str(raw)]
                printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                ours, theirs = map(float, printed.split())
                spent[preset].append((ours, theirs))
        for preset, each in spent.items():
            ratios = sorted(ours / theirs for ours, theirs in each)
            ours, theirs = (statistics.median(column) for column in zip(*each, strict=True))
            saved = raw.stat().st_size - paths[preset].stat().st_size
            below = f"below {saved / (ours - theirs) / 1e6:.0f} MB/s" if ours > theirs else "of any speed"
            print(
                f"{preset}: {1e3 * ours:.0f} ms, safetensors {1e3 * theirs:.0f} ms, "
                f"{statistics.median(ratios):.2f} x ({ratios[1]:.2f}-{ratios[-2]:.2f}), "
                f"first on disks {below}"
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        load_once(*sys.argv[2:])
    else:
        main()
