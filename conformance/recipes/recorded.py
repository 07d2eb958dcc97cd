"""Cases taken from the tests: every file that a test puts to readers as valid, or as broken by one edit.

The tests of a chapter name the clause, the valid file and the edit (`tests.forge.refused`), which is all that
a recipe needs; so they are run once more with those functions recording. Files that Hypothesis makes are left
out, since they are others each time, and so are those that depend on the package's writer.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import pytest

from sfpformat.errors import FileFault
from sfpformat.limits import DEFAULT_LIMITS, Limits
from sfpformat.writer import Writer
from tests import forge, samples
from tests.clauses import ROOT, marked_tests
from tests.forge import Forge

from .gallery import ALL
from .suite import Suite, is_as_put_together

MODULES = ("codetable", "planes", "mask", "quantiser", "reconstruction", "chunk", "raw", "features")
MODULES += ("hostile", "limits", "layout", "strictness", "directory", "preamble")
# Of one test, and of one file: tests that try every value of a field would fill the suite, spread over what
# they try this many say as much.
MOST_OF_A_TEST = 12
MOST_BYTES = 80_000


@dataclass
class Found:
    """A file that a test put to readers.

    Attributes:
        test: the test's name and parameters.
        data: the file.
        clause, tensor: by which clause it must be refused, and for which tensor; no clause: it is accepted.
        base: the valid file that it was made of, where there is one.
        limits: the limits in force.
    """

    test: str
    data: bytes
    clause: str | None = None
    tensor: str | None = None
    base: bytes | None = None
    limits: Limits = DEFAULT_LIMITS


@dataclass
class _Recorder:
    """A plugin of pytest that keeps what `accepted`, `refused` and `refused_bytes` are given."""

    found: list[Found] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    _test: str = ""
    _since: int = 0
    _wrote: bool = False

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Leaves out what Hypothesis makes."""
        items[:] = [
            item for item in items if not getattr(getattr(item, "obj", None), "is_hypothesis_test", False)
        ]

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Notes which test runs."""
        self._test, self._since, self._wrote = item.name, len(self.found), False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Forgets the files of a test that failed, or that used the package's writer."""
        if report.failed:
            self.failed.append(report.nodeid)
        if report.failed or self._wrote:
            del self.found[self._since :]

    def wrote(self, *_: object) -> None:
        """The package's writer is used."""
        self._wrote = True

    def accepted(self, data: bytes, limits: Limits = DEFAULT_LIMITS) -> dict[str, Any]:
        """In place of `forge.accepted`."""
        self.found.append(Found(self._test, bytes(data), limits=limits))
        return forge.read_all(data, limits)

    def refused_bytes(
        self, data: bytes, clause: str, *, tensor: str | None = None, limits: Limits = DEFAULT_LIMITS
    ) -> FileFault:
        """In place of `forge.refused_bytes`."""
        self.found.append(Found(self._test, bytes(data), clause, tensor, None, limits))
        return forge.fault_of(data, limits)

    def refused(
        self,
        clause: str,
        edit: Callable[[Forge], object],
        base: bytes,
        *,
        tensor: str | None = None,
        limits: Limits = DEFAULT_LIMITS,
    ) -> FileFault:
        """In place of `forge.refused`."""
        broken = Forge.of(base)
        edit(broken)
        data = broken.build()
        self.found.append(Found(self._test, data, clause, tensor, bytes(base), limits))
        return forge.fault_of(data, limits)


def recorded(everything: bytes) -> list[Found]:
    """What the tests put to readers, with ``everything`` in place of the written file of that name."""
    recorder = _Recorder()
    paths = [str(ROOT / "tests" / f"test_{module}.py") for module in MODULES]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("accepted", "refused", "refused_bytes"):
            patch.setattr(forge, name, getattr(recorder, name))
        patch.setattr(samples, "everything", lambda: everything)
        start = Writer.__init__

        def started(self: Writer, *args: Any, **options: Any) -> None:
            recorder.wrote()
            start(self, *args, **options)

        patch.setattr(Writer, "__init__", started)
        with contextlib.redirect_stdout(io.StringIO()):
            pytest.main(["-q", "-p", "no:cacheprovider", "-o", "addopts=", *paths], plugins=[recorder])
    assert not recorder.failed, recorder.failed
    return recorder.found


def add(suite: Suite) -> None:
    """Adds the cases."""
    marked = {test.place.split()[-1]: test.ids for test in marked_tests()}
    known = {case.data: case.id for case in suite.cases.values()}
    taken: Counter[str] = Counter()
    for found in _spread(recorded(suite.cases[ALL].data)):
        if found.data in known and found.clause is None:
            continue
        about = marked.get(found.test.partition("[")[0], ())
        if found.clause is None:
            if not about:
                continue
            slug = _name(about[0], found.test, taken)
            known[found.data] = suite.valid(
                slug, _sentence(found.test), found.data, *about[1:], limits=_limits(found)
            )
            continue
        assert found.base is not None
        twin = known.get(found.base)
        if twin is None:
            base = f"{found.clause[2:]}-base"
            base = f"{base}-{taken[base]}" if taken.update([base]) or taken[base] > 1 else base
            twin = known[found.base] = suite.valid(base, f"what {found.clause} is broken in", found.base)
        if not is_as_put_together(found.base):
            continue
        slug = _name(found.clause, found.test, taken)
        suite.invalid(
            slug,
            _sentence(found.test),
            twin,
            lambda _, data=found.data: data,
            tensor=found.tensor,
            plainly=None if found.limits is not DEFAULT_LIMITS or found.clause == "R-LIM-002" else "",
            tags=("hostile",) if found.clause == "R-LIM-002" else (),
            limits=_limits(found),
        )


def _spread(all_found: list[Found]) -> Iterator[Found]:
    """Files once each, none large, and of a test that has many those at even distances."""
    by_test: dict[str, list[Found]] = {}
    seen: set[tuple[bytes, str | None, Limits]] = set()
    for found in all_found:
        key = found.data, found.clause, found.limits
        changed = found.base != found.data or found.limits is not DEFAULT_LIMITS
        usable = found.clause is None or (found.base is not None and changed)
        if usable and key not in seen and max(len(found.data), len(found.base or b"")) <= MOST_BYTES:
            seen.add(key)
            by_test.setdefault(found.test.partition("[")[0], []).append(found)
    for many in by_test.values():
        step = max(len(many) / MOST_OF_A_TEST, 1)
        yield from (many[int(i * step)] for i in range(int(len(many) / step)))


def _limits(found: Found) -> dict[str, int]:
    """The limits that are not the default."""
    own = {field.name: getattr(found.limits, field.name) for field in fields(Limits)}
    return {name: value for name, value in own.items() if value != getattr(DEFAULT_LIMITS, name)}


def _sentence(test: str) -> str:
    """What a test's name says."""
    name, _, parameters = test.removeprefix("test_").partition("[")
    words = name.replace("_", " ")
    return f"{words}: {parameters[:-1]}" if parameters else words


def _name(clause: str, test: str, taken: Counter[str]) -> str:
    """A case's name, without its kind: clause and slug."""
    name, _, parameters = test.removeprefix("test_").partition("[")
    words = re.sub("[^a-z0-9]+", "-", f"{name[:48]}-{parameters}".lower()).strip("-")[:72].strip("-")
    slug = f"{clause[2:]}-{words}"
    taken[slug] += 1
    return slug if taken[slug] == 1 else f"{slug}-{taken[slug]}"
