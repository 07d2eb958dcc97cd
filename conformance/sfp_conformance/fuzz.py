"""Differential fuzzing: compares a program with the reference reader; minimises files on which they differ.

Rules: files come from Hypothesis or from a seeded random generator, which is faster. Both use the same code
over choices (`choices`). Hypothesis minimises the file in both cases, with fewer and smaller choices.
Each kind of disagreement is reported once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sfpformat.decode.reader import SfpFile
from sfpformat.decode.validate import validate
from sfpformat.errors import FileFault
from sfpformat.keyed.table import KeyedTable
from sfpformat.limits import DEFAULT_LIMITS, Limits

from .choices import Thrown
from .driver import Driver, DriverFailure
from .examples import Example, example
from .generate_keyed import ASKED
from .judge import SUFFIXES
from .own import answers_of, arrays_of, described

Json = dict[str, Any]
Described = list[tuple[Json, dict[str, bytes]]]  # the description of each array, and its bytes
# Limits for hostile files: a few bytes that claim a huge size must not cost either side much time.
SMALL = Limits(directory_bytes=1 << 16, name_bytes=256, tensors=256, tensor_bytes=1 << 20)
IN_FORCE = {name: n for name, n in asdict(SMALL).items() if n != getattr(DEFAULT_LIMITS, name)}
VALID = "valid"
GOLDEN_BYTES = 8192  # maximum size of a golden file that is damaged; small files are faster
_BATCH = 500  # examples per Hypothesis run; a run remembers all examples that it has made


@dataclass(frozen=True)
class Parting:
    """A disagreement between a program and the reference.

    Attributes:
        kind: ``accepts``, ``refuses``, ``contents``, ``look-up``, or the kind of the program's failure
            (`DriverFailure`).
        about: distinguishes disagreements of one kind: a clause, ``tensors``, or the name of an array.
        words: the description for people.
    """

    kind: str
    about: str
    words: str

    @property
    def key(self) -> tuple[str, str]:
        """Identifies the disagreement while its file is minimised."""
        return self.kind, self.about


@dataclass(frozen=True)
class Meeting:
    """The result for one file.

    Attributes:
        ours: the answer of the reference: an error code, or ``valid``.
        theirs: the answer of the program: an error code, ``valid``, ``unsupported``, or its kind of failure.
        parting: the disagreement, or None.
    """

    ours: str
    theirs: str
    parting: Parting | None = None


class Duel:
    """Asks a program and the reference, and compares their answers."""

    def __init__(self, driver: Driver, folder: Path) -> None:
        """``folder`` is an empty folder for temporary files."""
        self._driver, self._file, self._out = driver, folder / "file.sfp", folder / "out"
        self._out.mkdir()
        self._keys = folder / "keys.txt"
        self._keys.write_text("".join(f"{key.hex()}\n" for key in ASKED), "ascii")

    def meet(self, data: bytes) -> Meeting:
        """Gives a file to both and compares their answers."""
        self._file.write_bytes(data)
        ours = reference(data)
        said = ours.code if isinstance(ours, FileFault) else VALID
        try:
            theirs = self._driver.ask(["decode", str(self._file), str(self._out)], IN_FORCE)
        except DriverFailure as failure:
            return Meeting(said, failure.kind, Parting(failure.kind, "", str(failure)))
        if theirs.get("unsupported"):
            return Meeting(said, "unsupported")
        if isinstance(ours, FileFault):
            return Meeting(said, _word(theirs), _accepts(ours) if theirs["ok"] else None)
        if theirs["ok"]:
            parting = self._contents(ours, theirs, "contents")
            if parting is None and (meeting := self._looked_up(data)) is not None:
                return meeting
            return Meeting(said, VALID, parting)
        # The reference reader skips data that no tensor needs, such as the factors of an empty tensor. The
        # validator checks it.
        if validate(data, limits=SMALL, engine="python").ok:
            return Meeting(said, _word(theirs), _refuses(theirs))
        return Meeting(said, _word(theirs))

    def _looked_up(self, data: bytes) -> Meeting | None:
        """Compares look-ups in the keyed tables of a valid file. Returns None if they agree.

        A program that does not answer `look-up` is asked about tensors alone.
        """
        ours = look_ups(data)
        if not ours:
            return None
        try:
            words = ["look-up", str(self._file), str(self._keys), str(self._out)]
            theirs = self._driver.ask(words, IN_FORCE)
        except DriverFailure as failure:
            return Meeting(VALID, failure.kind, Parting(failure.kind, "look-up", str(failure)))
        if theirs.get("unsupported"):
            return None
        if not theirs["ok"]:
            refused = f"refuses look-ups in a valid file with {_word(theirs)}"
            return Meeting(VALID, _word(theirs), Parting("look-up", str(theirs.get("clause")), refused))
        parting = self._contents(ours, theirs, "look-up")
        return None if parting is None else Meeting(VALID, VALID, parting)

    def _contents(self, ours: Described, theirs: Json, kind: str) -> Parting | None:
        said = theirs.get("tensors")
        if not isinstance(said, list) or len(said) != len(ours):
            return Parting(kind, "tensors", "lists other tensors")
        for number, ((own, arrays), other) in enumerate(zip(ours, said, strict=True)):
            if any(other.get(key) != own[key] for key in own):
                return Parting(kind, "tensors", f"tensor {number} is {other}, must be {own}")
            for what, wanted in arrays.items():
                found = self._out / f"{number}{SUFFIXES[what]}"
                if not found.exists() or found.read_bytes() != wanted:
                    return Parting(kind, what, f"the {what} of tensor {own['name']!r} differ")
        return None


def _word(theirs: Json) -> str:
    return VALID if theirs["ok"] else str(theirs.get("error"))


def _accepts(ours: FileFault) -> Parting:
    return Parting("accepts", ours.clause, f"accepts a file that breaks {ours.clause}: {ours.detail}")


def _refuses(theirs: Json) -> Parting:
    said = f"{theirs.get('error')} ({theirs.get('clause')}): {theirs.get('detail', '')}"
    return Parting("refuses", str(theirs.get("clause")), f"refuses a valid file with {said}")


def reference(data: bytes) -> Described | FileFault:
    """Returns what the reference reads from a file: its tensors, or the fault."""
    try:
        with SfpFile(data, limits=SMALL, engine="python", threads=1) as file:
            return [(described(file, name), arrays_of(file, name)) for name in file]
    except FileFault as error:
        return error


def look_ups(data: bytes, engine: str = "python") -> Described:
    """Returns what an engine finds for the keys `ASKED` in the keyed tables of a valid file."""
    out: Described = []
    with SfpFile(data, limits=SMALL, engine="python", threads=1) as file:
        names = [table.name for table in file.directory.keyed]
    for name in names:
        table = KeyedTable.open(data, name, limits=SMALL, engine=engine)
        for what, array in answers_of(table, list(ASKED)).items():
            dtype = "BOOL" if array.dtype == np.bool_ else "F32"
            told = {"name": what, "dtype": dtype, "shape": list(array.shape)}
            out.append((told, {"values": array.tobytes()}))
    return out


@dataclass(frozen=True)
class Find:
    """A disagreement, and the smallest file found that shows it."""

    parting: Parting
    example: Example


@dataclass
class Results:
    """The results of a run.

    Attributes:
        files: the number of files that both were asked about.
        said: how often each pair of answers (reference, program) occurred.
        finds: the disagreements, one per kind.
    """

    files: int = 0
    said: Counter[tuple[str, str]] = field(default_factory=Counter)
    finds: list[Find] = field(default_factory=list)


class _Look:
    """The predicate for Hypothesis: searches for a new kind of disagreement, then for that kind only."""

    def __init__(self, duel: Duel, results: Results, advance: Callable[[int], None]) -> None:
        self._duel, self._results, self._advance = duel, results, advance
        self._known: set[tuple[str, str]] = set()
        self._found: Find | None = None

    def __call__(self, made: Example) -> bool:
        """Returns whether a file shows the disagreement. Counts files until the first that does."""
        meeting = self._duel.meet(made.data)
        if self._found is None:
            self._results.files += 1
            self._results.said[meeting.ours, meeting.theirs] += 1
            self._advance(1)
        parting = meeting.parting
        wanted = None if self._found is None else self._found.parting.key
        if parting is None or parting.key in self._known or parting.key != (wanted or parting.key):
            return False
        self._found = Find(parting, made)
        return True

    def take(self, smallest: Example | None) -> None:
        """Adds the current find, if there is one, to the results, and resets the search.

        Args:
            smallest: the file that Hypothesis minimised; None if it failed because the program is not
                deterministic.
        """
        if self._found is None:
            return
        find, self._found = self._found, None
        if smallest is not None:
            find = Find(self._duel.meet(smallest.data).parting or find.parting, smallest)
        self._known.add(find.parting.key)
        self._results.finds.append(find)


def fuzz(
    duel: Duel,
    golden: Sequence[bytes],
    cases: int,
    *,
    seed: int = 0,
    fast: bool = False,
    advance: Callable[[int], None] = lambda _: None,
) -> Results:
    """Asks a program about ``cases`` files, most of them damaged.

    Args:
        golden: valid files that are damaged in addition to new ones.
        seed: the same seed gives the same files.
        fast: whether the seeded random generator makes the files, not Hypothesis.
        advance: called with 1 after each file.
    """
    from .strategies import hunt, made_small  # lazy, because it requires Hypothesis

    golden = sorted((data for data in golden if len(data) <= GOLDEN_BYTES), key=len)
    results = Results()
    look = _Look(duel, results, advance)
    while results.files < cases:
        named = f"{seed}/{results.files}"
        if not fast:
            look.take(hunt(golden, look, most=min(_BATCH, cases - results.files), seed=named))
            continue
        thrown = Thrown(named)
        if look(example(thrown, golden)):
            look.take(made_small(golden, look, thrown.made))
    return results


def as_json(results: Results, seconds: float) -> Json:
    """Returns the results as JSON values."""
    ours: Counter[str] = Counter()
    both: Counter[bool] = Counter()
    for (own, their), count in results.said.items():
        ours[own] += count
        if own.startswith("E_") and their.startswith("E_"):
            both[own == their] += count
    return {
        "files": results.files,
        "seconds": round(seconds, 2),
        "files_per_second": round(results.files / max(seconds, 1e-9)),
        "reference": dict(sorted(ours.items())),
        "both_refused": both.total(),
        "same_code": both[True],
        "finds": [
            {**asdict(find.parting), "bytes": len(find.example.data), "damage": find.example.words}
            for find in results.finds
        ],
    }
