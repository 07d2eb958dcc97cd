"""All checks and measurements that need a GPU, in ten minutes at most: ``python -m kernels.tools.check``.

* compiles the kernels for the device, and reports the registers of each;
* compares the engine with the reference: golden files, files of every kind, damaged files; products with sums
  in double precision, and their bits between runs; changes of deltas; compressed layers of torch with dense
  ones;
* measures decoding of matrices of 67 M weights; compares it with the floor (the time to move the necessary
  bytes at the copy rate of the device), and with nvCOMP, DFloat11 and DietGPU if they are installed;
* measures products with a compressed matrix of 8192 × 8192; compares them with torch's dense products;
* measures loading a file to the device; compares it with safetensors;
* measures `apply_delta` on the device, its kernels beside the floor, and the way over CPU memory;
* runs the engine under compute-sanitizer's memcheck, racecheck, initcheck and synccheck.

Prints each part when it ends, and writes it to ``kernels/results``, as JSON and as a table. A part that fails
does not stop the others. Exit code: 1 if a part failed, 2 if there is no device.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from sfpformat.bench import device_runners as bench_device
from sfpformat.engines.cuda.device import Device
from sfpformat.engines.cuda.driver import CudaDevice

from . import identity, machine, peers, speed
from .report import tables

RESULTS = Path(__file__).parents[1] / "results"
MINUTES = 9.0
DAMAGED = 1000
DELTAS = 400
_TOOL_SECONDS = 60.0
_PACKAGES = ("cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc", "torch", "nvidia-nvcomp-cu13", "dfloat11")

# The parts for deltas; the floor needs the copy rate.
_OF_DELTAS = ("delta", "copy rate")

Part = tuple[str, Callable[[], Any]]


def why_not() -> str | None:
    """Returns why this machine cannot run the checks, or None."""
    return bench_device.why_not("cuda")


class Report:
    """The results of the parts; written to disk after each part.

    Attributes:
        facts: facts of the device and the run.
        parts: name, seconds, and a result, a failure, or the reason why the part is not available.
    """

    def __init__(self, stem: Path, facts: dict[str, Any], seconds: float) -> None:
        """Creates an empty report.

        Args:
            stem: the path of the files, without suffix.
            facts: facts of the device and the run.
            seconds: time limit; no part starts after it.
        """
        self.facts, self.parts = facts, list[dict[str, Any]]()
        self._stem, self._begun, self._seconds = stem, time.monotonic(), seconds

    @property
    def left(self) -> float:
        """The remaining time in seconds."""
        return self._seconds - (time.monotonic() - self._begun)

    @property
    def failed(self) -> bool:
        """Whether a part failed, or did not start in time."""
        return any("result" not in part and "missing" not in part for part in self.parts)

    def result(self, name: str) -> Any:
        """Returns the result of a part; None if it has none."""
        return next((part.get("result") for part in self.parts if part["name"] == name), None)

    def run(self, name: str, work: Callable[[], Any]) -> None:
        """Runs a part, prints its result or failure, and writes the report. Catches all exceptions."""
        part: dict[str, Any] = {"name": name}
        begun = time.monotonic()
        if self.left <= 0:
            part["failure"] = "the time limit was reached"
        else:
            try:
                part["result"] = work()
            except peers.Missing as missing:
                part["missing"] = str(missing)
            except Exception as error:
                part["failure"] = f"{type(error).__name__}: {error}"
                traceback.print_exc()
        part["seconds"] = round(time.monotonic() - begun, 1)
        self.parts.append(part)
        said = next(part[key] for key in ("result", "missing", "failure") if key in part)
        print(f"{name} ({part['seconds']} s): {json.dumps(said)}", flush=True)
        self._write()

    def _write(self) -> None:
        self._stem.parent.mkdir(parents=True, exist_ok=True)
        whole = {**self.facts, "parts": self.parts}
        self._stem.with_suffix(".json").write_text(json.dumps(whole, indent=2) + "\n")
        self._stem.with_suffix(".md").write_text(tables(self.facts, self.parts))


def compiled(arch: str) -> dict[str, Any]:
    """Returns the registers that each kernel uses on an architecture.

    Raises:
        AssertionError: a kernel spills registers.
    """
    _, usage, _ = machine.compile_with_usage(arch)
    spilled = [kernel for kernel, used in usage.items() if used.spilled]
    assert not spilled, f"{arch}: registers are spilled in {', '.join(spilled)}"
    return {"arch": arch, "registers": {kernel: used.registers for kernel, used in usage.items()}}


def identity_parts(device: Device, damaged: int, every: int) -> list[Part]:
    """Returns the parts that compare results."""
    return [
        ("files as by the reference", partial(identity.compare_with_reference, damaged, every)),
        ("products as in double precision", partial(identity.compare_products, device, every)),
        ("deltas as by the reference", partial(identity.compare_deltas, device, max(DELTAS // every, 20))),
    ]


def speed_parts(device: Device, side: int, report: Report) -> Iterator[Part]:
    """Yields the parts that measure time."""
    yield "copy rate", speed.copy_rate
    rate = report.result("copy rate")
    if rate is None:
        return
    yield "products", lambda: speed.products(device, rate, side)
    for name in speed.MATRICES:
        yield f"decoding: {name}", partial(speed.decoding, name, device, rate, side)
    for name, peer in peers.PEERS.items():
        yield f"peer: {name}", partial(_timed, peer, side)
    yield "layers", lambda: speed.layers(side)
    yield "loading", lambda: speed.loading(side // 2)
    for name in speed.STEPS:
        yield f"delta: {name}", partial(speed.deltas, name, device, rate, side // 2)


def _timed(peer: Callable[[int], peers.Timed], side: int) -> dict[str, Any]:
    return peer(side)._asdict()


def sanitizer_parts(report: Report) -> list[Part]:
    """Returns the parts that run compute-sanitizer."""
    arguments = ("--only-identity", "--damaged", "40", "--every", "40")

    def sanitize(tool: str) -> dict[str, Any]:
        return identity.sanitize(tool, arguments, max(min(_TOOL_SECONDS, report.left), 1.0))

    return [(f"compute-sanitizer: {tool}", partial(sanitize, tool)) for tool in identity.TOOLS]


def parts_of(device: Device, args: argparse.Namespace, report: Report) -> Iterator[Part]:
    """Yields the parts that need compiled kernels."""
    yield from identity_parts(device, args.damaged, args.every)
    contents = partial(identity.compare_contents, args.damaged, args.every)
    yield "masks and importances as by the reference", contents
    yield "layers as dense ones", identity.compare_layers
    yield from speed_parts(device, args.side, report)
    yield from [] if args.no_sanitizer else sanitizer_parts(report)


def facts_of(words: Sequence[str]) -> dict[str, Any]:
    """Returns facts of the device, the run and the packages."""
    torch: Any = importlib.import_module("torch")
    return {
        "device": torch.cuda.get_device_name(),
        "capability": list(torch.cuda.get_device_capability()),
        "multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join(["python -m kernels.tools.check", *words]),
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    made = argparse.ArgumentParser(
        prog="python -m kernels.tools.check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--damaged", type=int, default=DAMAGED, help=f"number of damaged files ({DAMAGED})")
    made.add_argument(
        "--every", type=int, default=1, metavar="N", help="check every Nth of the generated files (1)"
    )
    made.add_argument(
        "--side", type=int, default=speed.SIDE, help=f"rows and columns of the matrices ({speed.SIDE})"
    )
    made.add_argument(
        "--only-identity", action="store_true", help="check files and products only; write no results"
    )
    made.add_argument(
        "--only-deltas",
        action="store_true",
        help="compare and measure deltas only; results in files of their own",
    )
    made.add_argument("--no-sanitizer", action="store_true", help="do not run compute-sanitizer")
    made.add_argument(
        "--minutes", type=float, default=MINUTES, help=f"time limit: no part starts after it ({MINUTES:g})"
    )
    made.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    return made


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command. Returns the exit code."""
    words = sys.argv[1:] if words is None else words
    args = parser().parse_args(words)
    reason = why_not()
    if reason is not None:
        print(reason, file=sys.stderr)
        return 2
    if args.only_identity:
        for name, work in identity_parts(CudaDevice(0), args.damaged, args.every):
            print(f"{name}: {work()}", flush=True)
        return 0
    torch: Any = importlib.import_module("torch")
    facts = facts_of(words)
    stem = args.out / (str(facts["device"]).lower().replace(" ", "-") + "-deltas" * args.only_deltas)
    report = Report(stem, facts, 60 * args.minutes)
    major, minor = facts["capability"]
    report.run("kernels compiled", partial(compiled, f"sm_{major}{minor}"))
    if not report.failed:  # all other parts need the kernels
        device = CudaDevice(0, torch.cuda.current_stream().cuda_stream)
        for name, work in parts_of(device, args, report):
            if not args.only_deltas or name.startswith(_OF_DELTAS):
                report.run(name, work)
    print(tables(facts, report.parts))
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
