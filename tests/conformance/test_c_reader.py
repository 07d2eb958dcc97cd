"""The reader in C (conformance/examples/c) against the package's reader, with the same files.

The reader in C was written from SPEC.md alone. It is built with the compiler's checks for invalid memory
accesses and undefined behaviour. One process reads all files, so that leaks and damaged memory are detected
at its end.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sfp_conformance.forge import Forge, exact, f32_bytes, hand_file, hand_part, table
from sfp_conformance.slow_reader import FLOATS

import sfpformat
from conformance.recipes.samples import everything, importance, plain, weights
from sfpformat import Limits
from sfpformat.decode.validate import validate
from sfpformat.errors import CODE_OF_CLAUSE

from ..format.test_hostile import SMALL
from ..support.c_reader import SOURCE, Answer, Reader, Readers, built
from ..support.clauses import ROOT, clauses_of_spec
from ..support.mutations import with_changed_chunks, with_changes
from ..support.programs import needs
from ..support.strategies import Job, jobs, written

pytestmark = needs("make", "cc")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, compiled with checks."""
    return built("sanitized", tmp_path_factory.mktemp("build"))


@pytest.fixture(scope="module")
def readers(program: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Readers]:
    """Running programs, which end after the tests."""
    readers = Readers(program, tmp_path_factory.mktemp("served"))
    yield readers
    readers.end()


@pytest.fixture(scope="module")
def c_reader(readers: Readers) -> Reader:
    """The program with the default limits."""
    return readers.reader()


@pytest.fixture(scope="module")
def careful(readers: Readers) -> Reader:
    """The program with limits for hostile files."""
    return readers.reader(SMALL)


# ----------------------------------------------------------------------------------------- what is decoded


def same(reader: Reader, data: bytes) -> None:
    """Asserts that both readers decode a valid file to the same contents."""
    assert reader.ask("validate", data)["ok"]
    answer = reader.ask("decode", data)
    assert answer["ok"], answer
    with sfpformat.open(data, threads=1) as file:
        assert answer["metadata"] == file.metadata()
        assert [tensor["name"] for tensor in answer["tensors"]] == file.keys()
        for number, tensor in enumerate(answer["tensors"]):
            same_tensor(reader, file, number, tensor)


def same_tensor(reader: Reader, file: Any, number: int, tensor: Answer) -> None:
    """Asserts that both readers decode the same tensor."""
    name = tensor["name"]
    info, found = file.info(name), file.get_importance(name)
    assert tensor["dtype"] == info.dtype
    assert tensor["shape"] == list(info.shape)
    assert tensor["coding"] == info.coding
    assert tensor["mask"] == (info.mask is not None)
    assert tensor["importance"] == info.importance
    assert reader.written(f"{number}.bin") == file.get_tensor(name).tobytes()
    if tensor["mask"]:
        assert reader.written(f"{number}.mask.bin") == file.get_mask(name).tobytes()
    if found is not None:
        assert reader.written(f"{number}.importance.bin") == found.astype("<f4").tobytes()


def test_both_readers_return_the_same_contents_for_every_coding(c_reader: Reader) -> None:
    same(c_reader, everything())
    same(c_reader, plain())
    later = Forge.of(everything())
    later.preamble["minor"] = 7
    later.root |= {"metadata": {"é": '"\\\n\x7f'}, "x-mine": [1, {"a": b"\0"}], "zz": 2**64 - 1}
    same(c_reader, later.build())
    same(c_reader, hand_file())


@settings(max_examples=100)
@given(jobs())
def test_both_readers_return_the_same_contents_for_every_written_file(c_reader: Reader, job: Job) -> None:
    same(c_reader, written(job))


