"""The description of the container for Kaitai Struct parses files to their contents.

The compiler is an npm package: run ``npm install kaitai-struct-compiler`` in any folder, and set the
environment variable ``KAITAI_FOLDER`` to it. ``.ci/run`` does this if npm is installed. Without the compiler,
the tests check only the sizes in the description.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import msgpack
import pytest
import yaml

from ..support.conformance_cases import FOLDER, cases, data_of

SOURCE: dict[str, Any] = yaml.safe_load((FOLDER / "sfp.ksy").read_text("utf-8"))
SIZES = {"u1": 1, "u2": 2, "u4": 4, "u8": 8}
COMPILE = """
const [, , source, folder] = process.argv, fs = require('fs');
require('kaitai-struct-compiler').compile('python', JSON.parse(fs.readFileSync(source)), null, false).then(
  files => { for (const name in files) fs.writeFileSync(folder + '/' + name, files[name]); },
  error => { console.error(String(error)); process.exit(1); });
"""


def size_of(fields: list[dict[str, Any]]) -> int:
    """The number of bytes of fields of fixed size."""
    magic = len(b"\x89SFP\r\n\x1a\n")
    return sum(f["size"] if "size" in f else SIZES[f["type"]] if "type" in f else magic for f in fields)


def test_records_have_the_sizes_of_the_document() -> None:
    types = SOURCE["types"]
    assert size_of(types["preamble"]["seq"]) == 64
    assert size_of(types["chunk_record"]["seq"]) == 8
    assert size_of(types["quantity"]["seq"]) == 8
    assert size_of(types["delta_checksum"]["seq"]) == 8


def compiled(folder: Path) -> Any:
    """The module that the compiler generates from the description."""
    (folder / "sfp.json").write_text(json.dumps(SOURCE))
    (folder / "compile.js").write_text(COMPILE)
    environment = {**os.environ, "NODE_PATH": str(Path(os.environ["KAITAI_FOLDER"]) / "node_modules")}
    words = ["node", str(folder / "compile.js"), str(folder / "sfp.json"), str(folder)]
    subprocess.run(words, env=environment, check=True)
    spec = importlib.util.spec_from_file_location("sfp", folder / "sfp.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Sfp


def plain(value: Any) -> Any:
    """A value of the directory as a Python object."""
    if value.is_map:
        return {plain(pair.key): plain(pair.value) for pair in value.pairs}
    if value.is_array:
        return [plain(element) for element in value.elements]
    return value.text if value.is_text else value.binary if value.is_binary else value.number


@pytest.mark.skipif(
    "KAITAI_FOLDER" not in os.environ,
    reason="KAITAI_FOLDER names no folder of the compiler; .ci/run installs that, where there is npm",
)
def test_the_description_parses_every_valid_file(tmp_path: Path) -> None:
    parser = compiled(tmp_path)
    for case in cases("y"):
        data = data_of(case)
        found = parser.from_bytes(data)
        root = plain(found.directory)
        assert root == msgpack.unpackb(data[found.preamble.directory_offset :]), case["id"]
        assert found.preamble.file_length == len(data)
        records = [
            record
            for entry in root["tensors"]
            for key in ("vectors", "chunks")
            if key in entry
            for record in parser.ChunkRecords.from_bytes(entry[key]).records
        ]
        assert sum(record.length for record in records) == len(found.chunks), case["id"]
