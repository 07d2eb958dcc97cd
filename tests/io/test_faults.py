"""Every system call of a command fails or is the last one: the complete old or new file exists afterwards."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from ..cli.test_main import make, sharded
from ..support.clauses import clauses
from ..support.faults import CALLS, KILLED_AFTER, KILLED_BEFORE, SHORT, Ended, Fault, Machine

ARRAYS = {
    "a": np.where(np.arange(64) % 3, 0, 1).astype(np.float32).reshape(8, 8),
    "b": np.arange(30, dtype=np.int32),
}
MODE = 0o640  # of the old files, so that the new ones must get it too

# The errors of a call, in turn.
ERRORS = dict.fromkeys(CALLS, ("EIO", "ENOSPC", "EDQUOT")) | {
    "open": ("EIO", "ENOSPC", "EMFILE"),
    "rename": ("EIO", "EXDEV", "ENOSPC"),
    "unlink": ("EIO", "EPERM", "EBUSY"),
    "fchmod": ("EIO", "EROFS"),
    "flock": ("EIO", "ENOMEM"),
    "close": ("EIO", "EDQUOT"),
}
# After these errors, Python repeats the call.
REPEATED = ("open", "write", "fsync", "ftruncate", "fchmod", "flock")


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A server that runs commands with faults."""
    if sys.platform != "linux" or shutil.which("cc") is None:
        pytest.skip("faults are injected by a preloaded library, which needs Linux and a C compiler")
    with Machine(tmp_path_factory.mktemp("library")) as running:
        yield running


@dataclass
class Scene:
    """A command that replaces old files.

    Attributes:
        machine: the server that runs it.
        words: the command.
        folder: the folder of its output.
        leftovers: suffixes of the files that can remain after a failed command.
        old, new: name -> bytes of the files before the command, and after its success.
        seen: name of a call -> number of calls of the command that concern the folder.
    """

    machine: Machine
    words: list[str]
    folder: Path
    leftovers: tuple[str, ...]
    old: dict[str, bytes] = field(init=False)
    new: dict[str, bytes] = field(init=False)
    seen: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir()
        assert self.run().code == 0
        self.new = self.contents()
        self.old = {name: f"old {name}".encode() for name in self.new}
        self.begin()
        ended = self.run()
        assert (ended.code, ended.err, self.contents()) == (0, "", self.new)
        self.seen = ended.seen

    def run(self, fault: Fault | None = None) -> Ended:
        """Runs the command."""
        return self.machine.run(self.words, self.folder, fault)

    def contents(self) -> dict[str, bytes]:
        """Returns the files in the folder: name -> bytes."""
        return {path.name: path.read_bytes() for path in self.folder.iterdir()}

    def begin(self) -> None:
        """Resets the folder to the old files."""
        for path in self.folder.iterdir():
            path.unlink()
        for name, data in self.old.items():
            path = self.folder / name
            path.write_bytes(data)
            path.chmod(MODE)

    def faults(self, *more: str, killed: Sequence[str] = CALLS) -> Iterator[Fault]:
        """Yields an error for each call, and kills and other faults for some."""
        for call, count in self.seen.items():
            for number in range(1, count + 1):
                names = ERRORS[call]
                yield Fault(call, number, names[number % len(names)])
                if call in killed:
                    yield Fault(call, number, KILLED_AFTER)
                if "again" in more and call in REPEATED:
                    yield Fault(call, number, "EINTR")
                if "short" in more and call == "write":
                    yield Fault(call, number, SHORT)
        yield Fault("open", 1, KILLED_BEFORE)

    def check(self, fault: Fault) -> Ended:
        """Runs the command with a fault, checks the folder, and resumes the command."""
        self.begin()
        ended = self.run(fault)
        found = self.contents()
        rest = {name: data for name, data in found.items() if name not in self.old}
        whole = {name: data for name, data in found.items() if name in self.old}
        self._check_words(fault, ended, rest)
        for name, data in whole.items():
            assert data in (self.old[name], self.new[name]), fault
            assert stat.S_IMODE((self.folder / name).stat().st_mode) == MODE
        self._check_set(fault, whole)
        assert all(name.endswith(self.leftovers) for name in rest), (fault, list(rest))
        if ended.code == 0:
            assert whole == self.new, fault
        return ended

    def _check_words(self, fault: Fault, ended: Ended, rest: dict[str, bytes]) -> None:
        assert "Traceback" not in ended.err, (fault, ended)
        assert "a bug in sfp" not in ended.err, (fault, ended)
        if fault.action in (KILLED_AFTER, KILLED_BEFORE):
            assert (ended.code, ended.err) == (-9, ""), (fault, ended)
        elif fault.action in (SHORT, "EINTR"):
            assert (ended.code, ended.err) == (0, ""), (fault, ended)
        elif ended.code:
            assert (ended.code, ended.out, ended.err.count("\n")) == (2, "", 1), (fault, ended)
            assert ended.err.startswith(f"sfp: error: {self.folder}"), (fault, ended)
            assert os.strerror(getattr(errno, fault.action)) in ended.err, (fault, ended)
            if not rest:
                assert "kept" not in ended.err, (fault, ended)
        elif fault.call == "unlink":
            assert ended.err.startswith("sfp: warning: "), (fault, ended)
            assert "could not be removed" in ended.err
        else:  # nothing depends on these
            assert (fault.call, ended.err) == ("close", ""), (fault, ended)

    def _check_set(self, fault: Fault, whole: dict[str, bytes]) -> None:
        """Asserts that no index lists old files together with new ones."""
        index = next((name for name in self.old if name.endswith(".index.json")), None)
        if index is None:
            assert len(whole) == 1, fault
        elif index in whole:
            state = self.new if whole[index] == self.new[index] else self.old
            assert whole == state, (fault, list(whole))

    def go_on(self, fault: Fault) -> None:
        """Runs the command again and checks that the result is the same as without the fault."""
        ended = self.run()
        assert (ended.code, ended.err) == (0, ""), (fault, ended)
        assert self.contents() == self.new, fault
        assert {stat.S_IMODE(path.stat().st_mode) for path in self.folder.iterdir()} == {MODE}, fault


