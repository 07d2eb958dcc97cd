"""Measurements in fresh processes: the time of a whole process, or the memory of one decoding.

``python -m sfpformat.bench.child REQUEST`` loads a small file to warm up, then the large one, and prints the
rise of memory as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import SfpError
from .subject import Array, bits_of

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # of the resident set, proc(5)
VMHWM, MAXRSS = "VmHWM", "ru_maxrss"
_NO_PEAK = "peak memory cannot be measured: this system does not report it"


class ChildError(SfpError):
    """A child process failed."""


def run_python(arguments: Sequence[str]) -> tuple[float, str]:
    """Runs Python and returns the seconds from start to end, and the standard output.

    Raises:
        ChildError: the process failed.
    """
    root = str(Path(__file__).resolve().parents[2])
    before = os.environ.get("PYTHONPATH")
    environment = {
        **os.environ,
        "PYTHONIOENCODING": "utf-8",
        "PYTHONPATH": f"{root}{os.pathsep}{before}" if before else root,
    }
    start = time.perf_counter()
    ended = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, encoding="utf-8", check=False
    )
    seconds = time.perf_counter() - start
    if ended.returncode:
        raise ChildError((ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1])
    return seconds, ended.stdout


def loading_memory(request: Mapping[str, Any]) -> dict[str, Any]:
    """Runs `main` in a new process and returns its answer.

    Raises:
        ChildError: the process failed.
    """
    _, out = run_python(["-m", __name__, json.dumps(dict(request))])
    answer: dict[str, Any] = json.loads(out)
    return answer


def fingerprint(tensors: Mapping[str, Array]) -> int:
    """Returns a checksum over names and bytes."""
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(bits_of(tensors[name]).data, zlib.crc32(name.encode(), crc))
    return crc


def _load(path: str, request: Mapping[str, Any]) -> Mapping[str, Array]:
    if request["engine"] is None:
        from .load import safetensors_load_file

        return safetensors_load_file(Path(path))
    from ..numpy import load_file

    return load_file(path, engine=request["engine"], threads=request["threads"])


def _resident() -> tuple[int, int]:
    """Returns the resident bytes now, and at the peak."""
    found = dict(line.split(":", 1) for line in _STATUS.read_text("utf-8").splitlines())
    return _bytes_of(found["VmRSS"]), _bytes_of(found[VMHWM])


def _bytes_of(words: str) -> int:
    """Parses a number of bytes such as ``1234 kB``."""
    return int(words.split()[0]) * 1024


def _max_resident() -> int:
    """Returns the peak of the resident bytes of this process.

    Raises:
        ChildError: the system does not report it.
    """
    if sys.platform == "win32":
        raise ChildError(_NO_PEAK)
    try:
        import resource
    except ImportError:
        raise ChildError(_NO_PEAK) from None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # in KiB, except on macOS


def _reset_peak() -> bool:
    """Resets the peak of memory; returns whether the system supports it."""
    try:
        _CLEAR.write_text(_RESET_PEAK, "utf-8")
        return VMHWM in _STATUS.read_text("utf-8")
    except OSError:
        return False


def main() -> None:
    """Loads the files of the request in the first argument, a JSON object: heads, path, engine, threads."""
    request = json.loads(sys.argv[1])
    _load(request["heads"], request)
    can_reset = _reset_peak()
    before = _resident()[0] if can_reset else _max_resident()
    tensors = _load(request["path"], request)
    peak = _resident()[1] if can_reset else _max_resident()
    answer = {
        "growth": peak - before,
        "output_bytes": sum(array.nbytes for array in tensors.values()),
        "method": VMHWM if can_reset else MAXRSS,
        "fingerprint": fingerprint(tensors),
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
