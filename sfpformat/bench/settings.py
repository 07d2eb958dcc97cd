"""The settings of a benchmark."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .measure import Contender
from .peers import PEERS, why_not


@dataclass(frozen=True)
class Settings:
    """The settings of a benchmark.

    Attributes:
        engines, presets: engines and presets of this package.
        threads: numbers of threads; the first is 1.
        rounds: number of rounds.
        folder: folder for the files to load; empty at first.
        device: name of the torch device to decode to; None decodes to arrays.
    """

    engines: tuple[str, ...]
    presets: tuple[str, ...]
    threads: tuple[int, ...]
    rounds: int
    folder: Path
    device: str | None = None

    def sfp_contenders(
        self,
        *,
        presets: Iterable[str] | None = None,
        threads: Iterable[int] | None = None,
        case: str | None = None,
    ) -> list[Contender]:
        """Returns a contender for every engine, preset and number of threads.

        Args:
            presets, threads: None takes those of the settings.
            case: the case of all contenders.
        """
        return [
            Contender("sfp", count, engine, preset, case)
            for count in (self.threads if threads is None else threads)
            for engine in self.engines
            for preset in (self.presets if presets is None else presets)
        ]

    def peers(self, section: str) -> list[str]:
        """Returns the available peers of a section; with a device, only those of the section ``load``."""
        if self.device is not None and section != "load":
            return []
        return [name for name, peer in PEERS.items() if peer.section == section and why_not(name) is None]
