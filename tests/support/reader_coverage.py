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

if TYPE_CHECKING:
    from sfpformat.decode.reader import SfpFile

MODULES = (
    *("container.preamble", "container.directory", "container.entry", "container.fields"),
    *("container.messagepack", "container.chunk", "container.stream_maps", "container.plain_entries"),
    "coding.bits",
    "coding.codetable",
    "coding.mask",
    "coding.planes",
    "coding.quantisers.exact",
    "coding.quantisers.kind",
    "coding.quantisers.table",
    "coding.quantisers.uniform",
    "decode.tensor",
    "decode.jobs",
    "decode.selection",
    "decode.execution",
    "engines.reference",
    "limits",
    "decode.reader",
    "decode.stored_chunks",
    "decode.validate",
)

# Reason -> functions, or single lines of them after a colon, that golden files do not reach.
EXCUSED: dict[str, tuple[str, ...]] = {
    "words for `sfp info`": ("coding.quantisers.table.Table.__str__",),
    "the writer's half of the module": (
        "coding.bits.write_bits",
        "coding.bits.write_fields",
        "coding.codetable.CodeTable.has_class_of_zeros",
        "coding.codetable.PrefixCode.codewords",
        "coding.codetable.PrefixCode.rank_of",
        "coding.codetable.pack_lengths",
        "coding.mask.chosen",
        "coding.mask.encode_mask",
        "coding.mask.mask_to_octets",
        "coding.mask.mask_to_runs",
        "coding.mask.survivors",
        "coding.planes._encode_prefix_plane",
        "coding.planes.encode_levels",
        "coding.planes.without_trimmed_bits",
        "coding.quantisers.exact._holds",
        "coding.quantisers.exact.float_patterns",
        "coding.quantisers.exact.narrowest_exact",
        "coding.quantisers.exact.patterns_to_levels",
        "coding.quantisers.exact.Exact.to_map",
        "coding.quantisers.kind.scaled_down",
        "coding.quantisers.table.Table.to_map",
        "coding.quantisers.uniform.Uniform.to_map",
        "coding.quantisers.uniform.uniform_levels",
        "coding.quantisers.uniform.uniform_numbers",
        "container.chunk._data_of",
        "container.chunk._quantity",
        "container.chunk.build_chunk",
        "container.chunk.build_raw",
        "container.chunk.build_vectors",
        "container.directory.Directory.to_bytes",
        "container.entry.TensorEntry.to_map",
        "container.messagepack._sorted",
        "container.messagepack.depth_of",
        "container.messagepack.encode",
        "container.preamble.Preamble.to_bytes",
        "container.stream_maps.FingerprintsEntry.to_map",
        "container.stream_maps.ImportanceEntry.to_map",
        "container.stream_maps.MaskEntry.to_map",
        "container.stream_maps.ScaleEntry.to_map",
        "container.stream_maps.quantiser_to_map",
        "container.stream_maps.table_to_map",
        "limits.Limits.require_written",
        "limits.Limits.require_written_tensor",
    ),
    "models of several files, which golden files are not": (
        "decode.reader.SfpFile.file_of",
        "decode.validate._validate_model",
        "decode.validate._validate_model.advance",
        "decode.validate.validate: readable = model_path",
        "decode.validate.validate: if is_index(",
        "decode.validate.validate: return _validate_model(",
        "decode.validate.validate_index",
    ),
    "for compiled engines: the reference prepares nothing, and decodes by levels": (
        "decode.tensor.TensorDecoder.run",
        "container.entry.TensorEntry.positions_of_chunk",
        "engines.reference.decode_runs",
        "decode.reader.SfpFile._left_by",
        "decode.execution.Decoding._do_batch: numbers.append",
        "decode.execution.Decoding._do_batch: at_once.append",
        "decode.execution.Decoding._do_batch: good =",
        "decode.execution.Decoding._do_batch: done = {number",
        "decode.execution.Decoding._do_batch: if number not in done:",
    ),
    "for others than who decodes: commands, GPUs, what a caller asks of the directory": (
        "container.chunk.greatest_head",
        "container.stream_maps.MaskEntry.is_bitmap",
        "decode.reader.SfpFile.__contains__",
        "decode.reader.SfpFile.__len__",
        "decode.reader.SfpFile.__reduce__",
        "decode.reader.SfpFile.identity",
        "decode.reader.SfpSlice.__reduce__",
        "decode.reader.SfpFile.keys",
        "decode.reader.SfpFile.metadata",
        "decode.reader.SfpFile.read_chunks",
        "decode.reader.SfpFile.read_chunks.read",
        "decode.reader.SfpFile.read_head",
        "decode.stored_chunks.StoredChunks.read_head",
        "decode.reader.SfpSlice.get_dtype",
        "decode.reader.SfpSlice.get_shape",
        "decode.validate.Report.canonical",
        "decode.validate.Report.ok",
        "decode.validate.validate: progress(",
    ),
    "mistakes of a caller, which no file makes": (
        "decode.selection._ranges: raise IndexError(",
        "coding.codetable.code_lengths: raise ValueError(",
        "limits.Limits.__post_init__: raise OptionError(",
        "decode.reader.SfpFile._require_present: raise MissingTensorError(",
        "decode.reader.SfpFile.read_into: raise MismatchError(",
    ),
    "a file that ends while it is read": (
        "decode.stored_chunks.StoredChunks.read_in_turn: except FileFault",
        "decode.stored_chunks.StoredChunks.read_in_turn: error.place(",
        "decode.stored_chunks.StoredChunks.read_in_turn: raise",
        "decode.stored_chunks.StoredChunks.read_region: except FileFault",
        "decode.stored_chunks.StoredChunks.read_region: return None",
    ),
    "what a file's bytes were held to before; here every other caller is held to it": (
        'coding.bits.require_bits: raise fault("R-IDX-003"',
        'coding.codetable.CodeTable.__post_init__: raise fault("R-TAB-004"',
    ),
    "version 1.0 defines no feature": (
        "container.directory._features: if name not in KNOWN_FEATURES:",
        "container.directory._features: return tuple(names)",
    ),
}


@dataclass(frozen=True)
class Gap:
    """A line that does not run, or a line with a branch that is not taken.

    Attributes:
        function: module and qualified name.
        text: the line.
        line: its number.
    """

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

    from .conformance_cases import cases, data_of, limits_of

    for case in cases("ynihf"):
        data, limits = data_of(case), limits_of(case)
        validate(data, limits=limits, engine="python")
        try:
            with sfpformat.open(data, limits=limits, threads=1, engine="python") as file:
                for name in file:
                    _read(file, name)
                file.read_into(file.get_tensors())
        except sfpformat.FileFault:
            continue


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
        yield Gap(f"{module}.{functions[line]}", lines[line - 1].strip(), line)


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
    needed, unreached = set(), []
    for module in MODULES:
        found = list(gaps(report, module))
        left = [gap for gap in found if not any(map(gap.is_excused_by, places))]
        needed |= {place for place in places for gap in found if gap.is_excused_by(place)}
        unreached += left
        print(f"{module}: {len(found) - len(left)} gaps excused, {len(left)} others")
    for gap in unreached:
        print(f"not reached: {gap.function}:{gap.line}: {gap.text}")
    idle = [place for place in places if place not in needed]
    print(*(f"excused for nothing: {place}" for place in idle), sep="\n", end="\n" if idle else "")
    return 1 if unreached or idle else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
