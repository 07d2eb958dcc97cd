"""A program and the reference on any number of files; what they judge unlike is made small and kept."""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from ..limits import DEFAULT_LIMITS, Limits
from .driver import Driver, DriverFailure
from .mutate import Pieces, damaged
from .own import OwnDriver
from .suite import Suite, SuiteError

Json = dict[str, Any]
# Limits for hostile files: neither side may be busy with what a few bytes claim.
SMALL = Limits(directory_bytes=1 << 16, name_bytes=256, tensors=256, tensor_bytes=1 << 20)
_LIMITS = {name: n for name, n in asdict(SMALL).items() if n != getattr(DEFAULT_LIMITS, name)}
_FILE_BYTES = 8192  # of a golden file that is changed; small ones go through faster
_TRIES = 2000  # files that making one small may take
_SUFFIXES = (".bin", ".mask.bin", ".importance.bin")


class Duel:
    """Asks a program and the reference, and says where they part.

    Attributes:
        counts: how often the reference said what: a code, or ``valid``.
    """

    def __init__(self, driver: Driver, folder: Path) -> None:
        """Takes an empty folder for files."""
        self.counts: Counter[str] = Counter()
        self._driver, self._reference = driver, OwnDriver("auto", _LIMITS)
        self._file, self._theirs, self._ours = (folder / name for name in ("file.sfp", "theirs", "ours"))
        self._theirs.mkdir()
        self._ours.mkdir()

    def parts(self, data: bytes) -> tuple[str, str] | None:
        """The kind of disagreement, kept while a file is made small, and what it is; None for none."""
        self._file.write_bytes(data)
        for left in self._ours.iterdir():  # of a file of which the first tensors were good
            left.unlink()
        ours = self._reference.decode(str(self._file), str(self._ours))
        if ours["ok"]:  # a reader need not look at what no tensor needs, such as the factors of an empty one
            ours = {**self._reference.validate(str(self._file)), "tensors": ours["tensors"]}
        either = not ours["ok"] and "tensors" in ours
        self.counts["valid" if ours["ok"] else ours["error"]] += 1
        try:
            theirs = self._driver.ask(["decode", str(self._file), str(self._theirs)], _LIMITS)
        except DriverFailure as failure:
            return failure.kind, str(failure)
        if theirs.get("unsupported"):
            return None
        if either:
            return None
        if theirs["ok"] and not ours["ok"]:
            return "accepts", f"accepts what breaks {ours['clause']}: {ours['detail']}"
        if ours["ok"] and not theirs["ok"]:
            return "refuses", f"refuses a valid file with {theirs.get('error')} ({theirs.get('clause')})"
        return self._contents(ours["tensors"], theirs) if ours["ok"] else None

    def is_still(self, kind: str, data: bytes) -> bool:
        """Whether both part in this way."""
        found = self.parts(data)
        return found is not None and found[0] == kind

    def _contents(self, tensors: list[Json], theirs: Json) -> tuple[str, str] | None:
        said = theirs.get("tensors")
        if not isinstance(said, list) or len(said) != len(tensors):
            return "contents", "lists other tensors"
        for number, (own, other) in enumerate(zip(tensors, said, strict=True)):
            if any(other.get(key) != own[key] for key in own):
                return "contents", f"tensor {number} is described as {other}, must be {own}"
            for suffix in _SUFFIXES:
                ours, found = self._ours / f"{number}{suffix}", self._theirs / f"{number}{suffix}"
                if ours.exists() and (not found.exists() or found.read_bytes() != ours.read_bytes()):
                    return "contents", f"tensor {own['name']!r}: {number}{suffix} differs"
        return None


def fuzz(
    driver: Driver,
    suite: Suite,
    cases: int,
    seed: int,
    folder: Path,
    save: Path | None,
    advance: Callable[[int], None],
) -> Json:
    """Puts so many files to a program: valid ones now and then, others with damage, mended or not.

    Args:
        suite: its valid files are what is changed.
        seed: the same seed gives the same files.
        folder: an empty folder.
        save: where what is judged unlike goes, one file of each kind, with what is known of it.
        advance: called with 1 after each file.

    Returns:
        Files, seconds, files a second, how often the reference said what, and the finds.

    Raises:
        SuiteError: the suite has no valid file.
    """
    seeds = [case.data() for case in suite.cases if case.kind == "valid" and not case.limits]
    seeds = [data for data in seeds if len(data) <= _FILE_BYTES]
    if not seeds:
        raise SuiteError(f"{suite.folder}: has no valid file to start from")
    rng, duel, finds = random.Random(seed), Duel(driver, folder), dict[tuple[str, str], Json]()
    begin = time.monotonic()
    try:
        for _ in range(cases):
            data = rng.choice(seeds)
            if rng.randrange(50):
                data = damaged(data, rng)
            found = duel.parts(data)
            if found is not None:
                key = found[0], found[1].partition(":")[0]  # what differs, not by how much
                if key not in finds:
                    finds[key] = kept(shrunk(data, partial(duel.is_still, found[0])), *found, save)
            advance(1)
    finally:
        driver.close()
    seconds = time.monotonic() - begin
    return {
        "files": cases,
        "seconds": round(seconds, 2),
        "files_per_second": round(cases / max(seconds, 1e-9)),
        "reference": dict(duel.counts),
        "finds": list(finds.values()),
    }


def shrunk(data: bytes, still: Callable[[bytes], bool]) -> bytes:
    """A file as small as greedy steps make it of which ``still`` holds."""
    tries, better = 0, True
    while better:
        better = False
        for one in _smaller(data):
            tries += 1
            if tries > _TRIES:
                return data
            if len(one) < len(data) and still(one):
                data, better = one, True
                break
    return data


def _smaller(data: bytes) -> Iterator[bytes]:
    """Smaller files: without a tensor or a key, mended; then without a run of bytes, as it is."""
    try:
        pieces = Pieces.of(data)
        tensors, root = len(pieces.chunks), list(pieces.root)
    except Exception:  # of a damaged file anything may be wrong: it is then made small as bytes
        tensors, root = 0, []
    for k in range(tensors):
        one = Pieces.of(data)
        del one.root["tensors"][k], one.chunks[k]
        yield one.build()
    for key in root:
        if key != "tensors":
            one = Pieces.of(data)
            del one.root[key]
            yield one.build()
    size = len(data) // 2
    while size:
        for at in range(0, len(data), size):
            yield data[:at] + data[at + size :]
        size //= 2


def kept(data: bytes, kind: str, words: str, save: Path | None) -> Json:
    """What is known of a find; saved with its file where a folder is given."""
    digest = hashlib.sha256(data).hexdigest()
    name = f"find-{digest[:12]}.sfp"
    entry: Json = {"file": name, "bytes": len(data), "sha256": digest, "kind": kind, "words": words}
    entry["limits"] = _LIMITS
    if save is not None:
        save.mkdir(parents=True, exist_ok=True)
        (save / name).write_bytes(data)
        (save / name).with_suffix(".json").write_text(json.dumps(entry, indent=1) + "\n")
    return entry
