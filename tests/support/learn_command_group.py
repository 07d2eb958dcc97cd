"""Two processes that run ``sfp learn`` together: ``python -m tests.support.learn_command_group FOLDER``.

Prints as JSON, for each scenario, the exit code, stderr and seconds of each process. FOLDER gets the model
and the written files.
"""

from __future__ import annotations

import io
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

import sfpformat.pruning
from sfpformat.cli import main as sfp
from sfpformat.pruning.hierarchy import Learner

from .pruning_transformers import saved, text

WORLD = 2
STEPS = 12
SCENARIOS = ("interrupted", "resumed", "no data", "no memory", "disk full", "gone")
_learn = Learner.learn


def failing(step: int, fail: Callable[[], Any]) -> Callable[..., float]:
    """A `Learner.learn` that fails at a step."""

    def learn(self: Learner, batches: Any) -> float:
        if self.step == step:
            fail()
        return _learn(self, batches)

    return learn


def interrupt() -> None:
    raise KeyboardInterrupt


def no_memory() -> None:
    raise MemoryError


def disk_full(model: Any, path: Path, *args: Any, **more: Any) -> None:
    raise OSError(28, "No space left on device", path.name)


def prepare(scenario: str, rank: int) -> None:
    """Replaces functions, so that the scenario happens in this process."""
    replaced: Any = Learner
    if scenario == "interrupted":
        replaced.learn = failing(11, interrupt)
    elif scenario == "no memory" and rank == 1:
        replaced.learn = failing(2, no_memory)
    elif scenario == "gone" and rank == 1:
        replaced.learn = failing(2, lambda: os._exit(9))
    elif scenario == "disk full":
        package: Any = sfpformat.pruning
        package.pack = disk_full


def words_of(folder: Path, scenario: str, rank: int) -> list[str]:
    """The arguments of the command."""
    data = folder / ("missing.txt" if scenario == "no data" and rank == 1 else "text.txt")
    steps = STEPS if scenario in ("interrupted", "resumed", "whole") else 3
    words = ["learn", str(folder / "model"), "--data", str(data), "--sparsity", "0.5", "--json"]
    words += ["--steps", str(steps), "--window", "16", "--calibration", "4", "--batches", str(WORLD)]
    target = {"whole": "whole.sfp", "disk full": "full.sfp"}.get(scenario, "resumed.sfp")
    words += ["-o", str(folder / target)]
    return [*words, "--resume", str(folder / "state.pt")] if scenario in SCENARIOS[:2] else words


def run(folder: Path, scenario: str, rank: int) -> dict[str, Any]:
    """Runs the command in a scenario."""
    told, begun = io.StringIO(), time.monotonic()
    with redirect_stderr(told), redirect_stdout(io.StringIO()):
        code = sfp(words_of(folder, scenario, rank))
    return {"code": code, "stderr": told.getvalue(), "seconds": time.monotonic() - begun}


def forked(folder: Path, scenario: str) -> list[dict[str, Any]]:
    """Runs a scenario in new processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(WORLD):
        child = os.fork()
        if not child:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_RANK": str(rank)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            try:
                prepare(scenario, rank)
                found = run(folder, scenario, rank)
                (folder / f"{rank}.json").write_text(json.dumps(found))
            finally:
                os._exit(0)
        children.append(child)
    results: list[dict[str, Any]] = []
    for rank, child in enumerate(children):
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        path = folder / f"{rank}.json"
        ended = {"code": code, "stderr": "", "seconds": 0.0}
        results.append(ended if code else json.loads(path.read_text()))
        path.unlink(missing_ok=True)
    return results


def main() -> None:
    """The command."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    saved("LlamaForCausalLM", folder / "model")
    text(folder)
    whole = run(folder, "whole", 0)
    assert not whole["code"], whole["stderr"]
    print(json.dumps({scenario: forked(folder, scenario) for scenario in SCENARIOS}))


if __name__ == "__main__":
    main()
