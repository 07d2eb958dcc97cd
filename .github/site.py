"""Builds the API reference and the guides as a static site; any warning is an error.

python .github/site.py FOLDER
"""

from __future__ import annotations

import re
import sys
import tempfile
import warnings
from pathlib import Path

import pdoc

import sfpformat

GUIDES = Path(__file__).parent / "guides"
MODULES = tuple(
    f"sfpformat{name}" for name in ("", ".numpy", ".torch", ".hf", ".sklearn", ".pruning", ".errors")
)


def as_module(text: str) -> str:
    """A guide as the docstring of a Python module; links to guides become links to their pages."""
    text = re.sub(r"\]\((\w+)\.md\)", r"](\1.html)", text)
    text = re.sub(r"\[([^]]+)\]\(\.\./\.\./([^)#]+)[^)]*\)", r"\1 (`\2`)", text)
    return f"{text!r}\n"


def main(folder: str) -> None:
    """Writes the site into a folder."""
    warnings.simplefilter("error")
    # `from sfpformat import *` must not hide Python's own `open`; the reference shows it.
    sfpformat.__all__.insert(0, "open")
    with tempfile.TemporaryDirectory() as made:
        package = Path(made) / "guides"
        package.mkdir()
        guides = sorted(GUIDES.glob("*.md"))
        titles = {guide.stem: guide.read_text("utf-8").split("\n", 1)[0].lstrip("# ") for guide in guides}
        links = "".join(f"* [{title}](guides/{name}.html)\n" for name, title in titles.items())
        (package / "__init__.py").write_text(f"{'# Guides' + chr(10) * 2 + links!r}\n", "utf-8")
        for guide in guides:
            (package / f"{guide.stem}.py").write_text(as_module(guide.read_text("utf-8")), "utf-8")
        sys.path.insert(0, made)
        pdoc.render.configure(docformat="google", search=True)
        pdoc.pdoc("guides", *MODULES, output_directory=Path(folder))


if __name__ == "__main__":
    main(sys.argv[1])