def narrow_midpoints(dtype: str) -> list[int]:
    """F32 patterns without a sign: numbers of a dtype, the midpoints between them, and their neighbours."""
    out = {0, 1, 0x7FFFFF}
    shift = 23 - FLOATS[dtype].mantissa
    bias = 127 - ((1 << (FLOATS[dtype].exponent - 1)) - 1)
    rng = random.Random(dtype)
    for _ in range(1500):
        exponent = rng.randrange(max(bias - FLOATS[dtype].mantissa - 2, 0), min(bias + 34, 255))
        kept = max(shift + max(bias + 1 - max(exponent, 1), 0), 1)
        bits = exponent << 23 | rng.randrange(1 << 23)
        middle = (bits >> min(kept, 23) << min(kept, 23)) + (1 << min(kept - 1, 22))
        out |= {p for m in (middle, bits) for p in (m - 1, m, m + 1)}
    return sorted(p for p in out if 0 <= p < 0x7F7FFFFF)


@pytest.mark.parametrize("dtype", FLOATS)
def test_both_readers_round_to_the_same_numbers(c_reader: Reader, dtype: str) -> None:
    centroids = narrow_midpoints(dtype if FLOATS[dtype].bits <= 16 else "F16")
    width = (2 * len(centroids) - 1).bit_length() - 1  # greatest number of levels of a class
    levels = list(range(1 << width))
    entry = {
        "dtype": dtype,
        "shape": [len(levels)],
        "segment": 4096,
        "chunk": 64,
        "fingerprints": {"quantiser": "table", "count": len(centroids), **table([width])},
        "scale": {"per": "tensor", "dtype": "F32"},
    }
    for scale in (
        0x3F800000,
        0x3F800001,
        0xBF7FFFFF,
    ):  # 1, the number above it, and minus the number below it
        vectors = {"fingerprint centroids": centroids, "scale": [scale]}
        same(c_reader, hand_file(hand_part(entry, {"fingerprints": levels}, vectors=vectors)))


def classes_below(top: int) -> dict[str, Any]:
    """A code table for the levels from 0 to top - 1: a class for each set bit of top, the widest first."""
    extra = [bit for bit in reversed(range(top.bit_length())) if top >> bit & 1]
    return table(extra, [*range(1, len(extra)), len(extra) - 1])


@pytest.mark.parametrize("role", ["multiplier", "metadata"])
def test_both_readers_widen_every_narrower_dtype_to_the_same_numbers(c_reader: Reader, role: str) -> None:
    parts = []
    for coded, kind in FLOATS.items():
        if kind.bits > 16:
            continue
        top = 2 * kind.nonfinite
        levels = [*range(0, top, 1 if kind.bits == 8 else 61), top - 1]
        for dtype in (coded, *kind.widens):
            stream = {"over": "all", "role": role, "quantiser": "uniform", "step": f32_bytes(0.3)}
            entry = {
                "name": f"{coded} as {dtype}",
                "dtype": dtype,
                "shape": [len(levels)],
                "segment": 4096,
                "fingerprints": exact(coded, **classes_below(top)),
                "importance": {**stream, **table([4])},
            }
            own = {"fingerprints": levels, "importance": [i % 16 for i in range(len(levels))]}
            parts.append(hand_part(entry, own))
    same(c_reader, hand_file(*parts))


# ----------------------------------------------------------------------------------------- what is refused

# The tests in which files keep or break each requirement.
REFUSING = ["chunk", "codetable", "directory", "features", "layout", "limits", "mask", "messagepack"]
REFUSING += ["planes", "preamble", "quantiser", "raw", "reconstruction"]


