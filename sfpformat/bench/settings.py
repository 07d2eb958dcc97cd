"""What a benchmark is asked to measure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .measure import Contender
from .peers import PEERS, why_not


@dataclass(frozen=True)
class Settings:
    """What is asked.

    Attributes:
        engines, presets: of ours.
        threads: the numbers of threads, 1 the first.
        rounds: how often each contender runs.
        folder: for the files that are loaded; empty at first.
        device: of torch's, where tensors are decoded to it; None for arrays.
    """

    engines: tuple[str, ...]
    presets: tuple[str, ...]
    threads: tuple[int, ...]
    rounds: int
    folder: Path
    device: str | None = None

    def ours(
        self,
        *,
        presets: Iterable[str] | None = None,
        threads: Iterable[int] | None = None,
        case: str | None = None,
    ) -> list[Contender]:
        """Every engine with every preset and number of threads.

        Args:
            presets, threads: None takes all that are asked for.
        """
        return [
            Contender("sfp", count, engine, preset, case)
            for count in (self.threads if threads is None else threads)
            for engine in self.engines
            for preset in (self.presets if presets is None else presets)
        ]

    def peers(self, section: str) -> list[str]:
        """The peers of a section that can be used here; on a device only those that load to it."""
        if self.device is not None and section != "load":
            return []
        return [name for name, peer in PEERS.items() if peer.section == section and why_not(name) is None]
