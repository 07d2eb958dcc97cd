"""Measures which branches of the pure-Python reader the golden files reach.

It opens every golden file, decodes it as a whole, by slices and by survivors, and validates it. Each line or
branch that no file reaches needs a reason in `EXCUSED`, and each entry of `EXCUSED` must match such a line::

    python -m tests.support.reader_coverage  # coverage of each module; exit status 1 if there is a gap
    python -m tests.support.reader_coverage --excused  # lines that are not reached, with the reasons

No module of the package may be imported before coverage.py starts, because lines that run at import count
too.
"""

from __future__ import annotations

import ast
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import coverage

from .clauses import ROOT
from .reader_modules import reader_modules

if TYPE_CHECKING:
    from sfpformat.decode.reader import SfpFile

# Reason -> functions, or single lines of them after a colon, that golden files do not reach. Functions are
# named without their modules, so that a moved module needs no change here.
EXCUSED: dict[str, tuple[str, ...]] = {
    "words for `sfp info`": ("Table.__str__",),
    "the writer's half of the module": (
        "write_bits",
        "write_fields",
        "CodeTable.may_have_many_zeros",
        "pack_lengths",
        "chosen",
        "encode_mask",
        "mask_to_octets",
        "mask_to_runs",
        "survivors",
        "_encode_prefix_plane",
        "encode_windows",
        "best_windows",
        "encode_levels",
        "without_trimmed_bits",
        "_holds",
        "narrowest_exact",
        "may_be_narrower",
        "_fewer_bits",
        "_mantissa_bits",
        "compare",
        "find_changes",
        "extent_of",
        "Extent.joined",
        "to_levels",
        "DeltaMap.to_map",
        "KeyedMap.quantiser",
        "KeyedMap.to_map",
        "solve_rows",
        "random_bytes",
        "ImportanceStructure.to_map",
        "Structure.to_map",
        "_shared",
        "Exact.to_map",
        "scaled_down",
        "Table.to_map",
        "Uniform.to_map",
        "uniform_levels",
        "uniform_numbers",
        "_data_of",
        "_quantity",
        "build_chunk",
        "build_raw",
        "build_vectors",
        "Directory.to_bytes",
        "TensorEntry.to_map",
        "_sorted",
        "depth_of",
        "encode",
        "Preamble.to_bytes",
        "FingerprintsEntry.to_map",
        "ImportanceEntry.to_map",
        "MaskEntry.to_map",
        "ScaleEntry.to_map",
        "quantiser_to_map",
        "table_to_map",
        "Limits.require_written",
        "Limits.require_written_tensor",
    ),
    "models of several files, which golden files are not": (
        "_validate_model",
        "_validate_model.advance",
        "validate: readable = model_path",
        "validate: if is_index(",
        "validate: return _validate_model(",
        "validate_index",
        "Delta.__init__: self.file = ShardedFile(",
    ),
    "for engines of devices: the reference finds changes by gaps": ("coded_ranks",),
    "for compiled engines: the reference prepares nothing, and decodes by levels": (
        "TensorDecoder.run",
        "decode_runs",
        "SfpFile._left_by",
        "Decoding._do_batch: numbers.append",
        "Decoding._do_batch: at_once.append",
        "Decoding._do_batch: good =",
        "Decoding._do_batch: done = {number",
        "Decoding._do_batch: if number not in done:",
    ),
    "for others than who decodes: commands, GPUs, what a caller asks of the directory": (
        "greatest_head",
        "MaskEntry.is_bitmap",
        "SfpFile.__len__",
        "SfpFile.__reduce__",
        "SfpFile.identity",
        "SfpSlice.__reduce__",
        "_slice_of",
        "SfpFile.read_chunks",
        "SfpFile.read_chunks.read",
        "SfpFile.read_chunks_into",
        "SfpFile.read_chunks_into.read",
        "StoredChunks.read_into",
        "SfpFile.read_head",
        "StoredChunks.read_head",
        "SfpSlice.get_dtype",
        "SfpSlice.get_shape",
        "Report.canonical",
        "Report.ok",
        "validate: progress(",
    ),
    "files behind URLs, which golden files are not": (
        "Decoding._chunks",
        "SfpFile.get_tensors: found",
        "SfpFile.get_tensors: with self.prefetch(",
        "SfpFile.get_tensors: for group in",
        "SfpFile.get_tensors: return {name: found",
        "SfpFile.read_into: with self.prefetch(",
        "SfpFile.read_into: for group in",
        "SfpFile.read_into: self._fill({",
        "SfpFile.in_file_order",
        "SfpFile.unplanned",
        "SfpFile.forget",
        "SfpFile.heads_ahead",
        "StoredChunks._head",
        "StoredChunks._whole",
        "StoredChunks.ahead: ranges =",
        "StoredChunks.ahead: return ReadAhead(",
        "StoredChunks.forget",
        "StoredChunks.heads_ahead",
        "StoredChunks.unplanned",
    ),
    "chains of deltas, which golden files are not": ("Delta.require_follows",),
    "parts of tensors, and processes that hold parts of a model": (
        "PoolChanges.blocks_with",
        "PoolChanges.coded",
        "PoolChanges.dense_counts",
    ),
    "mistakes of a caller, which no file makes": (
        "Delta.__init__: except BaseException:",
        "Delta.__init__: self.file.close()",
        "Delta.__init__: raise",
        'Delta.require_base: words += "; these are levels',
        "Delta.require_elements: raise OptionError(",
        "_Collected.parts: return None",
        "_ranges: raise IndexError(",
        "code_lengths: raise ValueError(",
        "Limits.__post_init__: raise OptionError(",
        "SfpFile._require_present: raise MissingTensorError(",
        "SfpFile.read_into: raise MismatchError(",
    ),
    "a file that ends while it is read": (
        "StoredChunks.read_in_turn: except FileFault",
        "StoredChunks.read_in_turn: error.place(",
        "StoredChunks.read_in_turn: raise",
        "StoredChunks.read_region: except FileFault",
        "StoredChunks.read_region: return None",
    ),
    "what a file's bytes were held to before; here every other caller is held to it": (
        'require_bits: raise fault("R-IDX-003"',
        'CodeTable.__post_init__: raise fault("R-TAB-004"',
    ),
}