def test_both_readers_give_the_same_verdict_on_files_of_the_other_tests(program: Path) -> None:
    files = [f"tests/format/test_{name}.py" for name in REFUSING]
    plugins = ["-p", "tests.support.c_reader", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            *plugins,
            "-x",
            "-k",
            "refused or missed or reach or truncated",
            *files,
        ],
        cwd=ROOT,
        env=os.environ | {"C_READER": str(program)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def assert_same_verdict(reader: Reader, data: bytes, limits: Limits) -> None:
    """Asserts that both readers accept a file with the same contents, or that both refuse it."""
    report, answer = validate(data, limits=limits), reader.ask("validate", data)
    assert answer["ok"] == report.ok, (answer, report.faults)
    if not report.ok:
        assert reader.ask("decode", data) == answer
        assert answer["error"] == CODE_OF_CLAUSE[answer["clause"]]
        assert 0 <= answer["offset"] <= len(data)
    elif len(data) < 1 << 16:
        same(reader, data)


@settings(max_examples=300)
@given(st.integers(0, 2**64 - 1), st.integers(1, 3))
def test_both_readers_give_the_same_verdict_on_changed_files_with_repaired_checksums(
    careful: Reader, seed: int, changes: int
) -> None:
    assert_same_verdict(careful, with_changes(everything(), seed, changes), SMALL)


@settings(max_examples=300)
@given(st.integers(0, 2**64 - 1))
def test_both_readers_give_the_same_verdict_on_changed_chunks_with_repaired_checksums(
    careful: Reader, seed: int
) -> None:
    assert_same_verdict(careful, with_changed_chunks([plain(), everything()], seed), SMALL)


@settings(max_examples=150)
@given(jobs(), st.integers(0, 2**64 - 1))
def test_both_readers_give_the_same_verdict_on_changes_of_any_written_file(
    careful: Reader, job: Job, seed: int
) -> None:
    assert_same_verdict(careful, with_changes(written(job), seed), SMALL)


@settings(max_examples=200)
@given(st.binary(max_size=200))
def test_both_readers_give_the_same_verdict_on_random_bytes_and_short_files(
    careful: Reader, data: bytes
) -> None:
    for bad in (data, plain()[: len(data)], plain()[:64] + data, Forge(directory=data).build()):
        assert_same_verdict(careful, bad, SMALL)


def test_chunks_that_do_not_reach_the_directory_are_refused(c_reader: Reader) -> None:
    file = Forge.of(everything())
    chunks = b"".join(part.data for part in file.parts)
    for more, clause in ((64, "R-LAY-003"), (1, "R-PRE-011")):
        gap, at = bytes(more), 64 + len(chunks) + more
        shifted = Forge.of(everything())
        shifted.preamble = {
            "directory_offset": at,
            "file_length": at + len(shifted.directory_bytes()),
        }
        whole = shifted.build()
        data = whole[: at - more] + gap + whole[at - more :]
        assert c_reader.ask("validate", data)["clause"] == clause
        assert validate(data).faults[0].clause == clause


@pytest.mark.parametrize(
    ("limit", "just"), [("depth", 5), ("name_bytes", 7), ("tensors", 10), ("rank", 2), ("tensor_bytes", 384)]
)
def test_a_value_equal_to_a_limit_is_accepted_and_one_more_is_refused(
    readers: Readers, limit: str, just: int
) -> None:
    limits = replace(sfpformat.DEFAULT_LIMITS, **{limit: just})
    less = replace(limits, **{limit: just - 1})
    verdicts = [validate(everything(), limits=one).ok for one in (limits, less)]
    assert [readers.reader(one).ask("validate", everything())["ok"] for one in (limits, less)] == verdicts
    assert not verdicts[1]


def test_the_clauses_and_codes_in_c_equal_those_of_the_document() -> None:
    rows = re.findall(r'X\((R_\w+), "([-\w]+)", SFP_(E_\w+)\)', (SOURCE / "sfp.c").read_text())
    assert all(name.replace("_", "-") == clause for name, clause, _ in rows)
    found = {clause: code for _, clause, code in rows}
    refusing = {clause.id: clause.code for clause in clauses_of_spec() if clause.code}
    # Clauses without a check of their own: more specific clauses apply to reserved bytes, and shards and
    # profiles do not concern a single file.
    others = {"R-CNV-005", "R-PRO-001", "R-SHD-001", "R-SHD-002"}
    assert found == {clause: code for clause, code in refusing.items() if clause not in others}


# --------------------------------------------------------------------------------------- program and memory


def test_the_exit_status_is_0_for_valid_1_for_refused_2_for_wrong_usage(
    program: Path, tmp_path: Path
) -> None:
    good, bad = tmp_path / "good.sfp", tmp_path / "bad.sfp"
    good.write_bytes(everything())
    bad.write_bytes(everything()[:-1])
    outcomes: list[tuple[list[object], int]] = [
        (["validate", good], 0),
        (["decode", good, tmp_path], 0),
        (["validate", bad], 1),
        (["decode", bad, tmp_path], 1),
        (["tensors=1", "validate", good], 1),
        (["validate", tmp_path / "none.sfp"], 2),
        (["decode", good, tmp_path / "none"], 2),
        (["validate"], 2),
        (["tensors=x", "validate", good], 2),
        ([], 2),
    ]
    for words, status in outcomes:
        done = subprocess.run([program, *map(str, words)], capture_output=True, text=True, check=False)
        assert done.returncode == status, (words, done)
        assert json.loads(done.stdout)["ok"] == (status == 0)
        assert not done.stderr


STARVED = r"""
#include "sfp.h"
#include <stdio.h>
#include <stdlib.h>

typedef struct { size_t given, held, most; } ration;

static void *give(void *user, size_t size)
{
    ration *r = user;
    if (r->given == r->most) return NULL;
    r->given++, r->held++;
    return malloc(size);
}

static void take(void *user, void *memory)
{
    ((ration *)user)->held--;
    free(memory);
}

static sfp_status read_all(const unsigned char *bytes, size_t length, const sfp_allocator *a)
{
    sfp_fault fault;
    sfp_file *file;
    sfp_status status = sfp_open(bytes, length, NULL, a, &file, &fault);
    for (size_t i = 0; status == SFP_OK && i < sfp_tensor_count(file); i++) {
        sfp_decoded got;
        status = sfp_decode(file, i, SFP_VALUES | SFP_MASK | SFP_IMPORTANCE, &got, &fault);
        sfp_release(file, &got);
        if (status == SFP_OK) status = sfp_check(file, i, &fault);
    }
    sfp_close(file);
    return status;
}

int main(int count, char **words)
{
    static unsigned char bytes[1 << 20];
    FILE *stream = fopen(words[count - 1], "rb");
    size_t length = fread(bytes, 1, sizeof bytes, stream);
    fclose(stream);
    for (size_t most = 0;; most++) {
        ration r = {0, 0, most};
        sfp_allocator a = {give, take, &r};
        sfp_status status = read_all(bytes, length, &a);
        if (r.held != 0) return 3;
        if (status == SFP_OK) return r.given == most ? 0 : 4;
        if (status != SFP_NO_MEMORY) return 5;
    }
}
"""


def test_a_failed_allocation_is_reported_and_leaks_nothing(tmp_path: Path) -> None:
    (tmp_path / "starved.c").write_text(STARVED)
    (tmp_path / "file.sfp").write_bytes(everything())
    flags = ["-std=c99", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{SOURCE}"]
    words = ["cc", *flags, "-o", tmp_path / "starved", tmp_path / "starved.c", SOURCE / "sfp.c"]
    subprocess.run(list(map(str, words)), check=True)
    done = subprocess.run([tmp_path / "starved", tmp_path / "file.sfp"], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def test_both_readers_return_the_same_contents_for_large_segments_and_all_trims(c_reader: Reader) -> None:
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(64, 3000)).astype(np.float32)
    rows[::3] = rows[::3].astype(np.float16)
    narrow = rows.astype(np.float32)
    options = sfpformat.Options(sfpformat.Exact(), coding="fingerprint", narrow=False, segment=65536)
    tensors = {"dense": narrow, "half": weights(300, 700), "few": np.round(weights(64, 512) * 2)}
    data = sfpformat.numpy.save(tensors, options=options, importances={"half": importance(300, 700)})
    same(c_reader, data)
    trimmed = sfpformat.numpy.save({"dense": narrow}, options=options.but(segment=96))
    assert b"trim\x01" in trimmed
    same(c_reader, trimmed)