@clauses("R-STR-005")
def test_a_fault_in_any_system_call_of_pack_leaves_a_complete_file(machine: Machine, tmp_path: Path) -> None:
    source = make(tmp_path / "m.safetensors", ARRAYS)
    out = tmp_path / "out"
    words = ["pack", str(source), "-o", str(out / "m.sfp")]
    scene = Scene(machine, words, out, ("m.sfp.partial", "m.sfp.partial.journal"))
    faults = [*scene.faults("again", "short")]
    assert len(faults) >= 80
    assert {"open", "write", "fsync", "ftruncate", "rename", "unlink", "fchmod", "flock", "close"} <= {
        fault.call for fault in faults
    }
    for fault in faults:
        scene.check(fault)
        if set(scene.contents()) != set(scene.old):
            scene.go_on(fault)


@clauses("R-STR-005", "R-SHD-003")
def test_a_fault_in_any_system_call_of_a_sharded_pack_leaves_a_complete_model(
    machine: Machine, tmp_path: Path
) -> None:
    source = sharded(tmp_path / "in", ARRAYS, cuts=2)
    out = tmp_path / "out"
    leftovers = (".finished", ".partial", ".partial.journal", ".replaced")
    words = ["pack", str(source), "-o", str(out / "m.sfp")]
    scene = Scene(machine, words, out, leftovers)
    faults = [*scene.faults(killed=("write", "rename", "unlink"))]
    assert len(faults) >= 90
    for fault in faults:
        scene.check(fault)
        if set(scene.contents()) != set(scene.old):
            scene.go_on(fault)


@clauses("R-STR-005")
@pytest.mark.parametrize("more", [[], ["--sharded"]])
def test_a_fault_in_any_system_call_of_unpack_leaves_complete_files(
    machine: Machine, tmp_path: Path, more: list[str]
) -> None:
    source = sharded(tmp_path / "in", ARRAYS, cuts=2)
    out = tmp_path / "out"
    assert machine.run(["pack", str(source), "-o", str(tmp_path / "m.sfp")], tmp_path).code == 0
    words = ["unpack", str(tmp_path / "m.sfp.index.json"), "-o", str(out / "m.safetensors"), *more]
    scene = Scene(machine, words, out, (".partial", ".replaced"))
    for fault in scene.faults(killed=("rename",)):
        ended = scene.check(fault)
        if ended.code != -9 and fault.call != "unlink":
            assert set(scene.contents()) <= set(scene.old), fault


@pytest.mark.parametrize(
    ("call", "name"),
    [
        ("fchmod", "EPERM"),
        ("fchmod", "EOPNOTSUPP"),
        ("flock", "ENOSYS"),
        ("flock", "ENOLCK"),
        ("flock", "EOPNOTSUPP"),
        ("fsync", "EINVAL"),
        ("fsync", "EOPNOTSUPP"),
        ("rename", "EBUSY"),
        ("rename", "EACCES"),
    ],
)
def test_system_calls_that_are_unsupported_or_briefly_refused_do_not_fail_pack(
    machine: Machine, tmp_path: Path, call: str, name: str
) -> None:
    source = make(tmp_path / "m.safetensors", ARRAYS)
    out = tmp_path / "out"
    words = ["pack", str(source), "-o", str(out / "m.sfp")]
    scene = Scene(machine, words, out, ())
    for number in range(1, scene.seen[call] + 1):
        scene.begin()
        ended = scene.run(Fault(call, number, name))
        assert (ended.code, scene.contents()) == (0, scene.new)
        assert ended.err == "" or (call == "flock" and "cannot be locked" in ended.err)