@dataclass(frozen=True)
class Gap:
    """A line that does not run, or a line with a branch that is not taken.

    Attributes:
        module: name of the module in the package.
        function: qualified name in the module.
        text: the line.
        line: its number.
    """

    module: str
    function: str
    text: str
    line: int

    def is_excused_by(self, place: str) -> bool:
        """Returns whether an entry of `EXCUSED` matches this gap."""
        function, _, text = place.partition(": ")
        return function == self.function and self.text.startswith(text)


def report_of_golden_files() -> dict[str, Any]:
    """Returns the report of coverage.py for the golden files."""
    assert "sfpformat.decode.reader" not in sys.modules, "imported before coverage.py could watch"
    watch = coverage.Coverage(branch=True, source=[str(ROOT / "sfpformat")], data_file=None)
    with watch.collect():
        read_all_golden_files()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "report.json")
        watch.json_report(outfile=str(path))
        report: dict[str, Any] = json.loads(path.read_bytes())
    return report


def read_all_golden_files() -> None:
    """Reads every golden file in every way that the package has."""
    import sfpformat
    from sfpformat.decode.validate import validate

    from .conformance_cases import cases, data_of, limits_of, looked_up, refusal_of_result

    for case in cases("ynihf"):
        data, limits = data_of(case), limits_of(case)
        validate(data, limits=limits, engine="python")
        try:
            with sfpformat.SfpFile(data, limits=limits, threads=1, engine="python") as file:
                for name in file:
                    _read(file, name)
                file.read_into(file.get_tensors())
        except sfpformat.FileFault:
            continue
        if "base" in case:
            refusal_of_result(case)
        if "keys" in case:
            looked_up(case)


def _read(file: SfpFile, name: str) -> None:
    file.info(name)
    shape = file.get_tensor(name).shape
    file.get_mask(name)
    file.get_importance(name)
    file.get_survivors(name)
    part = file.get_slice(name)
    for index in (..., *((slice(1, None), slice(None, None, -2), -1) if shape and shape[0] > 1 else ())):
        part[index]
    if len(shape) > 1:
        part[..., :1]


def gaps(report: dict[str, Any], module: str) -> Iterator[Gap]:
    """Yields the gaps in the functions of a module."""
    path = f"sfpformat/{module.replace('.', '/')}.py"
    found, text = report["files"][path], (ROOT / path).read_text("utf-8")
    lines, functions = text.splitlines(), dict(_functions(ast.parse(text)))
    missing = set(found["missing_lines"])
    partial = {line for line, target in found["missing_branches"] if target not in missing}
    for line in sorted({*missing, *partial} & set(functions)):
        yield Gap(module, functions[line], lines[line - 1].strip(), line)


def _functions(tree: ast.AST, inside: tuple[str, ...] = ()) -> Iterator[tuple[int, str]]:
    """Yields each line of a function's body with the function's qualified name; inner functions come last."""
    for node in ast.iter_child_nodes(tree):
        names = (*inside, node.name) if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else inside
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            last = node.end_lineno or node.lineno
            yield from ((line, ".".join(names)) for line in range(node.body[0].lineno, last + 1))
        yield from _functions(node, names)


def main(words: list[str]) -> int:
    """Runs the command. Returns the exit status."""
    if "--excused" in words:
        for reason, excused in EXCUSED.items():
            print(f"{reason}:", *(f"    {place}" for place in excused), sep="\n")
        return 0
    report = report_of_golden_files()
    places = [place for excused in EXCUSED.values() for place in excused]
    unreached = []
    needed: dict[str, set[str]] = {}  # place -> modules in which it excuses a gap
    for module in reader_modules():
        found = list(gaps(report, module))
        left = [gap for gap in found if not any(map(gap.is_excused_by, places))]
        for place in places:
            if any(gap.is_excused_by(place) for gap in found):
                needed.setdefault(place, set()).add(module)
        unreached += left
        print(f"{module}: {len(found) - len(left)} gaps excused, {len(left)} others")
    for gap in unreached:
        print(f"not reached: {gap.module}.{gap.function}:{gap.line}: {gap.text}")
    idle = [place for place in places if place not in needed]
    print(*(f"excused for nothing: {place}" for place in idle), sep="\n", end="\n" if idle else "")
    several = [place for place, modules in needed.items() if len(modules) > 1]
    print(
        *(f"excused in several modules: {place}" for place in several), sep="\n", end="\n" if several else ""
    )
    return 1 if unreached or idle or several else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
