"""Section ``lossless``: bit-exact encoding and decoding of a model in memory."""

from __future__ import annotations

from ..options import PRESETS
from .codecs import PackerRunner
from .device_runners import sfp_runner
from .measure import Contender, Runner
from .peers import PEERS
from .settings import Settings
from .subject import Subject

NAME = "lossless"


def runners(subject: Subject, settings: Settings) -> list[Runner]:
    """Returns runners of this package for every engine, preset and number of threads, and of peers."""
    files: dict[tuple[str | None, str | None], bytes] = {}
    out: list[Runner] = [
        sfp_runner(settings, contender, subject.tensors, PRESETS[contender.preset or "default"], files)
        for contender in settings.sfp_contenders()
    ]
    for name in settings.peers(NAME):
        peer = PEERS[name]
        if peer.packer is None:
            continue
        for threads in settings.threads if peer.threaded else (1,):
            out.append(PackerRunner(Contender(name, threads), subject.tensors, peer.packer))
    return out
